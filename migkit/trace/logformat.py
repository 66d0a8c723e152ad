"""Print a trace as the log backend of QEMU 7.2 does: ``TID@SEC.USEC:event args``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from migkit.trace.registry import Event, Registry
    from migkit.trace.simpletrace import Trace

_CHUNK = 65536


def format_log(trace: Trace, registry: Registry | None = None) -> Iterator[str]:
    """Yield a line per record, ordered by time; the seconds are those of the trace's clock.

    Records of the same nanosecond keep the file's order. ``registry`` is the trace's by default.
    """
    registry = trace.registry if registry is None else registry
    names = list(trace.events)
    if not names:
        return
    arrays = [trace.events[name] for name in names]
    which = np.repeat(np.arange(len(names)), [array.size for array in arrays])
    row = np.concatenate([np.arange(array.size) for array in arrays])
    order = np.lexsort(
        (np.concatenate([a["seq"] for a in arrays]), np.concatenate([a["ts_ns"] for a in arrays]))
    )
    for begin in range(0, order.size, _CHUNK):
        chunk = order[begin : begin + _CHUNK]
        lines = np.empty(chunk.size, object)
        for index in np.unique(which[chunk]).tolist():
            mine = which[chunk] == index
            lines[mine] = _lines(registry[names[index]], arrays[index][row[chunk[mine]]])
        yield from lines.tolist()


def _lines(event: Event, records: npt.NDArray[np.void]) -> list[str]:
    """Print records of one event."""
    lines = []
    for ts_ns, tid, _seq, *values in records.tolist():
        seconds, rest_ns = divmod(ts_ns, 1_000_000_000)
        args = event.format_args(values)
        lines.append(f"{tid}@{seconds}.{rest_ns // 1000:06d}:{event.name} {args}")
    return lines
