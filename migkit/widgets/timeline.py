"""The Explorer's timeline: a run's phases and faults over time, to brush and to click."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import numpy as np
import traitlets
from matplotlib.ticker import MaxNLocator

from migkit.view.style import GREY, PHASE_STYLES, RESOLUTION_STYLES

if TYPE_CHECKING:
    from migkit.analysis.pages import Block
    from migkit.analysis.run import Run

_MOST_POINTS = 20_000
_DARK = 0.5


class TimelineView(anywidget.AnyWidget):
    """A run over time; ``brush_ms`` is the span that was chosen, ``cursor_ms`` the moment.

    ``points`` are float32 triples: ms, place in RAM as a share, number of the resolution.
    """

    _esm = Path(__file__).with_name("timeline.js")
    _css = Path(__file__).with_name("timeline.css")

    span_ms = traitlets.List([0.0, 1.0]).tag(sync=True)
    size_mib = traitlets.Float(0.0).tag(sync=True)
    phases: traitlets.List[Any] = traitlets.List().tag(sync=True)
    ticks: traitlets.List[Any] = traitlets.List().tag(sync=True)
    points = traitlets.Bytes(b"").tag(sync=True)
    key: traitlets.List[Any] = traitlets.List().tag(sync=True)
    says = traitlets.Unicode("").tag(sync=True)
    cursor_ms = traitlets.Float(0.0).tag(sync=True)
    brush_ms: traitlets.List[Any] = traitlets.List([]).tag(sync=True)
    chosen: traitlets.List[Any] = traitlets.List([]).tag(sync=True)
    """ms and place of a fault, or nothing."""

    def __init__(self, run: Run, block: Block) -> None:
        """Draw a run; of very many faults a random part."""
        faults = run.faults
        shown = faults
        if len(faults) > _MOST_POINTS:
            shown = faults.sample(_MOST_POINTS, random_state=0)
        names = list(RESOLUTION_STYLES)
        number = shown["resolution"].map({name: i for i, name in enumerate(names)})
        known = number.notna()
        points = np.column_stack([
            shown.loc[known, "time_s"] * 1e3,
            shown.loc[known, "offset"] / max(1, block.size),
            number[known].astype(float),
        ]).astype(np.float32)  # fmt: skip
        counts = faults["resolution"].value_counts()
        phases = _phases(run)
        span = _span_ms(run, phases)
        drawn = f", {len(shown):,} of them drawn" if len(shown) < len(faults) else ""
        super().__init__(
            span_ms=span, cursor_ms=span[1], size_mib=block.size / (1 << 20), phases=phases,
            points=points.tobytes(),
            ticks=[{"at": at, "text": f"{at:,g}"} for at in _ticks(span)],
            says=f"{len(faults):,} page faults by time and place in RAM{drawn}; phases of the "
            "source: " + ", ".join(dict.fromkeys(phase["name"] for phase in phases)),
            key=[
                {"color": color, "marker": marker, "label": label,
                 "count": int(counts.get(name, 0))}
                for name, (color, marker, label) in RESOLUTION_STYLES.items()
            ],
        )  # fmt: skip


def _phases(run: Run) -> list[dict[str, Any]]:
    """Return the source's phases, rounds of pre-copy under one name."""
    frame = run.phases[run.phases["side"] == "source"]
    phases = []
    for row in frame.to_dict("records"):
        name = "pre-copy" if row["name"].startswith("precopy") else row["name"]
        color, _ = PHASE_STYLES.get(name, (GREY, ""))
        red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        phases.append({
            "name": name, "color": color,
            "dark": 0.2126 * red + 0.7152 * green + 0.0722 * blue < _DARK,
            "start_ms": (row["start_ns"] - run.origin_ns) / 1e6,
            "end_ms": (row["end_ns"] - run.origin_ns) / 1e6,
        })  # fmt: skip
    return phases


def _span_ms(run: Run, phases: list[dict[str, Any]]) -> list[float]:
    """Return from when to when there is something to be seen: phases, states, else events."""
    states = [(ts_ns - run.origin_ns) / 1e6 for ts_ns, _, _ in run.meta.get("statuses", ())]
    if phases:
        begin = min(phase["start_ms"] for phase in phases)
        return [begin, max([phase["end_ms"] for phase in phases] + states)]
    last = max((trace.span_ns[1] for trace in run.traces.values()), default=0)
    return [0.0, max(1.0, (last - run.origin_ns) / 1e6)]


def _ticks(span: list[float]) -> list[float]:
    places = MaxNLocator(8).tick_values(*span)
    return [float(at) for at in places if span[0] <= at <= span[1]]
