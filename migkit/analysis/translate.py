"""What QEMU's events say in migkit's words, so that one set of analyses serves both engines.

QEMU has no event for some things that migkit records, but others that tell the same:

guest_stopped                    the source's run state leaves ``running``
guest_started                    the destination's run state becomes ``running``
ram_save_round                   a scan for dirty pages before the switchover has ended
postcopy_preempt_send_host_page  a request was taken off the source's queue, to be sent next
postcopy_request_received        a page that was requested was read (ram_load_postcopy_loop)
postcopy_request_placed          a page that was requested was placed

These become derived events of the trace: frames are made of them, but ``run.events`` has only
what was recorded, and what QEMU recorded itself is never replaced.
"""

from __future__ import annotations

from collections import ChainMap
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from migkit.analysis.faults import Guest
from migkit.analysis.join import Occurrences
from migkit.analysis.scans import scans
from migkit.trace.decode import event_dtype
from migkit.trace.logtrace import LogTrace
from migkit.trace.recorded import RecordedEvents
from migkit.trace.simpletrace import Trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy.typing as npt


_BLOCK_FIELDS = {
    "postcopy_ram_fault_thread_request": "ramblock",
    "migrate_handle_rp_req_pages": "rbname",
    "get_queued_page": "block_name",
    "postcopy_preempt_send_host_page": "str",
    "postcopy_request_received": "rbname",
    "postcopy_request_placed": "rbname",
}
_STAGE_SOURCES = {
    "read": "postcopy_ram_fault_thread_request",
    "requested": "postcopy_page_req_add",
    "received_by_source": "migrate_handle_rp_req_pages",
    "sent": "get_queued_page",
    "received": "ram_load_postcopy_loop",
    "placed": "postcopy_place_page",
}
"""The event of QEMU behind each stage of a fault."""


def translated(source: Trace, destination: Trace) -> tuple[Trace, Trace]:
    """Return both traces with the events that follow from theirs."""
    return (
        _with(source, dict(_of_source(source))),
        _with(destination, dict(_of_destination(destination))),
    )


def of_block(source: Trace, destination: Trace, guest: Guest) -> tuple[Trace, Trace]:
    """Return both traces with the faults of only one RAM block, the guest's."""
    return _only(source, guest), _only(destination, guest)


def _only(trace: Trace, guest: Guest) -> Trace:
    chosen = {}
    for event, field in _BLOCK_FIELDS.items():
        rows = trace[event]
        chosen[event] = rows[_blocks(rows[field]) == guest.block]
    requested = trace["postcopy_page_req_add"]
    offset = requested["addr"].astype(np.int64) - guest.address
    chosen["postcopy_page_req_add"] = requested[(offset >= 0) & (offset < guest.n_bytes)]
    return Trace(trace.registry, ChainMap(chosen, trace.events))  # type: ignore[arg-type]


DERIVED_FROM = {
    "guest_stopped": "runstate_set",
    "guest_started": "runstate_set",
    "ram_save_round": "migration_bitmap_sync_end",
    "postcopy_request_received": "ram_load_postcopy_loop",
    "postcopy_request_placed": "postcopy_place_page",
}
"""The event of QEMU behind each event of ours that no QEMU has."""


def fault_warnings(recorded: frozenset[str], traces: Mapping[str, Trace]) -> Iterator[str]:
    """Say which stages of the fault table are empty, and which of QEMU's events would tell."""
    states = [trace["migrate_set_state"]["new_state"].tolist() for trace in traces.values()]
    if any(states) and not any(s.startswith("postcopy") for side in states for s in side):
        yield "faults: there are none: the migration did not come to post-copy"
        return
    off = {stage: name for stage, name in _STAGE_SOURCES.items() if name not in recorded}
    if off:
        yield (
            f"faults: {', '.join(off)} cannot be known: there is no {', '.join(off.values())}; "
            "QEMU records an event with -trace NAME"
        )
    yield "faults: fault, blocked, woken and running are empty: a log has not what the kernel saw"


def _blocks(names: npt.NDArray[np.object_]) -> npt.NDArray[np.object_]:
    """Return the names of blocks with ``(null)``, "the same as before", filled in."""
    index = np.where(names == "(null)", 0, np.arange(len(names)))
    return names[np.maximum.accumulate(index)] if len(names) else names


def _with(trace: Trace, derived: dict[str, npt.NDArray[np.void]]) -> Trace:
    new = {name: rows for name, rows in derived.items() if name not in trace.events}
    if isinstance(trace, LogTrace):
        return replace(trace, events=trace.events.joined(new), derived=frozenset(new))
    if isinstance(trace.events, RecordedEvents):
        return replace(trace, events=trace.events.joined(new), derived=frozenset(new))
    return replace(trace, events={**trace.events, **new}, derived=frozenset(new))


def _of_source(trace: Trace) -> Iterator[tuple[str, npt.NDArray[np.void]]]:
    states = trace["runstate_set"]
    if len(states):
        stops = states[(states["current_state_str"] == "running") & _is_migrating(states)]
        yield "guest_stopped", _make(trace, "guest_stopped", stops, ts=stops["ts_ns"])
    rows = trace["migration_bitmap_sync_end"]
    rows = rows[np.argsort(rows["ts_ns"], kind="stable")]
    if len(rows):
        _, found = scans(trace, of_qemu=True)
        switch = trace["postcopy_start"]["ts_ns"]
        if not len(switch):
            switch = states["ts_ns"][
                (states["current_state_str"] == "running") & _is_migrating(states)
            ]
        early = rows["ts_ns"] < (switch.max() if len(switch) else np.iinfo(np.int64).max)
        before = rows[early]
        yield (
            "ram_save_round",
            _make(
                trace, "ram_save_round", before, round=np.arange(len(before)) + 1,
                dirty_pages=found[early],
            ),
        )  # fmt: skip
    taken = trace["get_queued_page"]
    if len(taken):
        event = "postcopy_preempt_send_host_page"
        yield event, _make(trace, event, taken, str=taken["block_name"], offset=taken["page_abs"])


def _is_migrating(states: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    return np.isin(states["new_state_str"], ["finish-migrate", "postmigrate"])


def _of_destination(trace: Trace) -> Iterator[tuple[str, npt.NDArray[np.void]]]:
    states = trace["runstate_set"]
    if len(states):
        started = states[
            (states["new_state_str"] == "running") & (states["current_state_str"] == "inmigrate")
        ]
        yield "guest_started", _make(trace, "guest_started", started, ts=started["ts_ns"])
    requests = trace["postcopy_ram_fault_thread_request"]
    if not len(requests):
        return
    kinds = [trace["postcopy_place_page"], trace["postcopy_place_page_zero"]]
    placed = Occurrences.both(
        *(Occurrences.of(r["ts_ns"], r["host_addr"], kind) for kind, r in enumerate(kinds))
    )
    answered = _answers(trace, "postcopy_request_placed", requests, "hostaddr", placed, "kind")
    yield "postcopy_request_placed", answered
    records = trace["ram_load_postcopy_loop"]
    if len(records):
        came = Occurrences.of(records["ts_ns"], records["addr"], records["channel"])
        yield "postcopy_request_received", _receipts(trace, requests, answered, came)


def _receipts(
    trace: Trace, requests: npt.NDArray[np.void], answered: npt.NDArray[np.void], came: Occurrences
) -> npt.NDArray[np.void]:
    """Return when the pages that were requested had been read.

    A record says not of which RAM block its page is, but is followed by the page's placing: it is
    the last of that offset before it. Where no placing is known the first after the request is.
    """
    event = "postcopy_request_received"
    if not len(answered):
        return _answers(trace, event, requests, "offset", came, "channel")
    answered = answered[np.argsort(answered["ts_ns"], kind="stable")]
    found = came.last_until(answered["ts_ns"].astype(np.int64), answered["offset"].astype(np.int64))
    index, answered = found[found >= 0], answered[found >= 0]
    fields = {"rbname": answered["rbname"], "offset": answered["offset"]}
    rows = _make(trace, event, answered, **fields, channel=came.value[index])
    rows["ts_ns"] = came.ts[index]
    return rows


def _answers(
    trace: Trace,
    event: str,
    requests: npt.NDArray[np.void],
    key: str,
    what: Occurrences,
    value: str,
) -> npt.NDArray[np.void]:
    """Return the first occurrence on each requested page from the request on, each once."""
    requests = requests[np.argsort(requests["ts_ns"], kind="stable")]
    found = what.first_from(requests["ts_ns"].astype(np.int64), requests[key].astype(np.int64))
    index, first = np.unique(found[found >= 0], return_index=True)
    asked = requests[found >= 0][first]
    fields = {"rbname": asked["ramblock"], "offset": asked["offset"], value: what.value[index]}
    rows = _make(trace, event, asked, **fields)
    rows["ts_ns"] = what.ts[index]
    return rows


def _make(
    trace: Trace, event: str, like: npt.NDArray[np.void], **fields: npt.ArrayLike
) -> npt.NDArray[np.void]:
    """Return rows of an event at the times of others; fields that nobody knows are zero."""
    rows = np.zeros(len(like), event_dtype(trace.registry[event]))
    for name in ("ts_ns", "tid", "seq"):
        rows[name] = like[name]
    for name, values in fields.items():
        rows[name] = values
    return rows
