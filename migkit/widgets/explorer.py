"""The Explorer: a recorded run, ours or QEMU's, taken apart at any moment of its time."""

from __future__ import annotations

from collections.abc import Hashable
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import numpy as np
import pandas as pd

from migkit.analysis.pages import Block, page_changes
from migkit.view.style import duration
from migkit.widgets import faultpath, statemachine
from migkit.widgets.look import LOOKS
from migkit.widgets.notebook import show, without_widgets
from migkit.widgets.pagemap import PageMapView, draw, in_words
from migkit.widgets.timeline import TimelineView

if TYPE_CHECKING:
    from migkit.analysis.run import Run

_STEPS = 400
_ROWS = 200
_NONE = -1
_STYLE = (
    "<style>.migkit-faults select{font:14px/1.5 var(--jp-code-font-family,monospace);"
    "height:190px}</style>"
)


class Explorer:
    """A run with a time slider: page map, state machine, timeline, fault table, one fault's path.

    ``migkit.Explorer(run)``, shown by its cell; it begins at the switchover. ``faults`` is what
    the table lists: the faults of the span brushed in the timeline, the longest first.
    """

    def __init__(self, run: Run) -> None:
        """Derive the states of all pages from the run's trace."""
        self.run = run
        self._block = Block.of(run)
        self._changes = page_changes(run)
        self._latency = run.faults["latency_us"].fillna(0.0).to_numpy()
        self._times_ms = run.faults["time_s"].to_numpy() * 1e3
        self.faults: pd.DataFrame = run.faults.iloc[:0]
        self._timeline = TimelineView(run, self._block)
        self._begin_ms, self._end_ms = self._timeline.span_ms
        self._map = PageMapView(self._describe)
        if self._block.n_pages:
            self._map.resize(self._block.n_pages, self._block.page_size)
        self._time = ipw.HTML()
        first = self._step(self._first_ms())
        self._slider = ipw.IntSlider(
            value=first, max=_STEPS, readout=False, description="time",
            layout={"width": "70%", "min_width": "300px"},
        )  # fmt: skip
        self._play = ipw.Play(max=_STEPS, interval=100, value=first)
        ipw.jslink((self._play, "value"), (self._slider, "value"))
        self._diagram, self._path = ipw.HTML(), ipw.HTML()
        self._table = ipw.Select(rows=9, layout={"width": "100%", "max_width": "1024px"})
        self._table.add_class("migkit-faults")
        self._heading = ipw.HTML()
        self.panel = ipw.VBox(
            [
                ipw.HTML(self._about()),
                ipw.HBox([self._play, self._slider, self._time]),
                self._map, self._timeline, self._heading, self._table, self._path, self._diagram,
            ],
            layout={"grid_gap": "6px", "padding": "4px"},
        )  # fmt: skip
        self.panel.add_class("migkit-panel")
        self._slider.observe(self._slid, "value")
        self._timeline.observe(self._clicked, "cursor_ms")
        self._timeline.observe(self._brushed, "brush_ms")
        self._table.observe(self._chose, "value")
        self._brushed()
        self._slid()

    def show(self, ms: float) -> None:
        """Show a moment, in ms since the run's first event."""
        ms = min(max(ms, self._begin_ms), self._end_ms)
        now_ns = self.run.origin_ns + round(ms * 1e6)
        if self._block.n_pages:
            self._map.show(self._changes.at(now_ns))
        self._time.value = f'<b style="font-size:17px">{ms:,.2f} ms</b>'
        self._timeline.cursor_ms = ms
        self._draw_states(now_ns)

    def brush(self, begin_ms: float, end_ms: float) -> None:
        """List the faults of a span of time, as dragging in the timeline does."""
        self._timeline.brush_ms = [begin_ms, end_ms]

    def _ipython_display_(self) -> None:
        show(self.panel, self._without_widgets())

    def _without_widgets(self) -> dict[str, str]:
        states = self._changes.at(self.run.origin_ns + round(self._end_ms * 1e6))
        text = f"migkit Explorer: {self._title()}"
        figure = None
        if len(states):
            text += f"; at the end {in_words(states)}"
            figure = draw(states, f"Page map at the end: {self.run.status}")
        return without_widgets(text, self._path.value, figure)

    # What is shown.

    def _title(self) -> str:
        return f"{self.run.path.name}: {self.run.status}, {len(self.run.faults):,} page faults"

    def _about(self) -> str:
        text = f"{escape(self._title())}."
        sent = len(self.run.traces["source"]["ram_save_range"])
        if not self._block.n_pages:
            text += " The trace does not tell of pages: the map stays empty."
        elif not sent:
            text += (
                " What was sent in pre-copy is not in the trace: such pages are shown as they "
                "were before."
            )
        return (
            f'{_STYLE}<div style="font-size:15px;line-height:1.4;'
            f'color:var(--jp-ui-font-color1,inherit)">{text}</div>'
        )

    def _draw_states(self, now_ns: int) -> None:
        states: dict[str, list[str]] = {"source": [], "destination": []}
        for ts_ns, role, status in self.run.meta.get("statuses", ()):
            if ts_ns <= now_ns:
                states[role].append(status)
        source, there = states["source"] or ["none"], (states["destination"] or [""])[-1]
        picture = statemachine.draw(source[-1], set(source[:-1]), there)
        if picture != self._diagram.value:
            self._diagram.value = picture

    def _describe(self, page: int) -> str:
        parts = [LOOKS[state].label for state in LOOKS][:1]
        for ts_ns, state in self._changes.of_page(page)[-12:]:
            parts.append(f"{LOOKS[state].label} at {(ts_ns - self.run.origin_ns) / 1e6:,.2f} ms")
        return f"page {page:,}: " + " → ".join(parts)

    def _first_ms(self) -> float:
        """Return the moment to begin with: the switchover, where there was one."""
        if len(downtime := self.run.downtime):
            return float(downtime["start_ns"].iloc[0] - self.run.origin_ns) / 1e6
        return (self._begin_ms + self._end_ms) / 2

    def _step(self, ms: float) -> int:
        """Return the slider's step for a moment."""
        share = (ms - self._begin_ms) / max(self._end_ms - self._begin_ms, 1e-9)
        return round(min(max(share, 0.0), 1.0) * _STEPS)

    # What was done.

    def _slid(self, _: object = None) -> None:
        share = self._slider.value / _STEPS
        self.show(self._begin_ms + share * (self._end_ms - self._begin_ms))

    def _clicked(self, change: dict[str, Any]) -> None:
        ms = change["new"]
        step = self._step(ms)
        if step != self._slider.value:
            with self._slider.hold_trait_notifications():
                self._slider.unobserve(self._slid, "value")
                self._slider.value = step
            self._slider.observe(self._slid, "value")
            self.show(ms)

    def _brushed(self, _: object = None) -> None:
        """List the longest faults of the span, all if none is chosen."""
        begin, end = self._timeline.brush_ms or (-np.inf, np.inf)
        inside = np.flatnonzero((self._times_ms >= begin) & (self._times_ms <= end))
        longest = inside[np.argsort(-self._latency[inside], kind="stable")[:_ROWS]]
        self.faults = self.run.faults.iloc[longest]
        where = f"from {begin:,.1f} to {end:,.1f} ms" if self._timeline.brush_ms else "of the run"
        few = f", the {len(longest)} longest listed" if len(longest) < len(inside) else ""
        self._heading.value = (
            '<div style="font-size:15px;color:var(--jp-ui-font-color1,inherit)"><b>'
            f"{len(inside):,} faults {where}{few}.</b> Drag in the timeline to choose a span "
            "(Escape: all); choose a fault to see its path and its moment.</div>"
        )
        self._table.unobserve(self._chose, "value")
        self._table.options = [
            (_line(row), int(place))
            for place, row in zip(longest, self.faults.to_dict("records"), strict=True)
        ]
        self._table.observe(self._chose, "value")
        self._timeline.chosen = []
        self._map.mark = _NONE
        self._path.value = faultpath.draw(self.faults.iloc[0]) if len(longest) else ""

    def _chose(self, change: dict[str, Any]) -> None:
        if change["new"] is None:
            return
        fault = self.run.faults.iloc[change["new"]]
        self._path.value = faultpath.draw(fault)
        share = fault["offset"] / max(1, self._block.size)
        self._timeline.chosen = [fault["time_s"] * 1e3, share]
        self._map.mark = int(fault["page"]) // self._map.pages_per_cell
        self._timeline.cursor_ms = fault["time_s"] * 1e3


def _line(fault: dict[Hashable, Any]) -> str:
    us = fault["latency_us"]
    waited = duration(us) if us == us else "not known"  # noqa: PLR0124 — NaN
    what = {True: "write", False: "read"}.get(fault["write"], "")
    return (
        f"{fault['time_s'] * 1e3:>12,.2f} ms   page {fault['page']:>9,}   "
        f"{fault['resolution']!s:<11} {waited:>10}   {what}"
    )
