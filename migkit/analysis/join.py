"""Joining the messages of userfaultfd with what happened to them, vectorised.

Everything here works on numpy arrays of int64; an index of -1 and a time of 0 mean "none".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# A message is withdrawn when its thread runs again: one that is read later than this after that
# belongs to another fault. (Within it the thread may not have come to withdraw it.)
_WITHDRAWN_NS = 100_000


@dataclass(frozen=True)
class Occurrences:
    """When something happened to which page, in order of time; ``value`` is what it says."""

    ts: Ints
    page: Ints
    value: Ints

    @classmethod
    def of(cls, ts: npt.ArrayLike, page: npt.ArrayLike, value: npt.ArrayLike = 0) -> Occurrences:
        """Sort by time; a single value goes for all."""
        times = np.asarray(ts).astype(np.int64)
        order = np.argsort(times, kind="stable")
        values = np.broadcast_to(np.asarray(value, np.int64), times.shape)
        return cls(times[order], np.asarray(page).astype(np.int64)[order], values[order])

    @classmethod
    def both(cls, first: Occurrences, second: Occurrences) -> Occurrences:
        """Merge two kinds of occurrences."""
        return cls.of(
            np.concatenate([first.ts, second.ts]),
            np.concatenate([first.page, second.page]),
            np.concatenate([first.value, second.value]),
        )

    def first_from(self, ts: Ints, page: Ints) -> Ints:
        """Return the index of the first at or after ``ts`` (ascending) on the same page."""
        return _asof(ts, page, self.ts, self.page, "forward")

    def last_until(self, ts: Ints, page: Ints) -> Ints:
        """Return the index of the last at or before ``ts`` (ascending) on the same page."""
        return _asof(ts, page, self.ts, self.page, "backward")

    def times(self, index: Ints) -> Ints:
        """Return the times of these indices."""
        return take(self.ts, index)


def take(values: Ints, index: Ints, none: int = 0) -> Ints:
    """Return ``values[index]``, and ``none`` where the index is -1."""
    if not len(values):
        return np.full(index.shape, none, np.int64)
    return np.where(index < 0, none, values[index])


def kernel_of_messages(read: Ints, page: Ints, tid: Ints, kernel: dict[str, Ints]) -> Ints:
    """Return for each message, in order of ``read``, its kernel record's index.

    That is the latest fault of that thread on that page at or before the reading, unless it had
    ended by then. ``kernel`` has ``fault`` (ascending), ``running``, ``page`` and ``tid``.
    """
    threads = np.unique(np.concatenate([tid, kernel["tid"]]))
    key = page * len(threads) + np.searchsorted(threads, tid)
    other_key = kernel["page"] * len(threads) + np.searchsorted(threads, kernel["tid"])
    index = _asof(read, key, kernel["fault"], other_key, "backward")
    running = take(kernel["running"], index)
    ended = (running > 0) & (running + _WITHDRAWN_NS < read)
    return np.where(ended, -1, index)


def fold(page: Ints, tid: Ints, resolution: Ints, kernel: Ints) -> Ints:
    """Return for each message, in order of time, the number of the fault that it belongs to.

    A signal, or a wake-up before the page is there, makes a thread fault or ask again. Messages
    of one thread for one page are one fault when the same occurrence resolved them (``resolution``)
    or the kernel has them in one record (``kernel``).
    """
    order = np.lexsort((np.arange(len(page)), tid, page))
    page, tid, resolution, kernel = (a[order] for a in (page, tid, resolution, kernel))
    same_thread = (page[1:] == page[:-1]) & (tid[1:] == tid[:-1])
    same_end = resolution[1:] == resolution[:-1]
    same_record = (kernel[1:] == kernel[:-1]) & (kernel[1:] >= 0)
    begins = np.ones(len(page), np.bool_)
    begins[1:] = ~(same_thread & (same_end | same_record))
    numbers = np.empty(len(page), np.int64)
    numbers[order] = np.cumsum(begins) - 1
    return numbers


def _asof(
    ts: Ints, key: Ints, other_ts: Ints, other_key: Ints, direction: Literal["forward", "backward"]
) -> Ints:
    """Return for each ``ts`` the index of the nearest ``other_ts`` of the same key, or -1."""
    if not len(ts) or not len(other_ts):
        return np.full(len(ts), -1, np.int64)
    left = pd.DataFrame({"ts": ts, "key": key}, copy=False)
    index = np.arange(len(other_ts))
    right = pd.DataFrame({"ts": other_ts, "key": other_key, "index": index}, copy=False)
    merged = pd.merge_asof(left, right, on="ts", by="key", direction=direction)
    found: Ints = merged["index"].fillna(-1).to_numpy().astype(np.int64)
    return found
