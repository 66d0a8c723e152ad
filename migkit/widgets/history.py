"""What became of each page: when it entered each state, as far as somebody looked."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from migkit.migration.pagemap import PageState
from migkit.widgets.look import LOOKS

States = npt.NDArray[np.uint8]


class PageHistory:
    """The states of all pages as of the last look, and the times of each page's earlier ones."""

    def __init__(self, n_pages: int) -> None:
        """Begin with every page only at the source."""
        self.states: States = np.zeros(n_pages, np.uint8)
        shape = len(PageState), n_pages
        self._first, self._last = (np.full(shape, np.nan, np.float32) for _ in range(2))

    def update(self, states: States, time_s: float) -> States:
        """Take the states (n_pages,) that were seen at a time; return them as they are shown.

        A page that the background placed stays so when, after a recovery, the source knows of it
        only that it is at the destination.
        """
        placed = np.uint8(PageState.BACKGROUND)
        forgotten = (self.states == placed) & (states == PageState.SENT)
        if forgotten.any():
            states = np.where(forgotten, placed, states)
        changed = np.flatnonzero(states != self.states)
        if len(changed):
            into = states[changed]
            first = self._first[into, changed]
            self._first[into, changed] = np.where(np.isnan(first), time_s, first)
            self._last[into, changed] = time_s
            self.states = states
        return self.states

    def describe(self, page: int) -> str:
        """Say what became of a page, with the times in s."""
        if not 0 <= page < len(self.states):
            return f"there is no page {page}"
        first, last = self._first[:, page].tolist(), self._last[:, page].tolist()
        parts = [LOOKS[PageState.AT_SOURCE].label]
        entered = [state for state in PageState if not math.isnan(first[state])]
        for state in sorted(entered, key=first.__getitem__):
            text = f"{LOOKS[state].label} at {first[state]:.2f} s"
            if last[state] > first[state]:
                text += f", last at {last[state]:.2f} s"
            parts.append(text)
        return f"page {page:,}: " + " → ".join(parts)
