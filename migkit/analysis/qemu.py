"""What a real QEMU recorded of a migration, opened as a run: ``migkit.load_qemu()``.

Each side's trace is a log of any version or a simpletrace file; either may be missing, and then
what needs it says so. Times are those of the destination's clock where there is one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from migkit.analysis import clocks, translate
from migkit.analysis.run import Run
from migkit.errors import OptionError, TraceFormatError
from migkit.trace import logtrace, simpletrace
from migkit.trace.dialect import Dialect, canonical
from migkit.trace.folder import FORMAT, ROLES, SAMPLES_DTYPE
from migkit.trace.loglines import open_plain
from migkit.trace.recorded import RecordedEvents
from migkit.trace.registry import Registry
from migkit.trace.simpletrace import Trace

if TYPE_CHECKING:
    import os

    import numpy.typing as npt

    from migkit.analysis.clocks import Alignment

_TARGET_PAGE = 4096
_HEAD = 65536


def load_qemu(
    source: str | os.PathLike[str] | None = None,
    destination: str | os.PathLike[str] | None = None,
    *,
    registry: str | os.PathLike[str] | Registry | None = None,
    query_migrate: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Run:
    """Open what QEMU recorded of one migration as a :class:`Run`.

    ``source`` and ``destination`` are logs (``-trace NAME -D FILE -msg timestamp=on``; .xz and
    .gz as they are) or simpletrace files. ``registry`` is the trace-events file of that QEMU
    (``trace-events-all``); without it the forms of QEMU 7.2 and 11.1 are known, and the arguments
    of other events stay text. ``query_migrate`` is what ``query-migrate`` said at the end, a file
    or a mapping with ``src`` and ``dst``; it is kept in ``run.meta``. ``progress`` is told how
    many bytes have been read since it was last told.

    Raises TraceFormatError for a file that is neither, or that has no trace event in it; for one
    of the other side, of both sides, or of several migrations.
    """
    given = {"source": source, "destination": destination}
    if source is None and destination is None:
        raise OptionError("load_qemu wants a trace of the source, of the destination, or of both")
    if registry is not None and not isinstance(registry, Registry):
        registry = Registry.load(Path(registry))
    dialect = Dialect(registry)
    traces = {
        role: _read(path, registry, dialect, progress) if path is not None else _none(role, dialect)
        for role, path in given.items()
    }
    for role, path in given.items():
        if path is not None:
            _check_side(role, path, traces[role])
    _check_single(traces["source"])
    alignment = clocks.align(traces["source"], traces["destination"])
    if source is not None and destination is not None:
        traces["source"] = clocks.shifted(traces["source"], alignment.offset_ns)
    translated = translate.translated(traces["source"], traces["destination"])
    traces = dict(zip(ROLES, _known_to_both(*translated), strict=True))
    paths = {role: Path(path) for role, path in given.items() if path is not None}
    meta = _meta(traces, paths, alignment if len(paths) == 2 else None)
    meta["query_migrate"] = _query(query_migrate)
    meta["memory"] = _memory(meta["query_migrate"], traces["destination"])
    return Run(QemuTraces(traces, paths, meta))


class QemuTraces:
    """What a Run of QEMU's is made of; the counterpart of a run folder."""

    def __init__(
        self, traces: Mapping[str, Trace], paths: Mapping[str, Path], meta: dict[str, Any]
    ) -> None:
        self.path = next(iter(paths.values()))
        self._traces = traces
        self._meta = meta

    def load_meta(self) -> dict[str, Any]:
        """Return what meta.json would say."""
        return self._meta

    def read_trace(self, role: str) -> Trace:
        """Return one side's trace."""
        return self._traces[role]

    def load_samples(self) -> npt.NDArray[np.void]:
        """Return no samples: QEMU takes none."""
        return np.empty(0, SAMPLES_DTYPE)

    def load_probe(self, dtype: np.dtype[np.void]) -> npt.NDArray[np.void]:
        """Return no records of the kernel's."""
        return np.empty(0, dtype)


def _read(
    path: str | os.PathLike[str],
    registry: Registry | None,
    dialect: Dialect,
    progress: Callable[[int], None] | None,
) -> Trace:
    """Read a trace of either format."""
    try:
        with open_plain(path) as file:
            head = file.read(_HEAD)
            if not head.startswith(simpletrace.header()[:16]):
                return logtrace.read(path, registry, progress)
            data = head + file.read()
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror or error}") from error
    if progress:
        progress(len(data))
    return _canonical(simpletrace.read(data, dialect.registry([]), dialect.forms))


def _canonical(trace: Trace) -> Trace:
    """Return a trace with its events under their canonical names."""
    recorded = trace.events.recorded if isinstance(trace.events, RecordedEvents) else {}
    return dataclasses.replace(
        trace,
        events=RecordedEvents({canonical(name): each for name, each in recorded.items()}),
        originals={canonical(n): n for n in trace.events if canonical(n) != n},
    )


def _none(role: str, dialect: Dialect) -> Trace:
    return Trace(dialect.registry([]), warnings=(f"there is no trace of the {role}",))


# Neither side logs events of the other's, whatever is migrated and however.
_ONLY_AT = {
    "source": ("migration_thread_setup_complete", "migration_thread_low_pending",
               "open_return_path_on_source", "migrate_handle_rp_req_pages"),
    "destination": ("process_incoming_migration_co_end", "loadvm_process_command",
                    "postcopy_ram_listen_thread_start", "postcopy_ram_fault_thread_request"),
}  # fmt: skip


def _check_side(role: str, path: str | os.PathLike[str], trace: Trace) -> None:
    """Raise TraceFormatError for a trace of the other side, or of both."""
    other = next(side for side in ROLES if side != role)
    own, foreign = (
        next((name for name in _ONLY_AT[side] if name in trace.events), None)
        for side in (role, other)
    )
    if foreign and own:
        raise TraceFormatError(
            f"{path} has {own}, of a source or destination each, and {foreign}, of the other: two "
            "QEMUs wrote into one file, or one was migrated to and then migrated on; give each "
            "QEMU its own -D FILE, and cut it to one migration"
        )
    if foreign:
        raise TraceFormatError(
            f"{path} was given as the {role}'s trace, but {foreign} occurs only at a {other}: "
            f"load_qemu({other}=...)"
        )


def _check_single(source: Trace) -> None:
    """Raise TraceFormatError for a source that migrated several times, or tried to."""
    rows = source["migrate_set_state"]
    begins = np.sort(rows["ts_ns"][rows["new_state"] == "setup"].astype(np.int64))
    if len(begins) > 1:
        seconds, rest_ns = divmod(int(begins[-1]), 1_000_000_000)
        raise TraceFormatError(
            f"the source's trace holds {len(begins)} migrations, the last one begins at "
            f"{seconds}.{rest_ns // 1000:06d} s with 'migrate_set_state new state setup': cut it "
            "to one"
        )


def _known_to_both(source: Trace, destination: Trace) -> tuple[Trace, Trace]:
    """Return both traces with registries that have the other's events too."""
    known = [{event.name: event for event in trace.registry} for trace in (source, destination)]
    return (
        dataclasses.replace(source, registry=Registry([*(known[1] | known[0]).values()])),
        dataclasses.replace(destination, registry=Registry([*(known[0] | known[1]).values()])),
    )


def _memory(query: Mapping[str, Any] | None, destination: Trace) -> int:
    """Return the bytes of all RAM blocks, as query-migrate or the destination has them, else 0."""
    said = ((query or {}).get("src") or {}).get("ram") or {}
    if isinstance(total := said.get("total"), int):
        return total
    ranges = destination["postcopy_init_range"]
    return sum(dict(zip(ranges["ramblock"], ranges["length"].tolist(), strict=True)).values())


def _meta(
    traces: Mapping[str, Trace], paths: Mapping[str, Path], alignment: Alignment | None
) -> dict[str, Any]:
    """Return what meta.json says of a run of ours, as far as the traces tell it."""
    source, destination = traces["source"], traces["destination"]
    states = {role: _states(traces[role]) for role in ROLES}
    blocks = _blocks(destination)
    main = max(blocks, key=lambda block: int(block["size"]), default=None)
    events = sorted({name for trace in traces.values() for name in trace.events})
    reference = destination if "destination" in paths else source
    is_log = isinstance(reference, logtrace.LogTrace)
    clock: dict[str, Any] = {"name": "CLOCK_REALTIME" if is_log else "CLOCK_MONOTONIC"}
    notices = []
    if alignment is not None:
        clock["alignment"] = alignment.to_dict()
        notices += _alignment_notices(alignment)
    if found := clocks.monotonic_offset(destination):
        clock["monotonic"] = found.to_dict()
    errors = [str(text) for text in source["migrate_error"]["error_desc"].tolist()]
    return {
        "format": FORMAT,
        "engine": "qemu",
        "files": {role: str(path) for role, path in paths.items()},
        "status": states["source"][-1][1] if states["source"] else "unknown",
        "destination_status": states["destination"][-1][1] if states["destination"] else "unknown",
        "statuses": sorted((ts, role, s) for role, found in states.items() for ts, s in found),
        "workload": {"name": "QEMU's guest"},
        "options": {
            "memory": int(main["size"]) if main else 0,
            "page_size": _TARGET_PAGE,
            "postcopy_preempt": _preempt(traces),
            "trace": [],
        },
        "blocks": blocks,
        "guests": {"destination": {"address": int(main["address"]) if main else 0}},
        "events": events,
        "clock": clock,
        "errors": errors,
        "notices": notices,
    }


def _alignment_notices(alignment: Alignment) -> list[str]:
    if not alignment.consistent:
        apart = ((alignment.low_ns or 0) - (alignment.high_ns or 0)) / 1e3
        text = (
            f"no single offset explains all messages, by {apart:,.0f} us: a clock was set, or the "
            "traces are of two migrations; times of one side against the other are in doubt"
        )
    elif alignment.error_ns is None:
        text = "too few messages were recorded to tell how the two sides' clocks stand"
    elif alignment.offset_ns:
        text = (
            f"the source's times were moved by {alignment.offset_ns / 1e3:,.0f} us to the "
            f"destination's clock, give or take {alignment.error_ns / 1e3:,.0f} us"
        )
    else:
        return []
    return [f"clocks: {text}"]


def _states(trace: Trace) -> list[tuple[int, str]]:
    rows = trace["migrate_set_state"]
    rows = rows[np.argsort(rows["ts_ns"], kind="stable")]
    return [(int(ts), str(s)) for ts, s in zip(rows["ts_ns"], rows["new_state"], strict=True)]


def _preempt(traces: Mapping[str, Trace]) -> bool:
    """Return whether requested pages had a channel of their own."""
    enabled = traces["source"]["postcopy_preempt_enabled"]
    if len(enabled):
        return bool(enabled["value"][-1])
    return bool(len(traces["destination"]["postcopy_preempt_thread_entry"]))


def _blocks(destination: Trace) -> list[dict[str, Any]]:
    """Return the RAM blocks that post-copy has faults in, and where the destination maps them."""
    ranges = destination["postcopy_init_range"]
    requests = destination["postcopy_ram_fault_thread_request"]
    blocks = {
        str(r["ramblock"]): {"address": int(r["host_addr"]), "size": int(r["length"])}
        for r in ranges
    }
    for name in dict.fromkeys(requests["ramblock"].tolist()):
        mine = requests[requests["ramblock"] == name]
        bases = mine["hostaddr"] - mine["offset"]
        block = blocks.setdefault(
            str(name),
            {"address": int(bases[0]), "size": int(mine["offset"].max()) + _TARGET_PAGE},
        )
        if (bases != block["address"]).any():
            raise TraceFormatError(
                f"RAM block {name!r} lies at {block['address']:#x} and at "
                f"{int(bases[bases != block['address']][0]):#x}: the log holds several migrations; "
                "cut it to one"
            )
    return [{"name": name, **block} for name, block in blocks.items()]


def _query(query: str | os.PathLike[str] | Mapping[str, Any] | None) -> dict[str, Any] | None:
    if query is None or isinstance(query, Mapping):
        return None if query is None else dict(query)
    try:
        found = json.loads(Path(query).read_text())
    except (OSError, ValueError) as error:
        raise TraceFormatError(f"{query} is no JSON of query-migrate: {error}") from error
    if not isinstance(found, dict):
        raise TraceFormatError(f"{query}: expected an object, got {type(found).__name__}")
    return found
