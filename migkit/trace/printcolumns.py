"""Printf by columns: what an event's format prints for millions of records, as Arrow text.

Numbers become text in numpy and Arrow, not one by one in Python; what a format asks for beyond
plain conversions (a width, a precision, a flag) is left to :mod:`migkit.trace.printf`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from migkit.trace.printf import CONVERSION, MODIFIER_BITS

if TYPE_CHECKING:
    import re
    from collections.abc import Sequence

    import numpy.typing as npt

    from migkit.trace.registry import Argument, Event

_TEXT = pa.large_string()
_PLAIN = frozenset("diuxXps")


def print_columns(event: Event, columns: Sequence[npt.NDArray[Any]]) -> Any:
    """Return one text a record, ``large_string``; ``columns`` has an array per argument.

    What it derives takes little memory for some 10,000 records at a time.
    """
    if not len(columns[0]):
        return pa.array([], _TEXT)
    matches = list(CONVERSION.finditer(event.format))
    if all(_is_plain(match) for match in matches):
        return _join(event, matches, columns)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return pa.array([event.format_args(values) for values in rows], _TEXT)


def _is_plain(match: re.Match[str]) -> bool:
    if match["letter"] == "%":
        return True
    return match["letter"] in _PLAIN and not any(match.group("flags", "width", "precision"))


def _join(
    event: Event, matches: Sequence[re.Match[str]], columns: Sequence[npt.NDArray[Any]]
) -> Any:
    """Return the literal parts of a format with the printed columns between them."""
    pieces: list[Any] = []
    literal, position = "", 0
    arguments = iter(zip(event.args, columns, strict=True))
    for match in matches:
        literal += event.format[position : match.start()]
        position = match.end()
        if match["letter"] == "%":
            literal += "%"
            continue
        argument, column = next(arguments)
        texts = _print(match, argument, column)
        if isinstance(texts, str):
            literal += texts
        else:
            pieces += [pa.scalar(literal, _TEXT), texts]
            literal = ""
    last = pa.scalar(literal + event.format[position:], _TEXT)
    if not pieces:
        return pa.repeat(last, len(columns[0]))
    pieces.append(last)
    return pc.binary_join_element_wise(*pieces, pa.scalar("", _TEXT))


def _print(match: re.Match[str], argument: Argument, column: npt.NDArray[Any]) -> Any:
    """Return the text of each value of one conversion, or the one text of all."""
    letter = match["letter"]
    if argument.is_string or letter == "s":
        # Most often it is the one RAM block, all the time.
        return column[0] if (column == column[0]).all() else pa.array(column, _TEXT)
    numbers = _narrow(column, argument.bits, signed=argument.is_signed)
    if letter == "p":
        texts = pc.binary_join_element_wise(
            pa.scalar("0x", _TEXT), _hex(numbers), pa.scalar("", _TEXT)
        )
        return texts if numbers.all() else pc.if_else(pa.array(numbers != 0), texts, "(nil)")
    bits = MODIFIER_BITS[match["modifier"] or ""]
    numbers = _narrow(numbers, bits, signed=letter in "di")
    if letter in "xX":
        texts = _hex(numbers)
        return pc.utf8_upper(texts) if letter == "X" else texts
    return pa.array(numbers).cast(_TEXT)


def _narrow(numbers: npt.NDArray[Any], bits: int, *, signed: bool) -> npt.NDArray[Any]:
    """Return numbers as C holds them in an integer of that many bits."""
    kind = np.int64 if signed else np.uint64
    if bits == 64:
        return numbers.view(kind) if numbers.dtype.itemsize == 8 else numbers.astype(kind)
    spare = 64 - bits
    shifted = numbers.astype(np.uint64) << np.uint64(spare)
    return shifted.view(kind) >> kind(spare)


def _hex(numbers: npt.NDArray[Any]) -> Any:
    """Return numbers in hexadecimal, without leading zeros."""
    words = numbers.astype("<u8")
    quads = max(1, (int(words.max(initial=0)).bit_length() + 15) // 16)
    digits = _four_digits().take(words.view("<u2").reshape(-1, 4)[:, quads - 1 :: -1])
    ends = np.arange(len(words) + 1, dtype=np.int64) * 4 * quads
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(digits)]
    texts = pc.ascii_ltrim(pa.Array.from_buffers(_TEXT, len(words), buffers), "0")
    return texts if words.all() else pc.if_else(pa.array(words != 0), texts, "0")


@functools.cache
def _four_digits() -> npt.NDArray[np.uint32]:
    """Return the four hexadecimal digits of each number of 16 bits, as one item."""
    texts = b"".join(b"%04x" % number for number in range(1 << 16))
    return np.frombuffer(texts, np.uint32)
