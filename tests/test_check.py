"""The rules: no good run breaks one, and each is broken by a trace that is doctored for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from migkit.analysis import Run, schema
from migkit.analysis.check import RULES
from migkit.errors import MissingEventError, OptionError
from migkit.testing import (
    assert_downtime,
    assert_fault_latency,
    assert_no_violations,
    assert_order,
    assert_states,
)
from migkit.trace.decode import event_dtype

RUNS = ("plain_run", "recovered_run", "precopy_run", "cancelled_run")
ALL = {rule.name for rule in RULES}


@pytest.mark.parametrize("name", RUNS)
def test_no_good_run_breaks_a_rule(request, name):
    run = request.getfixturevalue(name)
    found = run.check()
    schema.check(found, "violations")
    assert found["message"].tolist() == []
    assert {*found.attrs["kept"], *found.attrs["not_checked"]} == ALL
    assert all(found.attrs["not_checked"].values())
    assert_no_violations(run)


def test_a_postcopy_is_judged_by_every_rule_that_is_not_qemus_own(plain_run):
    assert set(plain_run.check().attrs["not_checked"]) == {"blocktime-adds-up"}


def test_rules_have_names_and_say_what_they_are_about():
    assert len(ALL) == len(RULES)
    for rule in RULES:
        assert rule.doc
        assert rule.find.__doc__.startswith("Find ")


def doctored(run, side, **changes):
    """The run again, with an event of one side replaced by what a function makes of its rows."""
    again = Run.load(run.path)
    traces = dict(again.traces)
    events = dict(traces[side].events)
    for name, change in changes.items():
        rows = events.get(name, np.zeros(0, event_dtype(traces[side].registry[name])))
        events[name] = change(rows.copy())
        if not len(events[name]):
            del events[name]
    traces[side] = replace(traces[side], events=events)
    again.__dict__["traces"] = traces
    return again


def broken(run):
    """The rules that a run breaks, each with its message."""
    found = run.check()
    schema.check(found, "violations")
    return dict(zip(found["rule"], found["message"], strict=True))


def moved(event_ns):
    def change(rows):
        rows["ts_ns"] = event_ns
        return rows

    return change


def last(run, side, event):
    return int(run.traces[side][event]["ts_ns"].max())


def test_a_transition_that_no_table_has(plain_run):
    run = doctored(plain_run, "source", migrate_set_state=lambda rows: rows[[0, 4, 5]])
    found = broken(run)
    assert found["legal-states"] == (
        "no table of states has the transition setup → postcopy-active"
    )


def test_two_guests_at_a_time(plain_run):
    started = int(plain_run.traces["destination"]["guest_started"]["ts"][0])

    def late(rows):
        rows["ts"] = started + 1_000_000
        return rows

    found = broken(doctored(plain_run, "source", guest_stopped=late))
    assert "ran at the destination from" in found["one-guest"]

    def again(rows):
        row = np.zeros(1, rows.dtype)
        row["ts_ns"] = row["ts"] = started + 5_000_000
        return np.concatenate([rows, row])

    found = broken(doctored(plain_run, "source", guest_started=again))
    assert "ran at the source again" in found["one-guest"]


def test_a_guest_that_runs_before_the_package_is_here(plain_run):
    early = int(plain_run.traces["destination"]["loadvm_postcopy_handle_advise"]["ts_ns"][0])
    found = broken(doctored(plain_run, "destination", loadvm_postcopy_handle_run=moved(early + 1)))
    assert "came before postcopy_ram_listen_thread_start" in found["switchover-order"]
    assert "after RUN" in found["discards-first"]


@pytest.mark.parametrize(
    "event",
    [
        "migration_return_path_end_before",
        "migration_return_path_end_after",
        "migration_thread_after_loop",
        "migration_completion_postcopy_end_after_complete",
    ],
)
def test_an_end_that_is_out_of_order(plain_run, event):
    begin = int(plain_run.traces["source"]["postcopy_start"]["ts_ns"][0])
    found = broken(doctored(plain_run, "source", **{event: moved(begin)}))
    assert f"{event} at" in found["source-end-order"]
    assert "came before" in found["source-end-order"]


def test_a_step_of_the_end_that_did_not_occur(plain_run):
    run = doctored(plain_run, "source", migration_completion_postcopy_end=lambda rows: rows[:0])
    assert "migration_completion_postcopy_end did not occur" in broken(run)["source-end-order"]


def test_an_error_that_is_hidden_by_a_completion(plain_run):
    def failed(rows):
        rows["rp_error"] = -5
        return rows

    run = doctored(plain_run, "source", migration_return_path_end_after=failed)
    assert "reported the error -5, and the migration completed" in broken(run)["source-end-order"]

    def shut(rows):
        rows["val"] = 1
        return rows

    run = doctored(plain_run, "source", source_return_path_thread_shut=shut)
    assert "source_return_path_thread_shut" in broken(run)["source-end-order"]


def test_a_destination_that_cleans_up_before_the_stream_ended(plain_run):
    begin = int(plain_run.traces["destination"]["loadvm_postcopy_handle_run"]["ts_ns"][0])
    run = doctored(plain_run, "destination", postcopy_ram_incoming_cleanup_closeuf=moved(begin))
    assert "closeuf" in broken(run)["destination-end-order"]


def test_a_page_that_is_placed_twice(plain_run):
    def twice(rows):
        row = rows[-1:].copy()
        row["ts_ns"] += 1000
        return np.concatenate([rows, row])

    found = broken(doctored(plain_run, "destination", ram_load_range=twice))
    assert "placed again" in found["placed-once"]


def test_a_page_that_nobody_sent(plain_run):
    size = plain_run.page_size
    page = int(plain_run.event("postcopy_preempt_send_host_page")["offset"].iloc[0])

    def without(rows):
        return rows[rows["offset"] != page]

    def elsewhere(rows):
        end = rows["offset"] + rows["len"]
        return rows[(rows["offset"] > page * size) | (end <= page * size)]

    run = doctored(
        plain_run, "source", postcopy_preempt_send_host_page=without, ram_save_range=elsewhere
    )
    found = broken(run)["placed-was-sent"]
    assert f"{page:,}" in found or ", ..." in found


def test_a_request_that_is_never_answered(plain_run):
    run = doctored(plain_run, "destination", postcopy_request_placed=lambda rows: rows[:-1])
    assert "1 faults were never answered" in broken(run)["requests-answered"]


def test_a_trace_that_lost_records(plain_run):
    again = Run.load(plain_run.path)
    traces = dict(again.traces)
    traces["source"] = replace(traces["source"], dropped=7)
    again.__dict__["traces"] = traces
    assert "7 records of the source were lost" in broken(again)["records-kept"]
    with pytest.raises(AssertionError, match=r"records-kept \(source, 7 times\)"):
        assert_no_violations(again)


def test_an_answer_that_came_before_its_request(plain_run):
    again = Run.load(plain_run.path)
    faults = again.faults.copy()
    asked = faults["resolution"] == "requested"
    faults.loc[asked, "sent_ns"] -= 50_000_000
    again.__dict__["faults"] = faults
    assert "sent came before received_by_source" in broken(again)["stages-in-order"]


def spinning(begin_ns, count):
    """Make pre and post of a limiter that is to wait 30 ms and is back after 2 us, every 20 us."""

    def make(offset_ns, values):
        def change(rows):
            spins = np.zeros(count, rows.dtype)
            spins["ts_ns"] = begin_ns + np.arange(count) * 20_000 + offset_ns
            spins[rows.dtype.names[3]] = values
            return spins

        return change

    return {"migration_rate_limit_pre": make(0, 30), "migration_rate_limit_post": make(2000, 1)}


def test_a_limiter_that_spins_and_starves(plain_run):
    begin = int(plain_run.requests["ts_ns"].iloc[0])
    run = doctored(plain_run, "source", **spinning(begin - 1000, 50))
    assert "limiter-waits" not in broken(run)  # a few returns at once are no spinning
    run = doctored(plain_run, "source", **spinning(begin - 1000, 1000))
    faults = run.faults.copy()
    for stage in ("sent", "received", "placed"):
        faults[f"{stage}_ns"] += 15_000_000
    assert begin < faults["sent_ns"].min()
    run.__dict__["faults"] = faults
    found = broken(run)
    assert "1,000 times within 20 ms" in found["limiter-waits"]
    assert "requests waited 5 ms or more" in found["limiter-starves-nobody"]


GOOD = {"postcopy-blocktime": 3, "postcopy-vcpu-blocktime": [3], "postcopy-latency": 1_500_000,
        "postcopy-latency-dist": [0] * 10 + [2] + [0] * 13}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, None),
        ({"postcopy-vcpu-blocktime": [1, 9]}, "all vCPUs were blocked at once for 3 ms"),
        ({"postcopy-latency": 900_000}, "the mean latency is 900 us"),
        ({"postcopy-latency": 2_100_000}, "from 1,024 to 2,048 us"),
    ],
)
def test_blocktime_that_does_not_add_up(plain_run, wrong, said):
    run = Run.load(plain_run.path)
    run.meta["query_migrate"] = {"dst": GOOD | wrong}
    found = broken(run)
    assert ("blocktime-adds-up" in found) == (said is not None)
    assert said is None or said in found["blocktime-adds-up"]


def test_our_own_figures_add_up(plain_run):
    run = Run.load(plain_run.path)
    run.meta["query_migrate"] = {"dst": plain_run.query_blocktime()}
    assert broken(run) == {}


# The assertions.


def test_a_violation_is_shown_with_the_events_next_to_it(plain_run):
    begin = int(plain_run.traces["source"]["postcopy_start"]["ts_ns"][0])
    run = doctored(plain_run, "source", migration_thread_after_loop=moved(begin))
    with pytest.raises(AssertionError) as caught:
        assert_no_violations(run)
    text = str(caught.value)
    assert "breaks 1 rules" in text
    assert "source-end-order (source, 1 times): migration_thread_after_loop at" in text
    assert "source postcopy_start" in text
    assert_no_violations(run, ignore=["source-end-order"])
    with pytest.raises(OptionError, match="did you mean 'source-end-order'"):
        assert_no_violations(run, ignore=["source-end-oder"])


def test_order_holds_with_other_events_between(plain_run):
    assert_order(
        plain_run,
        ["migrate_set_state active", "postcopy_start", "loadvm_postcopy_handle_run",
         "migration_return_path_end_before", "migrate_set_state completed"],
    )  # fmt: skip


def test_order_that_does_not_hold_names_the_event_and_its_neighbours(plain_run):
    with pytest.raises(AssertionError) as caught:
        assert_order(
            plain_run, ["migration_return_path_end_before", "postcopy_start"], side="source"
        )
    text = str(caught.value)
    assert text.startswith("postcopy_start (2 of 2) did not occur after migration_return_path_end")
    assert "it occurred 1 times before that, at 0." in text
    assert "\n  > 0." in text
    assert "migration_completion_postcopy_end_after_complete" in text
    with pytest.raises(AssertionError, match="it did not occur at all"):
        assert_order(plain_run, ["migrate_set_state failed"])
    with pytest.raises(MissingEventError, match="did you mean 'postcopy_start'"):
        assert_order(plain_run, ["postcopy_strt"])


def test_states_are_compared_one_by_one(cancelled_run, plain_run):
    assert_states(cancelled_run, ["setup", "active", "cancelling", "cancelled"])
    with pytest.raises(AssertionError, match="went to postcopy-active, expected completed"):
        assert_states(plain_run, ["setup", "active", "completed"], side="destination")


def test_latency_over_the_limit_shows_the_slowest_faults(plain_run):
    assert_fault_latency(plain_run, p50_us=1e6, p99_us=1e7, max_us=1e8)
    with pytest.raises(AssertionError, match=r"p50 is .* allowed are 1\.0.*\n.* us  page \d+, "):
        assert_fault_latency(plain_run, p50_us=1)


def test_no_fault_is_no_proof(cancelled_run):
    with pytest.raises(AssertionError, match="has 0 faults that waited for the source"):
        assert_fault_latency(cancelled_run, p99_us=100)


def test_downtime_over_the_limit_shows_its_parts(plain_run, cancelled_run):
    assert_downtime(plain_run, max_ms=10_000)
    with pytest.raises(AssertionError, match=r"ran nowhere for .*\n.*stop noticed \(source\)"):
        assert_downtime(plain_run, max_ms=0.001)
    with pytest.raises(AssertionError, match="there was no downtime"):
        assert_downtime(cancelled_run, max_ms=1)
