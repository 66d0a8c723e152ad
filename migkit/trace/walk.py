"""Go through a trace from record to record: in runs where the chase found them, else singly.

All that can be wrong between records is told here. A record that the file's end cuts off is not
malformed, provided that its length is one that its event can have; nor is a tail of zeros, which
a writer leaves that was killed after it had set the file's size.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from migkit.errors import TraceFormatError
from migkit.trace.chase import Candidates, Records, find_candidates
from migkit.trace.decode import payload_bounds
from migkit.trace.layout import (
    DROPPED_ID,
    FILE_HEADER,
    HEADER,
    HEADER_ID,
    MAGIC,
    MAPPING,
    MAPPING_HEADER,
    MAX_EVENT_ID,
    MIN_LENGTH,
    RECORD,
    RECORD_HEADER,
    TYPE_BYTES,
    VERSION,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from migkit.trace.chase import Bytes
    from migkit.trace.registry import Event

_MAX_NAME = 1024


def check_header(data: Bytes) -> None:
    """Raise TraceFormatError unless the data begins as a trace that we read."""
    raw = data[: FILE_HEADER.size].tobytes()
    if len(raw) < FILE_HEADER.size:
        raise TraceFormatError(f"offset 0: expected a simpletrace header, got {raw.hex()!r}")
    header_id, magic, version = FILE_HEADER.unpack(raw)
    if magic == int.from_bytes(MAGIC.to_bytes(8, "little"), "big"):
        raise TraceFormatError("offset 8: the trace was written in the other byte order")
    if (header_id, magic) != (HEADER_ID, MAGIC):
        raise TraceFormatError(
            f"offset 0: expected a simpletrace header, {HEADER_ID:#x} and {MAGIC:#x}, "
            f"got {header_id:#x} and {magic:#x}"
        )
    if version != VERSION:
        raise TraceFormatError(
            f"offset 16: expected version {VERSION}, got version {version}; traces before "
            "version 4 do not name their events: record with QEMU 2.8 or newer"
        )


class Walk:
    """One pass over a trace, or over a part of one; `run` fills the attributes.

    ``names`` maps event ids to names; ``records`` are the event records, those that count dropped
    ones among them. ``forms`` returns the forms that an event may have, by its name. With ``more``
    the data is only the trace's beginning: ``end`` is where the first record lies that is not
    whole, from which the next part is walked.
    """

    def __init__(
        self,
        data: Bytes,
        forms: Callable[[str], Sequence[Event]],
        names: dict[int, str] | None = None,
        start: int = FILE_HEADER.size,
        *,
        more: bool = False,
    ) -> None:
        self.names: dict[int, str] = {} if names is None else names
        self.end = data.size
        self.missing_bytes = 0
        self.warnings: list[str] = []
        self._data = data
        self._forms = forms
        self._records: list[Records] = []
        self._start = start
        self._more = more

    @property
    def records(self) -> Records:
        """The event records."""
        parts = self._records or [Records(np.zeros(0, np.int64), np.zeros(0, HEADER))]
        if len(parts) == 1:
            return parts[0]
        offsets, headers = zip(*((part.offsets, part.headers) for part in parts), strict=True)
        return Records(np.concatenate(offsets), np.concatenate(headers))

    def run(self) -> None:
        """Walk to the end; raises TraceFormatError at the first thing that is no record."""
        at = self._start
        candidates: Candidates | None = None
        while at < self._data.size:
            word = self._data[at : at + TYPE_BYTES].tobytes()
            kind = int.from_bytes(word, sys.byteorder)
            if len(word) < TYPE_BYTES:
                at = self._stop(at)
            elif kind == MAPPING:
                at = self._take_mapping(at)
            elif kind == RECORD:
                if candidates is None:
                    candidates = find_candidates(self._data, at)
                at = self._take_run(at, candidates) or self._take_one(at)
            else:
                raise TraceFormatError(
                    f"offset {at}: expected a record's type, {MAPPING} or {RECORD}, got {kind:#x}"
                )

    def _take_run(self, at: int, candidates: Candidates) -> int:
        """Take all records from an offset on that the chase linked; return their end, or 0."""
        run = candidates.run_from(at)
        if not run.offsets.size:
            return 0
        self._records.append(run)
        return int(run.offsets[-1]) + TYPE_BYTES + int(run.headers["length"][-1])

    def _take_one(self, at: int) -> int:
        """Take the event record at an offset; return its end."""
        raw = self._data[at : at + HEADER.itemsize].tobytes()
        if len(raw) < HEADER.itemsize:
            return self._stop(at)
        _, event_id, _, length, _ = RECORD_HEADER.unpack(raw)
        end = int(at + TYPE_BYTES + length)
        if length < MIN_LENGTH:
            raise TraceFormatError(
                f"offset {at + 24}: expected a record's length, {MIN_LENGTH} or more, got {length}"
            )
        if end > self._data.size:
            if not self._more:
                self._check_cut_off(at, event_id, length)
            return self._stop(at)
        self._records.append(Records(np.array([at]), np.frombuffer(raw, HEADER)))
        return end

    def _check_cut_off(self, at: int, event_id: int, length: int) -> None:
        """Raise TraceFormatError if the length reaches past the file for another reason."""
        name = self.names.get(event_id)
        if name is None and event_id != DROPPED_ID:
            raise TraceFormatError(f"offset {at}: event id {event_id:#x} has no mapping record")
        bounds = [(8, 8)] if name is None else [payload_bounds(form) for form in self._forms(name)]
        if not bounds:
            return
        least, most = min(low for low, _ in bounds), max(high for _, high in bounds)
        if not least <= length - MIN_LENGTH <= most:
            raise TraceFormatError(
                f"offset {at}: expected {least} to {most} bytes of arguments for "
                f"{name or 'dropped records'}, got a length of {length - MIN_LENGTH}, past the "
                f"end of the trace at {self._data.size}"
            )

    def _take_mapping(self, at: int) -> int:
        """Take the mapping record at an offset; return its end."""
        raw = self._data[at : at + MAPPING_HEADER.size].tobytes()
        if not any(raw) and not self._data[at:].any():
            return self._stop(at, zeros=True)
        if len(raw) < MAPPING_HEADER.size:
            return self._stop(at)
        _, event_id, length = MAPPING_HEADER.unpack(raw)
        begin, end = at + MAPPING_HEADER.size, int(at + MAPPING_HEADER.size + length)
        if not 1 <= length <= _MAX_NAME:
            raise TraceFormatError(
                f"offset {at + 16}: expected the length of an event's name, got {length}"
            )
        if event_id > MAX_EVENT_ID:
            raise TraceFormatError(
                f"offset {at + 8}: expected an event id up to {MAX_EVENT_ID}, got {event_id:#x}"
            )
        if end > self._data.size:
            return self._stop(at)
        name = self._data[begin:end].tobytes().decode("ascii", "replace")
        if not name.isidentifier():
            raise TraceFormatError(f"offset {begin}: expected an event's name, got {name!r}")
        if self.names.setdefault(event_id, name) != name:
            raise TraceFormatError(
                f"offset {at}: event id {event_id} is mapped to {name}, "
                f"but was mapped to {self.names[event_id]} before"
            )
        return end

    def _stop(self, at: int, *, zeros: bool = False) -> int:
        """Note that the trace holds nothing more from an offset on; return the trace's end."""
        if self._more:
            self.end = at
            return self._data.size
        self.missing_bytes = self._data.size - at
        what = "are zeros: the writer ended" if zeros else "hold no whole record: the trace was cut"
        self.warnings.append(
            f"the trace was not closed properly: its last {self.missing_bytes} bytes, from offset "
            f"{at} on, {what} before everything was written"
        )
        return self._data.size
