"""Post-copy that breaks, is paused and recovers; the oracle is the judge of each."""

import contextlib
import os
import signal
import struct
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from observing import await_, events_of, in_order, is_legal, walk

import migkit
from migkit.errors import MigrationError, ProtocolError
from migkit.kernel.memory import huge_pages_free
from migkit.migration import bitmap, wire
from migkit.migration.channel import connect
from migkit.migration.remote import EngineProcess
from migkit.migration.session import Session
from migkit.migration.states import Status
from migkit.migration.wire import BlockLayout
from migkit.trace.simpletrace import read

pytestmark = pytest.mark.usefixtures("nothing_left")

HUGE = 2 << 20


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("preempt", [True, False])
def test_a_migration_paused_by_hand_recovers_and_keeps_the_guest(in_postcopy, transport, preempt):
    s = in_postcopy(transport=transport, postcopy_preempt=preempt)
    s.pause()
    assert s.await_end(20) == Status.POSTCOPY_PAUSED
    assert walk(s, "destination")[-1] == "postcopy-paused"
    s.recover()
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()
    is_legal(s)


def test_a_migration_recovers_as_often_as_it_breaks(in_postcopy):
    s = in_postcopy()
    for _ in range(4):
        s.pause()
        assert s.await_end(20) == Status.POSTCOPY_PAUSED
        s.recover()
        time.sleep(0.05)
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()
    is_legal(s)


def test_pause_and_recovery_emit_qemus_events_in_order(in_postcopy):
    s = in_postcopy()
    s.pause()
    s.await_end(20)
    s.recover()
    s.await_end(60)
    for role, wanted in {
        "source": [
            "ram_dirty_bitmap_request", "savevm_send_recv_bitmap", "ram_dirty_bitmap_reload_begin",
            "ram_dirty_bitmap_reload_complete", "savevm_send_postcopy_resume",
            "source_return_path_thread_resume_ack", "postcopy_pause_continued",
            "migration_thread_low_pending", "migration_completion_postcopy_end",
            "migration_return_path_end_after", "migration_thread_after_loop",
        ],
        "destination": [
            "postcopy_pause_incoming", "postcopy_pause_fault_thread", "loadvm_handle_recv_bitmap",
            "loadvm_postcopy_handle_resume", "postcopy_pause_fault_thread_continued",
            "postcopy_pause_incoming_continued", "postcopy_ram_listen_thread_exit",
        ],
    }.items():  # fmt: skip
        assert in_order(events_of(s, role), *wanted), role


def test_the_guest_waits_in_the_outage_and_goes_on_after_it(in_postcopy):
    s = in_postcopy(rate=0, max_postcopy_bandwidth="4MiB")
    s.pause()
    s.await_end(20)
    time.sleep(0.2)  # it runs until it needs a page that is not here
    before = s.query()["destination"]["step"]
    time.sleep(0.3)
    assert s.query()["destination"]["step"] - before < 2
    s.recover()
    await_(lambda: s.query()["destination"]["step"] > before + 100)
    s.await_end(60)
    assert s.verify()


def test_a_fault_that_spans_the_outage_is_one_row(in_postcopy):
    s = in_postcopy(rate=0, max_postcopy_bandwidth="4MiB")
    s.pause()
    s.await_end(20)
    time.sleep(0.5)
    s.recover()
    s.await_end(60)
    run = migkit.load(s.record().path)
    long = run.faults[run.faults["latency_us"] > 400_000]
    assert len(long) == 1
    assert long["resolution"].tolist() == ["requested"]
    assert long["outage_us"].item() > 400_000
    assert (run.faults["outage_us"] > 0).sum() == 1


def test_a_recovery_that_fails_leaves_it_paused_to_be_tried_again(in_postcopy, monkeypatch):
    s = in_postcopy()
    s.pause()
    s.await_end(20)
    nowhere = {"uri": f"unix:{s._sockets}/nobody"}
    execute = type(s._engines["destination"]).execute

    def lost(engine, command, **arguments):
        return nowhere if command == "migrate-recover" else execute(engine, command, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(s._engines["destination"]), "execute", lost)
        with pytest.raises(MigrationError, match="no connection"):
            s.recover()
    assert s.status == Status.POSTCOPY_PAUSED
    s.recover()
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()
    is_legal(s)


def test_waiting_for_a_paused_migration_says_how_to_go_on_and_ends_nothing(tmp_path):
    with migkit.Migration(
        memory="32MiB", path=tmp_path / "run", probe="off", max_postcopy_bandwidth="24MiB"
    ) as m:
        m.start()
        m.start_postcopy()
        m.await_status(Status.POSTCOPY_ACTIVE)
        m.pause()
        with pytest.raises(MigrationError, match=r"paused: .* recover\(\)"):
            m.wait(20)
        m.recover()
        run = m.wait(60)
        assert m.verify()
    assert run.status == "completed"
    assert "paused" in run.phases["name"].tolist()


def test_only_post_copy_can_be_paused_and_only_a_paused_one_recovered(in_postcopy):
    s = in_postcopy(max_postcopy_bandwidth=0)
    assert s.await_end(60) == Status.COMPLETED
    with pytest.raises(MigrationError, match="only post-copy"):
        s.pause()
    with pytest.raises(MigrationError, match="nothing to recover"):
        s.recover(1)


@pytest.mark.skipif(
    huge_pages_free(HUGE) < 32 and os.geteuid() != 0, reason="no free huge pages of 2 MiB"
)
def test_huge_pages_recover_whole(huge_pages, in_postcopy):
    s = in_postcopy(page_size=HUGE, memory="64MiB", rate=100)
    s.pause()
    assert s.await_end(20) == Status.POSTCOPY_PAUSED
    s.recover()
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()


def test_a_source_guest_that_dies_after_the_switch_is_no_loss(in_postcopy):
    s = in_postcopy()
    os.kill(s._guests["source"].pid, signal.SIGKILL)
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()


def test_a_destination_guest_that_dies_in_post_copy_is_said_to_be_lost_for_good(in_postcopy):
    s = in_postcopy(max_postcopy_bandwidth="2MiB")
    os.kill(s._guests["destination"].pid, signal.SIGKILL)
    assert s.await_end(30) == Status.FAILED, s.notices
    assert any("memory is lost for good" in error for error in s.errors)
    folder = s.record()
    assert all(len(read(folder.trace(role)).events) for role in ("source", "destination"))


@pytest.mark.parametrize("victim", ["source", "destination"])
def test_an_interrupt_sent_to_an_engine_or_a_guest_changes_nothing(in_postcopy, victim):
    s = in_postcopy()
    os.kill(s._engines[victim].child.pid, signal.SIGINT)
    os.kill(s._guests[victim].pid, signal.SIGINT)
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()


@pytest.mark.parametrize("victim", ["source", "destination"])
def test_an_engine_that_stands_still_for_a_while_only_takes_longer(in_postcopy, victim):
    s = in_postcopy()
    pid = s._engines[victim].child.pid
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.7)
    os.kill(pid, signal.SIGCONT)
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()


# The received bitmap.


@given(
    received=st.lists(st.booleans(), min_size=1, max_size=200),
    per_host=st.sampled_from([1, 2, 512]),
)
def test_a_received_bitmap_says_what_it_was_told(received, per_host):
    block = BlockLayout("pc.ram", len(received) * per_host * 4096, per_host * 4096)
    data = bitmap.encode(np.array(received), block)
    assert len(data) == bitmap.encoded_size(block)
    assert bitmap.decode(data, block).tolist() == received


def test_a_received_bitmap_is_qemus_bytes():
    block = BlockLayout("pc.ram", 3 * 4096, 4096)
    data = bitmap.encode(np.array([True, False, True]), block)
    assert data == struct.pack(">Q", 8) + b"\5" + bytes(7) + struct.pack(">Q", 0x0123456789ABCDEF)


def test_a_huge_page_of_which_a_part_came_counts_as_missing():
    block = BlockLayout("pc.ram", 2 * HUGE, HUGE)
    data = bytearray(bitmap.encode(np.array([True, True]), block))
    data[8] = 0xFE
    assert bitmap.decode(bytes(data), block).tolist() == [False, True]


@pytest.mark.parametrize(("at", "message"), [(7, "expected 8"), (-1, "ends in")])
def test_a_received_bitmap_of_another_size_or_end_is_refused(at, message):
    block = BlockLayout("pc.ram", 4096, 4096)
    data = bytearray(bitmap.encode(np.array([True]), block))
    data[at] ^= 1
    with pytest.raises(ProtocolError, match=message):
        bitmap.decode(bytes(data), block)


def test_a_bitmap_as_text_shows_the_lines_that_differ():
    mask = np.ones(130, np.bool_)
    mask[65] = False
    assert bitmap.as_text(mask) == "0x00000040: 1." + "1" * 62


# Strangers.


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_stranger_is_turned_away_and_the_source_still_gets_in(tmp_path, monkeypatch, transport):
    """The stranger connects before the source, as the same user, and speaks."""
    execute = EngineProcess.execute
    strangers = []

    def crowded(engine, command, **arguments):
        answer = execute(engine, command, **arguments)
        if command == "migrate-incoming":
            for _ in range(3):
                strangers.append(connect(answer["uri"]))
                with contextlib.suppress(ConnectionError):
                    strangers[-1].send(wire.header() + b"\xff" * 64)
        return answer

    monkeypatch.setattr(EngineProcess, "execute", crowded)
    with Session("random", "8MiB", path=tmp_path / "run", transport=transport, probe="off") as s:
        s.start()
        s.start_postcopy()
        assert s.await_end(30) == Status.COMPLETED
        assert s.verify()
    for stranger in strangers:
        stranger.settimeout(5)
        with contextlib.suppress(ConnectionError):
            assert stranger.recv(1) == b""
        stranger.close()
