"""The downtime as the guest felt it: from its last step at the source to its first beyond.

Both ends are the guests' own stamps, not the engines'. What lies between is divided at events of
both sides, on one clock: each part ends when its event occurs and the next one begins there. A
part whose event was not recorded is counted with the one after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migkit.analysis import schema

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from migkit.trace.simpletrace import Trace

# Part, who does it, and the event of which process that ends it, or, where there was no such, the
# next ones: QEMU without a return path, or in pre-copy.
_POSTCOPY = (
    ("stop noticed", "source", "source", "guest_stopped"),
    ("final dirty scan", "source", "source", "migration_bitmap_sync_end"),
    ("discards sent", "source", "source", "postcopy_discard_send_finish"),
    ("CPU state packaged", "source", "source", "qemu_savevm_send_packaged"),
    ("package under way", "wire", "destination", "loadvm_handle_cmd_packaged_received"),
    ("listening, CPU state loaded", "destination", "destination", "loadvm_postcopy_handle_run"),
)
_PRECOPY = (
    ("stop noticed", "source", "source", "guest_stopped"),
    ("final dirty scan", "source", "source", "migration_bitmap_sync_end"),
    ("last pages and CPU state sent", "source", "source", "migration_return_path_end_before",
     "migration_thread_after_loop"),
    ("last pages loaded", "destination", "destination", "loadvm_postcopy_handle_run",
     "process_incoming_migration_co_end"),
)  # fmt: skip
_LAST = ("guest starts", "destination")


def downtime_frame(source: Trace, destination: Trace) -> pd.DataFrame:
    """Return the parts of the downtime in order; ``schema.describe("downtime")``.

    ``attrs["total_ms"]`` is their sum, None when the guest was not handed over; then the frame
    is empty and ``attrs["reason"]`` says why.
    """
    stops, starts = source["guest_stopped"], destination["guest_started"]
    if not len(stops) or not len(starts):
        frame = schema.frame("downtime")
        missing = "guest_started" if len(stops) else "guest_stopped"
        frame.attrs = {
            "total_ms": None,
            "reason": f"the guest was not handed over, or {missing} was not recorded",
        }
        return frame
    begin, end = int(stops["ts"][-1]), int(starts["ts"][-1])
    parts = _POSTCOPY if len(source["postcopy_start"]) else _PRECOPY
    traces = {"source": source, "destination": destination}
    found = [
        (name, side, time)
        for name, side, process, *events in parts
        if (time := _first_after(traces[process], events, begin)) is not None
    ]
    names = [name for name, _, _ in found] + [_LAST[0]]
    sides = [side for _, side, _ in found] + [_LAST[1]]
    # A stamp may be taken late, after its effect was seen beyond: no part ends after the next.
    ends = np.minimum.accumulate(np.array([*(time for _, _, time in found), end])[::-1])[::-1]
    starts_ns = np.concatenate([[begin], ends[:-1]])
    frame = schema.frame(
        "downtime",
        {
            "part": names,
            "side": sides,
            "start_ns": starts_ns,
            "end_ns": ends,
            "duration_us": (ends - starts_ns) / 1e3,
            "share": (ends - starts_ns) / max(end - begin, 1),
        },
    )
    frame.attrs = {"total_ms": (end - begin) / 1e6}
    return frame


def _first_after(trace: Trace, events: Sequence[str], begin: int) -> int | None:
    """Return when the first of some events that occurred from ``begin`` on did so first."""
    for event in events:
        times = trace[event]["ts_ns"].astype(np.int64)
        times = times[times >= begin]
        if len(times):
            return int(times.min())
    return None
