"""The fault table: what the kernel saw of each page fault and what both engines did about it.

A row begins with a message that the destination read from userfaultfd; the events of its page
that follow, up to the one that resolves it, are its stages. The kernel's record of the same
fault, if the probe was attached, adds the stages that no process can see. Kernel records without
a message are rows of their own. Columns: ``schema.describe("faults")``.

Some stamps are taken after a system call returned, when its effect may have been seen on
another CPU already. An effect cannot precede its cause, so ``requested``, ``sent`` and
``placed`` are not put later than ``received_by_source``, ``received`` and ``woken``;
``attrs["capped"]`` counts the faults, by stage, in which a stamp was moved for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from migkit.analysis import schema
from migkit.analysis.join import Occurrences, fold, kernel_of_messages, take
from migkit.analysis.outages import outages, overlap_us
from migkit.analysis.schema import STAGES
from migkit.probe.records import ErrorCode, FaultFlag

if TYPE_CHECKING:
    from migkit.analysis.join import Bools, Ints
    from migkit.probe.records import FaultRecords
    from migkit.trace.simpletrace import Trace

STAGE_EVENTS = {
    "read": "postcopy_ram_fault_thread_request",
    "requested": "postcopy_page_req_add",
    "received_by_source": "migrate_handle_rp_req_pages",
    "sent": "postcopy_preempt_send_host_page",
    "received": "postcopy_request_received",
    "placed": "postcopy_request_placed",
    "answered here": "postcopy_fault_local",
}
"""The event behind each stage of user space."""

_REQUESTED, _IN_FLIGHT, _LOCAL, _BACKGROUND, _MINOR, _UNRESOLVED = range(len(schema.RESOLUTIONS))
_BOTH, _KERNEL, _USER = range(3)
_NONE = -1
_LOCALLY = 2  # beside the kinds of postcopy_request_placed: 0 data, 1 zero


@dataclass(frozen=True)
class Guest:
    """What of the run the fault table must know."""

    address: int
    """Where the destination guest maps its RAM block."""
    n_bytes: int
    page_size: int
    origin_ns: int
    """What ``time_s`` counts from."""
    preempt: bool
    """Requested pages had a channel of their own."""
    recorded: frozenset[str]
    """The events that were on."""
    block: str = ""
    """The name of the RAM block that the faults are in."""


def faults_frame(
    source: Trace, destination: Trace, records: FaultRecords, guest: Guest
) -> pd.DataFrame:
    """Return the fault table; ``records`` are the probe's, possibly none."""
    kernel = _kernel_columns(records, guest)
    users, matched = _user_rows(source, destination, kernel, guest)
    rest = _kernel_rows(kernel, ~matched, guest)
    rows = {name: np.concatenate([users[name], rest[name]]) for name in users}
    capped = _cap_causes(rows)
    frame = _as_frame(rows, guest, outages(destination))
    frame.attrs["capped"] = capped
    return frame


def _kernel_columns(records: FaultRecords, guest: Guest) -> dict[str, Ints]:
    """Return the probe's records of faults in guest RAM, by time of the fault."""
    offset = records["address"].astype(np.int64) - guest.address
    inside = (offset >= 0) & (offset < guest.n_bytes)
    kept = records[inside]
    order = np.argsort(kept["fault_ns"], kind="stable")
    kept = kept[order]
    columns = {
        stage: kept[f"{stage}_ns"].astype(np.int64)
        for stage in ("fault", "blocked", "woken", "running")
    }
    columns["page"] = offset[inside][order] // guest.page_size
    columns["tid"] = kept["tid"].astype(np.int64)
    columns["write"] = (kept["error_code"] & ErrorCode.WRITE > 0).astype(np.int64)
    columns["kernel_mode"] = (kept["flags"] & FaultFlag.KERNEL_MODE > 0).astype(np.int64)
    return columns


def _user_rows(
    source: Trace, destination: Trace, kernel: dict[str, Ints], guest: Guest
) -> tuple[dict[str, Ints], Bools]:
    """Return the rows of faults that had a message, and which kernel records they took up."""
    size = guest.page_size
    requests = destination.columns(STAGE_EVENTS["read"], "ts_ns", "offset", "pid")
    order = np.argsort(requests[0], kind="stable")
    read, offset, tid = (column[order].astype(np.int64) for column in requests)
    page = offset // size

    ends = Occurrences.both(
        _occurrences(destination, "postcopy_request_placed", "offset", size, "kind"),
        _occurrences(destination, "postcopy_fault_local", "offset", size, _LOCALLY),
    )
    end = ends.first_from(read, page)
    record = kernel_of_messages(read, page, tid, kernel)
    fault = fold(page, tid, end, record)

    # Of each fault: its first and its last message, and those that the kernel has a record of.
    n_faults = int(fault.max()) + 1 if len(fault) else 0
    indices = np.arange(len(fault))
    first = np.full(n_faults, len(fault))
    np.minimum.at(first, fault, indices)
    last = np.zeros(n_faults, np.int64)
    np.maximum.at(last, fault, indices)
    earliest = np.full(n_faults, len(kernel["fault"]))
    latest = np.full(n_faults, -1)
    has = record >= 0
    np.minimum.at(earliest, fault[has], record[has])
    np.maximum.at(latest, fault[has], record[has])
    earliest[latest < 0] = -1

    rows = {"page": page[first], "tid": tid[first], "read": read[first]}
    rows["messages"] = np.bincount(fault, minlength=n_faults)
    rows["placed"] = ends.times(end[last])
    rows["kind"] = take(ends.value, end[last], _NONE)
    _add_stages(rows, source, destination, guest)
    for name in ("fault", "blocked"):
        rows[name] = take(kernel[name], earliest)
    for name in ("woken", "running"):
        rows[name] = take(kernel[name], latest)
    for name in ("write", "kernel_mode"):
        rows[name] = take(kernel[name], latest, _NONE)
    rows["probe"] = np.where(latest >= 0, _BOTH, _USER)
    matched = np.zeros(len(kernel["fault"]), np.bool_)
    matched[record[has]] = True
    return rows, matched


def _add_stages(rows: dict[str, Ints], source: Trace, destination: Trace, guest: Guest) -> None:
    """Add the stages between the reading of a fault and its end, and how it was resolved."""
    size = guest.page_size
    kind = rows.pop("kind")
    rows["zero"] = np.where(kind == _LOCALLY, _NONE, kind)
    reading = _Reading(rows["read"], rows["page"])
    came = _occurrences(destination, STAGE_EVENTS["received"], "offset", size, "channel")
    arrival = reading.first_until(came, rows["placed"])
    rows["received"], rows["channel"] = came.times(arrival), take(came.value, arrival, _NONE)
    # What the source did about a page after it had come is not what the guest waited for.
    bound = np.where(rows["received"] > 0, rows["received"], rows["placed"])
    asked = _occurrences(destination, STAGE_EVENTS["requested"], "addr", size, base=guest.address)
    heard = _occurrences(source, STAGE_EVENTS["received_by_source"], "start", size)
    for stage, occurrences in (("requested", asked), ("received_by_source", heard)):
        rows[stage] = occurrences.times(reading.first_until(occurrences, bound))
    # Stamped after the fact, see the top; a page is sent for one request at most, so no bound.
    went = _occurrences(source, STAGE_EVENTS["sent"], "offset", 1)
    sent = np.where(kind == _LOCALLY, 0, went.times(reading.first_in(went)))
    rows["sent"] = np.where(_unasked(source, len(went.ts), reading, size), 0, sent)

    answered = (rows["sent"] > 0) | (rows["channel"] == 1)
    told = guest.preempt or STAGE_EVENTS["sent"] in guest.recorded
    rows["resolution"] = np.select(
        [kind == _NONE, kind == _LOCALLY, answered], [_UNRESOLVED, _LOCAL, _REQUESTED],
        _IN_FLIGHT if told else _NONE,
    )  # fmt: skip


def _unasked(source: Trace, n_sent: int, reading: _Reading, size: int) -> Bools:
    """Return which pages were sent, but not because they were asked for.

    QEMU 7.2's postcopy_preempt_send_host_page is of every page that post-copy sends when requested
    ones have a channel of their own, 8.0's of requested ones: the queue tells which were.
    """
    (queued,) = source.columns("get_queued_page", "ts_ns")
    if not 0 < len(queued) < n_sent:
        return np.zeros(1, np.bool_)
    return reading.first_in(_occurrences(source, "get_queued_page", "tmp_offset", size)) < 0


class _Reading:
    """When each row's message was read, and for which page."""

    def __init__(self, read: Ints, page: Ints) -> None:
        self._order = np.argsort(read, kind="stable")
        self._read, self._page = read[self._order], page[self._order]

    def first_in(self, what: Occurrences) -> Ints:
        """Return the index of the first occurrence on each row's page from the reading on."""
        index = np.empty(len(self._order), np.int64)
        index[self._order] = what.first_from(self._read, self._page)
        return index

    def first_until(self, what: Occurrences, bound: Ints) -> Ints:
        """Return the same, but -1 if it is after ``bound``.

        A bound of 0 is none: the fault was never resolved.
        """
        index = self.first_in(what)
        return np.where((bound > 0) & (what.times(index) > bound), -1, index)


def _occurrences(
    trace: Trace, event: str, field: str, size: int, value: str | int = 0, *, base: int = 0
) -> Occurrences:
    """Return an event's records; the page is ``(field - base) / size``, the value another field."""
    fields = ["ts_ns", field] + ([value] if isinstance(value, str) else [])
    ts, place, *values = trace.columns(event, *fields)
    page = (place.astype(np.int64) - base) // size
    return Occurrences.of(ts, page, values[0].astype(np.int64) if values else value)


def _kernel_rows(kernel: dict[str, Ints], chosen: Bools, guest: Guest) -> dict[str, Ints]:
    """Return the rows of faults that only the kernel has seen."""
    rows = {name: values[chosen] for name, values in kernel.items()}
    n_rows = len(rows["page"])
    for name in ("read", "requested", "received_by_source", "sent", "received", "placed"):
        rows[name] = np.zeros(n_rows, np.int64)
    for name in ("channel", "zero"):
        rows[name] = np.full(n_rows, _NONE)
    rows["messages"] = np.zeros(n_rows, np.int64)
    rows["probe"] = np.full(n_rows, _KERNEL)
    slept = rows["blocked"] > 0
    # Without the messages nobody can tell that there was none.
    unasked = _BACKGROUND if STAGE_EVENTS["read"] in guest.recorded else _NONE
    ended = np.where(rows["running"] > 0, unasked, _UNRESOLVED)
    rows["resolution"] = np.where(slept, ended, _MINOR)
    return rows


def _cap_causes(rows: dict[str, Ints]) -> dict[str, int]:
    """Let no cause be later than its effect (see the top); return how many were, by stage."""
    before = {stage: rows[stage] for stage in ("requested", "sent", "placed")}
    for cause, effect in (("requested", "received_by_source"), ("sent", "received")):
        capped = np.minimum(rows[cause], rows[effect])
        rows[cause] = np.where(rows[effect] > 0, capped, rows[cause])
    # A wake-up by a signal, before the page came, is no effect of its placing.
    earliest = np.maximum(rows["received"], rows["read"])
    woken = (rows["woken"] > 0) & (rows["woken"] >= earliest)
    rows["placed"] = np.where(woken, np.minimum(rows["placed"], rows["woken"]), rows["placed"])
    return {stage: int((rows[stage] != stamps).sum()) for stage, stamps in before.items()}


def _as_frame(rows: dict[str, Ints], guest: Guest, paused: Ints) -> pd.DataFrame:
    """Return rows as the table of the schema, in order of time."""
    ts = _began_ns(rows)
    order = np.lexsort((rows["page"], ts))
    rows = {name: values[order] for name, values in rows.items()}
    ts = ts[order]
    end = np.where(rows["running"] > 0, rows["running"], rows["placed"])
    data: dict[str, object] = {
        "ts_ns": ts,
        "time_s": (ts - guest.origin_ns) / 1e9,
        "block": [guest.block] * len(ts),
        "offset": rows["page"] * guest.page_size,
        "latency_us": np.where((ts > 0) & (end >= ts), (end - ts) / 1e3, np.nan),
        **{name: rows[name] for name in ("page", "tid", "messages")},
        **{name: _flags(rows[name]) for name in ("write", "kernel_mode", "zero")},
    }
    columns = schema.TABLES["faults"].columns
    for name in ("resolution", "channel", "probe"):
        kind = pd.CategoricalDtype(list(columns[name].choices))
        data[name] = pd.Categorical.from_codes(rows[name], dtype=kind)
    for stage in STAGES:
        data[f"{stage}_ns"] = pd.arrays.IntegerArray(rows[stage], rows[stage] == 0)
    data |= _durations_us(rows)
    data["outage_us"] = overlap_us(ts, end, paused)
    return schema.frame("faults", data)


def _flags(values: Ints) -> pd.arrays.BooleanArray:
    return pd.arrays.BooleanArray(values == 1, values == _NONE)


def _began_ns(rows: dict[str, Ints]) -> Ints:
    """Return when each wait began: at the fault, or at the reading of its message.

    The message is the earlier one where the kernel's record is of a later try of the thread.
    """
    fault, read = rows["fault"], rows["read"]
    both = (fault > 0) & (read > 0)
    return np.where(both, np.minimum(fault, read), np.maximum(fault, read))


def _durations_us(rows: dict[str, Ints]) -> dict[str, object]:
    """Return ``<stage>_us``: since the latest of the stages before it, 0 if it was earlier.

    So they add up to the time from the first to the last stage, whatever the order.
    """
    latest = rows[STAGES[0]].copy()
    durations: dict[str, object] = {}
    for stage in STAGES[1:]:
        there = rows[stage] > 0
        step = np.maximum(rows[stage] - latest, 0) / 1e3
        durations[f"{stage}_us"] = np.where(there & (latest > 0), step, np.nan)
        latest = np.maximum(latest, rows[stage])
    return durations
