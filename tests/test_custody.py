"""Who has the guest when an engine dies: never two, and one wherever its memory is."""

import os
import signal
import time

import pytest
from observing import await_, is_legal, runs_on, walk

from migkit.errors import MigrationError
from migkit.migration.states import Status

pytestmark = pytest.mark.usefixtures("nothing_left")


def kill(session, *roles):
    for role in roles:
        os.kill(session._engines[role].child.pid, signal.SIGKILL)


@pytest.mark.parametrize("victims", [("source",), ("destination",), ("source", "destination")])
def test_engines_killed_in_post_copy_are_replaced_by_a_recovery(in_postcopy, victims):
    s = in_postcopy()
    kill(s, *victims)
    assert s.await_end(20) == Status.POSTCOPY_PAUSED
    assert walk(s, "destination")[-1] == "postcopy-paused"
    assert not runs_on(s)
    s.recover()
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()
    is_legal(s)


def test_an_engine_killed_again_and_again_is_replaced_again_and_again(in_postcopy):
    s = in_postcopy(transport="tcp")
    for victim in ("destination", "source", "destination"):
        kill(s, victim)
        assert s.await_end(20) == Status.POSTCOPY_PAUSED
        s.recover()
        time.sleep(0.05)
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()
    is_legal(s)


def test_an_engine_killed_while_it_was_paused_is_replaced_too(in_postcopy):
    s = in_postcopy()
    s.pause()
    s.await_end(20)
    kill(s, "destination")
    await_(lambda: s._engines["destination"].gone)
    s.recover()
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()


def test_huge_pages_survive_an_engine(huge_pages, in_postcopy):
    s = in_postcopy(page_size="2MiB", rate=50)
    kill(s, "destination")
    assert s.await_end(20) == Status.POSTCOPY_PAUSED
    s.recover()
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()


def test_a_trace_and_its_faults_go_on_in_the_new_engine(in_postcopy):
    s = in_postcopy()
    before = s.query()["destination"]["faults"]
    kill(s, "destination")
    s.await_end(20)
    s.recover()
    run = s.wait()
    assert len(run.faults) > before
    assert (run.faults["outage_us"] > 0).any()
    assert run.event("guest_started")["ts"].nunique() == 1  # both engines tell of the same start
    assert 0 < run.downtime["duration_us"].sum() < 1e6


def test_memory_is_lost_with_the_destination_and_its_guest_and_that_is_said(in_postcopy):
    s = in_postcopy()
    os.kill(s._guests["destination"].pid, signal.SIGSTOP)  # it cannot be seen to die first
    kill(s, "destination")
    os.kill(s._guests["destination"].pid, signal.SIGKILL)
    s.await_end(20)
    with pytest.raises(MigrationError, match="lost for good"):
        s.recover()
    assert not runs_on(s)


@pytest.mark.parametrize("victims", [("source",), ("destination",), ("source", "destination")])
@pytest.mark.parametrize("status", ["active", "pre-switchover"])
def test_before_the_switch_the_sources_guest_runs_on(session, victims, status):
    s = session(
        rate=2000, max_bandwidth="4MiB" if status == "active" else 0,
        pause_before_switchover=status == "pre-switchover",
    )  # fmt: skip
    s.start()
    if status == "pre-switchover":
        s.start_postcopy()
    s.await_status(status)
    kill(s, *victims)
    assert s.await_end(20) == Status.FAILED
    await_(lambda: runs_on(s))
    assert not s._guests["destination"].is_alive
    assert s.verify()
    is_legal(s)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("victim", ["source", "destination"])
def test_an_engine_killed_in_the_switch_leaves_one_guest(session, victim, stage):
    """The switch takes a millisecond: it is not aimed at, but hit at several moments."""
    s = session(rate=2000)
    s.start()
    s.await_status("active")
    s.start_postcopy()
    time.sleep(0.004 * stage)
    kill(s, victim)
    status = s.await_end(20)
    if status == Status.POSTCOPY_PAUSED:
        assert not runs_on(s)
        s.recover()
        status = s.await_end(60)
    assert status in (Status.COMPLETED, Status.FAILED)
    await_(lambda: runs_on(s, "destination") != runs_on(s, "source"))
    assert s.verify()
    is_legal(s)
