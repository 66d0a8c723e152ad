"""The columns of every frame: one table that documents the frames and that they are checked by.

All times are CLOCK_MONOTONIC in ns; a column's name ends in its unit. ``int64`` and ``float64``
are numpy's, with NaN for what is not there; ``Int64`` and ``boolean`` are pandas' nullable types.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from migkit.analysis.column import SIDES, Column, Table
from migkit.analysis.derived import DERIVED
from migkit.errors import MigkitError, OptionError, close_matches
from migkit.trace.folder import SAMPLES_DTYPE

__all__ = ["RESOLUTIONS", "SIDES", "STAGES", "TABLES", "Column", "SchemaError", "Table", "check",
           "describe", "frame", "table"]  # fmt: skip

STAGES = (
    "fault", "blocked", "read", "requested", "received_by_source",
    "sent", "received", "placed", "woken", "running",
)  # fmt: skip
"""The stages of a fault, in order."""

RESOLUTIONS = ("requested", "in_flight", "local", "background", "minor", "unresolved")


class SchemaError(MigkitError, ValueError):
    """A frame does not have the columns or dtypes that the schema gives it."""


_SIDE = Column("category", "the process: source or destination", SIDES)
_TS = Column("int64", "when, ns")
_TIME = Column("float64", "when, seconds since the run's first event")

_STAGE_DOCS = {
    "fault": "the guest's exception was taken (kernel)",
    "blocked": "its thread went to sleep in handle_userfault (kernel)",
    "read": "the destination read the fault from userfaultfd",
    "requested": "the destination sent the request, at received_by_source the latest",
    "received_by_source": "the source read the request",
    "sent": "the source sent the page, at received the latest",
    "received": "the destination read the page",
    "placed": "the page was in guest RAM (of a local fault: it was answered), at woken the latest",
    "woken": "the thread was woken for the last time (kernel)",
    "running": "the thread ran again (kernel)",
}


def _fault_columns() -> dict[str, Column]:
    """Return the columns of the fault table: who and what, the stages, their durations."""
    columns = {
        "ts_ns": Column("int64", "the first stage there is: fault, else read, ns"),
        "time_s": _TIME,
        "block": Column("str", "the RAM block"),
        "page": Column("int64", "host page, its index in the RAM block"),
        "offset": Column("int64", "where the page begins in the RAM block, bytes"),
        "tid": Column("int64", "thread of the guest that faulted"),
        "write": Column("boolean", "the access was a write (kernel)"),
        "kernel_mode": Column(
            "boolean", "the kernel made the access for the thread, in a system call (kernel)"
        ),
        "resolution": Column(
            "category",
            "requested: the source sent the page for this request; in_flight: a request was made, "
            "but the page was under way already; local: answered without the source (a zero page, "
            "or a page that had just come); background: the page came before the fault was read; "
            "minor: the page was there and only had to be mapped, nobody waited; unresolved: the "
            "run ended first; empty where the events that would tell were off",
            RESOLUTIONS,
        ),
        "channel": Column(
            "category", "what brought the page: main or preempt", ("main", "preempt")
        ),
        "zero": Column("boolean", "the page that came was all zeros"),
        "probe": Column(
            "category",
            "where the row comes from: kernel (the eBPF probe), user (the engines' events), both",
            ("both", "kernel", "user"),
        ),
        "messages": Column(
            "int64", "userfaultfd messages of this fault: signals repeat them; 0 in kernel rows"
        ),
        "latency_us": Column(
            "float64",
            "how long the guest waited: from fault (else read) to running (else placed), us",
        ),
    }
    columns["outage_us"] = Column(
        "float64", "how much of the wait fell into an outage (paused, recovering), us"
    )
    for stage in STAGES:
        columns[f"{stage}_ns"] = Column("Int64", f"{_STAGE_DOCS[stage]}, ns")
    for stage in STAGES[1:]:
        columns[f"{stage}_us"] = Column(
            "float64", f"from the latest stage before it to {stage}, 0 if that was earlier, us"
        )
    return columns


_SAMPLE_DOCS = {
    "step": "steps that the guest has executed, over all its migrations",
    "precopy_bytes": "sent on the main channel before post-copy, bytes",
    "postcopy_bytes": "sent on the main channel in post-copy, bytes",
    "preempt_bytes": "sent on the preempt channel, bytes",
    "precopy_pages": "pages before post-copy",
    "background_pages": "pages in post-copy that nobody asked for",
    "requested_pages": "pages in post-copy that were asked for",
    "zero_pages": "zero pages among all these",
    "discarded_pages": "pages thrown away at the destination",
    "remaining_pages": "pages still to be sent",
    "round": "pass over the dirty pages, from 1",
    "dirty_pages": "pages that the last scan found dirty",
    "bandwidth": "bytes a second, as last measured",
    "faults": "messages read from userfaultfd",
    "local_faults": "of those, answered without the source",
    "outstanding": "requests under way",
    "unsent_requests": "requests for pages that were under way already",
}


def _sample_columns() -> dict[str, Column]:
    """Return the columns of the samples: those of the file, and the time in seconds."""
    columns = {"ts_ns": _TS, "time_s": _TIME}
    for name in (SAMPLES_DTYPE.names or ())[1:]:
        side, _, what = name.partition("_")
        columns[name] = Column("int64", f"{side}: {_SAMPLE_DOCS.get(what, what)}")
    return columns


TABLES: dict[str, Table] = {
    "events": Table(
        "one row a trace event, in order of time",
        {
            "ts_ns": _TS,
            "process": _SIDE,
            "tid": Column("int64", "thread"),
            "event": Column("category", "name of the event, see trace-events"),
            "original": Column("category", "its name in the trace, which in a QEMU's may be older"),
            "args": Column("str", "its arguments as QEMU's log prints them"),
        },
    ),
    "faults": Table("one row a page fault of the destination guest, in order", _fault_columns()),
    "samples": Table("one row a sample, every 20 ms", _sample_columns()),
    "phases": Table(
        "one row a phase; the phases of a side follow each other without a gap",
        {
            "name": Column(
                "str",
                "source: setup, precopy round N (precopy if no scan was recorded), discard, "
                "switchover, post-copy, completion; "
                "destination: setup, load, listen, post-copy, cleanup or completion; after a "
                "break: paused, recovery; after a cancel: cancelling",
            ),
            "side": _SIDE,
            "start_ns": Column("int64", "begin, ns"),
            "end_ns": Column("int64", "end, ns: the next one's begin"),
            "duration_ms": Column("float64", "ms"),
            "pages": Column("Int64", "pages that were sent, or came"),
            "bytes": Column("Int64", "of those, the content of pages that were not zero, bytes"),
            "dirty_pages": Column(
                "Int64", "to be sent in this round; else what the phase's last scan found dirty"
            ),
        },
    ),
    "stream": Table(
        "one row a piece of a migration stream, in its order and without a gap",
        {
            "offset": Column("int64", "where it begins in the stream, bytes"),
            "bytes": Column("int64", "its length on the wire, bytes"),
            "section": Column(
                "category",
                "what it is, or what section it lies in: start, part, end or full; undecoded is "
                "what could not be understood, or is cut off",
                ("header", "configuration", "command", "start", "part", "end", "full", "footer",
                 "vmdescription", "eof", "undecoded"),
            ),
            "section_id": Column("Int64", "the section's number"),
            "device": Column("str", "the section's device, ram for guest memory"),
            "command": Column("str", "QEMU's MIG_CMD name"),
            "block": Column("str", "RAM block of pages or discards"),
            "start": Column("Int64", "first byte of the pages in their block"),
            "end": Column("Int64", "first byte behind them"),
            "pages": Column("Int64", "how many pages of 4 KiB came, or were discarded"),
            "flags": Column(
                "category",
                "of a section: head; state (of a device); of RAM: page (4 KiB of data), zero, "
                "xbzrle and compressed (not decoded), mem_size (the list of blocks), eos (the "
                "end), multifd_flush",
                ("head", "state", "page", "zero", "xbzrle", "compressed", "mem_size", "eos",
                 "multifd_flush"),
            ),
            "packaged": Column("bool", "it lies in a package, read whole before any is acted on"),
            "detail": Column("str", "a ping's value, a discard's ranges, the machine, the blocks"),
        },
    ),
    "downtime": Table(
        "one row a part of the time in which the guest ran nowhere; the parts add up to it",
        {
            "part": Column("str", "what was done"),
            "side": Column("category", "who did it: source, wire or destination",
                           ("source", "wire", "destination")),
            "start_ns": Column("int64", "begin, ns; the first is the source guest's last step"),
            "end_ns": Column("int64", "end, ns; the last is the destination guest's first step"),
            "duration_us": Column("float64", "us"),
            "share": Column("float64", "part of the whole, 0 to 1"),
        },
    ),
    **DERIVED,
}  # fmt: skip
"""All frames by name."""


def table(name: str) -> Table:
    """Return a frame's table; raises OptionError for an unknown name."""
    if name not in TABLES:
        raise OptionError(f"no frame {name!r}; {close_matches(name, TABLES)}")
    return TABLES[name]


def frame(name: str, data: dict[str, object] | None = None) -> pd.DataFrame:
    """Make a frame of the schema from its columns, each as a sequence; none make an empty one."""
    given = data or {}
    columns = table(name).columns
    return pd.DataFrame(
        {key: column.make(given.get(key, [])).array for key, column in columns.items()},
        copy=False,  # a million faults are 300 MB
    )


def concat(name: str, frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Put frames of one table together, by time; counts in ``attrs`` are not added up."""
    joined = pd.concat(frames, ignore_index=True)
    check(joined, name)
    return joined.sort_values("ts_ns", kind="stable", ignore_index=True)


def check(data: pd.DataFrame, name: str) -> None:
    """Raise SchemaError, with all that is wrong, unless a frame is as its table says."""
    columns = table(name).columns
    wrong = []
    if list(data.columns) != list(columns):
        missing = [key for key in columns if key not in data.columns]
        extra = [str(key) for key in data.columns if key not in columns]
        wrong.append(f"columns missing {missing}, too many {extra}, or in another order")
    for key, column in columns.items():
        if key not in data.columns:
            continue
        found = data[key].dtype
        if str(found) != column.dtype:
            wrong.append(f"{key} is {found}, expected {column.dtype}")
        elif isinstance(found, pd.CategoricalDtype) and column.choices:
            choices = tuple(found.categories)
            if choices != column.choices:
                wrong.append(f"{key} has the values {choices}, expected {column.choices}")
    if wrong:
        raise SchemaError(f"frame {name!r}: " + "; ".join(wrong))


def describe(name: str) -> str:
    """Return a frame's documentation: what a row is, then each column, its dtype and meaning."""
    chosen = table(name)
    width = max(len(key) for key in chosen.columns)
    lines = [f"{chosen.row[0].upper()}{chosen.row[1:]}.", ""]
    for key, column in chosen.columns.items():
        lines.append(f"{key:<{width}}  {column.dtype:<8}  {column.doc}")
    return "\n".join(lines)
