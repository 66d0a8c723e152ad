"""Outages: the times in which post-copy was paused, and how much of a wait fell into them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from migkit.analysis.join import Ints
    from migkit.trace.simpletrace import Trace


def outages(destination: Trace) -> Ints:
    """Return the outages, (n, 2) int64: from postcopy-paused to postcopy-active, ns, by time.

    An outage that never ended lasts until the last event.
    """
    rows = destination["migrate_set_state"]
    last = destination.span_ns[1]
    spans: list[tuple[int, int]] = []
    begun = 0
    for ts, state in zip(rows["ts_ns"].tolist(), rows["new_state"].tolist(), strict=True):
        if state == "postcopy-paused":
            begun = begun or ts
        elif begun and state in ("postcopy-active", "failed"):
            spans.append((begun, ts))
            begun = 0
    if begun:
        spans.append((begun, last))
    return np.array(spans, np.int64).reshape(-1, 2)


def overlap_us(begin: Ints, end: Ints, spans: Ints) -> npt.NDArray[np.float64]:
    """Return how much of each time from ``begin`` to ``end`` lies in ``spans``, us."""
    total = np.zeros(len(begin))
    for first, last in spans.tolist():
        total += np.maximum(np.minimum(end, last) - np.maximum(begin, first), 0)
    return total / 1e3
