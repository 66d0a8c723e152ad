"""What one trace event costs, on and off, in the buffer that engines use; the dearest counts."""

from __future__ import annotations

import os
import time
import timeit
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.result import Row
from migkit.trace.drain import create_buffer, map_buffer
from migkit.trace.emit import Tracer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.result import Scale

_AT = 4096 * 4711
_EVENTS = {
    "postcopy_ram_fault_thread_request": (1 << 46, "pc.ram", _AT, 4242),
    "postcopy_page_req_add": (1 << 46, 1),
    "migrate_handle_rp_req_pages": ("pc.ram", _AT, 4096),
    "postcopy_preempt_send_host_page": ("pc.ram", 4711),
    "postcopy_request_received": ("pc.ram", _AT, 1),
    "postcopy_request_placed": ("pc.ram", _AT, 0),
}
_CALLS = 5000


def measure(scale: Scale) -> Iterator[Row]:
    """Time the events of a fault; a call that is off costs what a call costs."""
    for name, bound_ns, enabled in (("on", 1000.0, tuple(_EVENTS)), ("off", 100.0, ())):
        fd = create_buffer(1 << 30)
        buffer = map_buffer(fd)
        tracer = Tracer(buffer, enabled, tid=1)
        costs = {event: _cost_ns(tracer, event, scale.chunks) for event in _EVENTS}
        tracer.close()
        buffer.close()
        os.close(fd)
        dearest = max(costs, key=lambda event: np.median(costs[event]))
        median, p99 = np.percentile(costs[dearest], [50, 99])
        yield Row(
            f"an event that is {name}", "scheduler", float(median), bound_ns, "ns",
            ours=f"p99 {p99:.0f} ns", samples={"ns": costs},
        )  # fmt: skip


def _cost_ns(tracer: Tracer, event: str, repeats: int) -> list[float]:
    """Return ns a call, the loop around it subtracted, of some repeats."""
    call = f"emit{_EVENTS[event]!r}"
    setting = {"emit": getattr(tracer, event)}
    # The time of this process alone: what a neighbour takes is no cost of an event.
    watch = time.process_time
    empty = min(timeit.repeat("pass", number=_CALLS, repeat=5, timer=watch))
    taken = timeit.repeat(call, globals=setting, number=_CALLS, repeat=repeats, timer=watch)
    return [(seconds - empty) / _CALLS * 1e9 for seconds in taken]
