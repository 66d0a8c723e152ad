"""Printf backwards: what an event's format printed is parsed into its arguments, by columns.

A format becomes one regular expression of RE2 (linear in time, whatever the text), which Arrow
applies to all lines of an event at once.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from migkit.trace.decode import event_dtype
from migkit.trace.printf import CONVERSION

if TYPE_CHECKING:
    import numpy.typing as npt

    from migkit.trace.registry import Argument, Event

_PATTERNS = {
    **dict.fromkeys("di", r"[-+]?\d+"),
    "u": r"\d+",
    "o": r"[0-7]+",
    **dict.fromkeys("xX", r"[0-9a-fA-F]+"),
    "p": r"0x[0-9a-fA-F]+|\(nil\)",
    "c": r"(?s:.)",
    "s": r".*",
}
_HEX = "xXp"


def scannable(event: Event) -> bool:
    """Return whether `scan` can take the event's text apart: no width comes from an argument."""
    return not any("*" in match[0] for match in CONVERSION.finditer(event.format))


def scan(event: Event, texts: Any) -> tuple[npt.NDArray[np.void], npt.NDArray[np.bool_]]:
    """Return the rows of those texts that the event's format can have printed, and which these are.

    ``texts`` is an Arrow array of ``large_string``. The rows have the fields of
    :func:`~migkit.trace.decode.event_dtype`; ``ts_ns``, ``tid`` and ``seq`` are left to the caller.
    """
    letters = [m["letter"] for m in CONVERSION.finditer(event.format) if m["letter"] != "%"]
    if not letters:
        fits = _flags(pc.equal(texts, pa.scalar(event.format.replace("%%", "%"), texts.type)))
        return np.zeros(int(fits.sum()), event_dtype(event)), fits
    found = pc.extract_regex(texts, _regex(event.format))
    fits = _flags(pc.is_valid(found))
    groups = [found.field(f"a{i}").filter(pa.array(fits)) for i in range(len(letters))]
    rows = np.zeros(int(fits.sum()), event_dtype(event))
    names = (rows.dtype.names or ())[3:]
    for name, arg, letter, group in zip(names, event.args, letters, groups, strict=True):
        if arg.is_string:
            rows[name] = _shared(group)
        elif letter == "c":
            rows[name] = [ord(text) for text in group.to_pylist()]
        else:
            numbers, whole = _numbers(group, letter)
            rows[name] = _narrow(numbers, arg)
            if not whole.all():  # a number of more than 64 bits: nothing that QEMU printed
                fits[np.flatnonzero(fits)[~whole]] = False
                return scan(event, texts.filter(pa.array(fits)))[0], fits
    return rows, fits


def _regex(template: str) -> str:
    parts, position, number = [], 0, 0
    for match in CONVERSION.finditer(template):
        parts.append(_literal(template[position : match.start()]))
        position = match.end()
        if match["letter"] == "%":
            parts.append("%")
            continue
        prefix = r"(?:0[xX])?" if "#" in match["flags"] and match["letter"] in "xX" else ""
        padding = " *" if (match["width"] or " " in match["flags"]) else ""
        parts.append(f"{padding}{prefix}(?P<a{number}>{_PATTERNS[match['letter']]}){padding}")
        number += 1
    return "^" + "".join(parts) + _literal(template[position:]) + "$"


def _literal(text: str) -> str:
    return re.escape(text.rstrip("\n"))


def _flags(values: Any) -> npt.NDArray[np.bool_]:
    return np.asarray(values.to_numpy(zero_copy_only=False), np.bool_).copy()


def _numbers(texts: Any, letter: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return numbers of 64 bits, and which texts are such."""
    if letter in _HEX:
        if letter == "p":
            texts = pc.replace_substring(texts, "(nil)", "0x0")
        else:
            texts = pc.binary_join_element_wise(
                pa.scalar("0x", texts.type), texts, pa.scalar("", texts.type)
            )
    elif letter == "o":
        numbers = np.array([int(text, 8) for text in texts.to_pylist()], object)
        whole = numbers < 1 << 64
        return np.where(whole, numbers, 0).astype(np.uint64), whole.astype(np.bool_)
    kind = pa.int64() if letter in "di" else pa.uint64()
    try:
        numbers = texts.cast(kind).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        base = 16 if letter in _HEX else 10
        bits = range(-(1 << 63), 1 << 63) if letter in "di" else range(1 << 64)
        values = [int(text, base) for text in texts.to_pylist()]
        whole = np.array([value in bits for value in values], np.bool_)
        numbers = np.array([v if v in bits else 0 for v in values], object)
        return numbers.astype(np.int64 if letter in "di" else np.uint64), whole
    return numbers, np.ones(len(numbers), np.bool_)


def _narrow(numbers: npt.NDArray[Any], arg: Argument) -> npt.NDArray[Any]:
    """Return numbers as the argument's C type holds them: a format may print it as another."""
    spare = np.uint64(64 - arg.bits)
    shifted = numbers.astype(np.uint64) << spare
    if arg.is_signed:
        return shifted.view(np.int64) >> spare.astype(np.int64)
    return shifted >> spare


def _shared(texts: Any) -> npt.NDArray[np.object_]:
    """Return texts as Python strings; equal ones share one."""
    encoded = texts.dictionary_encode()
    words = np.array([*encoded.dictionary.to_pylist(), None], object)[:-1]
    found: npt.NDArray[np.object_] = words[encoded.indices.to_numpy()]
    return found
