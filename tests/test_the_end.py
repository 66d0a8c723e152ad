"""The end of a migration in its outcomes: the seed's events, rp_error, and where the guest runs."""

import os
import signal
import time

import pytest
from observing import events_of, in_order, runs_on

import migkit
from migkit.errors import MigrationError, OptionError
from migkit.migration.states import Status
from migkit.trace.simpletrace import read

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def start(session):
    """Start migrations of a guest that pre-copy can follow."""

    def make(**options):
        s = session(**{"rate": 2000, "postcopy": "off", **options})
        s.start()
        s.await_status("active")
        return s

    return make


def rp_errors(session):
    trace = read(session.record().trace("source"))
    return trace["migration_return_path_end_after"]["rp_error"].tolist()


def await_status(session, status):
    deadline = time.monotonic() + 20
    while session.status != status:
        assert time.monotonic() < deadline, session.query()
        time.sleep(0.001)


@pytest.mark.parametrize("return_path", [True, False])
def test_completed_from_pre_copy_closes_the_return_path_only_if_there_is_one(start, return_path):
    s = start(return_path=return_path)
    assert s.await_end(30) == Status.COMPLETED
    assert rp_errors(s) == ([0] if return_path else [])
    assert "migration_completion_file_err" not in events_of(s, "source")


def test_a_destination_that_gives_up_in_pre_copy_is_an_rp_error(start):
    s = start(max_bandwidth="1MiB")
    os.kill(s._guests["destination"].pid, signal.SIGKILL)
    assert s.await_end(30) == Status.FAILED
    assert runs_on(s)
    assert s.verify()
    assert rp_errors(s) == [1]
    assert in_order(
        events_of(s, "source"),
        "source_return_path_thread_shut",
        "migration_return_path_end_before",
        "source_return_path_thread_end",
        "migration_return_path_end_after",
        "migration_thread_after_loop",
    )


def test_a_destination_that_gives_up_at_the_very_end_is_an_rp_error_and_the_guest_runs_on(start):
    s = start(rate=100)
    os.kill(s._guests["destination"].pid, signal.SIGSTOP)  # it cannot begin when it is asked to
    await_status(s, Status.DEVICE)
    time.sleep(0.3)
    os.kill(s._guests["destination"].pid, signal.SIGKILL)
    assert s.await_end(30) == Status.FAILED
    assert runs_on(s)
    assert s.verify()
    assert rp_errors(s) == [1]
    names = events_of(s, "source")
    assert in_order(
        names,
        "migration_thread_low_pending",
        "migration_return_path_end_before",
        "source_return_path_thread_shut",
        "migration_return_path_end_after",
        "migrate_set_state",
    )
    assert "migration_completion_file_err" not in names


def test_a_return_path_that_breaks_in_pre_copy_is_an_rp_error(start):
    s = start(max_bandwidth="1MiB")
    os.kill(s._engines["destination"].child.pid, signal.SIGKILL)
    assert s.await_end(30)
    await_status(s, Status.FAILED)
    assert runs_on(s)
    assert rp_errors(s) == [-1]
    assert in_order(
        events_of(s, "source"),
        "migration_thread_file_err",
        "migration_return_path_end_before",
        "source_return_path_thread_bad_end",
        "migration_return_path_end_after",
    )


def test_a_stream_that_breaks_without_a_return_path_is_a_file_err(start):
    s = start(max_bandwidth="1MiB", return_path=False)
    os.kill(s._engines["destination"].child.pid, signal.SIGKILL)
    s.await_end(30)
    await_status(s, Status.FAILED)
    assert runs_on(s)
    names = events_of(s, "source")
    assert "migration_thread_file_err" in names
    assert rp_errors(s) == []


def test_a_cancel_closes_the_return_path_without_an_error(start):
    s = start(max_bandwidth="1MiB")
    s.cancel()
    assert s.await_end(30) == Status.CANCELLED
    assert runs_on(s)
    assert rp_errors(s) == [0]


@pytest.mark.parametrize("postcopy", ["off", "manual"])
def test_a_migration_paused_before_the_switchover_waits_to_be_continued(start, postcopy):
    s = start(postcopy=postcopy, pause_before_switchover=True)
    if postcopy == "manual":
        s.start_postcopy()
    await_status(s, Status.PRE_SWITCHOVER)
    assert not runs_on(s)
    s.continue_()
    assert s.await_end(30) == Status.COMPLETED
    assert s.verify()
    walk = [status for _, role, status in s.statuses if role == "source"]
    assert walk[walk.index("pre-switchover") + 1] == "device"


def test_a_migration_paused_before_the_switchover_can_be_cancelled(start):
    s = start(pause_before_switchover=True)
    await_status(s, Status.PRE_SWITCHOVER)
    s.cancel()
    assert s.await_end(30) == Status.CANCELLED
    assert runs_on(s)
    assert s.verify()


def test_there_is_nothing_to_continue_elsewhere_and_no_hand_in_a_run_of_one_call(start, tmp_path):
    s = start(max_bandwidth="1MiB")
    with pytest.raises(MigrationError, match="the source is active"):
        s.continue_()
    with pytest.raises(OptionError, match=r"migkit\.Migration"):
        migkit.run(path=tmp_path / "never", pause_before_switchover=True)
