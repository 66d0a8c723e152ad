"""Read a trace in QEMU's simpletrace format, ours or QEMU's, into one numpy array per event."""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from migkit.errors import MissingEventError, TraceFormatError, close_matches
from migkit.trace.chase import WORD, gather
from migkit.trace.decode import EventRecords, event_dtype
from migkit.trace.layout import (
    DROPPED_ID,
    HEADER,
    MAX_EVENT_ID,
    MIN_LENGTH,
    TYPE_BYTES,
    dropped_record,
    header,
    mapping_record,
)
from migkit.trace.recorded import RecordedEvents
from migkit.trace.registry import Registry
from migkit.trace.walk import Walk, check_header

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import numpy.typing as npt

    from migkit.trace.chase import Bytes, Offsets, Records
    from migkit.trace.registry import Event

__all__ = [
    "Trace",
    "dropped_record",
    "header",
    "mapping_record",
    "read",
    "read_pieces",
    "sort_by_event",
    "walk_pieces",
]

PIECE_BYTES = 8 << 20
_PIECES_KEPT = 4
_NO_KIND = np.uint16(0xFFFF)
_DROPPED = np.uint16(0xFFFE)


@dataclass(frozen=True)
class Trace:
    """What one trace file holds.

    ``events`` has an array per event that occurs, in the file's order, with the fields ``ts_ns``
    (u8), ``tid`` (u4), ``seq`` (u8, the record's place in the file) and one per argument: i8 or
    u8 by its C type, object (str) for a string. An argument that is itself called ``ts_ns``,
    ``tid`` or ``seq`` has an underscore at its end. Timestamps need not ascend. What comes from a
    file becomes an array when it is first asked for; `columns` makes single fields.
    """

    registry: Registry
    events: Mapping[str, npt.NDArray[np.void]] = field(default_factory=dict)
    n_records: int = 0
    """Event records in the file, those of unknown events included."""
    dropped: int = 0
    """Records that the writer had no room for."""
    unknown: dict[str, int] = field(default_factory=dict)
    """How many records there are of each event that the registry lacks."""
    missing_bytes: int = 0
    """Bytes at the end that hold no whole record."""
    warnings: tuple[str, ...] = ()
    derived: frozenset[str] = frozenset()
    """Events among them that nobody recorded, but that follow from others."""
    originals: Mapping[str, str] = field(default_factory=dict)
    """What the file calls an event that has another name here."""

    @property
    def span_ns(self) -> tuple[int, int]:
        """When the first and the last event occurred, zeros if none did."""
        if isinstance(self.events, RecordedEvents):
            return self.events.span_ns
        stamps = [rows["ts_ns"] for rows in self.events.values() if len(rows)]
        if not stamps:
            return 0, 0
        return min(int(ts.min()) for ts in stamps), max(int(ts.max()) for ts in stamps)

    def __getitem__(self, name: str) -> npt.NDArray[np.void]:
        """Return one event's records, none if it did not occur; MissingEventError if unknown."""
        if name in self.events:
            return self.events[name]
        if name in self.registry:
            return np.zeros(0, event_dtype(self.registry[name]))
        hint = close_matches(name, self.events)
        raise MissingEventError(f"the trace has no event {name!r}, nor has the registry; {hint}")

    def columns(self, name: str, *fields: str) -> tuple[npt.NDArray[Any], ...]:
        """Return some fields of one event's records: quicker than all of them; raises as ``[]``."""
        if isinstance(self.events, RecordedEvents) and name in self.events.recorded:
            return self.events.columns(name, *fields)
        rows = self[name]
        return tuple(rows[field] for field in fields)


def read(
    source: str | os.PathLike[str] | bytes,
    registry: Registry | None = None,
    forms: Callable[[str], Sequence[Event]] | None = None,
) -> Trace:
    """Read a trace file, or the bytes of one; the registry is migkit's own by default.

    ``forms`` returns the forms of an event, by its name, that some version may have recorded: the
    first that fits is taken, in the registry's place.
    A trace that is cut off, or whose writer was killed, yields what it holds and says so in
    ``missing_bytes`` and ``warnings``. Raises TraceFormatError, with the offset, for what cannot
    be the beginning of a trace.
    """
    registry = Registry.load() if registry is None else registry
    if isinstance(source, bytes):
        data = np.frombuffer(source, np.uint8)
    else:
        data = np.fromfile(Path(source), np.uint8)
    if data.size < len(header()) and header().startswith(data.tobytes()):
        text = f"the trace ends after {data.size} bytes, within its header: it holds no records"
        return Trace(registry, missing_bytes=data.size, warnings=(text,))
    forms = forms or registry.forms
    return sort_by_event(data, _walks(data, forms, PIECE_BYTES), registry, forms)


def read_pieces(
    path: str | os.PathLike[str],
    registry: Registry | None = None,
    forms: Callable[[str], Sequence[Event]] | None = None,
    *,
    n_bytes: int = PIECE_BYTES,
) -> Iterator[Trace]:
    """Read a trace file of any size a piece at a time, in memory for one piece.

    The pieces hold the same records, and raise the same errors, as one `read` of the file.
    """
    registry = Registry.load() if registry is None else registry
    if Path(path).stat().st_size < 2 * n_bytes:
        yield read(path, registry, forms)
        return
    forms, first = forms or registry.forms, 0
    for data, walk in walk_pieces(path, forms, n_bytes=n_bytes):
        yield sort_by_event(data, [walk], registry, forms, first)
        first += walk.records.offsets.size


def walk_pieces(
    path: str | os.PathLike[str],
    forms: Callable[[str], Sequence[Event]],
    *,
    n_bytes: int = PIECE_BYTES,
) -> Iterator[tuple[Bytes, Walk]]:
    """Walk through a trace file a piece at a time; yield what lies up to its end, and the walk.

    Raises what `read` does. The data stays readable, but takes memory only for a few pieces.
    """
    with Path(path).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    data = np.frombuffer(mapped, np.uint8)
    for walk in _walks(data, forms, n_bytes):
        yield data[: walk.end], walk
        passed = max(walk.end - _PIECES_KEPT * n_bytes, 0)
        mapped.madvise(mmap.MADV_DONTNEED, 0, passed & -mmap.PAGESIZE)


def _walks(data: Bytes, forms: Callable[[str], Sequence[Event]], n_bytes: int) -> Iterator[Walk]:
    """Walk through a trace in pieces of about ``n_bytes``: what is derived stays in the cache."""
    check_header(data)
    names: dict[int, str] = {}
    start, step = len(header()), n_bytes
    while True:
        end = min(start + step, data.size)
        walk = Walk(data[:end], forms, names, start, more=end < data.size)
        walk.run()
        if walk.end == start < end:  # a record longer than a piece, or a tail of zeros
            step *= 2
            continue
        yield walk
        start, step = walk.end, n_bytes
        if end == data.size:
            return


def sort_by_event(
    data: Bytes,
    walks: Iterable[Walk],
    registry: Registry,
    forms: Callable[[str], Sequence[Event]],
    first: int = 0,
) -> Trace:
    """Return the records that walks, at least one, have found; ``first`` lie before them."""
    found = []
    for walk in walks:
        records = walk.records
        found.append((records.offsets, records.headers["length"].copy(), _kinds(walk, records)))
    offsets, lengths, kinds = map(np.concatenate, zip(*found, strict=True))
    names = _names(walk)
    order = np.argsort(kinds, kind="stable")
    bounds = np.searchsorted(kinds, np.arange(len(names) + 1), sorter=order).tolist()
    recorded, unknown = {}, {}
    for name, (begin, end) in zip(names, pairwise(bounds), strict=True):
        rows = order[begin:end]
        if not rows.size:
            continue
        if candidates := forms(name):
            places = offsets[rows], lengths[rows], rows + first
            forms_of_it = [EventRecords(form, data, *places) for form in candidates]
            recorded[name] = _first_fitting(forms_of_it)
        else:
            unknown[name] = int(rows.size)
    dropped = _count_dropped(data, offsets[order[bounds[-1] :]])
    return Trace(
        registry=registry.with_forms({name: each.event for name, each in recorded.items()}),
        events=RecordedEvents(recorded),
        n_records=bounds[-1],
        dropped=dropped,
        unknown=unknown,
        missing_bytes=walk.missing_bytes,
        warnings=(*_warnings(dropped, unknown), *walk.warnings),
    )


def _first_fitting(candidates: Sequence[EventRecords]) -> EventRecords:
    """Return the first whose event fits its records; raise for the last if none does."""
    for each in candidates[:-1]:
        with contextlib.suppress(TraceFormatError):
            each.check()
            return each
    candidates[-1].check()
    return candidates[-1]


def _names(walk: Walk) -> list[str]:
    """Return the names of the events that were mapped, each once."""
    return list(dict.fromkeys(walk.names.values()))


def _kinds(walk: Walk, records: Records) -> npt.NDArray[np.uint16]:
    """Return for each record the index of its name in `_names`, or _DROPPED.

    The lower 16 bits of an id are enough to look it up: of the ids that may be mapped none has
    more, nor the lower bits of DROPPED_ID.
    """
    index = {name: kind for kind, name in enumerate(_names(walk))}
    table = np.full(1 << 16, _NO_KIND)
    for event_id, name in walk.names.items():
        table[event_id] = index[name]
    table[DROPPED_ID & 0xFFFF] = _DROPPED
    ids = records.headers["id"]
    kinds = table[ids.astype(np.uint16)]
    bad = (kinds == _NO_KIND) | ((ids > MAX_EVENT_ID) & (ids != DROPPED_ID))
    if bad.any():
        row = int(np.argmax(bad))
        raise TraceFormatError(
            f"offset {records.offsets[row] + TYPE_BYTES}: expected an event id that a mapping "
            f"record names, got {int(ids[row]):#x}"
        )
    return kinds


def _count_dropped(data: Bytes, offsets: Offsets) -> int:
    """Add up the counts of dropped records."""
    lengths = gather(data, offsets, HEADER)["length"]
    fits = lengths == MIN_LENGTH + 8
    if not fits.all():
        row = int(np.argmin(fits))
        raise TraceFormatError(
            f"offset {offsets[row] + 24}: expected the length of a record of dropped events, "
            f"{MIN_LENGTH + 8}, got {lengths[row]}"
        )
    return sum(gather(data, offsets + HEADER.itemsize, WORD).tolist())


def _warnings(dropped: int, unknown: dict[str, int]) -> Iterator[str]:
    """Say what is not in the trace, or in it but not understood."""
    if dropped:
        yield f"{dropped} records are missing: the trace buffer was full when they came"
    if unknown:
        which = ", ".join(f"{name} ({count})" for name, count in sorted(unknown.items()))
        yield f"the registry lacks these events, their records were skipped: {which}"
