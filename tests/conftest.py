"""What several test files share."""

import os
import time
from pathlib import Path

import pytest

import migkit
from migkit import Migration


def _inventory():
    """What a run might leave behind: children, descriptors, shared memory, private folders."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    fds = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            fds[entry.name] = str(entry.readlink())
        except OSError:
            continue  # the descriptor of this very listing
    shared = {entry.name for entry in Path("/dev/shm").iterdir() if entry.is_file()}
    return set(children), fds, shared


@pytest.fixture
def nothing_left():
    """Fail a test that leaves a child process, a descriptor or a file in /dev/shm behind."""
    children, fds, shared = _inventory()
    yield
    children_after, fds_after, shared_after = _inventory()
    assert children_after <= children, "a child process was left behind"
    left = {n: target for n, target in fds_after.items() if n not in fds and "pytest" not in target}
    assert not left, f"descriptors were left open: {left}"
    assert shared_after <= shared, "shared memory was left behind"


@pytest.fixture(scope="session")
def huge_pages():
    """Have some huge pages of 2 MiB for the tests that need them, as root."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    before = int(setting.read_text())
    if os.geteuid() == 0 and before < 300:
        setting.write_text("300")
    yield
    if os.geteuid() == 0:
        setting.write_text(str(before))


@pytest.fixture
def session(tmp_path):
    """Make migrations that are closed whatever happens; no probe unless asked for."""
    made = []

    def make(workload="random", memory="16MiB", **options):
        options.setdefault("probe", "off")
        made.append(Migration(workload, memory, path=tmp_path / f"run{len(made)}", **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


# Recorded migrations that several files look at; none of them changes its folder.


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture(scope="session")
def plain_run(recordings):
    return migkit.run(
        path=recordings / "plain",
        memory="16MiB",
        rate=0,
        max_postcopy_bandwidth="40MiB",
        timeout_s=60,
    )


@pytest.fixture(scope="session")
def precopy_run(recordings):
    return migkit.run(
        path=recordings / "precopy", memory="16MiB", rate=5000, postcopy="off", timeout_s=60
    )


@pytest.fixture(scope="session")
def recovered_run(recordings):
    """A post-copy that was paused and recovered, with every event recorded."""
    with migkit.Migration(
        "random", "16MiB", path=recordings / "recovered", postcopy="manual", trace="all",
        max_postcopy_bandwidth="16MiB",
    ) as migration:  # fmt: skip
        migration.start()
        migration.start_postcopy()
        migration.await_status("postcopy-active")
        time.sleep(0.05)
        migration.pause()
        migration.await_end()
        migration.recover()
        return migration.wait(60)


@pytest.fixture(scope="session")
def cancelled_run(recordings):
    with migkit.Migration(
        "random", "16MiB", path=recordings / "cancelled", rate=1000, postcopy="manual",
        max_bandwidth="8MiB", probe="off",
    ) as migration:  # fmt: skip
        migration.start()
        migration.await_status("active")
        migration.cancel()
        return migration.wait(60)


@pytest.fixture
def in_postcopy(session):
    """Make migrations that are in the middle of post-copy, held up by a rate limit."""

    def make(workload="random", memory="32MiB", **options):
        slow = {"rate": 3000, "max_postcopy_bandwidth": "24MiB"}
        s = session(workload, memory, **{**slow, **options})
        s.start()
        s.start_postcopy()
        s.await_status("postcopy-active")
        time.sleep(0.1)
        return s

    return make
