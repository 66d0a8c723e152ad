"""Turn the payloads of one event's records into a numpy array with a field per argument."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from migkit.errors import TraceFormatError
from migkit.trace.chase import chunks, gather
from migkit.trace.layout import HEADER, LENGTH, MAX_STRING, TYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from migkit.trace.chase import Bytes, Offsets, Scalar
    from migkit.trace.registry import Argument, Event

_COMMON = {"ts_ns": np.uint64, "tid": np.uint32, "seq": np.uint64}
_COMMON_STRINGS = 8
_MAX_COPIED = 1 << 16
_WORD_BYTES = 8


def event_dtype(event: Event) -> np.dtype[np.void]:
    """Return the row type of an event: ts_ns, tid, seq and one field per argument."""
    fields: list[tuple[str, npt.DTypeLike]] = list(_COMMON.items())
    for name, arg in zip(_field_names(event), event.args, strict=True):
        number = np.int64 if arg.is_signed else np.uint64
        fields.append((name, np.object_ if arg.is_string else number))
    return np.dtype(fields)


def _field_names(event: Event) -> list[str]:
    names: list[str] = []
    for arg in event.args:
        name = arg.name
        while name in _COMMON or name in names:
            name += "_"
        names.append(name)
    return names


def payload_bounds(event: Event) -> tuple[int, int]:
    """Return the least and the greatest number of bytes that an event's arguments take."""
    strings = sum(arg.is_string for arg in event.args)
    least = 8 * (len(event.args) - strings) + 4 * strings
    return least, least + MAX_STRING * strings


@dataclass(frozen=True)
class EventRecords:
    """All records of one event as they lie in the data, and what the event's arguments are."""

    event: Event
    data: Bytes
    offsets: Offsets
    lengths: npt.NDArray[np.uint32]
    """What the records' headers say."""
    seq: Offsets
    """Each record's place in the file."""

    def check(self) -> None:
        """Raise TraceFormatError unless each record holds exactly the event's arguments."""
        for payloads in self._payloads():
            for argument in self.event.args:
                payloads.skip_argument(argument)
            payloads.check_end()

    def rows(self) -> npt.NDArray[np.void]:
        """Return them as an array of `event_dtype`; raises what `check` does."""
        rows = np.empty(self.seq.size, event_dtype(self.event))
        rows["seq"] = self.seq
        names = _field_names(self.event)
        for chunk, (headers, arguments) in zip(chunks(self.seq.size), self.pieces(), strict=True):
            part = rows[chunk]
            part["ts_ns"], part["tid"] = headers["ts_ns"], headers["tid"]
            for name, column in zip(names, arguments, strict=True):
                part[name] = column
        return rows

    def pieces(self) -> Iterator[tuple[npt.NDArray[np.void], list[npt.NDArray[Any]]]]:
        """Yield headers and arguments, an array each, of some records at a time; as `check`."""
        dtype = event_dtype(self.event)
        dtypes = [dtype[name] for name in _field_names(self.event)]
        for payloads in self._payloads():
            yield (
                payloads.headers,
                [
                    payloads.strings() if argument.is_string else payloads.take(item)
                    for argument, item in zip(self.event.args, dtypes, strict=True)
                ],
            )
            payloads.check_end()

    def columns(self, *fields: str) -> tuple[npt.NDArray[Any], ...]:
        """Return some fields of `rows`, without the others; raises what `check` does."""
        dtype = event_dtype(self.event)
        columns = {name: np.empty(self.seq.size, dtype[name]) for name in fields}
        if "seq" in columns:
            columns["seq"][:] = self.seq
        for chunk, payloads in zip(chunks(self.seq.size), self._payloads(), strict=True):
            for name in columns.keys() & {"ts_ns", "tid"}:
                columns[name][chunk] = payloads.headers[name]
            for name, argument in zip(_field_names(self.event), self.event.args, strict=True):
                if name not in columns:
                    payloads.skip_argument(argument)
                elif argument.is_string:
                    columns[name][chunk] = payloads.strings()
                else:
                    columns[name][chunk] = payloads.take(dtype[name])
            payloads.check_end()
        return tuple(columns[name] for name in fields)

    def _payloads(self) -> Iterator[_Payloads]:
        for chunk in chunks(self.seq.size):
            yield _Payloads(self.data, self.event, self.offsets[chunk], self.lengths[chunk])


class _Payloads:
    """The payloads of some records of an event, all read side by side, argument by argument.

    While the records are alike, what they have at one place is a column of a copy of them. From
    the first argument on whose length differs, each record has a place of its own.
    """

    def __init__(
        self, data: Bytes, event: Event, offsets: Offsets, lengths: npt.NDArray[np.uint32]
    ) -> None:
        self._data = data
        self._event = event
        self._offsets = offsets
        self._ends = lengths.astype(np.int64) + TYPE_BYTES
        self._at: Offsets | int = HEADER.itemsize
        size = int(self._ends[0])
        self._alike = size <= _MAX_COPIED and bool((self._ends == size).all())

    @property
    def headers(self) -> npt.NDArray[np.void]:
        """The header of each record, of type ``HEADER``."""
        return self._column(0, HEADER)

    def take(self, item: np.dtype[Scalar]) -> npt.NDArray[Scalar]:
        """Return the next item of each record."""
        return self._column(self._skip(item.itemsize), item)

    def strings(self) -> npt.NDArray[np.object_]:
        """Return the next string of each record; equal ones of equal length share one str."""
        lengths = self.take(LENGTH).astype(np.int64)
        length = int(lengths[0])
        if self._alike and 0 < length <= _MAX_COPIED and (lengths == length).all():
            return _equal_length_strings(self.take(np.dtype((np.void, length))))
        at = self._offsets + self._skip(lengths)
        texts = np.full(at.size, "", object)
        order = np.argsort(lengths, kind="stable")
        bounds = np.flatnonzero(np.diff(lengths[order])) + 1
        for group in np.split(order, bounds):
            if length := int(lengths[group[0]]):
                item = np.dtype((np.void, length))
                texts[group] = _equal_length_strings(gather(self._data, at[group], item))
        return texts

    def skip_argument(self, argument: Argument) -> None:
        """Go behind the next argument of each record."""
        if argument.is_string:
            at = self._offsets + self._skip(LENGTH.itemsize)
            self._skip(gather(self._data, at, LENGTH).astype(np.int64))
        else:
            self._skip(_WORD_BYTES)

    def check_end(self) -> None:
        """Raise TraceFormatError unless everything has been taken."""
        self._check(self._ends == self._at)

    def _skip(self, sizes: Offsets | int) -> Offsets | int:
        """Go behind the next item of each record; return where it lies in the record."""
        if self._alike and not isinstance(sizes, int):
            if (sizes == sizes[0]).all():
                sizes = int(sizes[0])
            else:
                self._alike = False
        at, self._at = self._at, self._at + sizes
        self._check(self._ends >= self._at)
        return at

    def _column(self, at: Offsets | int, item: np.dtype[Scalar]) -> npt.NDArray[Scalar]:
        """Return what each record has at a place in it."""
        if not self._alike:
            return gather(self._data, self._offsets + at, item)
        copies = self._copies
        return np.ndarray(copies.shape, item, copies.data, cast("int", at), copies.strides)

    @cached_property
    def _copies(self) -> npt.NDArray[np.void]:
        """The records, where they are alike, side by side."""
        return gather(self._data, self._offsets, np.dtype((np.void, int(self._ends[0]))))

    def _check(self, fits: npt.NDArray[np.bool_] | np.bool_) -> None:
        """Raise TraceFormatError for the first record that does not fit."""
        if fits.all():
            return
        bad = int(np.argmin(fits))
        event = self._event
        arguments = ", ".join(f"{arg.ctype} {arg.name}" for arg in event.args) or "void"
        raise TraceFormatError(
            f"offset {self._offsets[bad]}: expected the arguments of {event.name}({arguments}), "
            f"got {self._ends[bad] - HEADER.itemsize} bytes that do not hold exactly these"
        )


def _equal_length_strings(items: npt.NDArray[np.void]) -> npt.NDArray[np.object_]:
    """Decode byte strings of one length: the common ones all at once, the others one by one."""
    texts = np.empty(items.size, object)
    left = np.arange(items.size)
    for _ in range(_COMMON_STRINGS):
        if not left.size:
            return texts
        equal = items == items[0]
        texts[left[equal]] = items[0].tobytes().decode("utf-8", "backslashreplace")
        left, items = left[~equal], items[~equal]
    for row, item in zip(left.tolist(), items, strict=True):
        texts[row] = item.tobytes().decode("utf-8", "backslashreplace")
    return texts
