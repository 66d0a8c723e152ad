"""The page map: every page of guest RAM a cell, drawn by the browser from a packed buffer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import numpy as np
import traitlets

from migkit.migration.pagemap import PageState
from migkit.widgets.look import KEY, LOOKS

if TYPE_CHECKING:
    from migkit.view.style import RunFigure
    from migkit.widgets.history import States

MOST_CELLS = 1 << 20
"""Of a larger guest several pages share a cell, which shows the greatest of their states."""


class PageMapView(anywidget.AnyWidget):
    """The states of all pages; hovering asks ``describe`` what became of one.

    Two states a byte travel to the browser, the first in the lower half.
    """

    _esm = Path(__file__).with_name("pagemap.js")
    _css = Path(__file__).with_name("pagemap.css")

    key = traitlets.List(KEY).tag(sync=True)
    n_cells = traitlets.Int(0).tag(sync=True)
    pages_per_cell = traitlets.Int(1).tag(sync=True)
    page_bytes = traitlets.Int(4096).tag(sync=True)
    cells = traitlets.Bytes(b"").tag(sync=True)
    mark = traitlets.Int(-1, help="a cell to point at, -1 for none").tag(sync=True)

    def __init__(self, describe: Callable[[int], str]) -> None:
        """Show nothing yet; ``describe`` takes the number of a page."""
        super().__init__()
        self._describe = describe
        self.on_msg(self._asked)

    def resize(self, n_pages: int, page_bytes: int) -> None:
        """Become the map of a guest of so many pages, all only at the source."""
        per_cell = -(-n_pages // MOST_CELLS)
        n_cells = -(-n_pages // per_cell)
        with self.hold_sync():
            self.pages_per_cell, self.n_cells, self.page_bytes = per_cell, n_cells, page_bytes
            self.cells, self.mark = bytes(-(-n_cells // 2)), -1

    def show(self, states: States) -> None:
        """Draw the states (n_pages,) of all pages."""
        self.cells = pack(states, self.pages_per_cell)

    def _asked(self, _: object, content: dict[str, Any], __: object) -> None:
        page = content.get("page")
        if isinstance(page, int):
            self.send({"page": page, "text": self._describe(page)})


def pack(states: States, per_cell: int) -> bytes:
    """Return two cells a byte; a cell shows the greatest of its pages' states."""
    if per_cell > 1:
        padded = np.zeros(-(-len(states) // per_cell) * per_cell, np.uint8)
        padded[: len(states)] = states
        states = padded.reshape(-1, per_cell).max(axis=1)
    if len(states) % 2:
        states = np.append(states, np.uint8(0))
    return (states[::2] | (states[1::2] << 4)).tobytes()


def count_states(states: States) -> dict[PageState, int]:
    """Return how many pages are in each state that occurs."""
    counts = np.bincount(states, minlength=len(PageState)).tolist()
    return {state: counts[state] for state in PageState if counts[state]}


def in_words(states: States) -> str:
    """Return a line that says how many pages are in which state."""
    counts = count_states(states)
    return f"{len(states):,} pages: " + ", ".join(
        f"{count:,} {LOOKS[state].label}" for state, count in counts.items()
    )


def draw(states: States, title: str) -> RunFigure:
    """Return a static figure of the states (n_pages,), for where there are no widgets."""
    from matplotlib.colors import ListedColormap  # noqa: PLC0415 — only where it is drawn
    from matplotlib.patches import Patch  # noqa: PLC0415

    from migkit.view.style import headline, new_figure  # noqa: PLC0415

    columns = 1 << max(0, (len(states).bit_length() + 1) // 2)
    rows = -(-len(states) // columns)
    cells = np.full(rows * columns, np.nan)
    cells[: len(states)] = states
    figure = new_figure(9.0, 4.0)
    axes = figure.subplots()
    colors = ListedColormap([LOOKS[state].fill for state in PageState])
    axes.imshow(
        cells.reshape(rows, columns), cmap=colors, vmin=-0.5, vmax=len(PageState) - 0.5,
        aspect="auto", interpolation="nearest",
    )  # fmt: skip
    axes.set_xlabel(f"page within its row of {columns:,}")
    axes.set_ylabel("row of pages")
    headline(axes, in_words(states))
    handles = [
        Patch(facecolor=LOOKS[state].fill, hatch=LOOKS[state].hatch, edgecolor=LOOKS[state].ink,
              label=f"{LOOKS[state].label} ({count:,})")
        for state, count in count_states(states).items()
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure
