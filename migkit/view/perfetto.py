"""A run as a trace for Perfetto's UI (ui.perfetto.dev): who did what, and what followed from it.

A track for each process and thread; slices for the phases, the states and the steps of every
fault; arrows that lead from a fault through the destination to the source and back. Other events
are instants on their thread's track.
"""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from migkit.errors import MissingEventError, OptionError
from migkit.view.packets import PacketWriter

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from migkit.analysis.join import Ints
    from migkit.analysis.run import Run

_SOURCE, _DESTINATION, _GUEST = "source", "destination", "guest at the destination"
# What an engine does about a fault: the step, whose it is, from which stage to which.
_STEPS = (
    ("ask", _DESTINATION, "read", "requested"),
    ("send", _SOURCE, "received_by_source", "sent"),
    ("place", _DESTINATION, "received", "placed"),
)
_COUNTERS = {
    "source_remaining_pages": (_SOURCE, "pages still to be sent"),
    "destination_outstanding": (_DESTINATION, "requests under way"),
}
# What slices show, or what there is of every page, is not shown again as instants.
_SHOWN = (
    "migrate_set_state", "ram_save_range", "ram_load_range", "postcopy_place_page",
    "postcopy_place_page_zero", "ram_load_postcopy_loop", "ram_save_queue_pages",
    "get_queued_page", "postcopy_ram_fault_thread_request", "postcopy_page_req_add",
    "postcopy_page_req_del", "migrate_handle_rp_req_pages", "postcopy_preempt_send_host_page",
    "postcopy_request_received", "postcopy_request_placed",
)  # fmt: skip


def write_perfetto(run: Run, path: str | os.PathLike[str]) -> None:
    """Write a run as a Perfetto trace; its times are the run's own, ns.

    Raises CapabilityError without the package ``perfetto``, OptionError if the file cannot be
    written.
    """
    try:
        with Path(path).open("wb") as file:
            out = PacketWriter(file)
            tracks = _Tracks(out, run)
            _write_phases(out, tracks, run)
            _write_faults(out, tracks, run)
            _write_instants(out, tracks, run)
            _write_counters(out, tracks, run)
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror}") from error


class _Tracks:
    """The tracks of the processes, and of their threads as they are met."""

    def __init__(self, out: PacketWriter, run: Run) -> None:
        guests, engines = run.meta.get("guests", {}), run.meta.get("engines", {})
        # A QEMU's log does not tell process ids; the tracks still need different ones.
        self._pids = {
            _SOURCE: int(engines.get(_SOURCE, 1)),
            _DESTINATION: int(engines.get(_DESTINATION, 2)),
            _GUEST: int(guests.get(_DESTINATION, {}).get("pid", 3)),
        }
        self._out = out
        self._threads: dict[tuple[str, int], int] = {}
        self.process = {name: out.process(name, pid) for name, pid in self._pids.items()}

    def thread(self, process: str, tid: int) -> int:
        """Return the track of a thread."""
        key = process, tid
        if key not in self._threads:
            self._threads[key] = self._out.thread(
                process, self._pids[process], tid, self.process[process]
            )
        return self._threads[key]


def _write_phases(out: PacketWriter, tracks: _Tracks, run: Run) -> None:
    """Write the phases and the states of both sides."""
    try:
        states = run.states
    except MissingEventError:
        states = None
    for side in (_SOURCE, _DESTINATION):
        phases = run.phases[run.phases["side"] == side]
        track = out.track("phases", tracks.process[side])
        for name, begin, end in zip(
            phases["name"], phases["start_ns"], phases["end_ns"], strict=True
        ):
            out.slice(track, name, begin, end)
        if states is not None:
            track = out.track("state", tracks.process[side])
            walk = states[states["side"] == side]
            for name, ts, ms in zip(
                walk["new_state"], walk["ts_ns"], walk["duration_ms"], strict=True
            ):
                out.slice(track, name, ts, ts + round(ms * 1e6))


def _write_faults(out: PacketWriter, tracks: _Tracks, run: Run) -> None:
    """Write each fault on its thread's track, and the engines' steps on theirs.

    A fault's number is its flow: arrows lead from the fault to the destination, the source, the
    destination again, and to the waking of the thread.
    """
    faults = run.faults[run.faults["latency_us"].notna()].reset_index(drop=True)
    begin = faults["ts_ns"].to_numpy(np.int64)
    end = begin + np.rint(faults["latency_us"].to_numpy() * 1e3).astype(np.int64)
    placed = faults["placed_ns"].fillna(0).to_numpy(np.int64)
    ways = faults["resolution"].astype(object).fillna("fault").astype(str)
    labels = (ways + ": page " + faults["page"].astype(str)).to_numpy(object)
    tids = faults["tid"].to_numpy(np.int64)
    for tid in np.unique(tids).tolist():
        mine = np.flatnonzero(tids == tid)
        for number, lane in enumerate(_lanes(begin[mine], end[mine])):
            track = tracks.thread(_GUEST, tid)
            if number:  # should two waits of a thread overlap, their track is beside it
                track = out.track(f"thread {tid}", tracks.process[_GUEST])
            for row in mine[lane].tolist():
                out.begin(track, labels[row], int(begin[row]), flow=row + 1)
                if begin[row] < placed[row] < end[row]:
                    out.slice(track, "wakes up", int(placed[row]), int(end[row]), flow=row + 1)
                out.end(track, int(end[row]))
    for step, side, one, two in _STEPS:
        stages = faults[[f"{one}_ns", f"{two}_ns"]]
        known = np.flatnonzero(stages.notna().all(axis=1).to_numpy())
        start, stop = stages.fillna(0).to_numpy(np.int64).T
        pages = faults["page"].tolist()
        for lane in _lanes(start[known], stop[known]):
            track = out.track(f"faults: {step}", tracks.process[side])
            for row in known[lane].tolist():
                label = f"{step} page {pages[row]}"
                out.slice(track, label, int(start[row]), int(stop[row]), flow=row + 1)


def _write_instants(out: PacketWriter, tracks: _Tracks, run: Run) -> None:
    """Write the other events, each on the track of its thread."""
    events = run.events[~run.events["event"].isin(_SHOWN)]
    for ts, process, tid, name, args in zip(
        events["ts_ns"].tolist(), events["process"], events["tid"].tolist(), events["event"],
        events["args"], strict=True,
    ):  # fmt: skip
        out.instant(tracks.thread(process, tid), name, ts, args)


def _write_counters(out: PacketWriter, tracks: _Tracks, run: Run) -> None:
    """Write what the samples count."""
    samples = run.samples
    if samples.empty:
        return
    for column, (side, label) in _COUNTERS.items():
        track = out.counter(label, tracks.process[side])
        for ts, value in zip(samples["ts_ns"].tolist(), samples[column].tolist(), strict=True):
            out.value(track, ts, value)


def _lanes(begin: Ints, end: Ints) -> Iterator[Ints]:
    """Divide slices into lanes in which none overlaps another; yield indices, by time."""
    order = np.lexsort((end, begin))
    first, last = begin[order], np.maximum(end, begin)[order]
    if not (first[1:] < np.maximum.accumulate(last)[:-1]).any():
        if len(order):
            yield order
        return
    lanes: list[list[int]] = []
    free: list[tuple[int, int]] = []  # when a lane is free again, and which
    for place, start, stop in zip(order.tolist(), first.tolist(), last.tolist(), strict=True):
        if free and free[0][0] <= start:
            _, lane = heapq.heappop(free)
        else:
            lane = len(lanes)
            lanes.append([])
        lanes[lane].append(place)
        heapq.heappush(free, (stop, lane))
    for some in lanes:
        yield np.array(some, np.int64)
