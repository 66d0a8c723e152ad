"""The frames of recorded migrations, and the joins behind them on faults that are made up."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import migkit
from migkit.analysis import Run, TraceWarning, schema
from migkit.analysis.faults import STAGE_EVENTS, Guest, faults_frame
from migkit.analysis.latency import DURATIONS, latency_quantiles, stage_breakdown, waited
from migkit.analysis.rates import rates_frame
from migkit.analysis.schema import SchemaError
from migkit.errors import MissingEventError, OptionError, TraceFormatError
from migkit.probe import FAULT_DTYPE, ErrorCode, FaultFlag, available
from migkit.trace.decode import event_dtype
from migkit.trace.registry import Registry
from migkit.trace.simpletrace import Trace
from migkit.view.export import FRAMES

PAGE = 4096
# The destination may read a fault while its thread still falls asleep: these are not ordered.
ENGINE_PATH = ("fault", "read", "requested", "received_by_source", "sent", "received", "placed",
               "running")  # fmt: skip
KERNEL_PATH = ("fault", "blocked", "woken", "running")


# Recorded migrations.


@pytest.fixture(scope="session")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def run(name, **options):
        values = {"memory": "16MiB", "rate": 0, "max_postcopy_bandwidth": "40MiB"} | options
        return migkit.run(path=folder / name, timeout_s=60, **values)

    return run


@pytest.fixture(scope="session")
def postcopy(record):
    """A migration with several hundred faults, with the probe where it can run."""
    return record("postcopy")


@pytest.fixture(scope="session")
def unprobed(record):
    return record("unprobed", probe="off")


@pytest.fixture(scope="session")
def precopy(record):
    return record("precopy", postcopy="off", rate=5000)


@pytest.fixture(params=["postcopy", "unprobed", "precopy"])
def run(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def probed(postcopy):
    if not available().ok:
        pytest.skip(f"no eBPF probe here: {available()}")
    assert postcopy.meta["probe"]["attached"]
    return postcopy


@pytest.fixture
def copy(postcopy, tmp_path):
    """A copy of a run folder, to be damaged."""
    return shutil.copytree(postcopy.path, tmp_path / "copy")


@pytest.mark.parametrize("name", FRAMES)
def test_every_frame_is_as_the_schema_says(run, name):
    schema.check(getattr(run, name), name)


@pytest.mark.parametrize("name", sorted(schema.TABLES))
def test_every_column_is_documented(name):
    text = schema.describe(name)
    for column, declared in schema.TABLES[name].columns.items():
        assert f"\n{column} " in text
        assert declared.doc


def test_every_message_of_userfaultfd_is_accounted_for_once(run):
    messages = run.event("postcopy_ram_fault_thread_request")
    assert run.faults["messages"].sum() == len(messages) == run.summary().messages
    with_message = run.faults[run.faults["messages"] > 0]
    assert with_message["read_ns"].notna().all()
    assert set(with_message["offset"]) == set(messages["offset"])


def test_every_fault_of_a_completed_migration_is_resolved(run):
    assert run.status == "completed"
    assert run.faults["resolution"].notna().all()
    assert not (run.faults["resolution"] == "unresolved").any()


def test_requested_pages_are_those_that_the_source_sent_for_a_request(postcopy):
    requested = postcopy.faults[postcopy.faults["resolution"] == "requested"]
    sent = postcopy.event("postcopy_preempt_send_host_page")
    assert len(requested) > 50
    assert sorted(requested["page"]) == sorted(sent["offset"])
    for stage in ENGINE_PATH[1:-1]:
        assert requested[f"{stage}_ns"].notna().all()
    assert (requested["channel"] == "preempt").all()


def test_local_faults_have_no_stages_at_the_source(postcopy):
    local = postcopy.faults[postcopy.faults["resolution"] == "local"]
    assert len(local) == len(postcopy.event("postcopy_fault_local"))
    assert local["sent_ns"].isna().all()
    assert local["placed_ns"].notna().all()


def test_the_stages_of_a_fault_that_slept_are_in_order(probed):
    """Stamps of causes are capped at their effects (attrs["capped"]): the rest is measured."""
    slept = probed.faults[probed.faults["blocked_ns"].notna()]
    assert len(slept) > 50
    for path in (ENGINE_PATH, KERNEL_PATH):
        assert in_order(slept, path).mean() >= 0.995


def in_order(faults, stages):
    """Return which faults went through these stages in order, absent ones left out."""
    times = faults[[f"{stage}_ns" for stage in stages]].astype("float64")
    latest = times.cummax(axis=1).ffill(axis=1)
    return ((times >= latest) | times.isna()).all(axis=1)


def test_the_kernel_and_the_engine_see_the_same_faults(probed):
    messages = probed.faults[probed.faults["messages"] > 0]
    assert (messages["probe"] == "both").mean() >= 0.99
    assert messages["write"].notna().mean() >= 0.99
    assert set(probed.faults["tid"]) == {probed.meta["guests"]["destination"]["pid"]}
    assert not probed.faults.duplicated(["page", "tid", "fault_ns"]).any()


def test_minor_faults_are_those_that_nobody_waited_for(probed):
    minor = probed.faults[probed.faults["resolution"] == "minor"]
    assert (minor["probe"] == "kernel").all()
    assert minor["latency_us"].isna().all()
    assert minor["blocked_ns"].isna().all()


def test_steps_are_never_negative_and_add_up_from_the_first_stage_to_the_last(run):
    steps = run.faults[list(DURATIONS)]
    assert not (steps < 0).any(axis=None)
    times = run.faults[[f"{stage}_ns" for stage in schema.STAGES]].astype("float64")
    took_us = (times.max(axis=1) - times.min(axis=1)) / 1e3
    assert np.allclose(steps.sum(axis=1), took_us, rtol=0, atol=0.01)


def test_the_latency_is_the_sum_of_the_steps_unless_something_was_stamped_after_it(run):
    """A thread that a page of the background has woken runs before its message is read."""
    waited = run.faults[run.faults["latency_us"].notna()]
    times = waited[[f"{stage}_ns" for stage in schema.STAGES]].astype("float64")
    end = times["running_ns"].fillna(times["placed_ns"])
    last = times.max(axis=1) <= end
    assert last.sum() >= len(last) / 2
    steps = waited.loc[last, list(DURATIONS)].sum(axis=1)
    assert np.allclose(steps, waited.loc[last, "latency_us"], rtol=0, atol=0.01)


def test_without_a_probe_the_kernels_stages_are_empty_and_that_is_said(unprobed):
    for stage in ("fault", "blocked", "woken", "running"):
        assert unprobed.faults[f"{stage}_ns"].isna().all()
    assert (unprobed.faults["probe"] == "user").all()
    assert unprobed.faults["latency_us"].notna().all()
    assert any("the probe was off" in text for text in unprobed.warnings)
    assert any("the probe was off" in text for text in unprobed.faults.attrs["warnings"])


def test_without_the_events_of_faults_the_columns_are_there_and_empty(record):
    run = record("no-faults", trace=("migration", "savevm"), probe="off")
    schema.check(run.faults, "faults")
    assert run.faults.empty
    assert run.status == "completed"
    assert any("postcopy_request_placed" in text and "'faults'" in text for text in run.warnings)
    assert run.faults.attrs["warnings"]
    assert any("'transfer'" in text for text in run.warnings)
    assert run.phases["pages"].isna().all()
    assert len(run.downtime)


# Phases and downtime.


@pytest.mark.parametrize("side", schema.SIDES)
def test_phases_follow_each_other_without_a_gap(run, side):
    phases = run.phases[run.phases["side"] == side]
    assert len(phases) >= 3
    assert (phases["start_ns"].to_numpy()[1:] == phases["end_ns"].to_numpy()[:-1]).all()
    assert (phases["duration_ms"] >= 0).all()


def test_the_phases_of_a_postcopy_migration_are_named_in_order(postcopy):
    names = postcopy.phases.loc[postcopy.phases["side"] == "source", "name"].tolist()
    assert names == [
        "setup", "precopy round 1", "discard", "switchover", "post-copy", "completion",
    ]  # fmt: skip


def test_phases_hold_every_page_that_was_moved(run):
    came = run.phases[run.phases["side"] == "destination"]
    last = run.samples.iloc[-1]
    counted = sum(last[f"destination_{kind}_pages"] for kind in
                  ("precopy", "background", "requested"))  # fmt: skip
    assert came["pages"].sum() == counted
    sent = run.phases[run.phases["side"] == "source"]
    assert sent["pages"].sum() == counted


def test_the_parts_of_the_downtime_add_up_to_it(run):
    parts = run.downtime
    stopped, started = run.event("guest_stopped"), run.event("guest_started")
    total_ns = started["ts"].iloc[0] - stopped["ts"].iloc[0]
    assert parts["end_ns"].iloc[-1] - parts["start_ns"].iloc[0] == total_ns
    assert (parts["start_ns"].to_numpy()[1:] == parts["end_ns"].to_numpy()[:-1]).all()
    assert (parts["duration_us"] >= 0).all()
    assert parts["duration_us"].sum() == pytest.approx(total_ns / 1e3)
    assert parts["share"].sum() == pytest.approx(1)
    assert parts.attrs["total_ms"] == pytest.approx(total_ns / 1e6)
    assert run.summary().downtime_ms == parts.attrs["total_ms"]


def test_a_cancelled_migration_has_phases_but_no_downtime(tmp_path):
    with migkit.Migration(
        "random", "64MiB", path=tmp_path / "run", max_bandwidth="20MiB", probe="off"
    ) as migration:
        migration.start()
        time.sleep(0.1)
        migration.cancel()
        run = migration.wait(30)
    assert run.status == "cancelled"
    assert run.phases.loc[run.phases["side"] == "source", "name"].tolist() == [
        "setup", "precopy round 1", "cancelling",
    ]  # fmt: skip
    assert run.downtime.empty
    assert run.downtime.attrs["total_ms"] is None
    assert "not handed over" in run.downtime.attrs["reason"]
    assert "cancelled" in str(run.summary())


# Events.


def test_events_of_both_sides_are_in_order_of_time_with_their_text(postcopy):
    events = postcopy.events
    assert events["ts_ns"].is_monotonic_increasing
    assert set(events["process"]) == set(schema.SIDES)
    assert len(events) == sum(trace.n_records for trace in postcopy.traces.values())
    states = events.loc[events["event"] == "migrate_set_state", "args"].tolist()
    assert states[-1] == "new state completed"


def test_one_event_has_its_arguments_as_columns(postcopy):
    frame = postcopy.event("migrate_handle_rp_req_pages")
    assert frame.columns.tolist() == ["ts_ns", "process", "tid", "rbname", "start", "len"]
    assert frame["start"].dtype == "int64"
    assert (frame["len"] == PAGE).all()
    assert set(frame["rbname"]) == {"pc.ram"}


def test_an_event_that_did_not_occur_is_an_empty_frame(postcopy):
    assert postcopy.event("postcopy_pause_incoming").empty


def test_an_event_that_was_not_recorded_names_its_neighbours_and_the_way_to_it(postcopy):
    with pytest.raises(MissingEventError, match=r"trace='.*postcopy_place_page'.*group 'ram'"):
        postcopy.event("postcopy_place_page")
    with pytest.raises(MissingEventError, match="did you mean 'guest_stopped'"):
        postcopy.event("guest_stoped")


# Figures.


def test_the_summary_is_plain_values_that_a_terminal_can_show(run):
    summary = run.summary()
    assert json.loads(json.dumps(summary.to_dict())) == summary.to_dict()
    text = str(summary)
    assert text.startswith("migration")
    assert f"{summary.downtime_ms:,.2f} ms" in text
    assert sum(summary.faults.values()) == len(run.faults)
    assert sum(summary.phases_ms.values()) == pytest.approx(summary.total_ms)
    assert max(len(line) for line in text.splitlines() if not line.startswith("notice")) < 160


def test_the_summary_of_faults_agrees_with_their_table(postcopy):
    summary = postcopy.summary()
    latency = waited(postcopy.faults)["latency_us"]
    assert summary.latency_us["p99"] == latency.quantile(0.99)
    assert summary.dominating_stage["p50"] in schema.STAGES
    table = latency_quantiles(postcopy.faults)
    assert table.loc["requested", "count"] == summary.faults["requested"]


def test_the_breakdown_of_the_median_is_about_the_median(postcopy):
    parts = stage_breakdown(postcopy.faults)
    assert parts.loc["p50", "latency_us"] == pytest.approx(
        waited(postcopy.faults)["latency_us"].median(), rel=0.1
    )
    assert np.allclose(parts[list(DURATIONS)].sum(axis=1), parts["latency_us"])


def test_the_guest_progresses_at_one_side_at_a_time(postcopy):
    rates = rates_frame(postcopy.samples, PAGE)
    both = rates["source_steps_s"].gt(0) & rates["destination_steps_s"].gt(0)
    assert both.sum() <= 1  # the switchover may lie within one interval
    assert rates["time_s"].is_monotonic_increasing
    assert not (rates < 0).drop(columns="time_s").any(axis=None)


# Tables on disk, and damage.


def test_tables_can_be_read_without_migkit(postcopy):
    for name in ("events", "faults", "samples"):
        frame = pd.read_parquet(postcopy.path / f"{name}.parquet")
        assert len(frame) == len(getattr(postcopy, name))
        assert frame.columns.tolist() == list(schema.TABLES[name].columns)


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(TraceFormatError, match="not a folder"):
        Run.load(tmp_path / "nowhere")
    with pytest.raises(TraceFormatError, match=r"no meta\.json"):
        Run.load(tmp_path)


def test_a_cut_off_trace_yields_what_it_holds_and_warns(copy, postcopy):
    file = copy / "destination.trace"
    data = file.read_bytes()
    file.write_bytes(data[:-5])  # within the last record: a cut between two cannot be seen
    run = Run.load(copy)
    with pytest.warns(TraceWarning, match=r"destination\.trace: .*bytes"):
        events = run.events
    assert (events["process"] == "destination").sum() > 0
    assert len(events) < len(postcopy.events)
    assert len(run.faults) <= len(postcopy.faults)
    assert any("destination" in text for text in run.warnings)
    for name in FRAMES:
        schema.check(getattr(run, name), name)
    str(run.summary())


def test_a_run_of_which_only_the_description_is_left_is_an_empty_run(copy):
    for file in copy.iterdir():
        if file.name != "meta.json":
            file.unlink()
    run = Run.load(copy)
    with pytest.warns(TraceWarning, match="there is no"):
        assert run.events.empty
    for name in FRAMES:
        frame = getattr(run, name)
        schema.check(frame, name)
        assert frame.empty or not frame["faults"].any()  # the buckets are always there
    assert "completed" in str(run.summary())


def test_a_whole_run_is_loaded_without_a_warning(postcopy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Run.load(postcopy.path).events)


def test_a_frame_that_differs_from_the_schema_is_refused_with_all_differences():
    frame = schema.frame("faults").drop(columns="page").astype({"tid": "int32"})
    with pytest.raises(SchemaError, match=r"missing \['page'\].*tid is int32, expected int64"):
        schema.check(frame, "faults")
    with pytest.raises(OptionError, match="did you mean 'faults'"):
        schema.table("fault")


# The join, on faults made up.

STAGE_EVENT_NAMES = frozenset(STAGE_EVENTS.values())
BASE = 0x7F0000000000
T1, T2 = 11, 12


def trace(*events):
    """Return a trace of (event, ts_ns, argument...) in the order of the arguments."""
    registry = Registry.load()
    rows = {}
    for seq, (name, ts_ns, *values) in enumerate(events):
        rows.setdefault(name, []).append((ts_ns, 1, seq, *values))
    arrays = {name: np.array(some, event_dtype(registry[name])) for name, some in rows.items()}
    return Trace(registry, events=arrays, n_records=len(events))


def message(page, ts_ns, tid=T1):
    return (STAGE_EVENTS["read"], ts_ns, BASE + page * PAGE, "pc.ram", page * PAGE, tid)


def request(page, ts_ns):
    return ("postcopy_page_req_add", ts_ns, BASE + page * PAGE, 1)


def arrival(page, received_ns, placed_ns, channel=1):
    yield ("postcopy_request_received", received_ns, "pc.ram", page * PAGE, channel)
    yield ("postcopy_request_placed", placed_ns, "pc.ram", page * PAGE, 0)


def answer(page, received_ns, sent_ns):
    yield ("migrate_handle_rp_req_pages", received_ns, "pc.ram", page * PAGE, PAGE)
    yield ("postcopy_preempt_send_host_page", sent_ns, "pc.ram", page)


def kernel(*rows):
    """Return records of (page, tid, fault, blocked, woken, running)."""
    records = np.zeros(len(rows), FAULT_DTYPE)
    for record, (page, tid, *stages) in zip(records, rows, strict=True):
        record["address"], record["tid"] = BASE + page * PAGE + 123, tid
        record["error_code"] = ErrorCode.WRITE | ErrorCode.USER
        for name, ts_ns in zip(("fault", "blocked", "woken", "running"), stages, strict=True):
            record[f"{name}_ns"] = ts_ns
    return records


def join(source=(), destination=(), records=(), recorded=STAGE_EVENT_NAMES):
    guest = Guest(BASE, 1 << 30, PAGE, 0, preempt=True, recorded=frozenset(recorded))
    frame = faults_frame(trace(*source), trace(*destination), kernel(*records), guest)
    schema.check(frame, "faults")
    return frame


def test_one_fault_has_every_stage_on_one_row():
    faults = join(
        answer(5, 3000, 4000),
        [message(5, 1000), request(5, 2000), *arrival(5, 5000, 6000)],
        [(5, T1, 100, 200, 6500, 7000)],
    )
    assert len(faults) == 1
    row = faults.iloc[0]
    times = [row[f"{stage}_ns"] for stage in schema.STAGES]
    assert times == [100, 200, 1000, 2000, 3000, 4000, 5000, 6000, 6500, 7000]
    assert row["latency_us"] == 6.9
    assert (row["page"], row["offset"], row["tid"]) == (5, 5 * PAGE, T1)
    assert row["write"]
    assert not row["kernel_mode"]
    assert (row["resolution"], row["channel"], row["probe"]) == ("requested", "preempt", "both")


def test_no_cause_is_put_later_than_its_effect():
    faults = join(
        answer(5, 2500, 5200),
        [message(5, 1000), request(5, 3000), *arrival(5, 5000, 6600)],
        [(5, T1, 100, 200, 6500, 7000)],
    )
    assert faults.attrs["capped"] == {"requested": 1, "sent": 1, "placed": 1}
    row = faults.iloc[0]
    assert (row["requested_ns"], row["sent_ns"], row["placed_ns"]) == (2500, 5000, 6500)
    assert row["resolution"] == "requested"


def test_signals_repeat_messages_and_records_of_one_fault():
    faults = join(
        answer(5, 3000, 4000),
        [message(5, 1000), request(5, 1100), message(5, 2000), message(5, 3500),
         *arrival(5, 5000, 6000)],
        [(5, T1, 100, 200, 1400, 1500), (5, T1, 1600, 1700, 2400, 2500),
         (5, T1, 2600, 2700, 6100, 6200)],
    )  # fmt: skip
    assert len(faults) == 1
    row = faults.iloc[0]
    assert row["messages"] == 3
    assert (row["fault_ns"], row["blocked_ns"], row["read_ns"]) == (100, 200, 1000)
    assert (row["placed_ns"], row["woken_ns"], row["running_ns"]) == (6000, 6100, 6200)


def test_a_system_calls_fault_keeps_one_record_for_many_messages():
    faults = join(
        (),
        [message(5, 1000), request(5, 1100), *arrival(5, 2000, 3000, channel=0), message(5, 3500),
         ("postcopy_fault_local", 3600, "pc.ram", 5 * PAGE)],
        [(5, T1, 100, 200, 3700, 3800)],
    )  # fmt: skip
    assert faults["messages"].tolist() == [2]
    assert faults["probe"].tolist() == ["both"]


def test_two_threads_on_one_page_are_two_faults_of_one_request():
    faults = join(
        answer(5, 1300, 1400),
        [message(5, 1000, T1), request(5, 1100), message(5, 2000, T2), *arrival(5, 5000, 6000)],
        [(5, T1, 100, 200, 6100, 6200), (5, T2, 1900, 1950, 6150, 6300)],
    )
    assert faults["tid"].tolist() == [T1, T2]
    assert faults["resolution"].tolist() == ["requested", "requested"]
    assert faults["placed_ns"].tolist() == [6000, 6000]
    assert faults["fault_ns"].tolist() == [100, 1900]
    assert faults["sent_ns"].isna().tolist() == [False, True]


def test_a_page_that_comes_again_is_another_fault():
    faults = join(
        [*answer(5, 1300, 1400), *answer(5, 101_300, 101_400)],
        [message(5, 1000), request(5, 1100), *arrival(5, 2000, 3000),
         message(5, 101_000), request(5, 101_100), *arrival(5, 102_000, 103_000)],
        [(5, T1, 100, 200, 3100, 3200), (5, T1, 100_100, 100_200, 103_100, 103_200)],
    )  # fmt: skip
    assert faults["fault_ns"].tolist() == [100, 100_100]
    assert faults["sent_ns"].tolist() == [1400, 101_400]
    assert faults["latency_us"].tolist() == [3.1, 3.1]


def test_a_lost_record_leaves_its_message_alone():
    """The earlier fault of the thread on the page had ended: it is not this one's."""
    faults = join(
        (),
        [message(5, 1000), *arrival(5, 2000, 3000), message(5, 901_000),
         *arrival(5, 902_000, 903_000)],
        [(5, T1, 100, 200, 3100, 3200)],
    )  # fmt: skip
    assert faults["probe"].tolist() == ["both", "user"]
    assert faults["latency_us"].tolist() == [3.1, 2.0]


def test_a_request_for_a_page_under_way_is_told_from_one_that_fetched_it():
    late = ("migrate_handle_rp_req_pages", 2500, "pc.ram", 5 * PAGE, PAGE)
    row = join(
        [late, ("get_queued_page_not_dirty", 2500, "pc.ram", 5 * PAGE, 5)],
        [message(5, 1000), request(5, 1100), *arrival(5, 2000, 3000, channel=0)],
    ).iloc[0]
    assert (row["resolution"], row["channel"]) == ("in_flight", "main")
    assert pd.isna(row["received_by_source_ns"])  # it was too late to matter


def test_records_without_a_message_are_faults_of_their_own():
    faults = join((), (), [(5, T1, 100, 200, 300, 400), (6, T1, 500, 0, 0, 0)])
    assert faults["resolution"].tolist() == ["background", "minor"]
    assert faults["messages"].tolist() == [0, 0]
    assert faults["latency_us"].tolist()[0] == 0.3
    assert pd.isna(faults["latency_us"].iloc[1])


def test_without_the_messages_nobody_claims_that_there_was_none():
    faults = join((), (), [(5, T1, 100, 200, 300, 400)], recorded=())
    assert faults["resolution"].isna().all()


def test_a_fault_that_the_end_of_the_run_overtook_is_unresolved():
    faults = join((), [message(5, 1000), request(5, 1100)], [(5, T1, 100, 200, 0, 0)])
    assert faults["resolution"].tolist() == ["unresolved"]
    assert faults["latency_us"].isna().all()
    assert faults["requested_ns"].tolist() == [1100]


def test_records_outside_guest_ram_are_left_out():
    records = kernel((5, T1, 100, 0, 0, 0), (6, T1, 200, 0, 0, 0))
    records["address"] -= 6 * PAGE
    records["flags"] = FaultFlag.KERNEL_MODE
    guest = Guest(BASE, 16 * PAGE, PAGE, 0, preempt=True, recorded=frozenset())
    faults = faults_frame(trace(), trace(), records, guest)
    assert faults["page"].tolist() == [0]
    assert faults["kernel_mode"].tolist() == [True]


def test_a_million_faults_are_joined_in_seconds():
    n_faults = 1_000_000
    source, destination, records = many_faults(n_faults, np.random.default_rng(1))
    guest = Guest(BASE, n_faults * PAGE, PAGE, 0, preempt=True, recorded=STAGE_EVENT_NAMES)
    begun = time.perf_counter()
    faults = faults_frame(source, destination, records, guest)
    assert time.perf_counter() - begun < 30
    assert len(faults) == n_faults
    assert (faults["probe"] == "both").all()
    assert (faults["resolution"] == "requested").all()
    assert in_order(faults, schema.STAGES).all()


def many_faults(n_faults, random):
    """Return both traces and the records of faults of 8 threads, each page once."""
    registry = Registry.load()
    page = random.permutation(n_faults)
    tid = random.integers(1, 9, n_faults)
    begin = np.arange(1, n_faults + 1) * 20_000
    stages = begin[:, None] + np.cumsum(random.integers(100, 20_000, (n_faults, 10)), axis=1)

    def rows(event, stage, **values):
        array = np.zeros(n_faults, event_dtype(registry[STAGE_EVENTS[event]]))
        array["ts_ns"] = stages[:, stage]
        for name, value in values.items():
            array[name] = value
        return {STAGE_EVENTS[event]: array}

    destination = (
        rows("read", 2, offset=page * PAGE, pid=tid)
        | rows("requested", 3, addr=BASE + page * PAGE)
        | rows("received", 6, offset=page * PAGE, channel=1)
        | rows("placed", 7, offset=page * PAGE)
    )
    source = rows("received_by_source", 4, start=page * PAGE) | rows("sent", 5, offset=page)
    records = np.zeros(n_faults, FAULT_DTYPE)
    records["address"], records["tid"] = BASE + page * PAGE, tid
    for name, stage in (("fault", 0), ("blocked", 1), ("woken", 8), ("running", 9)):
        records[f"{name}_ns"] = stages[:, stage]
    return Trace(registry, source), Trace(registry, destination), records


def test_the_committed_sample_opens_on_any_machine():
    sample = migkit.load(Path(__file__).parent.parent / "traces" / "first-postcopy")
    assert sample.status == "completed"
    assert len(sample.faults) > 0
    assert "downtime" in str(sample.summary())
