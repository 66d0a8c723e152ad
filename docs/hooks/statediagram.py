"""The states of a side as a figure (SVG): every step of the table, nothing that is not in it.

Only the places of the boxes are given here. A state without a place fails the build.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from html import escape

from migkit.migration.states import ENDED, Status

Table = Mapping[Status, frozenset[Status]]
Place = tuple[int, int]

_S = Status
SOURCE: Mapping[Status, Place] = {
    _S.NONE: (1, 0), _S.SETUP: (1, 1), _S.ACTIVE: (1, 2), _S.PRE_SWITCHOVER: (1, 3),
    _S.DEVICE: (1, 4), _S.POSTCOPY_DEVICE: (1, 5), _S.POSTCOPY_ACTIVE: (1, 6), _S.COMPLETED: (1, 7),
    _S.CANCELLING: (0, 1), _S.CANCELLED: (0, 2), _S.FAILING: (0, 3), _S.FAILED: (0, 4),
    _S.POSTCOPY_RECOVER: (2, 4), _S.POSTCOPY_RECOVER_SETUP: (2, 5), _S.POSTCOPY_PAUSED: (2, 6),
}  # fmt: skip
DESTINATION: Mapping[Status, Place] = {
    _S.NONE: (1, 0), _S.SETUP: (1, 1), _S.ACTIVE: (1, 2), _S.POSTCOPY_ACTIVE: (1, 3),
    _S.COMPLETED: (1, 4), _S.FAILED: (0, 2), _S.POSTCOPY_RECOVER: (2, 2),
    _S.POSTCOPY_PAUSED: (2, 3),
}  # fmt: skip
"""Column and row of each state."""

_WIDTH, _HEIGHT = 196, 34
_COLUMN, _ROW = 290, 70
_MARGIN = 12
_APART = 9  # half the distance of two steps between the same states


def draw(title: str, table: Table, places: Mapping[Status, Place]) -> str:
    """Return the figure, with a text for who cannot see it."""
    steps = [(old, new) for old, after in table.items() for new in sorted(after)]
    restarts = {old for old, new in steps if old in ENDED and new == _S.SETUP}
    group = _group(table, places)
    shown = [(old, new) for old, new in steps if old not in restarts and
             (old not in group or new not in _sinks(table, group))]  # fmt: skip
    lines = [_line(old, new, places, (new, old) in steps) for old, new in shown]
    lines += [_from_group(new, group, places) for new in sorted(_sinks(table, group))]
    columns, rows = (max(place[axis] for place in places.values()) for axis in (0, 1))
    width = columns * _COLUMN + _WIDTH + 2 * _MARGIN + 40
    height = rows * _ROW + _HEIGHT + 2 * _MARGIN + 30
    boxes = [_box(status, places[status], ended=status in ENDED) for status in table]
    text = f"{title}: " + "; ".join(
        f"{old} to {' or '.join(sorted(after))}" for old, after in table.items() if after
    )
    caption = _caption(restarts, group)
    return (
        f'<figure class="states"><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(text)}"><defs><marker id="{title[4:7]}-tip" viewBox="0 0 8 8" '
        'refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker></defs>'
        f"{_group_box(group, places)}{''.join(lines)}{''.join(boxes)}</svg>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    ).replace("#tip", f"#{title[4:7]}-tip")


def _caption(restarts: set[Status], group: list[Status]) -> str:
    text = "States with a thick border end a migration."
    if group:
        text += " An arrow from the dashed frame begins at any state within it."
    if restarts:
        text += f" From {' or '.join(sorted(restarts))} a new migration begins at setup."
    return text


def _group(table: Table, places: Mapping[Status, Place]) -> list[Status]:
    """Return the states below each other, three at least, that fail and are cancelled alike."""
    left = {status for status, place in places.items() if place[0] == 0}
    alike = Counter(frozenset(after & left) for after in table.values())
    sinks, count = max(alike.items(), key=lambda item: (len(item[0]) > 1, item[1]))
    if len(sinks) < 2 or count < 3:
        return []
    group = sorted((s for s in table if table[s] & left == sinks), key=lambda s: places[s][1])
    rows = [places[status][1] for status in group]
    if rows != list(range(rows[0], rows[0] + count)):
        raise ValueError(f"give {', '.join(group)} places below each other: they leave alike")
    return group


def _sinks(table: Table, group: list[Status]) -> frozenset[Status]:
    """Return where all of a group's states lead and only they are drawn together."""
    return frozenset.intersection(*(table[status] for status in group)) if group else frozenset()


def _centre(place: Place) -> tuple[int, int]:
    return (
        _MARGIN + _WIDTH // 2 + place[0] * _COLUMN,
        _MARGIN + _HEIGHT // 2 + place[1] * _ROW,
    )


def _box(status: Status, place: Place, *, ended: bool) -> str:
    x, y = _centre(place)
    kind = ' class="ended"' if ended else ""
    return (
        f'<rect{kind} x="{x - _WIDTH // 2}" y="{y - _HEIGHT // 2}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" rx="6"/><text x="{x}" y="{y + 5}">{status.value}</text>'
    )


def _group_box(group: list[Status], places: Mapping[Status, Place]) -> str:
    if not group:
        return ""
    x, top = _centre(places[group[0]])
    _, bottom = _centre(places[group[-1]])
    return (
        f'<rect class="group" x="{x - _WIDTH // 2 - 14}" y="{top - _HEIGHT // 2 - 12}" '
        f'width="{_WIDTH + 28}" height="{bottom - top + _HEIGHT + 24}" rx="10"/>'
    )


def _from_group(new: Status, group: list[Status], places: Mapping[Status, Place]) -> str:
    (x, y), (left, _) = _centre(places[new]), _centre(places[group[0]])
    return _path(f"M{left - _WIDTH // 2 - 14} {y}H{x + _WIDTH // 2}")


def _line(old: Status, new: Status, places: Mapping[Status, Place], both: bool) -> str:
    """Return one step as an arrow; ``both``: there is one back, too."""
    (x0, y0), (x1, y1) = _centre(places[old]), _centre(places[new])
    columns, rows = (places[new][axis] - places[old][axis] for axis in (0, 1))
    if columns == 0:
        down = 1 if rows > 0 else -1
        if abs(rows) == 1:
            x = x0 - down * (_APART if both else 0)
            return _path(f"M{x} {y0 + down * _HEIGHT // 2}V{y1 - down * _HEIGHT // 2}")
        side, bow = x0 + _WIDTH // 2, 14 + 13 * abs(rows)
        shift = 3 * abs(rows)
        return _path(
            f"M{side} {y0 + shift // 2}C{side + bow} {y0 + shift + 20 * down} {side + bow} "
            f"{y1 - shift - 20 * down} {side} {y1 - down * shift // 2}"
        )
    left = 1 if columns > 0 else -1
    if abs(columns) == 1:
        y0 += 6 * (rows > 0) - 6 * (rows < 0)
        y1 += 8 * (rows < 0) - 8 * (rows > 0)
        return _path(f"M{x0 + left * _WIDTH // 2} {y0}L{x1 - left * _WIDTH // 2} {y1}")
    # Past everything in between: below all rows.
    bottom = _centre((0, max(place[1] for place in places.values())))[1] + _HEIGHT // 2 + 18
    return _path(f"M{x0} {y0 + _HEIGHT // 2}V{bottom}H{x1}V{y1 + _HEIGHT // 2}")


def _path(d: str) -> str:
    return f'<path class="step" d="{d}" marker-end="url(#tip)"/>'
