"""The phases of a migration, on both sides, whether it completed, failed or never ended.

Each phase begins with an event and lasts until the next one begins, so a side's phases follow
each other without a gap, from its ``setup`` to its end or to the last thing that was recorded.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from migkit.analysis import schema
from migkit.analysis.scans import scans

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from migkit.trace.simpletrace import Trace

Mark = tuple[int, str]
"""When a phase begins, ns, and its name; the name of the end is empty."""

_ENDS = frozenset({"completed", "failed", "cancelled"})
_AFTER_BREAK = {
    "postcopy-paused": "paused",
    "postcopy-recover-setup": "recovery",
    "postcopy-recover": "recovery",
    "cancelling": "cancelling",
}
_DISCARD_PINGS = (0x100, 0x10000)  # from and below: so the source pings while it discards ahead


def phases_frame(source: Trace, destination: Trace, page_size: int) -> pd.DataFrame:
    """Return the phases of both sides, by side and time; ``schema.describe("phases")``."""
    marks = {
        "source": sorted(_source_marks(source, destination)),
        "destination": sorted(_destination_marks(destination)),
    }
    traces = {"source": source, "destination": destination}
    rows = []
    for side, found in marks.items():
        transfers = _transfers(traces[side], side, page_size)
        for name, start, end in _spans(found, traces[side].span_ns[1]):
            pages, n_bytes = _moved(transfers, start, end, page_size)
            dirty = _dirty_pages(source, name, start, end) if side == "source" else None
            rows.append((name, side, start, end, (end - start) / 1e6, pages, n_bytes, dirty))
    columns = list(schema.TABLES["phases"].columns)
    values: list[list[object]] = [[row[i] for row in rows] for i in range(len(columns))]
    return schema.frame("phases", dict(zip(columns, values, strict=True)))


def _source_marks(source: Trace, destination: Trace) -> Iterator[Mark]:
    """Yield what begins phases of the migration; that is the source's side."""
    yield from _state_marks(source)
    rounds = source["ram_save_round"]
    for row in rounds:
        yield int(row["ts_ns"]), f"precopy round {int(row['round'])}"
    if not len(rounds) and (active := _state(source, "active")):
        yield active, "precopy"
    postcopy = _first(source, "postcopy_start")
    # QEMU has no state for it in pre-copy, or one that it enters late: the guest's stop tells.
    stopped = "guest_stopped" in source.derived and _first(source, "guest_stopped")
    switch = postcopy or stopped or _state(source, "device")
    if postcopy and (ahead := _discard_ahead(source, postcopy)):
        yield ahead, "discard"
    if switch:
        yield switch, "switchover"
    began = destination["guest_started"]["ts"].astype(np.int64)
    # Without the destination's trace: when the source had told it to run the guest.
    started = int(began[0]) if len(began) else _first(source, "postcopy_start_set_run")
    if switch and started:
        yield started, "post-copy" if postcopy else "completion"
    if postcopy and (sent := _first(source, "migration_completion_postcopy_end_after_complete")):
        # A small rest may be sent before the guest has begun.
        yield max(sent, started + 1 if started else 0), "completion"


def _destination_marks(trace: Trace) -> Iterator[Mark]:
    """Yield what begins phases of the destination's side."""
    yield from _state_marks(trace)
    if active := _state(trace, "active"):
        yield active, "load"
    listening = _first(trace, "loadvm_postcopy_handle_listen")
    if listening:
        yield listening, "listen"
    if len(started := trace["guest_started"]):
        yield int(started["ts"][0]), "post-copy" if listening else "completion"
    if done := _first(trace, "postcopy_ram_listen_thread_exit"):
        yield done, "cleanup"


def _state_marks(trace: Trace) -> Iterator[Mark]:
    """Yield the states that both sides have: set-up, breaks and ends."""
    rows = trace["migrate_set_state"]
    broken = False
    for ts, state in zip(rows["ts_ns"].tolist(), rows["new_state"].tolist(), strict=True):
        if state == "setup":
            yield ts, "setup"
        elif state in _AFTER_BREAK:
            broken = True
            yield ts, _AFTER_BREAK[state]
        elif state == "postcopy-active" and broken:
            yield ts, "post-copy"
        elif state in _ENDS:
            yield ts, ""


def _spans(marks: list[Mark], last: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, start and end of each phase; what begins after the end is left out."""
    for (start, name), (end, _) in pairwise([*marks, (last, "")]):
        if not name:
            return
        yield name, start, max(start, end)


def _discard_ahead(source: Trace, before: int) -> int:
    """Return when the source began to discard while its guest still ran, 0 if it did not."""
    sends = source["qemu_savevm_send_postcopy_ram_discard"]["ts_ns"]
    pings = source["savevm_send_ping"]
    first, end = _DISCARD_PINGS
    ahead = (pings["val"] >= first) & (pings["val"] < end)
    signs = np.concatenate([sends, pings["ts_ns"][ahead]])
    signs = signs[signs < before]
    if not len(signs):
        return 0
    scans = source["migration_bitmap_sync_start"]["ts_ns"]
    scans = scans[scans <= signs.min()]
    return int(scans.max() if len(scans) else signs.min())


def _transfers(trace: Trace, side: str, page_size: int) -> npt.NDArray[np.int64] | None:
    """Return what a side sent or received, by time, as (n, 3): ts_ns, bytes, kind; None unknown.

    A requested page that goes alone is in no range, but in an event of its own: the source's say
    not whether it was zero and count as data, the destination's have a range's stamp when they
    came in one.
    """
    event = "ram_save_range" if side == "source" else "ram_load_range"
    ranges = np.stack(
        trace.columns(event, "ts_ns", "len", "kind"), axis=1, dtype=np.int64, casting="unsafe"
    )
    if not len(ranges):
        return None
    if side == "source":
        (ts,) = trace.columns("postcopy_preempt_send_host_page", "ts_ns")
        kind = np.zeros(len(ts), np.int64)
    else:
        ts, kind = trace.columns("postcopy_request_placed", "ts_ns", "kind")
        alone = ~np.isin(ts, ranges[:, 0])
        ts, kind = ts[alone], kind[alone]
    sizes = np.full(len(ts), page_size)
    alone = np.stack([ts, sizes, kind], axis=1, dtype=np.int64, casting="unsafe")
    moved = np.concatenate([ranges, alone])
    ordered: npt.NDArray[np.int64] = moved[np.argsort(moved[:, 0], kind="stable")]
    return ordered


def _moved(
    transfers: npt.NDArray[np.int64] | None, start: int, end: int, page_size: int
) -> tuple[int | None, int | None]:
    """Return pages and bytes of data within a phase."""
    if transfers is None:
        return None, None
    begin, stop = np.searchsorted(transfers[:, 0], [start, end])
    some = transfers[begin:stop]
    return int(some[:, 1].sum()) // page_size, int(some[some[:, 2] == 0, 1].sum())


def _dirty_pages(source: Trace, name: str, start: int, end: int) -> int | None:
    """Return the pages that a round has to send, or that the last scan of another phase found."""
    rounds, of_qemu = source["ram_save_round"], "ram_save_round" in source.derived
    if name == "precopy round 1" and of_qemu:
        return None  # QEMU's first scan finds what was dirtied since everything was
    if name.startswith("precopy round"):
        return int(rounds["dirty_pages"][rounds["ts_ns"] == start][0])
    times, found = scans(source, of_qemu=of_qemu)
    found = found[(times >= start) & (times < end)]
    return int(found[-1]) if len(found) else None


def _first(trace: Trace, event: str) -> int:
    """Return when an event first occurred, 0 if it did not."""
    rows = trace[event]
    return int(rows["ts_ns"].min()) if len(rows) else 0


def _state(trace: Trace, state: str) -> int:
    """Return when a state was first entered, 0 if it was not."""
    rows = trace["migrate_set_state"]
    times = rows["ts_ns"][rows["new_state"] == state]
    return int(times.min()) if len(times) else 0
