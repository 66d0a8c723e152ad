"""The downtime, part by part: what was done while the guest ran nowhere, and by whom."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migkit.view.style import (
    BLUE,
    GREEN,
    LIGHT,
    dress,
    duration,
    duration_ticks,
    headline,
    legend_below,
    new_figure,
    note,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from migkit.analysis.run import Run

_STYLES = {"source": (GREEN, ""), "wire": (LIGHT, "...."), "destination": (BLUE, "////")}


def plot_downtime(run: Run) -> Figure:
    """Return the parts of the downtime one after the other, from the last step to the first."""
    parts = run.downtime
    figure = new_figure(10.5, 0.9 + 0.42 * max(len(parts), 4))
    axes = figure.subplots()
    dress(axes, grid="x")
    if parts.empty:
        figure.suptitle("No downtime", x=0.01, ha="left", fontsize=12, fontweight="bold")
        headline(axes, "Parts of the downtime")
        axes.set(xticks=[], yticks=[])
        note(axes, parts.attrs["reason"])
        return figure
    total_us = float(parts["duration_us"].sum())
    longest = parts.iloc[int(parts["duration_us"].argmax())]
    figure.suptitle(
        f"The guest ran nowhere for {duration(total_us)}, {longest['share']:.0%} of it: "
        f"{longest['part']}",
        x=0.01, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    headline(axes, "From its last step at the source to its first at the destination")
    begin_us = (parts["start_ns"] - parts["start_ns"].iloc[0]) / 1e3
    for side, (color, hatch) in _STYLES.items():
        mine = np.flatnonzero(parts["side"] == side)
        if not len(mine):
            continue
        axes.barh(
            mine, parts["duration_us"].iloc[mine], left=begin_us.iloc[mine], color=color,
            hatch=hatch, edgecolor="black", linewidth=0.6, height=0.7, label=side,
        )  # fmt: skip
    for row, (begin, length) in enumerate(zip(begin_us, parts["duration_us"], strict=True)):
        left = begin + length > 0.8 * total_us
        axes.annotate(
            duration(length), (begin if left else begin + length, row),
            xytext=(-5 if left else 5, 0), textcoords="offset points", va="center",
            ha="right" if left else "left", fontsize=9,
        )  # fmt: skip
    axes.set_yticks(range(len(parts)), list(parts["part"]))
    axes.invert_yaxis()
    axes.set_xlim(0, total_us)
    axes.xaxis.set_major_formatter(duration_ticks())
    axes.set_xlabel("time since the guest's last step (µs, ms)")
    legend_below(figure, axes, columns=3)
    return figure
