"""The rules on what real QEMUs recorded: they find what is in the samples, and nothing else."""

from __future__ import annotations

import warnings

import pytest

import migkit
from migkit.analysis import schema
from migkit.analysis.check import RULES
from migkit.analysis.derived import DERIVED
from migkit.analysis.samples import manifest
from migkit.errors import TraceWarning
from migkit.testing import assert_fault_latency, assert_no_violations, assert_order, assert_states

BLOCKTIME = ["blocktime-adds-up", "blocktime-adds-up"]
FOUND = {
    "qemu-11.1-destination-killed": ["limiter-waits"],
    "qemu-11.1-plain": BLOCKTIME,
    "qemu-11.1-rate-limited": ["limiter-waits", "limiter-starves-nobody", *BLOCKTIME],
}
"""What is wrong in the samples; nothing in any other."""
COMPLETE = ("qemu-7.2-preempt", "qemu-11.1-plain", "qemu-11.1-rate-limited")


@pytest.fixture(scope="module")
def samples():
    """All samples, each opened once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)  # one has no trace of the destination
        runs = {name: migkit.sample(name) for name in manifest()}
        for run in runs.values():
            _ = run.traces
        yield runs


@pytest.mark.parametrize("name", sorted(manifest()))
def test_the_check_finds_what_is_in_a_sample_and_nothing_else(samples, name):
    found = samples[name].check()
    schema.check(found, "violations")
    assert found["rule"].tolist() == FOUND.get(name, [])
    judged = {*found.attrs["kept"], *found["rule"]}
    assert judged | set(found.attrs["not_checked"]) == {rule.name for rule in RULES}


def test_a_postcopy_of_which_both_sides_are_there_is_judged_by_nearly_every_rule(samples):
    for name in COMPLETE:
        assert len(samples[name].check().attrs["not_checked"]) <= 3


@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.parametrize("frame", sorted(set(DERIVED) - {"violations", "comparison"}))
def test_the_analyses_take_a_qemus_run_as_they_take_ours(samples, name, frame):
    schema.check(getattr(samples[name], frame), frame)


def test_a_run_of_which_the_destination_is_missing_says_what_cannot_be_judged(samples):
    run = samples["qemu-11.1-destination-killed"]
    found = run.check()
    assert "postcopy_ram_fault_thread_request" in found.attrs["not_checked"]["stages-in-order"]
    assert_states(run, ["setup", "active", "device", "postcopy-device", "postcopy-active",
                        "postcopy-paused", "cancelling"])  # fmt: skip


@pytest.mark.parametrize("name", ["qemu-11.1-plain", "qemu-11.1-rate-limited"])
def test_our_blocktime_is_the_reported_one_and_our_buckets_are_nearly_theirs(samples, name):
    """QEMU's total is right; its times of vCPUs and its mean are what does not add up.

    It counts until a page was received, we until it was placed: ours are a little longer.
    """
    run = samples[name]
    reported = run.meta["query_migrate"]["dst"]
    ours = run.query_blocktime()
    assert 0 <= ours["postcopy-blocktime"] / reported["postcopy-blocktime"] - 1 < 0.01
    theirs, counts = reported["postcopy-latency-dist"], ours["postcopy-latency-dist"]
    assert sum(counts) == sum(theirs)
    moved = sum(abs(a - b) for a, b in zip(counts, theirs, strict=True)) / 2
    assert moved / sum(theirs) < 0.1
    whole_ms = ours["postcopy-latency"] * sum(counts) / 1e6
    assert whole_ms >= reported["postcopy-blocktime"] > reported["postcopy-vcpu-blocktime"][0]


def test_a_qemu_says_which_threads_are_vcpus(samples):
    run = samples["qemu-11.1-plain"]
    assert run.vcpus == run.blocktime["tid"].dropna().tolist() == [24381]
    assert samples["qemu-7.2-preempt"].vcpus is None


def test_requests_that_the_limiter_held_up_waited_for_most_of_its_period(samples):
    stalled = samples["qemu-11.1-rate-limited"].requests.query("stalled")
    assert stalled["limited_us"].max() > 80_000
    assert (stalled["limited_us"] <= stalled["wait_us"]).all()
    assert not samples["qemu-7.2-preempt"].requests["stalled"].any()


def test_the_plot_of_requests_says_how_many_the_limiter_held_up(samples):
    figure = samples["qemu-11.1-rate-limited"].plot.requests()
    assert "the rate limiter held 77 up, one for 91.9 ms" in figure.get_suptitle()
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert "the source is limited" in labels
    assert "stalled: held up by the rate limiter for 5 ms or more (77)" in labels
    assert "held none up" in samples["qemu-7.2-preempt"].plot.requests().get_suptitle()


def test_placed_pages_are_divided_into_requested_and_unasked(samples):
    run = samples["qemu-11.1-plain"]
    pages = run.transfer.groupby("how", observed=True)["pages"].sum()
    assert pages["requested"] == 1081
    assert pages.sum() == len(run.event("postcopy_place_page")) + len(
        run.event("postcopy_place_page_zero")
    )


def test_samples_are_compared_by_their_names(samples):
    comparison = migkit.compare(samples["qemu-11.1-plain"], samples["qemu-11.1-rate-limited"])
    rows = comparison.frame.set_index(["run", "figure"])
    assert rows.loc[("qemu-11.1-rate-limited", "fault latency p99"), "low"] > 2


def test_the_assertions_work_on_a_qemus_run(samples):
    run = samples["qemu-7.2-preempt"]
    assert_no_violations(run)
    assert_order(
        run,
        ["migration_completion_postcopy_end", "migration_return_path_end_before",
         "source_return_path_thread_shut 0x0", "migration_return_path_end_after",
         "migrate_set_state new state completed"],
        side="source",
    )  # fmt: skip
    assert_fault_latency(run, p50_us=1000, at_least=1000)
    with pytest.raises(AssertionError, match="blocktime-adds-up"):
        assert_no_violations(samples["qemu-11.1-plain"])
