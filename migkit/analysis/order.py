"""Rules about order: the states, one guest at a time, the switchover, the end of a migration."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from migkit.analysis.rule import DESTINATION, SOURCE, Finding, NotApplicableError, clock_error_ns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from migkit.analysis.analyses import Analyses
    from migkit.trace.simpletrace import Trace

# What follows what when a migration has completed; QEMU 7.2 and 11.1 agree in these orders. A
# state is written with an =; events that did not occur are passed over.
_SOURCE_END = (
    ("migration_thread_low_pending", "migration_completion_postcopy_end",
     "migration_completion_postcopy_end_after_complete", "migration_return_path_end_before",
     "migration_return_path_end_after", "=completed", "migration_thread_after_loop"),
    ("source_return_path_thread_shut", "source_return_path_thread_end",
     "migration_return_path_end_after"),
)  # fmt: skip
_DESTINATION_END = (
    ("loadvm_postcopy_handle_run", "postcopy_ram_listen_thread_exit",
     "postcopy_ram_incoming_cleanup_entry", "postcopy_ram_incoming_cleanup_join",
     "postcopy_ram_incoming_cleanup_closeuf", "postcopy_ram_incoming_cleanup_exit"),
    ("postcopy_ram_incoming_cleanup_entry", "postcopy_ram_fault_thread_quit",
     "postcopy_ram_fault_thread_exit", "postcopy_ram_incoming_cleanup_closeuf"),
    ("postcopy_ram_listen_thread_exit", "=completed"),
)  # fmt: skip
_SWITCHOVER = (
    "loadvm_postcopy_handle_advise", "loadvm_handle_cmd_packaged",
    "loadvm_handle_cmd_packaged_received", "loadvm_postcopy_handle_listen",
    "postcopy_ram_fault_thread_entry", "postcopy_ram_enable_notify",
    "postcopy_ram_listen_thread_start", "loadvm_postcopy_handle_run",
)  # fmt: skip
_POSTCOPY_END = _SOURCE_END[0][1:3]


def legal_states(run: Analyses) -> Iterator[Finding]:
    """Find transitions that no table of states has."""
    walk = run.states
    for side in (SOURCE, DESTINATION):
        wrong = walk[(walk["side"] == side) & ~walk["legal"]]
        if len(wrong):
            steps = dict.fromkeys(wrong["old_state"] + " → " + wrong["new_state"])
            yield Finding(
                side, int(wrong["ts_ns"].iloc[0]), len(wrong),
                f"no table of states has the transition {', '.join(steps)}",
            )  # fmt: skip


def one_guest(run: Analyses) -> Iterator[Finding]:
    """Find a guest that ran at the destination before, or while, it ran at the source."""
    run.need("guest_stopped", "guest_started")
    source, destination = run.traces["source"], run.traces["destination"]
    started = destination["guest_started"]
    if not len(started):
        raise NotApplicableError("the guest never ran at the destination")
    begun = int(started["ts"].min())
    allowed = begun + clock_error_ns(run)
    if not source.events:
        raise NotApplicableError("there is no trace of the source")
    stops = source["guest_stopped"]["ts"].astype(np.int64)
    if not (stops <= allowed).any():
        when = f"stopped at {_s(run, int(stops.min()))}" if len(stops) else "did not stop"
        yield Finding(
            DESTINATION, begun, 1,
            f"the guest ran at the destination from {_s(run, begun)} on, at the source it {when}",
        )  # fmt: skip
    again = source["guest_started"]["ts"].astype(np.int64)
    if len(again := again[again >= allowed]):
        yield Finding(
            SOURCE, int(again[0]), len(again),
            f"the guest ran at the source again at {_s(run, int(again[0]))}, after it had started "
            f"at the destination at {_s(run, begun)}",
        )  # fmt: skip


def discards_before_run(run: Analyses) -> Iterator[Finding]:
    """Find pages that were thrown away when the destination guest ran already."""
    trace = run.traces["destination"]
    run.need("loadvm_postcopy_handle_run", "loadvm_postcopy_ram_handle_discard")
    runs = trace["loadvm_postcopy_handle_run"]["ts_ns"]
    if not len(runs):
        raise NotApplicableError("the migration did not come to post-copy")
    for event in ("loadvm_postcopy_ram_handle_discard", "ram_discard_range"):
        times = trace[event]["ts_ns"].astype(np.int64)
        late = np.sort(times[times > int(runs.min())])
        if len(late):
            yield Finding(
                DESTINATION, int(late[0]), len(late),
                f"{event} at {_s(run, int(late[0]))}, after RUN at {_s(run, int(runs.min()))}",
            )  # fmt: skip


def switchover(run: Analyses) -> Iterator[Finding]:
    """Find a destination that did the switchover's steps in another order than QEMU."""
    trace = run.traces["destination"]
    if not len(trace["loadvm_postcopy_handle_run"]):
        raise NotApplicableError("the destination did not come to run the guest in post-copy")
    yield from _chain(run, DESTINATION, trace, _SWITCHOVER, last=False)


def end_of_source(run: Analyses) -> Iterator[Finding]:
    """Find a completion at the source that is out of order, or that hides an error."""
    trace = run.traces["source"]
    if run.status != "completed":
        raise NotApplicableError(f"the migration did not complete: {run.status}")
    for chain in _SOURCE_END:
        yield from _chain(run, SOURCE, trace, chain, last=True)
    if len(trace["postcopy_start"]):
        for event in _POSTCOPY_END:
            if event in run.recorded and not len(trace[event]):
                yield Finding(
                    SOURCE, None, 1, f"post-copy completed, but {event} did not occur"
                )  # fmt: skip
    yield from _hidden_errors(trace)


def end_of_destination(run: Analyses) -> Iterator[Finding]:
    """Find a post-copy that the destination did not end in order."""
    trace = run.traces["destination"]
    if not len(trace["postcopy_ram_listen_thread_exit"]):
        raise NotApplicableError("no post-copy came to its end at the destination")
    for chain in _DESTINATION_END:
        yield from _chain(run, DESTINATION, trace, chain, last=True)


def _hidden_errors(trace: Trace) -> Iterator[Finding]:
    """Find an error of the return path or the stream after which the migration "completed"."""
    completed = _time(trace, "=completed", last=True)
    for event, field in (
        ("migration_return_path_end_after", "rp_error"),
        ("source_return_path_thread_shut", "val"),
    ):
        rows = trace[event]
        if field in (rows.dtype.names or ()) and len(rows) and int(rows[field][-1]):
            yield Finding(
                SOURCE, int(rows["ts_ns"][-1]), 1,
                f"{event} reported the error {int(rows[field][-1])}, and the migration completed",
            )  # fmt: skip
    failed = trace["migration_completion_file_err"]["ts_ns"]
    if completed is not None and len(failed):
        yield Finding(
            SOURCE, int(failed[0]), len(failed),
            "the stream failed (migration_completion_file_err), and the migration completed",
        )  # fmt: skip


def _chain(
    run: Analyses, side: str, trace: Trace, chain: Sequence[str], *, last: bool
) -> Iterator[Finding]:
    """Find events of a chain that are not in order, by their first or their last occurrence."""
    times = [(event, _time(trace, event, last=last)) for event in chain]
    there = [(event, time) for event, time in times if time is not None]
    for (one, before), (two, after) in pairwise(there):
        if after < before:
            yield Finding(
                side, after, 1,
                f"{_name(two)} at {_s(run, after)} came before {_name(one)} at {_s(run, before)}",
            )  # fmt: skip


def _time(trace: Trace, event: str, *, last: bool) -> int | None:
    """Return when an event, or a state (``=name``), first or last occurred."""
    rows = trace["migrate_set_state" if event.startswith("=") else event]
    if event.startswith("="):
        rows = rows[rows["new_state"] == event[1:]]
    if not len(rows):
        return None
    return int(rows["ts_ns"].max() if last else rows["ts_ns"].min())


def _name(event: str) -> str:
    return f"migrate_set_state {event[1:]}" if event.startswith("=") else event


def _s(run: Analyses, ts_ns: int) -> str:
    return f"{(ts_ns - run.origin_ns) / 1e9:.6f} s"
