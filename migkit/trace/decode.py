"""Turn the payloads of one event's records into a numpy array with a field per argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migkit.errors import TraceFormatError
from migkit.trace.chase import chunks, gather
from migkit.trace.layout import HEADER, MAX_STRING, TYPE_BYTES

if TYPE_CHECKING:
    import numpy.typing as npt

    from migkit.trace.chase import Bytes, Offsets
    from migkit.trace.registry import Event

_COMMON = {"ts_ns": np.uint64, "tid": np.uint32, "seq": np.uint64}
_COMMON_STRINGS = 8
_TEXT_LENGTH = np.dtype(np.uint32)


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


def decode(data: Bytes, event: Event, offsets: Offsets, seq: Offsets) -> npt.NDArray[np.void]:
    """Decode the records of one event that begin at ``offsets`` and lie within the data.

    Raises TraceFormatError for a payload that does not fit the event's arguments.
    """
    rows = np.empty(offsets.size, event_dtype(event))
    rows["seq"] = seq
    for chunk in chunks(offsets.size):
        _decode_chunk(data, event, offsets[chunk], rows[chunk])
    return rows


def _decode_chunk(data: Bytes, event: Event, offsets: Offsets, rows: npt.NDArray[np.void]) -> None:
    """Decode records into rows, argument by argument, with a cursor in each record."""
    headers = gather(data, offsets, HEADER)
    rows["ts_ns"], rows["tid"] = headers["ts_ns"], headers["tid"]
    at = offsets + HEADER.itemsize
    ends = offsets + TYPE_BYTES + headers["length"]
    for name, arg in zip(_field_names(event), event.args, strict=True):
        if arg.is_string:
            _check(event, offsets, ends, at + 4 <= ends)
            lengths = gather(data, at, _TEXT_LENGTH).astype(np.int64)
            at = at + 4
            _check(event, offsets, ends, at + lengths <= ends)
            rows[name] = _strings(data, at, lengths)
            at = at + lengths
        else:
            _check(event, offsets, ends, at + 8 <= ends)
            rows[name] = gather(data, at, rows.dtype[name])
            at = at + 8
    _check(event, offsets, ends, at == ends)


def _check(event: Event, offsets: Offsets, ends: Offsets, fits: npt.NDArray[np.bool_]) -> None:
    """Raise TraceFormatError for the first record that does not fit."""
    if fits.all():
        return
    bad = int(np.argmin(fits))
    arguments = ", ".join(f"{arg.ctype} {arg.name}" for arg in event.args) or "void"
    raise TraceFormatError(
        f"offset {offsets[bad]}: expected the arguments of {event.name}({arguments}), "
        f"got {ends[bad] - offsets[bad] - HEADER.itemsize} bytes that do not hold exactly these"
    )


def _strings(data: Bytes, at: Offsets, lengths: Offsets) -> npt.NDArray[np.object_]:
    """Decode strings; equal ones of equal length share one str."""
    texts = np.full(at.size, "", object)
    order = np.argsort(lengths, kind="stable")
    bounds = np.flatnonzero(np.diff(lengths[order])) + 1
    for group in np.split(order, bounds):
        length = int(lengths[group[0]]) if group.size else 0
        if length:
            texts[group] = _equal_length_strings(gather(data, at[group], np.dtype(f"V{length}")))
    return texts


def _equal_length_strings(items: npt.NDArray[np.void]) -> npt.NDArray[np.object_]:
    """Decode byte strings of one length: the common ones all at once, the others one by one."""
    texts = np.empty(items.size, object)
    left = np.arange(items.size)
    for _ in range(_COMMON_STRINGS):
        if not left.size:
            return texts
        first = items[left[0]]
        equal = items[left] == first
        texts[left[equal]] = first.tobytes().decode("utf-8", "backslashreplace")
        left = left[~equal]
    for row in left.tolist():
        texts[row] = items[row].tobytes().decode("utf-8", "backslashreplace")
    return texts
