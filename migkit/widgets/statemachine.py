"""The state machine as a picture, drawn from the table in :mod:`migkit.migration.states`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from html import escape

from migkit.migration.states import ENDED, SOURCE, Status

_S = Status
_PLACES: Mapping[Status, tuple[float, float]] = {
    _S.NONE: (0, 1), _S.SETUP: (1, 1), _S.ACTIVE: (2, 1), _S.PRE_SWITCHOVER: (3, 0),
    _S.DEVICE: (4, 1), _S.COMPLETED: (6, 1),
    _S.POSTCOPY_DEVICE: (5, 0), _S.POSTCOPY_ACTIVE: (6, 0),
    _S.POSTCOPY_PAUSED: (7, 0), _S.POSTCOPY_RECOVER_SETUP: (7, -1), _S.POSTCOPY_RECOVER: (6, -1),
    _S.CANCELLING: (2, 2), _S.CANCELLED: (1, 2), _S.FAILING: (4, 2), _S.FAILED: (6, 2),
}  # fmt: skip
"""Column and row of each state: the good end in the middle, post-copy above, the bad ends below."""

_WIDTH, _HEIGHT = 132, 46  # a state, in px
_STEP_X, _STEP_Y, _LEFT, _TOP = 154, 96, 70, 126
_STYLE = (
    "<style>.migkit-fsm{font:600 17px var(--jp-ui-font-family,sans-serif);max-width:100%;"
    "color:var(--jp-ui-font-color1,#222);background:var(--jp-layout-color0,#fff)}"
    ".migkit-fsm path{fill:none;stroke:currentColor}</style>"
)


def draw(
    status: Status | str,
    passed: Collection[str] = (),
    destination: Status | str = "",
    table: Mapping[Status, frozenset[Status]] = SOURCE,
) -> str:
    """Return an SVG of a table of states with the current one lit.

    ``passed`` are the states that were entered before: they have a double edge. Possible next
    steps are thick arrows. ``destination`` is the other side's state, a tag beside the box.
    """
    current = Status(status)
    width = _LEFT * 2 + _STEP_X * 7
    height = _TOP + _STEP_Y * 2 + 40
    says = f"State machine of the migration: the source is {current}" + (
        f", the destination {destination}" if destination else ""
    )
    pairs = [(old, new) for old in table for new in sorted(table[old])]
    pairs.sort(key=lambda pair: pair[0] == current)  # the lit ones on top
    arrows = [_arrow(old, new, lit=old == current) for old, new in pairs]
    boxes = [_box(state, current, passed, destination) for state in table]
    return (
        f'<svg class="migkit-fsm" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(says)}" xmlns="http://www.w3.org/2000/svg">{_STYLE}'
        '<defs><marker id="migkit-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="11" '
        'markerHeight="11" orient="auto" markerUnits="userSpaceOnUse">'
        '<path d="M0 0 L8 4 L0 8 z" style="fill:currentColor;stroke:none"/></marker></defs>'
        f"{''.join(arrows)}{''.join(boxes)}</svg>"
    )


def _centre(state: Status) -> tuple[float, float]:
    column, row = _PLACES[state]
    return _LEFT + column * _STEP_X, _TOP + row * _STEP_Y


def _edge(from_: tuple[float, float], to: tuple[float, float]) -> tuple[float, float]:
    """Return where the line between two centres leaves the first one's box."""
    dx, dy = to[0] - from_[0], to[1] - from_[1]
    scale = min(
        (_WIDTH / 2 + 1) / abs(dx) if dx else math.inf,
        (_HEIGHT / 2 + 1) / abs(dy) if dy else math.inf,
    )
    return from_[0] + dx * scale, from_[1] + dy * scale


def _arrow(old: Status, new: Status, *, lit: bool) -> str:
    a, b = _centre(old), _centre(new)
    length = math.dist(a, b)
    # Bent to the left of its direction, the more the longer: two ways do not lie on each other.
    bend = 9.0 if length < 1.5 * _STEP_X else 0.12 * length
    normal = (b[1] - a[1]) / length, -(b[0] - a[0]) / length
    middle = (a[0] + b[0]) / 2 + bend * normal[0], (a[1] + b[1]) / 2 + bend * normal[1]
    (x0, y0), (x1, y1) = _edge(a, middle), _edge(b, middle)
    look = 'stroke-width="3.5"' if lit else 'stroke-width="1" opacity="0.35"'
    if old in ENDED:  # only if the guest migrates again
        look = 'stroke-width="1" opacity="0.35" stroke-dasharray="5 4"'
    tip = 'marker-end="url(#migkit-tip)"'
    return (
        f'<path d="M{x0:.0f} {y0:.0f} Q{middle[0]:.0f} {middle[1]:.0f} {x1:.0f} {y1:.0f}" '
        f"{look} {tip}><title>{old} to {new}</title></path>"
    )


def _box(state: Status, current: Status, passed: Collection[str], destination: str) -> str:
    x, y = _centre(state)
    lit, was = state == current, state in passed
    fill = "#0072B2" if lit else "#D5EAF7" if was else "#FFFFFF"
    ink = "#FFFFFF" if lit else "#222222"
    border = "#000000" if lit else "#0072B2" if was else "#8C8C8C"
    left, top = x - _WIDTH / 2, y - _HEIGHT / 2
    rectangle = (
        f'<rect x="{left}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" rx="7" fill="{fill}" '
        f'stroke="{border}" stroke-width="{3 if lit or was else 1.2}"/>'
    )
    lines = state.value.split("-", 1) if "-" in state.value else [state.value]
    if lit:
        lines[0] = f"▶ {lines[0]}"
    first = y + 6 - 9 * (len(lines) - 1)
    text = "".join(
        f'<text x="{x}" y="{first + 18 * i}" text-anchor="middle" fill="{ink}" '
        f'font-size="{17 if len(line) < 12 else 15}">{line}</text>'
        for i, line in enumerate(lines)
    )
    tag = ""
    if state == destination:
        tag = (
            f'<rect x="{x - 54}" y="{top + _HEIGHT}" width="108" height="20" rx="4" '
            f'fill="#CC8800" stroke="#000"/><text x="{x}" y="{top + _HEIGHT + 15}" '
            'text-anchor="middle" font-size="16" fill="#000">destination</text>'
        )
    return rectangle + text + tag
