"""Comparing runs: figures line up, ratios are of the first, intervals hold what they should."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import migkit
from migkit.analysis import schema
from migkit.analysis.compare import Group, _quantiles
from migkit.analysis.latency import waited
from migkit.errors import OptionError


def test_a_run_is_itself(plain_run):
    same = migkit.compare(plain_run, plain_run)
    schema.check(same.frame, "comparison")
    assert same.frame["run"].unique().tolist() == ["plain", "plain (2)"]
    assert (same.frame["ratio"] == 1).all()
    intervals = same.frame[same.frame["low"].notna()]
    assert set(intervals["figure"]) == {f"fault latency p{q}" for q in (50, 90, 99)}
    assert (intervals["low"] <= 1).all()
    assert (intervals["high"] >= 1).all()


def test_figures_are_those_of_the_run(plain_run, recovered_run):
    frame = migkit.compare(plain_run, recovered_run, names=["a", "b"]).frame
    value = frame.set_index(["figure", "run"])["value"]
    for name, run in (("a", plain_run), ("b", recovered_run)):
        assert value["downtime", name] == run.summary().downtime_ms
        assert value["total time", name] == pytest.approx(run.summary().total_ms)
        latency = waited(run.faults)["latency_us"]
        assert value["fault latency p99", name] == pytest.approx(latency.quantile(0.99))
    ratio = frame.set_index(["figure", "run"])["ratio"]
    assert ratio["downtime", "b"] == value["downtime", "b"] / value["downtime", "a"]


def test_repetitions_are_taken_together_and_give_intervals(plain_run, recovered_run):
    groups = migkit.compare([plain_run, recovered_run], [recovered_run, recovered_run])
    rows = groups.frame[groups.frame["figure"] == "downtime"]
    assert rows["runs"].tolist() == [2, 2]
    second = rows.iloc[1]
    assert second["low"] <= second["ratio"] <= second["high"]


def test_what_a_run_does_not_have_is_unknown_not_zero(plain_run, cancelled_run):
    comparison = migkit.compare(plain_run, cancelled_run)
    row = comparison.frame.set_index(["figure", "run"]).loc[("downtime", "cancelled")]
    assert np.isnan(row["value"])
    assert np.isnan(row["ratio"])
    assert "unknown" in str(comparison)


@pytest.mark.parametrize(
    ("pick", "options", "said"),
    [
        (1, {}, "two runs at least, got 1"),
        (2, {"names": ["a"]}, "expected 2 different ones"),
        (2, {"names": ["a", "a"]}, "expected 2 different ones"),
    ],
)
def test_a_wrong_call_is_explained(plain_run, pick, options, said):
    with pytest.raises(OptionError, match=said):
        migkit.compare(*[plain_run] * pick, **options)
    with pytest.raises(OptionError, match="has no runs"):
        migkit.compare(plain_run, [])


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_drawn_quantiles_are_those_of_a_plain_bootstrap(q):
    random = np.random.default_rng(7)
    values = np.sort(random.exponential(100, 400))
    plain = np.sort(random.choice(values, (4000, 400)), axis=1)[:, min(int(q * 400), 399)]
    drawn = _quantiles(values, q, random)
    for percentile in (2.5, 50, 97.5):
        one, other = np.percentile(plain, percentile), np.percentile(drawn, percentile)
        # Within a few of the values that lie there.
        places = np.searchsorted(values, [one, other])
        assert abs(places[0] - places[1]) <= 6


def test_an_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        values = np.sort(random.exponential(1.0, 300))
        low, high = np.percentile(_quantiles(values, 0.5, random), (2.5, 97.5))
        covered += low <= np.log(2) <= high
    assert 0.9 <= covered / 200 <= 0.99


def test_a_million_latencies_take_no_million_draws():
    values = np.sort(np.random.default_rng(1).exponential(100, 1_000_000))
    assert len(_quantiles(values, 0.99, np.random.default_rng(1))) < 10_000


def test_the_figure_shows_every_ratio_and_says_who_is_compared(plain_run, recovered_run):
    comparison = migkit.compare(plain_run, recovered_run, names=["a", "b"])
    figure = comparison.plot()
    FigureCanvasAgg(figure).draw()
    ratios, shares = figure.axes
    assert ratios.get_xlabel() == "ratio (times)"
    assert "that of a" in figure.get_suptitle()
    texts = {text.get_text() for text in ratios.texts}
    known = comparison.frame[(comparison.frame["run"] == "b") & (comparison.frame["ratio"] > 0)]
    assert {f"{ratio:.3g}" for ratio in known["ratio"]} == texts
    labels = shares.get_legend_handles_labels()[1]
    assert len(labels) == 2


def test_runs_without_faults_can_be_compared_and_drawn(cancelled_run):
    comparison = migkit.compare(cancelled_run, cancelled_run)
    FigureCanvasAgg(comparison.plot()).draw()
    assert not len(Group.of("x", cancelled_run).latency_us)
