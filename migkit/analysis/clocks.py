"""How two processes' clocks stand to each other, from what must have come before what.

A request is made before the source hears of it, and a page is taken up for sending before it is
placed. So each message from the destination to the source bounds the difference of their clocks
on one side, each one back on the other; the closest of thousands leave some microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from migkit.trace.logtrace import LogTrace

if TYPE_CHECKING:
    import numpy.typing as npt

    from migkit.trace.simpletrace import Trace

_RESOLUTION_NS = 1000
"""Logs cut their times to whole microseconds."""


@dataclass(frozen=True)
class Alignment:
    """What is added to one clock to read the other, ns, and how far that may be off."""

    offset_ns: int
    low_ns: int | None
    """The offset is at least this; None: nothing bounds it."""
    high_ns: int | None
    """The offset is at most this; None: nothing bounds it."""
    pairs: int
    """How many messages told."""

    @property
    def error_ns(self) -> int | None:
        """The most by which the offset can be wrong, None if that is not known."""
        if self.low_ns is None or self.high_ns is None:
            return None
        return max(abs(self.offset_ns - self.low_ns), abs(self.high_ns - self.offset_ns))

    @property
    def consistent(self) -> bool:
        """Whether one offset explains all messages: neither clock was set or ran differently."""
        return self.low_ns is None or self.high_ns is None or self.low_ns <= self.high_ns

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "offset_ns": self.offset_ns, "low_ns": self.low_ns, "high_ns": self.high_ns,
            "error_ns": self.error_ns, "pairs": self.pairs,
        }  # fmt: skip


def align(source: Trace, destination: Trace) -> Alignment:
    """Return what to add to the source's times to have them on the destination's clock.

    Two clocks that may be the same, as of processes of one machine, are taken to be: the offset
    is then 0, and its error what the bounds leave. Else it is the middle between the bounds.
    """
    back = [
        _pairs(
            _keys(destination, "postcopy_ram_fault_thread_request", "offset"),
            _keys(source, "migrate_handle_rp_req_pages", "start"),
        ),
        _pairs(
            _keys(destination, "loadvm_process_command_ping", "val"),
            _keys(source, "source_return_path_thread_pong", "val"),
        ),
    ]
    forth = [
        _pairs(
            _keys(source, "savevm_send_ping", "val"),
            _keys(destination, "loadvm_process_command_ping", "val"),
        ),
        _pairs(_keys(source, "get_queued_page", "tmp_offset"), _placed(destination)),
    ]
    # Of messages to the source: its time + offset is not before theirs; of those back, not after.
    lows = np.concatenate([cause - effect for cause, effect in back])
    highs = np.concatenate([effect - cause for cause, effect in forth])
    return _bounded(lows, highs)


def monotonic_offset(destination: Trace) -> Alignment | None:
    """Return what to add to the machine's monotonic clock to have it on the trace's, or None.

    QEMU 11.1 logs the monotonic time at which a vCPU began to wait, between two lines of the same
    thread that the log stamps.
    """
    begins = destination["postcopy_blocktime_begin"]
    if not len(begins) or "dd" in (begins.dtype.names or ()):  # before, it counted ms of its own
        return None
    cause, effect = _pairs(
        _keys(destination, "postcopy_page_req_add", "addr"),
        _keys(destination, "postcopy_blocktime_begin", "addr"),
    )
    times = dict(zip(begins["ts_ns"].tolist(), begins["time"].tolist(), strict=True))
    monotonic = np.array([times[ts] for ts in effect.tolist()], np.int64)
    return _bounded(cause - monotonic, effect - monotonic)


def shifted(trace: Trace, offset_ns: int) -> Trace:
    """Return a trace with its times on another clock."""
    if not offset_ns:
        return trace
    if isinstance(trace, LogTrace):
        return trace.shifted(offset_ns)
    events = {}
    for name, rows in trace.events.items():
        moved = rows.copy()
        moved["ts_ns"] = (moved["ts_ns"].astype(np.int64) + offset_ns).astype(np.uint64)
        events[name] = moved
    return replace(trace, events=events)


Keyed = tuple["npt.NDArray[np.int64]", "npt.NDArray[np.int64]"]
"""Times and keys."""


def _bounded(lows: npt.NDArray[np.int64], highs: npt.NDArray[np.int64]) -> Alignment:
    low = int(lows.max()) - _RESOLUTION_NS if len(lows) else None
    high = int(highs.min()) + _RESOLUTION_NS if len(highs) else None
    known = [bound for bound in (low, high) if bound is not None]
    if (low is None or low <= 0) and (high is None or high >= 0):
        offset = 0
    else:
        offset = sum(known) // len(known)
    return Alignment(offset, low, high, len(lows) + len(highs))


def _pairs(first: Keyed, second: Keyed) -> Keyed:
    """Return the times of both for the keys that occur once on each side.

    A key that comes again, after a break or for a page discarded anew, cannot be told apart.
    """
    times, keys = zip(_single(first), _single(second), strict=True)
    _, mine, theirs = np.intersect1d(*keys, assume_unique=True, return_indices=True)
    return times[0][mine], times[1][theirs]


def _single(keyed: Keyed) -> Keyed:
    times, keys = keyed
    unique, index, counts = np.unique(keys, return_index=True, return_counts=True)
    return times[index[counts == 1]], unique[counts == 1]


def _keys(trace: Trace, event: str, field: str) -> Keyed:
    """Return an event's times by what a field holds.

    One offset in two RAM blocks is a key that comes twice, and counts for nothing.
    """
    rows = trace[event]
    return rows["ts_ns"].astype(np.int64), rows[field].astype(np.int64)


def _placed(destination: Trace) -> Keyed:
    """Return when pages that were requested were placed, by their offset."""
    requests = destination["postcopy_ram_fault_thread_request"]
    times, addresses = (
        np.concatenate(parts)
        for parts in zip(
            *(
                _keys(destination, f"postcopy_place_page{kind}", "host_addr")
                for kind in ("", "_zero")
            ),
            strict=True,
        )
    )
    hosts = requests["hostaddr"].astype(np.int64)
    unique, index = np.unique(hosts, return_index=True)
    at = np.searchsorted(unique, addresses)
    at = np.minimum(at, max(len(unique) - 1, 0))
    asked = (unique[at] == addresses) if len(unique) else np.zeros(len(addresses), np.bool_)
    return times[asked], requests["offset"][index[at[asked]]].astype(np.int64)
