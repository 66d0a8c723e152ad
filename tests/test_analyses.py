"""The derived frames of recorded migrations: they add up, and agree with each other."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import migkit
from migkit.analysis import Run, schema
from migkit.analysis.derived import DERIVED
from migkit.analysis.latency import waited
from migkit.analysis.requests import STALL_US, limited_spans, requests_frame
from migkit.analysis.transfer import over_time, totals
from migkit.errors import MissingEventError, OptionError
from migkit.trace.decode import event_dtype
from migkit.trace.registry import Registry
from migkit.trace.simpletrace import Trace

PAGE = 4096
RUNS = ("plain_run", "recovered_run", "precopy_run", "cancelled_run")
FRAMES = sorted(set(DERIVED) - {"violations", "comparison"})  # those two are returned, not kept


@pytest.fixture(params=RUNS)
def run(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", FRAMES)
def test_every_frame_of_every_run_is_as_the_schema_says(run, name):
    schema.check(getattr(run, name), name)


@pytest.mark.parametrize("name", FRAMES)
def test_a_run_that_holds_nothing_has_empty_frames(plain_run, recordings, name):
    empty = recordings / "empty"
    empty.mkdir(exist_ok=True)
    (empty / "meta.json").write_text((plain_run.path / "meta.json").read_text())
    for role in schema.SIDES:
        (empty / f"{role}.trace").write_bytes((plain_run.path / f"{role}.trace").read_bytes()[:24])
    frame = getattr(Run.load(empty), name)
    schema.check(frame, name)
    assert frame.empty or not frame["faults"].any()  # QEMU's buckets are always there


def test_an_analysis_that_lacks_its_event_names_it_and_how_to_record_it(recordings):
    run = migkit.run(
        path=recordings / "blind",
        memory="4MiB",
        trace=("savevm", "faults"),
        probe="off",
        timeout_s=60,
    )
    with pytest.raises(MissingEventError, match=r"'migrate_set_state' was not recorded.*trace="):
        _ = run.states
    with pytest.raises(MissingEventError, match=r"'ram_save_range'.*its group 'transfer'"):
        _ = run.transfer
    assert len(run.blocktime)


def test_the_walk_begins_at_none_ends_as_the_run_did_and_is_legal(run):
    walk = run.states
    assert walk["legal"].all()
    for side in schema.SIDES:
        mine = walk[walk["side"] == side]
        assert mine["old_state"].iloc[0] == "none"
        assert mine["old_state"].tolist()[1:] == mine["new_state"].tolist()[:-1]
    source = walk[walk["side"] == "source"]
    assert source["new_state"].iloc[-1] == run.status


def test_a_recovery_is_in_the_walk(recovered_run):
    states = recovered_run.states
    source = states.loc[states["side"] == "source", "new_state"].tolist()
    assert source[-5:] == [
        "postcopy-paused", "postcopy-recover-setup", "postcopy-recover", "postcopy-active",
        "completed",
    ]  # fmt: skip


def test_rounds_are_the_phases_of_precopy(precopy_run):
    rounds = precopy_run.rounds
    phases = precopy_run.phases[precopy_run.phases["name"].str.startswith("precopy")]
    assert rounds["round"].tolist() == list(range(1, len(phases) + 1))
    assert rounds["pages"].sum() == phases["pages"].sum()
    assert rounds["left_pages"].tolist()[:-1] == rounds["dirty_pages"].tolist()[1:]
    assert rounds["left_share"].iloc[0] < 1


def test_transfer_holds_every_page_that_was_sent_and_how(plain_run):
    pages = totals(plain_run.transfer)["pages"]
    last = plain_run.samples.iloc[-1]
    assert pages["precopy"] == last["source_precopy_pages"]
    assert pages["requested"] == last["source_requested_pages"]
    unasked = pages.reindex(["background", "prefetched"]).sum()
    assert unasked == last["source_background_pages"]
    phases = plain_run.phases
    assert pages.sum() == phases.loc[phases["side"] == "source", "pages"].sum()
    in_rounds = plain_run.transfer[plain_run.transfer["how"] == "precopy"]
    assert in_rounds["round"].notna().all()


def test_transfer_over_time_keeps_every_byte(plain_run):
    rates = over_time(plain_run.transfer, 37)
    width_s = rates.index[1] - rates.index[0]
    assert np.isclose(
        rates.to_numpy().sum() * width_s * (1 << 20), plain_run.transfer["bytes"].sum()
    )
    assert over_time(plain_run.transfer.iloc[:0]).empty


def test_every_request_is_one_row_and_those_for_nothing_are_marked(plain_run):
    requests = plain_run.requests
    assert not requests.duplicated(["page", "ts_ns"]).any()
    assert requests["answered"].all()
    sent = plain_run.event("postcopy_preempt_send_host_page")
    assert sorted(requests.loc[~requests["wasted"], "page"]) == sorted(sent["offset"])


def test_blocktime_is_within_postcopy_and_explains_the_latencies(plain_run):
    table = plain_run.blocktime
    whole = table.loc[table["who"] == "all at once"].iloc[0]
    assert 0 < whole["blocktime_ms"] <= plain_run.faults["latency_us"].sum() / 1e3 + 1e-6
    reported = plain_run.query_blocktime()
    assert sum(reported["postcopy-latency-dist"]) == len(waited(plain_run.faults))
    assert len(reported["postcopy-latency-dist"]) == 24
    # One vCPU: all of them are blocked when it is.
    assert reported["postcopy-vcpu-blocktime"] == [reported["postcopy-blocktime"]]
    mean_ms = reported["postcopy-latency"] * len(waited(plain_run.faults)) / 1e6
    assert mean_ms >= reported["postcopy-blocktime"]


def test_the_outage_of_a_recovery_is_within_the_longest_standstill(recovered_run):
    longest = recovered_run.blocktime["longest_ms"].max()
    assert longest >= recovered_run.faults["outage_us"].max() / 1e3 > 0


def test_the_working_set_counts_scans_and_first_touches(plain_run):
    frame = plain_run.working_set
    touched = frame[frame["kind"] == "touched"]
    assert touched["total_pages"].iloc[-1] == plain_run.faults["page"].nunique()
    assert touched["total_pages"].is_monotonic_increasing
    scans = plain_run.event("migration_bitmap_sync_end")["dirty_pages"].tolist()
    assert frame.loc[frame["kind"] == "written", "pages"].tolist() == scans[1:]


def test_the_critical_path_names_the_largest_stage(plain_run):
    from migkit.analysis.latency import DURATIONS, stage_breakdown

    parts = stage_breakdown(plain_run.faults)
    for row in plain_run.critical_path.itertuples():
        assert row.stage_us == parts.loc[row.at, list(DURATIONS)].max()
        assert row.stage_us >= row.next_us
        assert 0 < row.share <= 1


def test_the_history_of_a_requested_page_is_told_from_both_sides(recovered_run):
    requested = recovered_run.faults[recovered_run.faults["resolution"] == "requested"].iloc[0]
    history = recovered_run.page(int(requested["page"]))
    schema.check(history, "events")
    assert history["ts_ns"].is_monotonic_increasing
    names = history["event"].tolist()
    story = [
        "postcopy_ram_fault_thread_request", "postcopy_page_req_add",
        "migrate_handle_rp_req_pages", "get_queued_page", "postcopy_preempt_send_host_page",
        "postcopy_request_received", "postcopy_request_placed", "postcopy_place_page",
    ]  # fmt: skip
    assert set(story) <= set(names)
    assert [names.index(name) for name in story[:1]] == [min(names.index(name) for name in story)]


def test_every_page_has_a_history_and_none_has_a_strangers(recovered_run):
    loads = recovered_run.event("ram_load_range")
    for number in (0, 17, recovered_run.faults["page"].iloc[-1]):
        history = recovered_run.page(int(number))
        mine = loads[(loads["offset"] <= number * PAGE)
                     & (loads["offset"] + loads["len"] > number * PAGE)]  # fmt: skip
        assert (history["event"] == "ram_load_range").sum() == len(mine)
    with pytest.raises(OptionError, match="the pages 0 to 4095"):
        recovered_run.page(4096)


# The limiter, on a trace made up.


def limiter(*waits):
    """A source's trace in which the rate limiter waited from ... to ..., us."""
    registry = Registry.load()
    arrays = {}
    for name, column in (("migration_rate_limit_pre", 0), ("migration_rate_limit_post", 1)):
        rows = [(int(wait[column] * 1000), 1, seq, 0) for seq, wait in enumerate(waits)]
        arrays[name] = np.array(rows, event_dtype(registry[name]))
    return Trace(registry, arrays)


def test_a_limiter_that_spins_is_one_wait():
    spins = limiter(*((begin, begin + 2) for begin in range(0, 20_000, 20)), (50_000, 60_000))
    assert limited_spans(spins).tolist() == [[0, 19_982_000], [50_000_000, 60_000_000]]
    assert limited_spans(limiter()).shape == (0, 2)


def test_a_request_that_waits_in_the_limiter_has_stalled(plain_run):
    faults = plain_run.faults[plain_run.faults["resolution"] == "requested"].head(1)
    begin = int(faults["received_by_source_ns"].iloc[0])
    late = faults.assign(
        sent_ns=pd.array([begin + int(9e6)], "Int64"),
        placed_ns=pd.array([begin + int(1e7)], "Int64"),
    )
    source = limiter((begin / 1e3 - 100, begin / 1e3 + 8000))
    row = requests_frame(late, source).iloc[0]
    assert row["limited_us"] == pytest.approx(8000)
    assert row["stalled"]
    assert row["limited_us"] > STALL_US
    assert not requests_frame(late, limiter()).iloc[0]["stalled"]
