"""The derived frames of recorded migrations: they add up, and agree with each other."""

from __future__ import annotations

import time

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
RUNS = ("plain", "recovered", "precopy", "cancelled")
FRAMES = sorted(set(DERIVED) - {"violations"})  # that one is what run.check() returns


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("analyses")


@pytest.fixture(scope="session")
def plain(folder):
    return migkit.run(
        path=folder / "plain", memory="16MiB", rate=0, max_postcopy_bandwidth="40MiB", timeout_s=60
    )


@pytest.fixture(scope="session")
def precopy(folder):
    return migkit.run(
        path=folder / "precopy", memory="16MiB", rate=5000, postcopy="off", timeout_s=60
    )


@pytest.fixture(scope="session")
def recovered(folder):
    """A post-copy that was paused and recovered, with every event recorded."""
    with migkit.Migration(
        "random", "16MiB", path=folder / "recovered", postcopy="manual", trace="all",
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
def cancelled(folder):
    with migkit.Migration(
        "random", "16MiB", path=folder / "cancelled", rate=1000, postcopy="manual",
        max_bandwidth="8MiB", probe="off",
    ) as migration:  # fmt: skip
        migration.start()
        migration.await_status("active")
        migration.cancel()
        return migration.wait(60)


@pytest.fixture(params=RUNS)
def run(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", FRAMES)
def test_every_frame_of_every_run_is_as_the_schema_says(run, name):
    schema.check(getattr(run, name), name)


@pytest.mark.parametrize("name", FRAMES)
def test_a_run_that_holds_nothing_has_empty_frames(plain, folder, name):
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    (empty / "meta.json").write_text((plain.path / "meta.json").read_text())
    for role in schema.SIDES:
        (empty / f"{role}.trace").write_bytes((plain.path / f"{role}.trace").read_bytes()[:24])
    frame = getattr(Run.load(empty), name)
    schema.check(frame, name)
    assert frame.empty or not frame["faults"].any()  # QEMU's buckets are always there


def test_an_analysis_that_lacks_its_event_names_it_and_how_to_record_it(folder):
    run = migkit.run(
        path=folder / "blind", memory="4MiB", trace=("savevm", "faults"), probe="off", timeout_s=60
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


def test_a_recovery_is_in_the_walk(recovered):
    states = recovered.states
    source = states.loc[states["side"] == "source", "new_state"].tolist()
    assert source[-5:] == [
        "postcopy-paused", "postcopy-recover-setup", "postcopy-recover", "postcopy-active",
        "completed",
    ]  # fmt: skip


def test_rounds_are_the_phases_of_precopy(precopy):
    rounds = precopy.rounds
    phases = precopy.phases[precopy.phases["name"].str.startswith("precopy")]
    assert rounds["round"].tolist() == list(range(1, len(phases) + 1))
    assert rounds["pages"].sum() == phases["pages"].sum()
    assert rounds["left_pages"].tolist()[:-1] == rounds["dirty_pages"].tolist()[1:]
    assert rounds["left_share"].iloc[0] < 1


def test_transfer_holds_every_page_that_was_sent_and_how(plain):
    pages = totals(plain.transfer)["pages"]
    last = plain.samples.iloc[-1]
    assert pages["precopy"] == last["source_precopy_pages"]
    assert pages["requested"] == last["source_requested_pages"]
    unasked = pages.reindex(["background", "prefetched"]).sum()
    assert unasked == last["source_background_pages"]
    phases = plain.phases
    assert pages.sum() == phases.loc[phases["side"] == "source", "pages"].sum()
    in_rounds = plain.transfer[plain.transfer["how"] == "precopy"]
    assert in_rounds["round"].notna().all()


def test_transfer_over_time_keeps_every_byte(plain):
    rates = over_time(plain.transfer, 37)
    width_s = rates.index[1] - rates.index[0]
    assert np.isclose(rates.to_numpy().sum() * width_s * (1 << 20), plain.transfer["bytes"].sum())
    assert over_time(plain.transfer.iloc[:0]).empty


def test_every_request_is_one_row_and_those_for_nothing_are_marked(plain):
    requests = plain.requests
    assert not requests.duplicated(["page", "ts_ns"]).any()
    assert requests["answered"].all()
    sent = plain.event("postcopy_preempt_send_host_page")
    assert sorted(requests.loc[~requests["wasted"], "page"]) == sorted(sent["offset"])


def test_blocktime_is_within_postcopy_and_explains_the_latencies(plain):
    table = plain.blocktime
    whole = table.loc[table["who"] == "all at once"].iloc[0]
    assert 0 < whole["blocktime_ms"] <= plain.faults["latency_us"].sum() / 1e3 + 1e-6
    reported = plain.query_blocktime()
    assert sum(reported["postcopy-latency-dist"]) == len(waited(plain.faults))
    assert len(reported["postcopy-latency-dist"]) == 24
    # One vCPU: all of them are blocked when it is.
    assert reported["postcopy-vcpu-blocktime"] == [reported["postcopy-blocktime"]]
    mean_ms = reported["postcopy-latency"] * len(waited(plain.faults)) / 1e6
    assert mean_ms >= reported["postcopy-blocktime"]


def test_the_outage_of_a_recovery_is_within_the_longest_standstill(recovered):
    longest = recovered.blocktime["longest_ms"].max()
    assert longest >= recovered.faults["outage_us"].max() / 1e3 > 0


def test_the_working_set_counts_scans_and_first_touches(plain):
    frame = plain.working_set
    touched = frame[frame["kind"] == "touched"]
    assert touched["total_pages"].iloc[-1] == plain.faults["page"].nunique()
    assert touched["total_pages"].is_monotonic_increasing
    scans = plain.event("migration_bitmap_sync_end")["dirty_pages"].tolist()
    assert frame.loc[frame["kind"] == "written", "pages"].tolist() == scans[1:]


def test_the_critical_path_names_the_largest_stage(plain):
    from migkit.analysis.latency import DURATIONS, stage_breakdown

    parts = stage_breakdown(plain.faults)
    for row in plain.critical_path.itertuples():
        assert row.stage_us == parts.loc[row.at, list(DURATIONS)].max()
        assert row.stage_us >= row.next_us
        assert 0 < row.share <= 1


def test_the_history_of_a_requested_page_is_told_from_both_sides(recovered):
    requested = recovered.faults[recovered.faults["resolution"] == "requested"].iloc[0]
    history = recovered.page(int(requested["page"]))
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


def test_every_page_has_a_history_and_none_has_a_strangers(recovered):
    loads = recovered.event("ram_load_range")
    for number in (0, 17, recovered.faults["page"].iloc[-1]):
        history = recovered.page(int(number))
        mine = loads[(loads["offset"] <= number * PAGE)
                     & (loads["offset"] + loads["len"] > number * PAGE)]  # fmt: skip
        assert (history["event"] == "ram_load_range").sum() == len(mine)
    with pytest.raises(OptionError, match="the pages 0 to 4095"):
        recovered.page(4096)


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


def test_a_request_that_waits_in_the_limiter_has_stalled(plain):
    faults = plain.faults[plain.faults["resolution"] == "requested"].head(1)
    begin = int(faults["requested_ns"].iloc[0])
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
