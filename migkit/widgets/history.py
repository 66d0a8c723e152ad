"""What became of each page: when it entered each state, as far as somebody looked."""

from __future__ import annotations

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
        self._entered = np.full((len(PageState), n_pages), np.nan, np.float32)
        self._times = np.zeros((len(PageState), n_pages), np.uint16)

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
            self._entered[into, changed] = time_s
            self._times[into, changed] += 1
            self.states = states
        return self.states

    def describe(self, page: int) -> str:
        """Say what became of a page, with the times in s."""
        if not 0 <= page < len(self.states):
            return f"there is no page {page}"
        entered = self._entered[:, page]
        parts = [LOOKS[PageState.AT_SOURCE].label]
        for state in np.argsort(entered)[: np.count_nonzero(~np.isnan(entered))].tolist():
            text = f"{LOOKS[PageState(state)].label} at {entered[state]:.2f} s"
            if (times := int(self._times[state, page])) > 1:
                text += f" ({times} times)"
            parts.append(text)
        return f"page {page:,}: " + " → ".join(parts)
