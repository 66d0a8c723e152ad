"""The latency of page faults: over time, as a distribution, and stage by stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from migkit.analysis.latency import DURATIONS, QUANTILES, stage_breakdown, waited
from migkit.view.style import (
    RESOLUTION_STYLES,
    STAGE_STYLES,
    dress,
    duration,
    duration_ticks,
    headline,
    ink,
    legend_below,
    new_figure,
    note,
    paper,
    resolution_key,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from migkit.analysis.run import Run

_MOST_POINTS = 20_000
_MANY_POINTS = 2_000
_LEAST_FOR_CURVE = 5
_LINES = {"p50": "--", "p99": ":"}
_CURVES = {"requested": "-", "in_flight": "--", "local": "-.", "background": ":"}


def plot_fault_latency(run: Run) -> Figure:
    """Return latency over time and its distribution, on one logarithmic axis of us.

    Colours and marks say how a fault was resolved; the lines are the median and the 99th
    percentile of the faults that the source had to answer.
    """
    faults = run.faults[run.faults["latency_us"] > 0]
    figure = new_figure(10.5, 5.2)
    over_time, shares = figure.subplots(1, 2, sharey=True, width_ratios=[2.2, 1.0])
    for axes in (over_time, shares):
        dress(axes)
    over_time.set_ylabel("time that the guest thread waited")
    over_time.set_xlabel("time since the run's first event (ms)")
    shares.set_xlabel("share of faults (%)")
    remote = waited(faults, ["latency_us"])["latency_us"]
    figure.suptitle(_latency_title(remote), x=0.01, ha="left", fontsize=12, fontweight="bold")
    shown = sum(min(n, _MOST_POINTS) for n in faults["resolution"].value_counts())
    few = shown < len(faults)
    headline(over_time, f"{shown:,} of {len(faults):,} faults" if few else "Each fault")
    headline(shares, "Share that waited no longer")
    if faults.empty:
        for axes in (over_time, shares):
            axes.set(xticks=[], yticks=[])
        note(over_time, "no fault with a known latency")
        return figure
    over_time.set_yscale("log")
    over_time.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    over_time.yaxis.set_major_formatter(duration_ticks())
    over_time.yaxis.set_minor_formatter(NullFormatter())
    _draw_points(over_time, faults)
    _draw_distribution(shares, faults)
    for key, line in _LINES.items():
        if len(remote):
            level = float(remote.quantile(QUANTILES[key]))
            for axes in (over_time, shares):
                axes.axhline(level, color=ink(), linestyle=line, linewidth=1.0)
            _name_level(shares, key, level)
    shares.set_xlim(0, 100)
    legend_below(figure, over_time, columns=4)
    return figure


def _latency_title(remote: pd.Series) -> str:
    if remote.empty:
        return "Latency of page faults: none waited for the source"
    p50, p99 = (duration(float(remote.quantile(QUANTILES[key]))) for key in ("p50", "p99"))
    return f"Half of the {len(remote):,} faults that the source answered took {p50}, 1 % over {p99}"


def _draw_points(axes: Axes, faults: pd.DataFrame) -> None:
    """Draw each fault; of very many a random part."""
    size = 7 if len(faults) > _MANY_POINTS else 18
    for resolution, (color, marker, _) in RESOLUTION_STYLES.items():
        mine = faults[faults["resolution"] == resolution]
        if mine.empty:
            continue
        shown = mine.sample(_MOST_POINTS, random_state=0) if len(mine) > _MOST_POINTS else mine
        axes.scatter(
            shown["time_s"] * 1e3, shown["latency_us"], s=size, color=color, marker=marker,
            alpha=0.75, linewidth=0, rasterized=True,
        )  # fmt: skip
        line = _CURVES.get(resolution, "") if len(mine) >= _LEAST_FOR_CURVE else ""
        resolution_key(axes, resolution, len(mine), line)


def _draw_distribution(axes: Axes, faults: pd.DataFrame) -> None:
    for resolution, line in _CURVES.items():
        latency = np.sort(faults.loc[faults["resolution"] == resolution, "latency_us"].to_numpy())
        if len(latency) >= _LEAST_FOR_CURVE:
            share = np.arange(len(latency) + 1) / len(latency) * 100
            latency = np.concatenate([latency[:1], latency])
            color = RESOLUTION_STYLES[resolution][0]
            axes.plot(share, latency, color=color, linestyle=line, linewidth=1.8, drawstyle="steps")


def _name_level(axes: Axes, name: str, level: float) -> None:
    """Write a quantile's name and value at the end of its line: above it, the median's below."""
    axes.annotate(
        f"{name}\n{duration(level)}", (1.0, level), xycoords=("axes fraction", "data"),
        xytext=(5, 0), textcoords="offset points", fontsize=8.5,
        va="top" if name == "p50" else "bottom",
    )  # fmt: skip


def plot_fault_stages(run: Run) -> Figure:
    """Return what a fault's latency consists of: at p50, p90 and p99, and on the average.

    To the left in us, to the right as shares of the whole. ``migkit.analysis.latency`` has the
    frame, :func:`~migkit.analysis.latency.stage_breakdown`.
    """
    parts = stage_breakdown(run.faults)
    count = len(waited(run.faults, ["latency_us"]))
    figure = new_figure(10.5, 4.4)
    absolute, relative = figure.subplots(1, 2, sharey=True, width_ratios=[1.25, 1.0])
    for axes in (absolute, relative):
        dress(axes, grid="x")
    figure.suptitle(_stages_title(parts, count), x=0.01, ha="left", fontsize=12, fontweight="bold")
    if not count:
        for axes in (absolute, relative):
            axes.set(xticks=[], yticks=[])
        note(absolute, "no fault waited for the source")
        return figure
    shown = parts.iloc[::-1]
    headline(absolute, f"Mean of the steps around each quantile, {count:,} faults")
    headline(relative, "The same as shares")
    _draw_stack(absolute, shown[list(DURATIONS)], 1.0)
    _draw_stack(relative, shown[list(DURATIONS)].div(shown["latency_us"], axis=0) * 100, 100.0)
    for row, total in enumerate(shown["latency_us"]):
        absolute.annotate(
            duration(total), (total, row), xytext=(5, 0), textcoords="offset points", va="center",
            fontsize=9, fontweight="bold",
        )  # fmt: skip
    absolute.set_xlim(0, float(parts["latency_us"].max()) * 1.16)
    absolute.xaxis.set_major_formatter(duration_ticks())
    absolute.set_xlabel("time since the fault")
    relative.set_xlim(0, 100)
    relative.set_xlabel("share of the latency (%)")
    absolute.set_yticks(range(len(shown)), [str(name) for name in shown.index])
    legend_below(figure, relative, columns=3)
    return figure


def _stages_title(parts: pd.DataFrame, count: int) -> str:
    if not count:
        return "Where the time of a fault goes"
    texts = []
    for at, words in (("p50", "the median"), ("p99", "p99")):
        steps = parts.loc[at, list(DURATIONS)].dropna()
        label = STAGE_STYLES[str(steps.idxmax()).removesuffix("_us")][2]
        texts.append(f"at {words}: {label} ({steps.max() / steps.sum():.0%})")
    return "The slowest step " + "; ".join(texts)


def _draw_stack(axes: Axes, steps: pd.DataFrame, whole: float) -> None:
    """Draw a row of stacked bars per row of ``steps``; write shares where there is room."""
    left = np.zeros(len(steps))
    rows = np.arange(len(steps))
    for column in DURATIONS:
        widths = steps[column].fillna(0.0).to_numpy()
        if not widths.any():
            continue
        color, hatch, label = STAGE_STYLES[column.removesuffix("_us")]
        axes.barh(
            rows, widths, left=left, height=0.66, color=color, hatch=hatch, edgecolor="black",
            linewidth=0.6, label=label,
        )  # fmt: skip
        if whole == 100.0:
            for row, width in enumerate(widths):
                if width >= 8:
                    axes.text(
                        left[row] + width / 2, row, f"{width:.0f}", ha="center", va="center",
                        fontsize=8.5, bbox={"facecolor": paper(), "alpha": 0.85, "pad": 1.2,
                                            "linewidth": 0},
                    )  # fmt: skip
        left = left + widths
