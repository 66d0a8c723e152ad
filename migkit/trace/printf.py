"""C's printf for trace arguments, as glibc prints them on 64-bit Linux.

A format is compiled once into a Python ``%`` template and one converter per conversion. The
converter does what C does before it prints: it narrows the value to the width of the length
modifier and takes it as signed or unsigned as the conversion letter says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Value: TypeAlias = int | str
Convert: TypeAlias = Callable[[Value], object]

MODIFIER_BITS = {"hh": 8, "h": 16, "": 32, "l": 64, "ll": 64, "j": 64, "z": 64, "t": 64}

_MAX_WIDTH = 999
"""Ours: C's is 2³¹ - 1, and a trace or a format could ask for a line of as many spaces."""

CONVERSION = re.compile(
    r"%(?P<flags>[-+ #0]*)(?P<width>\*|[0-9]{1,3})?(?P<precision>\.(?:\*|[0-9]{0,3}))?"
    r"(?P<modifier>hh|h|ll|l|j|z|t)?(?P<letter>[diouxXcsp%])"
)


def narrow(value: int, bits: int, *, signed: bool) -> int:
    """Return ``value`` as C holds it in an integer of that many bits."""
    value &= (1 << bits) - 1
    if signed and value >> (bits - 1):
        value -= 1 << bits
    return value


def count_arguments(template: str) -> int:
    """Count the arguments that a printf format consumes; ValueError for a malformed one."""
    if "%" in CONVERSION.sub("", template):
        raise ValueError(f"a % in {template!r} starts no conversion of C's printf")
    return sum(len(list(_converters(match))) for match in CONVERSION.finditer(template))


def compile_format(template: str) -> Callable[[Sequence[Value]], str]:
    """Return a function that prints one value per argument of a printf format.

    The values must already be what their C types can hold, see `narrow`.
    """
    python_template = CONVERSION.sub(_python_spec, template)
    converters = [each for match in CONVERSION.finditer(template) for each in _converters(match)]

    def render(values: Sequence[Value]) -> str:
        pairs = zip(converters, values, strict=True)
        return python_template % tuple(convert(value) for convert, value in pairs)

    return render


def _python_spec(match: re.Match[str]) -> str:
    """Return the conversion as Python's ``%`` wants it."""
    flags, width, precision, letter = match.group("flags", "width", "precision", "letter")
    if letter == "%":
        return "%%"
    if letter in "ps" or "#" in flags:
        letter, flags = "s", "-" if "-" in flags else ""
    return f"%{flags}{width or ''}{precision or ''}{letter}"


def _converters(match: re.Match[str]) -> Iterator[Convert]:
    """Yield what prepares each argument of one conversion (``*`` takes one of its own)."""
    flags, letter = match["flags"], match["letter"]
    for part in (match["width"], match["precision"]):
        if part and part.endswith("*"):
            yield _width
    if letter == "s":
        yield str
    elif letter == "p":
        yield _pointer
    elif letter == "c":
        yield _integer(8, signed=False)
    elif letter != "%":
        convert = _integer(MODIFIER_BITS[match["modifier"] or ""], signed=letter in "di")
        yield _alternate(convert, letter) if "#" in flags else convert


def _width(value: Value) -> int:
    """Convert what a ``*`` takes, within the widths that a format itself may have."""
    return max(-_MAX_WIDTH, min(narrow(int(value), 32, signed=True), _MAX_WIDTH))


def _integer(bits: int, *, signed: bool) -> Convert:
    """Return a converter to a C integer."""

    def convert(value: Value) -> int:
        return narrow(int(value), bits, signed=signed)

    return convert


def _alternate(convert: Convert, letter: str) -> Convert:
    """Return a converter for the # flag: C prefixes 0x or 0, but not to a zero."""
    prefix = {"x": "0x", "X": "0X", "o": "0"}.get(letter, "")

    def render(value: Value) -> str:
        number = convert(value)
        return (prefix if number else "") + f"%{letter}" % number

    return render


def _pointer(value: Value) -> str:
    """Print a pointer as glibc does; one to characters was recorded as its string."""
    if isinstance(value, str):
        return value
    return f"0x{narrow(value, 64, signed=False):x}" if value else "(nil)"
