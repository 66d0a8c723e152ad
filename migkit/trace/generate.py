"""Generate the function that emits an event.

What costs time in Python is not the store but the interpreter: unpacking ``*args``, looking
names up, packing constants one by one. So each event that is on gets source code of its own, in
which everything constant is packed beforehand, a string is encoded when it is first seen, and
the one store that publishes the record comes last.
"""

from __future__ import annotations

import struct
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from migkit.trace.layout import MAX_STRING, RECORD, TYPE_BYTES
from migkit.trace.printf import narrow

if TYPE_CHECKING:
    from collections.abc import Callable

    from migkit.trace.registry import Event

_MAX_SHAPES = 4096
_MASK = 0xFFFF_FFFF_FFFF_FFFF

# The first attempt to pack serves every value that its argument can hold and costs nothing more;
# a negative number for an unsigned argument, or its like, gets to the second.
_EMIT = """
def emit({params}*, ts=None):
    {shape}
    at = control[0]
    end = at + size
    if end > room:
        control[1] += 1
        return
    try:
        pack(data, at, prefix, now() if ts is None else ts, length_tid{values})
    except struct_error:
        pack(data, at, prefix, (now() if ts is None else ts) & mask, length_tid{wrapped})
    control[0] = end
"""
_SHAPE_BY_TEXT = """try:
        pack, size, length_tid, {texts} = shapes[{key}]
    except KeyError:
        pack, size, length_tid, {texts} = learn({key})"""


def encode_text(text: object) -> bytes:
    """Return a string as a payload has it: its length and at most 512 bytes; None is empty."""
    encoded = b"" if text is None else str(text).encode("utf-8", "backslashreplace")[:MAX_STRING]
    return struct.pack("=L", len(encoded)) + encoded


def record_prefix(event: Event) -> bytes:
    """Return the first 16 bytes of an event's records."""
    return struct.pack("=QQ", RECORD, event.id)


def record_shape(event: Event, tid: int, texts: tuple[bytes, ...]) -> tuple[struct.Struct, int]:
    """Return a packer of (prefix, timestamp, length and tid, argument...) and its third value."""
    remaining = iter(texts)
    codes = [
        f"{len(next(remaining))}s" if arg.is_string else "q" if arg.is_signed else "Q"
        for arg in event.args
    ]
    # Without strings everything is aligned, and native packing takes less time.
    packer = struct.Struct(("=" if texts else "@") + "16sQQ" + "".join(codes))
    length_tid = struct.pack("=LL", packer.size - TYPE_BYTES, tid)
    return packer, int.from_bytes(length_tid, sys.byteorder)


def emitter(event: Event, control: memoryview, data: memoryview, tid: int) -> Callable[..., None]:
    """Return the function that writes one event's records.

    ``control`` are the u64 of the control page, ``data`` the bytes from DATA_OFFSET on. The
    function takes the arguments by position and ``ts=`` in ns.
    """
    strings = [f"{arg.name}_" for arg in event.args if arg.is_string]
    shapes: dict[object, tuple[object, ...]] = {}

    def learn(*key: object) -> tuple[object, ...]:
        if len(shapes) >= _MAX_SHAPES:
            shapes.clear()
        texts = tuple(encode_text(text) for text in key)
        packer, length_tid = record_shape(event, tid, texts)
        shape = (packer.pack_into, packer.size, length_tid, *texts)
        shapes[key[0] if len(key) == 1 else key] = shape
        return shape

    scope: dict[str, object] = {
        "control": control,
        "data": data,
        "room": data.nbytes,
        "prefix": record_prefix(event),
        "now": time.monotonic_ns,
        "mask": _MASK,
        "struct_error": struct.error,
        "shapes": shapes,
        "learn": learn,
        **{
            f"wrap_{arg.name}": partial(narrow, bits=64, signed=arg.is_signed) for arg in event.args
        },
    }
    if not strings:
        packer, scope["length_tid"] = record_shape(event, tid, ())
        scope["pack"], scope["size"] = packer.pack_into, packer.size
    exec(_source(event), scope)  # noqa: S102 -- made of the registry's identifiers alone
    function: Callable[..., None] = scope["emit"]  # type: ignore[assignment]
    function.__name__ = function.__qualname__ = event.name
    function.__doc__ = event.doc
    return function


def _source(event: Event) -> str:
    """Return the function's source; names of arguments may be keywords, or ``ts``: hence the _."""
    strings = [f"{arg.name}_" for arg in event.args if arg.is_string]
    texts = ", ".join(f"text_{name}" for name in strings) + ","
    values = [f"text_{arg.name}_" if arg.is_string else f"{arg.name}_" for arg in event.args]
    wrapped = [
        f"text_{arg.name}_" if arg.is_string else f"wrap_{arg.name}({arg.name}_)"
        for arg in event.args
    ]
    return _EMIT.format(
        params="".join(f"{arg.name}_, " for arg in event.args) + ("/, " if event.args else ""),
        shape=_SHAPE_BY_TEXT.format(texts=texts, key=", ".join(strings)) if strings else "pass",
        values="".join(f", {value}" for value in values),
        wrapped="".join(f", {value}" for value in wrapped),
    )
