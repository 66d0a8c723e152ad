"""The same guest migrates again: after success, a cancel, a failure; there and back."""

import os
import signal

import pytest
from observing import await_, runs_on

from migkit.errors import MigrationError, OptionError
from migkit.migration.states import Status

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def again(session, tmp_path):
    """Migrate a guest once more; everything is closed whatever happens."""
    made = []

    def make(before, **options):
        made.append(before.again(path=tmp_path / f"again{len(made)}", **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def complete(migration):
    migration.start()
    if migration.options.postcopy == "manual":
        migration.start_postcopy()
    assert migration.await_end(60) == Status.COMPLETED


@pytest.mark.parametrize("workload", ["random", "memtest"])
def test_a_guest_migrates_on_and_back_and_on(session, again, workload):
    s = session(workload, rate=3000)
    complete(s)
    for options in ({}, {"transport": "tcp"}, {"postcopy": "off"}, {"postcopy": "manual"}):
        steps = s.query()["destination"]["step"]
        s = again(s, **options)
        complete(s)
        assert s.query()["destination"]["step"] >= steps
    assert s.verify()


def test_a_guest_of_huge_pages_migrates_back(huge_pages, session, again):
    s = session(page_size="2MiB", rate=100)
    complete(s)
    s = again(s)
    complete(s)
    assert s.verify()


def test_a_guest_migrates_again_after_a_cancel(session, again):
    s = session(rate=2000, max_bandwidth="4MiB")
    s.start()
    s.await_status("active")
    s.cancel()
    assert s.await_end(20) == Status.CANCELLED
    s = again(s, max_bandwidth=0)
    complete(s)
    assert s.verify()


@pytest.mark.parametrize("victim", ["source", "destination"])
def test_a_guest_migrates_again_after_a_failure(session, again, victim):
    s = session(rate=2000, max_bandwidth="4MiB")
    s.start()
    s.await_status("active")
    os.kill(s._engines[victim].child.pid, signal.SIGKILL)
    assert s.await_end(20) == Status.FAILED
    await_(lambda: runs_on(s))
    s = again(s, max_bandwidth=0)
    complete(s)
    assert s.verify()


def test_only_the_guest_of_an_ended_migration_migrates_again(session, again):
    s = session(rate=2000, max_bandwidth="4MiB")
    with pytest.raises(MigrationError, match="has not ended"):
        s.again()
    s.start()
    with pytest.raises(MigrationError, match="has not ended: it is"):
        s.again()
    s.cancel()
    s.await_end(20)
    with pytest.raises(OptionError, match="memory: the guest"):
        s.again(memory="32MiB")
    os.kill(s._guests["source"].pid, signal.SIGKILL)
    await_(lambda: not s._guests["source"].is_alive)
    with pytest.raises(MigrationError, match="the guest is dead"):
        s.again()
