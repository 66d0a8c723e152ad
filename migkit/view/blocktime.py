"""How long the guest stood still on faults: the latencies in QEMU's buckets, and over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migkit.analysis.blocktime import standstill
from migkit.view.style import (
    BLUE,
    ORANGE,
    VERMILION,
    dress,
    duration,
    headline,
    legend_below,
    new_figure,
    note,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from migkit.analysis.run import Run

_MOST_LABELLED = 10
_MOST_TICKS = 7


def plot_blocktime(run: Run) -> Figure:
    """Return the faults by QEMU's buckets of latency, and the time lost to them over time."""
    buckets, table = run.latency_distribution, run.blocktime
    figure = new_figure(10.5, 4.8)
    shares, course = figure.subplots(1, 2, width_ratios=[1.6, 1.0])
    dress(shares, grid="y")
    dress(course)
    figure.suptitle(_title(run, table), x=0.01, ha="left", fontsize=12, fontweight="bold")
    headline(shares, "Faults by latency, in the buckets of QEMU's postcopy-latency-dist")
    headline(course, "Time in which every thread stood still, so far")
    if not buckets["faults"].any():
        for axes in (shares, course):
            axes.set(xticks=[], yticks=[])
        note(shares, "no fault waited for the source")
        return figure
    _draw_buckets(shares, buckets)
    _draw_course(course, run)
    legend_below(figure, shares, columns=2)
    return figure


def _title(run: Run, table: pd.DataFrame) -> str:
    whole = table.loc[table["who"] == "all at once", "blocktime_ms"]
    if whole.empty:
        return "The guest did not stand still on any fault"
    text = f"Page faults made the guest stand still for {duration(float(whole.iloc[0]) * 1e3)}"
    mine = run.phases[(run.phases["side"] == "source") & (run.phases["name"] == "post-copy")]
    if len(mine):
        text += f"; post-copy took {duration(float(mine['duration_ms'].sum()) * 1e3)}"
    return text


def _draw_buckets(axes: Axes, buckets: pd.DataFrame) -> None:
    """Draw two bars a bucket: what the guest waited, and what the engine took of that."""
    used = np.flatnonzero((buckets["faults"] > 0) | (buckets["engine_faults"] > 0))
    shown = buckets.iloc[used[0] : used[-1] + 1]
    places = np.arange(len(shown))
    for shift, column, color, hatch, label in (
        (-0.2, "faults", ORANGE, "", "the guest waited: from the fault until it ran again"),
        (0.2, "engine_faults", BLUE, "////", "as QEMU counts: from reading the fault to placing"),
    ):
        bars = axes.bar(
            places + shift, shown[column], width=0.4, color=color, hatch=hatch, edgecolor="black",
            linewidth=0.6, label=label,
        )  # fmt: skip
        if len(shown) <= _MOST_LABELLED:  # a single slow fault is no visible bar
            texts = [f"{count:,}" if count else "" for count in shown[column]]
            axes.bar_label(bars, texts, fontsize=7.5, padding=1)
    ticked = slice(None, None, -(-len(shown) // _MOST_TICKS))
    axes.set_xticks(places[ticked], [f"≥ {duration(us)}" for us in shown["from_us"][ticked]])
    axes.set_ylabel("faults")
    axes.set_xlabel("latency, each bucket twice as wide as the one before (µs, ms)")


def _draw_course(axes: Axes, run: Run) -> None:
    """Draw how the time lost adds up."""
    spans = standstill(run.faults, run.end_ns, run.vcpus)
    lost_ms = np.cumsum(spans[:, 1] - spans[:, 0]) / 1e6
    times = (spans - run.origin_ns).reshape(-1) / 1e6
    heights = np.stack([np.concatenate([[0.0], lost_ms[:-1]]), lost_ms], axis=1).reshape(-1)
    axes.plot(times, heights, color=VERMILION, linewidth=1.8)
    if len(lost_ms):
        axes.annotate(
            duration(float(lost_ms[-1]) * 1e3), (times[-1], heights[-1]), xytext=(-6, 0),
            textcoords="offset points", ha="right", va="bottom", fontsize=9, fontweight="bold",
        )  # fmt: skip
    axes.set_ylim(0, float(lost_ms.max(initial=1e-3)) * 1.12)
    axes.set_ylabel("stood still so far (ms)")
    axes.set_xlabel("time since the run's first event (ms)")
