"""What is refused before the switch, with both values, and what the options of a switch do."""

import os
import re
import struct
import time
from pathlib import Path

import pytest
from observing import await_, events_of, in_order, runs_on

from migkit.errors import CapabilityError, OptionError
from migkit.kernel import memory
from migkit.kernel.cgroup import memory_left
from migkit.migration import wire
from migkit.migration.channel import connect
from migkit.migration.remote import EngineProcess
from migkit.migration.states import Status
from migkit.migration.wire import BlockLayout, Command

pytestmark = pytest.mark.usefixtures("nothing_left")

RAM = BlockLayout("pc.ram", 16 << 20, 4096)


@pytest.fixture
def destination(session, monkeypatch):
    """A real destination, to which the test is the source: (migration, its main channel)."""
    uris = []
    execute = EngineProcess.execute

    def diverted(engine, command, **arguments):
        if command == "migrate":
            return {}
        if command == "migrate-incoming":
            answer = execute(engine, command, **{**arguments, "peer": os.getpid()})
            uris.append(answer["uri"])
            return answer
        return execute(engine, command, **arguments)

    monkeypatch.setattr(EngineProcess, "execute", diverted)
    s = session(postcopy_preempt=False, rate=1000)
    s.start()
    sock = connect(uris[0])
    sock.setblocking(True)
    yield s, sock
    sock.close()


def setup(identity, ram=RAM, version=3):
    return b"".join((
        struct.pack(">II", wire.MAGIC, version),
        wire.configuration(identity),
        wire.command(Command.OPEN_RETURN_PATH),
        wire.advise(ram.page_size),
        wire.section_start(wire.RAM_SECTION, "ram", wire.RAM_VERSION),
        wire.ram_setup([ram], postcopy=True),
        wire.section_footer(wire.RAM_SECTION),
    ))  # fmt: skip


def package(state):
    blob = wire.command(Command.POSTCOPY_LISTEN) + wire.device_state(wire.CPU_SECTION, state)
    return wire.packaged(blob + wire.command(Command.POSTCOPY_RUN))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 4}, r"version 4.* 3|3.* version 4"),
        ({"identity": "migkit-other-0"}, r"the source has migkit-other-0, .* has migkit-random-"),
        ({"ram": RAM._replace(name="pc.rom")}, r"the source has pc.rom, the destination has pc.r"),
        ({"ram": RAM._replace(size=8 << 20)}, r"source has 8388608, the destination has 16777216"),
        ({"ram": RAM._replace(page_size=2 << 20)}, r"source has 2097152, the destination has 4096"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_values(destination, change, message):
    s, sock = destination
    sock.sendall(setup(**{"identity": s.spec.identity, **change}))
    await_(lambda: s.errors)
    assert re.search(message, s.errors[0]), s.errors
    await_(lambda: not s._guests["destination"].is_alive)
    assert runs_on(s)


def test_another_layout_of_the_cpu_state_is_refused_and_no_guest_runs_there(destination):
    s, sock = destination
    sock.sendall(setup(s.spec.identity) + package(bytes(24)))
    await_(lambda: s.errors)
    assert re.search(r"CPU state: the source has 24, the destination has \d+", s.errors[0])
    await_(lambda: not s._guests["destination"].is_alive)
    assert s.query()["destination"]["step"] == 0
    assert runs_on(s)


@pytest.fixture
def cgroup():
    """A control group for the memory of one process, as root."""
    folder = Path("/sys/fs/cgroup/memory/migkit-test")
    if os.geteuid() or not folder.parent.joinpath("memory.limit_in_bytes").exists():
        pytest.skip("needs root and a version 1 memory controller")
    folder.mkdir()
    yield folder
    await_(lambda: not folder.joinpath("cgroup.procs").read_text())
    folder.rmdir()


def test_a_destination_with_too_little_memory_refuses_before_the_switch(
    session, cgroup, monkeypatch
):
    limit = 64 << 20
    cgroup.joinpath("memory.limit_in_bytes").write_text(str(limit))
    attach = EngineProcess.attach

    def confined(engine, guest, *arguments):
        if engine.name == "destination":
            cgroup.joinpath("cgroup.procs").write_text(str(guest.pid))
            assert memory_left(guest.pid) <= limit
        attach(engine, guest, *arguments)

    monkeypatch.setattr(EngineProcess, "attach", confined)
    s = session(memory="128MiB", rate=1000)
    s.start()
    assert s.await_end(30) == Status.FAILED
    assert re.search(r"131072 KiB will come .* the destination has \d+ KiB left", s.errors[0])
    assert runs_on(s)
    s.close()


def test_switchover_ack_comes_before_the_switch(session):
    s = session(rate=1000, switchover_ack=True)
    s.start()
    s.start_postcopy()
    assert s.await_end(30) == Status.COMPLETED
    assert s.verify()
    assert in_order(
        events_of(s, "source"), "source_return_path_thread_switchover_acked", "postcopy_start"
    )
    assert "loadvm_approve_switchover" in events_of(s, "destination")


def test_without_an_ack_there_is_no_switch(session, monkeypatch):
    s = session(rate=1000, postcopy="off", switchover_ack=True)
    attach = EngineProcess.attach

    def deaf(engine, guest, identity, options, *arguments):
        if engine.name == "destination":
            options = type(options).from_dict({**options.as_dict(), "switchover_ack": False})
        attach(engine, guest, identity, options, *arguments)

    monkeypatch.setattr(EngineProcess, "attach", deaf)
    s.start()
    time.sleep(0.5)
    assert s.status == Status.ACTIVE
    assert s.query()["source"]["round"] > 3
    s.cancel()
    assert s.await_end(20) == Status.CANCELLED


def test_switchover_ack_needs_a_return_path(session):
    with pytest.raises(OptionError, match="return_path must be on"):
        session(switchover_ack=True, postcopy="off", return_path=False)


def locked_kib(pid):
    """What of a guest's RAM is locked; the kernel divides it by the processes that map a page."""
    smaps = Path(f"/proc/{pid}/smaps").read_text()
    ram = smaps[smaps.index("memfd:migkit-pc.ram") :]
    rss, pss, locked = (
        int(re.search(rf"^{name}: +(\d+) kB", ram, re.MULTILINE)[1])
        for name in ("Rss", "Pss", "Locked")
    )
    return rss * locked // pss


def test_locked_ram_is_locked_at_both_ends_and_hinders_no_post_copy(session):
    s = session(rate=1000, mem_lock=True)
    s.start()
    assert locked_kib(s._guests["source"].pid) >= (16 << 10) * 15 // 16
    s.start_postcopy()
    assert s.await_end(30) == Status.COMPLETED
    s._guests["destination"].vcpu.stop()
    assert locked_kib(s._guests["destination"].pid) >= (16 << 10) * 15 // 16 - 64
    assert s.verify()


def test_a_limit_on_locked_memory_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(memory._libc, "mlock2", lambda *_: -1, raising=False)
    block = memory.RamBlock.create("trial", 4096)
    with pytest.raises(CapabilityError, match="ulimit -l"):
        block.lock()
    block.close()


def test_huge_pages_are_not_populated_by_locking_them(session, huge_pages):
    s = session(rate=50, page_size="2MiB", mem_lock=True)
    s.start()
    s.start_postcopy()
    assert s.await_end(30) == Status.COMPLETED
    assert s.verify()
