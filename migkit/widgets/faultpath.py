"""The critical path of one fault: where it was, step by step, across the processes and the kernel.

The steps are as wide as they are long, but each is at least wide enough for its number.
"""

from __future__ import annotations

from html import escape
from typing import Any

import pandas as pd

from migkit.analysis.schema import STAGES
from migkit.view.style import STAGE_STYLES, duration

_GUEST, _KERNEL, _DESTINATION, _SOURCE, _STOPPED = range(5)
_LANES = (
    "guest (destination)", "kernel", "destination process", "source process", "guest (source)",
)  # fmt: skip
_PATH = {
    "blocked": (_GUEST, _KERNEL), "read": (_KERNEL, _DESTINATION),
    "requested": (_DESTINATION, _DESTINATION), "received_by_source": (_DESTINATION, _SOURCE),
    "sent": (_SOURCE, _SOURCE), "received": (_SOURCE, _DESTINATION),
    "placed": (_DESTINATION, _DESTINATION), "woken": (_DESTINATION, _KERNEL),
    "running": (_KERNEL, _GUEST),
}  # fmt: skip
"""From where to where each step leads."""

_LEFT, _WIDTH, _LANE, _LEAST, _TOP = 190, 820, 50, 34, 14


def draw(fault: pd.Series[Any]) -> str:
    """Return an SVG of a row of the fault table, with the steps in words below it."""
    known = [stage for stage in STAGES if not pd.isna(fault[f"{stage}_ns"])]
    times = [int(fault[f"{stage}_ns"]) for stage in known]
    for i in range(1, len(times)):  # two processes may note one moment in either order
        times[i] = max(times[i], times[i - 1])
    steps = [
        (stage, (times[i + 1] - times[i]) / 1e3)
        for i, stage in enumerate(known[1:])
    ]  # fmt: skip
    if not steps:
        return "<p>Of this fault only one stage is known: there is no path to draw.</p>"
    whole = sum(us for _, us in steps)
    room = _WIDTH - _LEAST * len(steps)
    x, parts, legend = float(_LEFT), [], []
    for number, (stage, us) in enumerate(steps, 1):
        width = _LEAST + (room * us / whole if whole else 0.0)
        parts.append(_step(number, stage, x, width))
        words = f"{STAGE_STYLES[stage][2]}: {duration(us)}"
        legend.append(f"<li><b>{escape(words)}</b></li>" if us == max(u for _, u in steps)
                      else f"<li>{escape(words)}</li>")  # fmt: skip
        x += width
    height = _TOP + _LANE * len(_LANES) + 6
    title = (
        f"Page {int(fault['page']):,}, thread {int(fault['tid'])}: {fault['resolution']}, "
        f"{duration(whole)} from {known[0]} to {known[-1]}"
    )
    lanes = "".join(_lane(number, name) for number, name in enumerate(_LANES))
    return (
        '<div class="migkit-path" style="color:var(--jp-ui-font-color1,inherit);'
        f'font:15px/1.4 var(--jp-ui-font-family,sans-serif)"><b>{escape(title)}</b>'
        f'<svg viewBox="0 0 {_LEFT + _WIDTH + 14} {height}" role="img" '
        f'aria-label="{escape(title)}" style="display:block;max-width:100%" '
        f'xmlns="http://www.w3.org/2000/svg">{lanes}{"".join(parts)}</svg>'
        f'<ol style="columns:2;margin:0">{"".join(legend)}</ol></div>'
    )


def _y(lane: int) -> float:
    return _TOP + _LANE * (lane + 0.5)


def _lane(number: int, name: str) -> str:
    y = _y(number)
    return (
        f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y}" y2="{y}" stroke="currentColor" '
        f'opacity="0.3" stroke-dasharray="2 4"/><text x="{_LEFT - 10}" y="{y + 5}" '
        f'text-anchor="end" fill="currentColor" font-size="16">{name}</text>'
    )


def _step(number: int, stage: str, x: float, width: float) -> str:
    """Draw a step: a bar in its lane, or a band that leads from one lane to another."""
    from_, to = (_y(lane) for lane in _PATH[stage])
    color = STAGE_STYLES[stage][0]
    title = f"<title>{escape(STAGE_STYLES[stage][2])}</title>"
    half = 13
    corners = (
        f"{x:.1f},{from_ - half} {x:.1f},{from_ + half} "
        f"{x + width:.1f},{to + half} {x + width:.1f},{to - half}"
    )
    middle = x + width / 2, (from_ + to) / 2
    return (
        f'<polygon points="{corners}" fill="{color}" stroke="#000">{title}</polygon>'
        f'<circle cx="{middle[0]:.1f}" cy="{middle[1]:.1f}" r="11" fill="#fff" stroke="#000"/>'
        f'<text x="{middle[0]:.1f}" y="{middle[1] + 5:.1f}" text-anchor="middle" '
        f'font-size="15" font-weight="700" fill="#000">{number}</text>'
    )
