"""How the states of pages look, in every picture: colour, grey level, shape and words together.

Told apart without colour by lightness, which falls in steps from state to state, and where a
cell is large enough by a shape within it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from migkit.migration.pagemap import PageState


@dataclass(frozen=True)
class Look:
    """A fill, the ink and the shape drawn upon it, and what the legend says."""

    fill: str
    ink: str
    shape: str
    hatch: str
    label: str


LOOKS = {
    PageState.AT_SOURCE: Look("#FFFFFF", "#8C8C8C", "none", "", "only at the source"),
    PageState.SENT: Look("#7CC7F0", "#00324F", "none", "..", "sent"),
    PageState.DIRTY_AGAIN: Look("#F0E442", "#4A4500", "slash", "//", "dirty again"),
    PageState.DISCARDED: Look("#B84300", "#FFFFFF", "cross", "xx", "discarded"),
    PageState.BACKGROUND: Look("#004C80", "#FFFFFF", "bar", "--", "placed by background"),
    PageState.ANSWERED: Look("#CC8800", "#000000", "dot", "oo", "placed by request"),
    PageState.REQUESTED: Look("#000000", "#FFFFFF", "ring", "OO", "requested"),
}
"""The look of each :class:`PageState`."""

KEY = [asdict(LOOKS[state]) for state in PageState]
"""The looks by number, plain values for the browser."""
