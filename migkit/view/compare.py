"""Runs side by side: ratios with their intervals, and the distributions of fault latency."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from migkit.view.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILION,
    dress,
    duration_ticks,
    headline,
    ink,
    legend_below,
    new_figure,
    note,
    paper,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from migkit.analysis.compare import Comparison, Group

_STYLES = (
    (BLUE, "o", "-"), (VERMILION, "s", "--"), (GREEN, "^", "-."), (PURPLE, "D", ":"),
    (ORANGE, "v", (0, (5, 1, 1, 1))), (GREY, "X", (0, (1, 1))),
)  # fmt: skip

_WIDE = 100  # from here on an axis has no room for ticks between the powers of ten


def plot_comparison(comparison: Comparison) -> Figure:
    """Return the ratios to the first run on a logarithmic axis, and the latencies of all."""
    figures = list(dict.fromkeys(comparison.frame["figure"]))
    figure = new_figure(10.5, 1.8 + 0.45 * len(figures))
    ratios, shares = figure.subplots(1, 2, width_ratios=[1.3, 1.0])
    dress(ratios, grid="x")
    dress(shares)
    figure.suptitle(_title(comparison), x=0.01, ha="left", fontsize=12, fontweight="bold")
    headline(ratios, f"As a multiple of {comparison.groups[0].name}, with 95 % intervals")
    headline(shares, "Share of faults that waited no longer")
    _draw_ratios(ratios, comparison, figures)
    _draw_latencies(shares, comparison.groups)
    legend_below(figure, shares, columns=3)
    return figure


def _title(comparison: Comparison) -> str:
    first = comparison.groups[0].name
    frame = comparison.frame
    median = frame[(frame["figure"] == "fault latency p50") & frame["ratio"].notna()]
    parts = []
    for group in comparison.groups[1:]:
        ratio = median.loc[median["run"] == group.name, "ratio"]
        parts.append(f"{group.name} {ratio.iloc[0]:.2f} times" if len(ratio) else group.name)
    if not len(median):
        return f"{', '.join(parts)} against {first}"
    return f"Median fault latency: {', '.join(parts)} that of {first}"


def _draw_ratios(axes: Axes, comparison: Comparison, figures: list[str]) -> None:
    """Draw a mark a run and figure, its interval as a line."""
    others = comparison.groups[1:]
    spread = np.linspace(-0.22, 0.22, len(others)) if len(others) > 1 else np.zeros(1)
    axes.axvline(1.0, color=ink(), linewidth=1.0)
    axes.set_xscale("log")
    for number, group in enumerate(others, 1):
        color, marker, _ = _STYLES[number % len(_STYLES)]
        mine = comparison.frame[comparison.frame["run"] == group.name]
        for row, (_, figure) in enumerate(mine.iterrows()):
            _draw_ratio(axes, figure, row + spread[number - 1], color, marker)
    axes.set_yticks(range(len(figures)), figures)
    axes.set_ylim(len(figures) - 0.5, -0.5)
    axes.set_xlabel("ratio (times)")
    axes.margins(x=0.15)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), max(high, 2.0))
    narrow = max(high, 2.0) / min(low, 0.5) < _WIDE
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_ratio(axes: Axes, row: pd.Series, place: float, color: str, marker: str) -> None:
    ratio = float(row["ratio"])
    if not np.isfinite(ratio) or ratio <= 0:
        return
    if np.isfinite(row["low"]) and row["low"] > 0:
        axes.plot([row["low"], row["high"]], [place, place], color=color, linewidth=2.2)
    axes.plot([ratio], [place], color=color, marker=marker, markersize=7, markeredgecolor="black",
              linestyle="")  # fmt: skip
    right = max(ratio, float(row["high"])) if np.isfinite(row["high"]) else ratio
    axes.annotate(
        f"{ratio:.3g}", (right, place), xytext=(7, 0), textcoords="offset points", ha="left",
        va="center", fontsize=8, bbox={"facecolor": paper(), "pad": 0.6, "linewidth": 0},
    )  # fmt: skip


def _draw_latencies(axes: Axes, groups: tuple[Group, ...]) -> None:
    """Draw each group's distribution of latency."""
    drawn = False
    for number, group in enumerate(groups):
        latency = group.latency_us[group.latency_us > 0]
        color, marker, line = _STYLES[number % len(_STYLES)]
        label = f"{group.name} ({len(group.latency_us):,} faults)"
        axes.plot([], [], color=color, linestyle=line, marker=marker, label=label)
        if not len(latency):
            continue
        drawn = True
        share = np.arange(1, len(latency) + 1) / len(latency) * 100
        axes.plot(
            latency, share, color=color, linestyle=line, linewidth=1.8, drawstyle="steps-post"
        )
    if not drawn:
        axes.set(xticks=[], yticks=[])
        note(axes, "no fault waited for the source")
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(duration_ticks())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 100)
    axes.set_ylabel("share of faults (%)")
    axes.set_xlabel("time that the guest thread waited (µs, ms)")
