"""The states of all pages at any moment of a recorded run, from its trace events.

What the trace does not say of each page is inferred from what it says later: a page that is sent
again was found dirty when its round began, and one that is sent again in post-copy was thrown
away by the discards before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from migkit.migration.pagemap import PageState

if TYPE_CHECKING:
    from migkit.analysis.run import Run

_KEYFRAMES = 64
_LEAST_BETWEEN = 1 << 15

Ints = npt.NDArray[np.int64]


class PageChanges:
    """Every change of a page's state, by time; :meth:`at` returns the states at a moment.

    ``ts_ns`` (n,) int64, ``page`` (n,) int64, ``state`` (n,) uint8 are parallel.
    """

    def __init__(
        self,
        n_pages: int,
        ts_ns: Ints,
        page: Ints,
        state: npt.NDArray[np.uint8],
        *,
        between: int = _LEAST_BETWEEN,
    ) -> None:
        """Sort the changes, those of one time keep their order; all is kept every so many."""
        inside = (page >= 0) & (page < n_pages)
        order = np.argsort(ts_ns[inside], kind="stable")
        self.ts_ns, self.page, self.state = (
            column[inside][order] for column in (ts_ns, page, state)
        )
        self.n_pages = n_pages
        self._between = max(between, -(-len(self.page) // _KEYFRAMES))
        states = np.zeros(n_pages, np.uint8)
        self._keyframes = [states.copy()]
        for begin in range(0, len(self.page), self._between):
            self._apply(states, begin, begin + self._between)
            self._keyframes.append(states.copy())

    def _apply(self, states: npt.NDArray[np.uint8], begin: int, end: int) -> None:
        states[self.page[begin:end]] = self.state[begin:end]  # of one page the last one stays

    def at(self, ts_ns: int) -> npt.NDArray[np.uint8]:
        """Return the :class:`PageState` of every page at a time, (n_pages,) uint8."""
        end = int(np.searchsorted(self.ts_ns, ts_ns, "right"))
        nearest = end // self._between
        states = self._keyframes[nearest].copy()
        self._apply(states, nearest * self._between, end)
        return states

    def of_page(self, page: int) -> list[tuple[int, PageState]]:
        """Return what became of one page: (ts_ns, state), by time."""
        rows = np.flatnonzero(self.page == page)
        return [(int(self.ts_ns[row]), PageState(int(self.state[row]))) for row in rows.tolist()]


@dataclass(frozen=True)
class Block:
    """The RAM block that is looked at: sizes in bytes, where the destination guest has it."""

    name: str
    size: int
    page_size: int
    address: int

    @property
    def n_pages(self) -> int:
        """How many host pages it has."""
        return self.size // self.page_size

    @classmethod
    def of(cls, run: Run) -> Block:
        """Choose a run's: ours has one, of a QEMU's it is the largest."""
        options = run.meta["options"]
        guest = run.meta.get("guests", {}).get("destination", {})
        only = {
            "name": str(run.meta.get("block", "")), "size": int(options["memory"]),
            "address": int(guest.get("address", 0)),
        }  # fmt: skip
        block = max(run.meta.get("blocks") or [only], key=lambda one: int(one["size"]))
        sizes = int(block["size"]), int(options["page_size"])
        return cls(block["name"], *sizes, int(block["address"]))


def page_changes(run: Run) -> PageChanges:
    """Derive all changes of a run's pages; what was not recorded is not among them."""
    block = Block.of(run)
    changes = _Changes(run, block)
    changes.precopy()
    changes.postcopy()
    return PageChanges(block.n_pages, *changes.columns())


class _Changes:
    """Collects the changes of one block's pages."""

    def __init__(self, run: Run, block: Block) -> None:
        self._source, self._destination = (run.traces[side] for side in ("source", "destination"))
        self._block, self._size = block, block.page_size
        self._parts: list[tuple[Ints, Ints, npt.NDArray[np.uint8]]] = []
        starts = self._source["postcopy_start"]["ts_ns"]
        self._switch = int(starts[0]) if len(starts) else np.iinfo(np.int64).max
        self._sent = self._ranges(self._source["ram_save_range"], "offset")
        self._came = self._placed()
        faults = run.faults[run.faults["block"].isin(["", block.name])]
        waited = faults["resolution"].isin(["requested", "in_flight", "unresolved"])
        asked = faults[waited & faults["read_ns"].notna()]
        self._asked = asked["read_ns"].to_numpy(np.int64), asked["page"].to_numpy(np.int64)
        answered = asked[asked["placed_ns"].notna() & (asked["resolution"] != "unresolved")]
        self._answered = (
            answered["placed_ns"].to_numpy(np.int64), answered["page"].to_numpy(np.int64)
        )  # fmt: skip

    def columns(self) -> tuple[Ints, Ints, npt.NDArray[np.uint8]]:
        """Return time, page and state of all that was collected."""
        none = np.zeros(0, np.int64)
        parts = self._parts or [(none, none, none.astype(np.uint8))]
        ts, page, state = (np.concatenate(column) for column in zip(*parts, strict=True))
        return ts, page, state

    def _add(self, ts: Ints, page: Ints, state: PageState) -> None:
        self._parts.append((ts, page, np.full(len(ts), state, np.uint8)))

    def _ranges(self, rows: npt.NDArray[Any], start: str) -> tuple[Ints, Ints]:
        """Return time and page of every page of the block's ranges of bytes."""
        rows = rows[rows["rbname"] == self._block.name]
        first = rows[start].astype(np.int64) // self._size
        count = -(-rows["len"].astype(np.int64) // self._size)
        ends = np.cumsum(count)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - count, count)
        return np.repeat(rows["ts_ns"].astype(np.int64), count), np.repeat(first, count) + within

    def _placed(self) -> tuple[Ints, Ints]:
        """Return time and page of what came in post-copy: QEMU names only the page's address."""
        ts, page = self._ranges(self._destination["ram_load_range"], "offset")
        if not len(ts) and self._block.address:
            names = ("postcopy_place_page", "postcopy_place_page_zero")
            rows = [self._destination[name] for name in names]
            ts, host = (
                np.concatenate([one[field] for one in rows]).astype(np.int64)
                for field in ("ts_ns", "host_addr")
            )
            page = (host - self._block.address) // self._size
        late = ts >= self._switch
        return ts[late], page[late]

    def precopy(self) -> None:
        """Add what was sent before post-copy, was dirty again, was discarded."""
        ts, page = self._sent
        before = ts < self._switch
        early_ts, early = ts[before], page[before]
        rounds = np.sort(self._source["ram_save_round"]["ts_ns"].astype(np.int64))
        order = np.lexsort((early_ts, early))
        again = order[1:][early[order[1:]] == early[order[:-1]]]
        place = np.searchsorted(rounds, early_ts[again], "right") - 1
        known = place >= 0
        self._add(rounds[place[known]], early[again[known]], PageState.DIRTY_AGAIN)
        self._add(early_ts, early, PageState.SENT)
        self._discards(early, page[~before])

    def _discards(self, early: Ints, late: Ints) -> None:
        ranges = self._ranges(self._destination["ram_discard_range"], "start")
        if len(ranges[0]):
            ts, page = ranges  # at its beginning QEMU discards all, though nothing was sent
            known = self._mask(early)[page] if len(early) else ts >= self._switch
            self._add(ts[known], page[known], PageState.DISCARDED)
            return
        (came_ts, came), (asked_ts, asked) = self._came, self._answered
        placed = np.concatenate([came_ts, asked_ts])
        finished = self._source["postcopy_discard_send_finish"]["ts_ns"].astype(np.int64)
        finished = finished[finished <= placed.min(initial=np.iinfo(np.int64).max)]
        if len(finished):
            gone = np.flatnonzero(
                self._mask(early) & (self._mask(late) | self._mask(came) | self._mask(asked))
            )
            self._add(np.full(len(gone), finished.max()), gone, PageState.DISCARDED)

    def _mask(self, page: Ints) -> npt.NDArray[np.bool_]:
        """Return which of the block's pages are among some."""
        mask = np.zeros(self._block.n_pages, np.bool_)
        mask[page[(page >= 0) & (page < len(mask))]] = True
        return mask

    def postcopy(self) -> None:
        """Add what was under way, asked for and placed in post-copy."""
        sent_ts, sent = self._sent
        late = sent_ts >= self._switch
        self._add(sent_ts[late], sent[late], PageState.SENT)
        self._add(*self._asked, PageState.REQUESTED)
        came_ts, came = self._came
        inside = (came >= 0) & (came < self._block.n_pages)
        came_ts, came = came_ts[inside], came[inside]
        unasked = ~self._mask(self._answered[1])[came]
        self._add(came_ts[unasked], came[unasked], PageState.BACKGROUND)
        self._add(*self._answered, PageState.ANSWERED)
