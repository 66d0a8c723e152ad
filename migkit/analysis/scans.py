"""What each scan for dirty pages found.

Ours says it of each scan. QEMU's ``migration_bitmap_sync_end`` says how many pages became dirty
in a period that may have had several scans (``num_dirty_pages_period``): it begins anew behind
the first scan that ends more than a second after its begin (``migration_bitmap_sync()``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from migkit.analysis.join import Ints
    from migkit.trace.simpletrace import Trace

_PERIOD_MS = 1000


def scans(source: Trace, *, of_qemu: bool) -> tuple[Ints, Ints]:
    """Return when each scan ended, ns, and how many pages it found newly dirty, by time."""
    rows = source["migration_bitmap_sync_end"]
    rows = rows[np.argsort(rows["ts_ns"], kind="stable")]
    ts, found = rows["ts_ns"].astype(np.int64), rows["dirty_pages"].astype(np.int64)
    if of_qemu and len(ts):
        begins = source["migration_bitmap_sync_start"]["ts_ns"].astype(np.int64)
        found = _each(ts // 1_000_000, found, int(begins.min(initial=ts[0])) // 1_000_000)
    return ts, found


def _each(ends_ms: Ints, counts: Ints, begin_ms: int) -> Ints:
    """Return what each scan adds to its period's count."""
    each, before = counts.copy(), 0
    for row, (end_ms, count) in enumerate(zip(ends_ms.tolist(), counts.tolist(), strict=True)):
        # A count that has become less is a new period's, wherever that began.
        each[row] = count - before if count >= before else count
        before = count
        if end_ms > begin_ms + _PERIOD_MS:
            begin_ms, before = end_ms, 0
    return each
