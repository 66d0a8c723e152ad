"""The requests for missing pages over time: answered, made for nothing, held up by the limiter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.ticker import LogLocator, NullFormatter

from migkit.analysis.requests import limited_spans
from migkit.view.style import (
    BLUE,
    GREY,
    ORANGE,
    VERMILION,
    dress,
    duration,
    duration_ticks,
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

_MOST_POINTS = 20_000
_MOST_SPANS = 2_000
_STYLES = {
    "answered": (BLUE, "o", "the source sent the page for it"),
    "wasted": (ORANGE, "^", "wasted: the page was under way already"),
    "stalled": (VERMILION, "X", "stalled: held up by the rate limiter for 5 ms or more"),
}


def plot_requests(run: Run) -> Figure:
    """Return how long each request waited, over time; grey is when the source was limited."""
    requests = run.requests
    figure = new_figure(10.5, 4.6)
    axes = figure.subplots()
    dress(axes)
    figure.suptitle(_title(requests), x=0.01, ha="left", fontsize=12, fontweight="bold")
    shown = requests[requests["wait_us"] > 0]
    if shown.empty:
        headline(axes, "Each request")
        axes.set(xticks=[], yticks=[])
        note(axes, "no page was requested")
        return figure
    if len(shown) > _MOST_POINTS:
        shown = shown.sample(_MOST_POINTS, random_state=0)
    headline(axes, f"{len(shown):,} of {len(requests):,} requests" if len(shown) < len(requests)
             else "Each request")  # fmt: skip
    _draw_limited(axes, run)
    kind = (
        shown["stalled"]
        .map({True: "stalled"})
        .fillna(shown["wasted"].map({True: "wasted", False: "answered"}))
    )
    for name, (color, marker, label) in _STYLES.items():
        mine = shown[kind == name]
        if len(mine):
            size = 40 if name == "stalled" else 16
            axes.scatter(
                mine["time_s"] * 1e3, mine["wait_us"], s=size, color=color, marker=marker,
                linewidth=0, label=f"{label} ({len(mine):,})", zorder=3, rasterized=True,
            )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(duration_ticks())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("from request to placing (µs, ms)")
    axes.set_xlabel("time since the run's first event (ms)")
    legend_below(figure, axes, columns=2)
    return figure


def _title(requests: pd.DataFrame) -> str:
    if requests.empty:
        return "No page was requested"
    wasted, stalled = int(requests["wasted"].sum()), int(requests["stalled"].sum())
    text = f"{len(requests):,} requests, {wasted / len(requests):.0%} of them for nothing"
    if stalled:
        longest = duration(float(requests["limited_us"].max()))
        return f"{text}; the rate limiter held {stalled:,} up, one for {longest}"
    return f"{text}; the rate limiter held none up"


def _draw_limited(axes: Axes, run: Run) -> None:
    """Shade when the source waited in its rate limiter; the longest times, if there are many."""
    spans = (limited_spans(run.traces["source"]) - run.origin_ns) / 1e6
    if not len(spans):
        return
    longest = spans[(spans[:, 0] - spans[:, 1]).argsort()][:_MOST_SPANS]
    axes.broken_barh(
        [(begin, end - begin) for begin, end in longest.tolist()], (0, 1), color=GREY, alpha=0.25,
        linewidth=0, transform=axes.get_xaxis_transform(), zorder=0, label="the source is limited",
    )  # fmt: skip
