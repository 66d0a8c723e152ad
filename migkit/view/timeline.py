"""The whole migration on one axis of time: phases, both guests' progress, transfer, faults."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import EngFormatter

from migkit.analysis.rates import KINDS
from migkit.view.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PHASE_STYLES,
    RESOLUTION_STYLES,
    SKY,
    VERMILION,
    dress,
    duration,
    headline,
    legend,
    mark_downtime,
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

_MIB = 1 << 20
_MOST_POINTS = 20_000
_MANY_POINTS = 2_000
_WIDE_RANGE = 100
_SLOW_SHARE = 0.1
_HEADLINE_WIDTH = 0.23
_ROOM_UP_TO = 0.7
_RATE_STYLES = {
    "precopy": (SKY, "", "pre-copy"),
    "background": (BLUE, "....", "post-copy, unasked"),
    "requested": (ORANGE, "xxxx", "post-copy, requested"),
}


def plot_timeline(run: Run) -> Figure:
    """Return a figure of the run over time, the downtime marked in every panel.

    From above: the source's phases; steps a second of both guests; what came at the destination
    in MiB a second; each fault at its place in guest RAM.
    """
    figure = new_figure(10.5, 9.0)
    panels = figure.subplots(4, 1, sharex=True, height_ratios=[1.5, 1.0, 1.0, 1.3])
    rates = run.rates
    _draw_phases(panels[0], run)
    _draw_progress(panels[1], rates)
    _draw_transfer(panels[2], rates, run.samples)
    _draw_faults(panels[3], run)
    start_ms, end_ms = _extent_ms(run)
    for axes in panels:
        dress(axes)
        if len(run.downtime):
            mark_downtime(axes, *_downtime_ms(run))
        legend(axes)
        axes.set_xlim(start_ms, end_ms)
    panels[0].grid(visible=False, axis="y")
    if len(run.downtime):
        _name_downtime(panels[0], *_downtime_ms(run))
    panels[3].set_xlabel("time since the run's first event (ms)")
    figure.suptitle(_title(run), x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _title(run: Run) -> str:
    figures = run.summary()
    text = f"{figures.guest}: {figures.status}"
    if figures.total_ms is not None:
        text += f" after {duration(figures.total_ms * 1e3)}"
    if figures.downtime_ms is not None:
        text += f"; the guest stood still for {duration(figures.downtime_ms * 1e3)}"
    return text


def _ms(run: Run, ts_ns: pd.Series) -> pd.Series:
    return (ts_ns - run.origin_ns) / 1e6


def _downtime_ms(run: Run) -> tuple[float, float]:
    starts, ends = _ms(run, run.downtime["start_ns"]), _ms(run, run.downtime["end_ns"])
    return float(starts.iloc[0]), float(ends.iloc[-1])


def _extent_ms(run: Run) -> tuple[float, float]:
    """Return what part of time is shown: the migration, with a little of before and after."""
    phases = run.phases[run.phases["side"] == "source"]
    if phases.empty:
        return 0.0, max(1.0, float(run.samples["time_s"].max() or 0.0) * 1e3)
    start, end = _ms(run, phases["start_ns"]).min(), _ms(run, phases["end_ns"]).max()
    margin = max(0.03 * (end - start), 0.1)
    return float(start - margin), float(end + margin)


def _name_downtime(axes: Axes, start_ms: float, end_ms: float) -> None:
    """Write above the mark of the downtime how long it is, and not on the headline."""
    left, right = axes.get_xlim()
    place = (start_ms - left) / (right - left)
    axes.annotate(
        f"guest runs nowhere: {duration((end_ms - start_ms) * 1e3)}",
        (max(place, _HEADLINE_WIDTH), 1.0), xycoords="axes fraction", xytext=(0, 6),
        textcoords="offset points", ha="right" if place > _ROOM_UP_TO else "left", fontsize=8.5,
        color=VERMILION, fontweight="bold",
    )  # fmt: skip


def _draw_phases(axes: Axes, run: Run) -> None:
    """Draw a row per kind of phase, in the order in which they came."""
    phases = run.phases[run.phases["side"] == "source"]
    headline(axes, "Phases of the source")
    if phases.empty:
        note(axes, "no phases: the group 'migration' was not recorded")
        return
    rounds = phases["name"].str.startswith("precopy")
    kinds = phases["name"].mask(rounds, "pre-copy")
    rows = list(dict.fromkeys(kinds))
    for row, kind in enumerate(rows):
        mine = phases[kinds == kind]
        color, hatch = PHASE_STYLES.get(kind, (GREY, ""))
        left, width = _ms(run, mine["start_ns"]), mine["duration_ms"]
        axes.barh(
            [row] * len(mine), width, left=left, height=0.7, color=color, hatch=hatch,
            edgecolor="black", linewidth=0.6,
        )  # fmt: skip
        text = duration(float(width.sum()) * 1e3)
        if len(mine) > 1:
            text += f" in {len(mine)}" + (" rounds" if kind == "pre-copy" else "")
        bar = (float(left.min()), float((left + width).max()))
        _name_bar(axes, row, bar, text, _extent_ms(run))
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()


def _name_bar(
    axes: Axes, row: int, bar: tuple[float, float], text: str, extent: tuple[float, float]
) -> None:
    """Write into a bar if it is wide enough, else beside it, where the figure goes on."""
    left, right = bar
    whole = extent[1] - extent[0]
    if right - left > 0.14 * whole:
        place, shift, align = (left + right) / 2, 0, "center"
    elif right > extent[1] - 0.14 * whole:
        place, shift, align = left, -6, "right"
    else:
        place, shift, align = right, 6, "left"
    box = {"facecolor": paper(), "alpha": 0.9, "pad": 1.5, "linewidth": 0}
    axes.annotate(
        text, (place, row), xytext=(shift, 0), textcoords="offset points", ha=align, va="center",
        fontsize=8.5, bbox=box,
    )  # fmt: skip


def _draw_progress(axes: Axes, rates: pd.DataFrame) -> None:
    """Draw steps a second; on a logarithmic axis when post-copy all but stops the guest."""
    headline(axes, "Progress of the guest, at the source and at the destination")
    axes.set_ylabel("steps/s")
    if rates.empty:
        note(axes, "no samples were taken")
        axes.set_yticks([])
        return
    styles = {"source": (GREEN, "-", "o"), "destination": (VERMILION, "--", "s")}
    for side, (color, line, marker) in styles.items():
        axes.plot(
            rates["time_s"] * 1e3, rates[f"{side}_steps_s"], color=color, linestyle=line,
            marker=marker, markersize=3, linewidth=1.3, label=side,
        )  # fmt: skip
    steps = rates[["source_steps_s", "destination_steps_s"]].to_numpy()
    positive = steps[steps > 0]
    if len(positive) and positive.max() > _WIDE_RANGE * np.quantile(positive, _SLOW_SHARE):
        decades = [math.floor(math.log10(edge)) for edge in (positive.min(), positive.max())]
        axes.set_yscale("symlog", linthresh=10.0 ** decades[0])
        axes.set_yticks([0.0, *(10.0**decade for decade in range(decades[0], decades[1] + 1))])
        axes.set_ylabel("steps/s (log)")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_transfer(axes: Axes, rates: pd.DataFrame, samples: pd.DataFrame) -> None:
    """Draw the rates on each other; those of requested pages, which are few, get a line too."""
    headline(axes, "Guest RAM that came at the destination")
    axes.set_ylabel("MiB/s")
    if rates.empty:
        note(axes, "no samples were taken")
        axes.set_yticks([])
        return
    below = rates["time_s"] * 0.0
    for kind in KINDS:
        if not rates[f"{kind}_mib_s"].any():
            continue
        color, hatch, label = _RATE_STYLES[kind]
        above = below + rates[f"{kind}_mib_s"]
        axes.fill_between(
            rates["time_s"] * 1e3, below, above, step="mid", facecolor=color,
            label=f"{label} ({samples[f'destination_{kind}_pages'].max():,} pages)",
            hatch=hatch, edgecolor="black", linewidth=0.5,
        )  # fmt: skip
        if kind == "requested":
            line = above.where(rates["requested_mib_s"] > 0)
            axes.plot(rates["time_s"] * 1e3, line, drawstyle="steps-mid", color=color)
        below = above
    axes.set_ylim(bottom=0)


def _draw_faults(axes: Axes, run: Run) -> None:
    """Draw each fault at its time and its place in RAM; of very many a random part."""
    faults = run.faults
    shown = faults.sample(_MOST_POINTS, random_state=0) if len(faults) > _MOST_POINTS else faults
    text = f"{len(faults):,} page faults of the destination guest"
    if len(shown) < len(faults):
        text += f", {len(shown):,} of them drawn"
    headline(axes, text)
    axes.set_ylabel("place in RAM (MiB)")
    sizes = [int(block["size"]) for block in run.meta.get("blocks", ())]
    axes.set_ylim(0, max([int(run.meta["options"]["memory"]), *sizes]) / _MIB or None)
    if faults.empty:
        note(axes, "no faults" if not faults.attrs["warnings"] else "no faults were recorded")
    size = 5 if len(shown) > _MANY_POINTS else 16
    for resolution in reversed(RESOLUTION_STYLES):
        mine = shown[shown["resolution"] == resolution]
        if len(mine):
            color, marker, _ = RESOLUTION_STYLES[resolution]
            axes.scatter(
                _ms(run, mine["ts_ns"]), mine["offset"] / _MIB, s=size, color=color, marker=marker,
                alpha=0.4 if resolution == "minor" else 0.9, linewidth=0, rasterized=True,
            )  # fmt: skip
    for resolution in RESOLUTION_STYLES:
        if count := int((faults["resolution"] == resolution).sum()):
            resolution_key(axes, resolution, count)
