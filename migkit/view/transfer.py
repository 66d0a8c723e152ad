"""How the guest's pages came: bytes by kind over time, and pages by how they came."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from migkit.analysis.transfer import over_time, totals
from migkit.view.style import (
    BLUE,
    GREEN,
    LIGHT,
    ORANGE,
    SKY,
    dress,
    duration,
    headline,
    legend_below,
    mark_downtime,
    new_figure,
    note,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from migkit.analysis.run import Run

_STYLES = {
    "precopy": (SKY, "", "pre-copy"),
    "background": (BLUE, "....", "post-copy, unasked"),
    "prefetched": (GREEN, "\\\\\\\\", "post-copy, from behind a request"),
    "requested": (ORANGE, "xxxx", "post-copy, requested"),
}


def plot_transfer(run: Run) -> Figure:
    """Return what the source sent over time, and how many pages came in which way."""
    transfer = run.transfer
    figure = new_figure(10.5, 4.8)
    course, sums = figure.subplots(1, 2, width_ratios=[1.6, 1.0])
    dress(course)
    dress(sums, grid="x")
    table = totals(transfer)
    figure.suptitle(_title(table), x=0.01, ha="left", fontsize=12, fontweight="bold")
    headline(course, "Content of pages that was sent, zero pages left out")
    headline(sums, "Pages by how they came")
    if transfer.empty:
        for axes in (course, sums):
            axes.set(xticks=[], yticks=[])
        note(course, "no page was sent")
        return figure
    _draw_course(course, over_time(transfer))
    if len(run.downtime):
        begin, end = run.downtime["start_ns"].iloc[0], run.downtime["end_ns"].iloc[-1]
        mark_downtime(course, (begin - run.origin_ns) / 1e6, (end - run.origin_ns) / 1e6)
    _draw_sums(sums, table)
    legend_below(figure, course, columns=4)
    return figure


def _title(table: pd.DataFrame) -> str:
    pages = int(table["pages"].sum())
    if not pages:
        return "No page was sent"
    zero = table["zero_pages"].sum() / pages
    return (
        f"{pages:,} pages were sent, {table['bytes'].sum() / (1 << 20):,.1f} MiB; {zero:.0%} zero"
    )


def _draw_course(axes: Axes, rates: pd.DataFrame) -> None:
    """Draw the rates on each other."""
    times = rates.index.to_numpy() * 1e3
    below = np.zeros(len(rates))
    for how, (color, hatch, label) in _STYLES.items():
        if not rates[how].any():
            continue
        above = below + rates[how].to_numpy()
        axes.fill_between(
            times, below, above, step="post", facecolor=color, hatch=hatch, edgecolor="black",
            linewidth=0.4, label=label,
        )  # fmt: skip
        below = above
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"MiB/s, each {duration((times[1] - times[0]) * 1e3)}")
    axes.set_xlabel("time since the run's first event (ms)")


def _draw_sums(axes: Axes, table: pd.DataFrame) -> None:
    """Draw a bar a kind, the zero pages in it light, and write how many they are."""
    sums = zip(table["pages"].tolist(), table["zero_pages"].tolist(), strict=True)
    counts = dict(zip(table.index, sums, strict=True))
    shown = [how for how in _STYLES if counts.get(how, (0, 0))[0]]
    longest = max(pages for pages, _ in counts.values())
    for row, how in enumerate(shown):
        color, hatch, _ = _STYLES[how]
        pages, zero = counts[how]
        axes.barh(
            row, pages - zero, color=color, hatch=hatch, edgecolor="black", linewidth=0.6,
            height=0.66,
        )  # fmt: skip
        axes.barh(
            row, zero, left=pages - zero, color=LIGHT, edgecolor="black", linewidth=0.6,
            height=0.66,
        )  # fmt: skip
        text = f"{pages:,}" + (f"\n{zero:,} zero" if zero else "")
        axes.annotate(
            text, (pages, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_xlim(0, longest * 1.3)
    axes.set_yticks(range(len(shown)), shown)
    axes.set_ylim(max(len(shown) - 0.5, 2.5), -0.5)
    axes.set_xlabel("pages")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
