"""Real migrations between real processes; the oracle is the judge of each."""

import gc
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from observing import events_of, in_order, is_legal, walk

import migkit
from migkit.errors import MigrationError, OptionError
from migkit.kernel.memory import huge_pages_free
from migkit.migration.session import Session
from migkit.migration.states import Status
from migkit.trace.simpletrace import read

pytestmark = pytest.mark.usefixtures("nothing_left")

HUGE = 2 << 20


def migrate(session):
    session.start()
    if session.options.postcopy == "manual":
        session.start_postcopy()
    return session.await_end(60)


@pytest.mark.parametrize("workload", ["memtest", "random", "hotset"])
@pytest.mark.parametrize("postcopy", ["manual", "1 round", "auto"])
def test_a_guest_moved_by_post_copy_is_bit_for_bit_unmoved(session, workload, postcopy):
    s = session(workload, postcopy=postcopy)
    assert migrate(s) == Status.COMPLETED
    assert s.verify(), str(s.verify())


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("preempt", [True, False])
def test_channels_and_transports_carry_the_same_guest(session, transport, preempt):
    s = session(transport=transport, postcopy_preempt=preempt)
    assert migrate(s) == Status.COMPLETED
    assert s.verify()


@pytest.mark.parametrize("return_path", [True, False])
def test_precopy_alone_converges_when_the_guest_writes_slowly(session, return_path):
    s = session(rate=2000, postcopy="off", return_path=return_path)
    assert migrate(s) == Status.COMPLETED
    assert "postcopy-active" not in walk(s, "source")
    assert s.verify()


def test_precopy_that_does_not_converge_switches_by_itself(session):
    s = session("memtest", "64MiB", postcopy="auto", downtime_limit=0.0001)
    assert migrate(s) == Status.COMPLETED
    assert "postcopy-active" in walk(s, "source")
    assert s.query()["source"]["round"] > 2


def test_post_copy_starts_after_a_time(session):
    s = session("memtest", postcopy="200 ms", downtime_limit=0.0)
    assert migrate(s) == Status.COMPLETED
    assert "postcopy-active" in walk(s, "source")


def test_states_follow_the_tables(session):
    s = session(postcopy="1 round")
    migrate(s)
    is_legal(s)
    assert walk(s, "source") == [
        "setup", "active", "device", "postcopy-device", "postcopy-active", "completed",
    ]  # fmt: skip


def test_the_end_of_post_copy_emits_the_events_of_the_seed_in_order(session):
    s = session()
    migrate(s)
    assert in_order(
        events_of(s, "source"),
        "postcopy_start",
        "guest_stopped",
        "qemu_savevm_send_packaged",
        "postcopy_start_set_run",
        "migration_thread_low_pending",
        "migration_completion_postcopy_end",
        "migration_completion_postcopy_end_after_complete",
        "migration_return_path_end_before",
        "source_return_path_thread_shut",
        "source_return_path_thread_end",
        "migration_return_path_end_after",
        "migrate_set_state",
        "migration_thread_after_loop",
    )
    assert in_order(
        events_of(s, "destination"),
        "loadvm_postcopy_handle_advise",
        "loadvm_handle_cmd_packaged",
        "loadvm_handle_cmd_packaged_received",
        "loadvm_postcopy_handle_listen",
        "postcopy_ram_enable_notify",
        "postcopy_ram_listen_thread_start",
        "loadvm_postcopy_handle_run",
        "postcopy_ram_listen_thread_exit",
        "postcopy_ram_incoming_cleanup_entry",
        "postcopy_ram_fault_thread_exit",
        "postcopy_ram_incoming_cleanup_closeuf",
    )


def test_rp_error_is_zero_when_all_is_well(session):
    s = session()
    migrate(s)
    trace = read(s.record().trace("source"))
    assert trace["migration_return_path_end_after"]["rp_error"].tolist() == [0]


def test_precopy_only_emits_no_postcopy_end(session):
    s = session(rate=1000, postcopy="off")
    migrate(s)
    names = events_of(s, "source")
    assert in_order(names, "migration_thread_low_pending", "migration_return_path_end_before")
    assert "migration_completion_postcopy_end" not in names


def test_the_source_guest_never_runs_after_the_switchover(session):
    s = session(postcopy="1 round", rate=20000)
    migrate(s)
    source, destination = (s.query()[role]["step"] for role in ("source", "destination"))
    time.sleep(0.1)
    assert s.query()["source"]["step"] == source
    assert s.query()["destination"]["step"] > destination >= source


def test_every_fault_is_answered_and_every_page_sent_once(session):
    s = session("random", "64MiB")
    migrate(s)
    now = s.query()
    source, destination = now["source"], now["destination"]
    sent = source["background_pages"] + source["requested_pages"] + source["precopy_pages"]
    assert sent - source["discarded_pages"] == (64 << 20) // 4096
    assert destination["outstanding"] == 0
    assert destination["faults"] >= source["requested_pages"] > 0


def test_a_rate_limit_holds_the_background_but_no_request(session):
    s = session("random", "32MiB", rate=2000, max_postcopy_bandwidth="16MiB")
    begun = time.monotonic()
    assert migrate(s) == Status.COMPLETED
    assert time.monotonic() - begun > 1.5  # 32 MiB at 16 MiB/s, less what was requested
    trace = read(s.record().trace("destination"))
    asked = dict(zip(*(trace["postcopy_ram_fault_thread_request"][k] for k in ("offset", "ts_ns")),
                     strict=True))  # fmt: skip
    placed = trace["postcopy_request_placed"]
    waits = [int(ts) - int(asked[at]) for at, ts in placed[["offset", "ts_ns"]].tolist()]
    assert np.median(waits) < 0.02e9


def test_max_bandwidth_limits_precopy(session):
    s = session("random", "32MiB", rate=100, postcopy="off", max_bandwidth="32MiB")
    begun = time.monotonic()
    assert migrate(s) == Status.COMPLETED
    assert time.monotonic() - begun > 0.8


def test_a_cancelled_migration_leaves_the_source_guest_running(session):
    s = session(rate=20000, max_bandwidth="1MiB")
    s.start()
    s.cancel()
    assert s.await_end(30) == Status.CANCELLED
    before = s.query()["source"]["step"]
    time.sleep(0.1)
    assert s.query()["source"]["step"] > before
    assert s.query()["destination"]["step"] == 0
    assert s.verify()


def test_a_cancel_in_post_copy_is_refused_with_the_reason(session):
    s = session(max_postcopy_bandwidth="1MiB", rate=1000)
    s.start()
    s.start_postcopy()
    while s.status != Status.POSTCOPY_ACTIVE:
        time.sleep(0.01)
    with pytest.raises(MigrationError, match="part of its memory is still here"):
        s.cancel()


def test_another_workload_at_the_destination_is_refused_before_the_switch(session, monkeypatch):
    s = session(rate=1000)
    identities = iter(["migkit-random-one", "migkit-random-two"])
    monkeypatch.setattr(type(s.spec), "identity", property(lambda _: next(identities)))
    original = Session._start

    def two_identities(self):
        from migkit.migration import remote

        attach = remote.EngineProcess.attach

        def attach_other(engine, guest, identity, options, events, file):
            other = identity if engine.name == "source" else "migkit-random-two"
            attach(engine, guest, other, options, events, file)

        monkeypatch.setattr(remote.EngineProcess, "attach", attach_other)
        original(self)

    monkeypatch.setattr(Session, "_start", two_identities)
    assert migrate(s) == Status.FAILED
    assert any("migkit-random-one" in e and "migkit-random-two" in e for e in s.errors)
    before = s.query()["source"]["step"]
    time.sleep(0.05)
    assert s.query()["source"]["step"] > before


def test_a_class_of_a_test_is_a_guest_too(session):
    class Stripes(migkit.Workload):
        state_dtype = np.dtype([("written", "<u8")])

        def step(self, ram, state, n):
            for i in range(int(state["step"]), int(state["step"]) + n):
                ram[(7 * i) % len(ram), i % 4096] += 1
            state["written"] += n

    s = session(Stripes, "8MiB", rate=20000)
    assert migrate(s) == Status.COMPLETED
    assert s.verify()


@pytest.mark.skipif(
    huge_pages_free(HUGE) < 32 and os.geteuid() != 0, reason="no free huge pages of 2 MiB"
)
@pytest.mark.parametrize("preempt", [True, False])
def test_huge_pages_move_whole(session, huge_pages, preempt):
    s = session("random", "32MiB", page_size=HUGE, postcopy_preempt=preempt, rate=50000)
    assert migrate(s) == Status.COMPLETED
    assert s.verify()


@pytest.mark.parametrize("victim", ["source", "destination"])
def test_an_engine_killed_before_the_switch_leaves_the_guest_running(session, victim):
    s = session(rate=20000, max_bandwidth="1MiB")
    s.start()
    os.kill(s._engines[victim].child.pid, signal.SIGKILL)
    s.await_end(30)
    before = s.query()["source"]["step"]
    time.sleep(0.1)
    assert s.query()["source"]["step"] > before
    assert s.query()["destination"]["step"] == 0


def test_ctrl_c_leaves_a_run_folder_and_nothing_else(tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        migkit.run(memory="32MiB", path=tmp_path / "run", probe="off",
                   max_bandwidth="1MiB", progress=interrupt)  # fmt: skip
    assert migkit.load(tmp_path / "run").status != "completed"


def test_ctrl_c_at_the_last_moment_leaves_a_guest_that_is_in_post_copy_alone(session, monkeypatch):
    # GIVEN a migration that goes on to post-copy when it is to be cancelled
    s = session(rate=1000, max_bandwidth="4MiB", max_postcopy_bandwidth="8MiB")
    cancel = s.cancel

    def too_late():
        s.start_postcopy()
        s.await_status("postcopy-active")
        cancel()

    def interrupt(_):
        raise KeyboardInterrupt

    s.start()
    s.await_status("active")
    monkeypatch.setattr(s, "cancel", too_late)
    with pytest.raises(KeyboardInterrupt):
        s.wait(progress=interrupt)
    # THEN it can be waited for again
    assert s.wait().status == "completed"


def test_a_session_that_is_collected_in_its_own_thread_is_closed(tmp_path):
    # GIVEN a migration in a cycle, as a traceback makes one, and a monitor that collects garbage
    s = Session("random", "16MiB", probe="off", max_bandwidth="1MiB", path=tmp_path / "run")
    s.start()
    s.itself = s
    drain, children = s._engines["source"]._drain, [Path(f"/proc/{pid}") for pid in s.pids.values()]
    pump = drain.pump
    drain.pump = lambda pump=pump: (gc.collect(), pump())
    # WHEN nobody holds it any more
    gc.disable()
    try:
        del s, drain, pump
        deadline = time.monotonic() + 20
        while any(path.exists() for path in children) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        gc.enable()
    # THEN it is closed
    assert not [path for path in children if path.exists()]
    for thread in threading.enumerate():
        if thread.name == "migkit-close":
            thread.join(20)
    gc.collect()  # what was put in the drain holds it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workload": "ramdom"}, "'random'"),
        ({"memory": "100kB"}, None),
        ({"memory": 5000}, "not a multiple of the page size"),
        ({"memory": "64TiB"}, "this machine has"),
        ({"max_bandwith": 5}, "'max_bandwidth'"),
        ({"trace": ("migrate_set_stat",)}, "'migrate_set_state'"),
        ({"params": {"alfa": 2}, "workload": "hotset"}, "'alpha'"),
        ({"postcopy": "sometimes"}, "'manual'"),
        ({"transport": "rdma"}, "tcp"),
    ],
)
def test_bad_options_are_refused_with_the_remedy(tmp_path, options, message):
    if message is None:
        Session(path=tmp_path / "run", **options).close()
        return
    with pytest.raises(OptionError, match=message):
        Session(path=tmp_path / "run", **options)


def test_a_folder_that_holds_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OptionError, match="not empty"):
        Session(path=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_migrations_of_every_kind_in_a_row_keep_the_guest(session, huge_pages):
    """A tenth of ``make soak``."""
    draw = random.Random(int(os.environ.get("MIGKIT_SEED", "20")))
    from benchmarks.soak import draw_options, migrate_once

    for _ in range(20):
        migrate_once(session, draw, draw_options(draw))
