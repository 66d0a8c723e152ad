"""The trace-events file: which events there are, their arguments and how they print.

The syntax is that of QEMU's trace-events files, so the same parser reads QEMU's own (the
``trace-events-all`` that its packages install)::

    [disable] [vcpu] name(type arg, ...) "format" PRIu64 "format"

A ``#`` starts a comment line. In ours the comment right above an event describes it and names
its group; formats are kept with their macros replaced, for 64-bit Linux.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from migkit.errors import MissingEventError, OptionError, TraceFormatError, close_matches
from migkit.trace.printf import Value, compile_format, count_arguments, narrow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

DEFAULT_PATTERNS = ("migration", "savevm", "faults", "transfer")
"""The groups of events that are on unless somebody says otherwise."""

_BUILT_IN = Path(__file__).with_name("trace-events")

_EVENT = re.compile(
    r"(?:(?P<properties>[\w\s-]*\w)\s+)?(?P<name>\w+)\((?P<args>[^)]*)\)(?P<rest>.*)"
)
_PROPERTIES = frozenset({"disable", "vcpu", "tcg"})
_TOKEN = re.compile(r'\s*(?:"(?P<text>(?:[^"\\]|\\.)*)"|(?P<macro>\w+)|(?P<comma>,))')
_MACRO = re.compile(r"(?:HWADDR_|TARGET_|VADDR_)?PRI(?P<letter>[diouxX])(?P<size>8|16|32|\w*)")
_MACRO_MODIFIERS = {"8": "hh", "16": "h", "32": ""}
_ESCAPES = {"n": "\n", "t": "\t"}
_GROUP = re.compile(r"\s*group:\s*(\S+)\s*$")

# Bits and signedness of the C types on 64-bit Linux; the last row holds typedefs of QEMU that
# its files used before 2018, when only standard types were left.
_INTEGER_TYPES = {
    **{f"int{bits}_t": (bits, True) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}_t": (bits, False) for bits in (8, 16, 32, 64)},
    **dict.fromkeys(("size_t", "uintptr_t"), (64, False)),
    **dict.fromkeys(("ssize_t", "ptrdiff_t", "intptr_t", "off_t", "time_t"), (64, True)),
    **dict.fromkeys(("bool", "_Bool"), (8, False)),
    **dict.fromkeys(("hwaddr", "ram_addr_t", "target_ulong", "vaddr", "TCGv"), (64, False)),
}


@dataclass(frozen=True)
class Argument:
    """One argument of an event: its C type, and what a simpletrace file holds for it."""

    name: str
    ctype: str
    is_string: bool
    is_signed: bool
    bits: int

    def as_c(self, value: Value) -> Value:
        """Return the value as this argument's C type holds it."""
        if self.is_string or isinstance(value, str):
            return value
        return narrow(value, self.bits, signed=self.is_signed)


@dataclass(frozen=True)
class Event:
    """One event; ``id`` is its place in its file, ``format`` a printf format without macros."""

    id: int
    name: str
    args: tuple[Argument, ...]
    format: str
    doc: str = ""
    group: str = ""
    disabled: bool = False

    def format_args(self, values: Sequence[Value]) -> str:
        """Print one value per argument as QEMU's log backend would."""
        if len(values) != len(self.args):
            raise OptionError(f"{self.name} takes {len(self.args)} arguments, got {len(values)}")
        return self._render([a.as_c(v) for a, v in zip(self.args, values, strict=True)])

    @functools.cached_property
    def _render(self) -> Callable[[Sequence[Value]], str]:
        return compile_format(self.format)


class Registry:
    """The events of one trace-events file, in its order."""

    def __init__(self, events: Iterable[Event]) -> None:
        self._events: Mapping[str, Event] = {event.name: event for event in events}

    @classmethod
    def load(cls, path: str | Path | None = None) -> Registry:
        """Parse a trace-events file, by default migkit's own (parsed once).

        Raises TraceFormatError, with file and line, for what QEMU's tracetool would not accept.
        """
        if path is None:
            return _built_in()
        return cls(parse(Path(path)))

    def __getitem__(self, name: str) -> Event:
        try:
            return self._events[name]
        except KeyError:
            hint = close_matches(name, self._events)
            raise MissingEventError(f"no trace event {name!r} in the registry; {hint}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._events

    def __iter__(self) -> Iterator[Event]:
        return iter(self._events.values())

    def __len__(self) -> int:
        return len(self._events)

    def forms(self, name: str) -> tuple[Event, ...]:
        """Return the one form that an event has here, none if it is unknown."""
        return (self._events[name],) if name in self._events else ()

    def with_forms(self, forms: Mapping[str, Event]) -> Registry:
        """Return a registry that has these forms of its events, and these events."""
        if all(self._events.get(name) is form for name, form in forms.items()):
            return self
        return Registry({**self._events, **forms}.values())

    @property
    def groups(self) -> frozenset[str]:
        """The names of all groups."""
        return frozenset(event.group for event in self if event.group)

    def select(self, patterns: Iterable[str]) -> frozenset[str]:
        """Return the names of the events that the patterns choose, read from left to right.

        A pattern is a glob over event names, a group, ``all`` or ``none``; with a leading ``-``
        it takes its events away again. Raises OptionError if it matches nothing.
        """
        chosen: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if pattern.startswith("-"):
                chosen -= self._matches(pattern[1:])
            else:
                chosen |= self._matches(pattern)
        return frozenset(chosen)

    def _matches(self, pattern: str) -> set[str]:
        if pattern == "none":
            return set()
        matches = {
            event.name
            for event in self
            if pattern in {"all", event.group} or fnmatchcase(event.name, pattern)
        }
        if not matches:
            hint = close_matches(pattern, {*self._events, *self.groups, "all", "none"})
            raise OptionError(
                f"the pattern {pattern!r} matches no trace event and no group; {hint}"
            )
        return matches


@functools.cache
def _built_in() -> Registry:
    return Registry(parse(_BUILT_IN))


def parse(path: Path, *, several_forms: bool = False) -> list[Event]:
    """Parse all lines of a trace-events file.

    A name is declared once, unless ``several_forms`` allows it to come in several.
    """
    events: list[Event] = []
    names: set[str] = set()
    comment: list[str] = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TraceFormatError(f"{path} is no text in UTF-8: {error}") from error
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if line.startswith("#"):
            comment.append(line.lstrip("# "))
            continue
        if line:
            try:
                event = _parse_event(line, len(events), " ".join(comment))
            except ValueError as error:
                raise TraceFormatError(f"{path}, line {number}: {error}") from None
            if event.name in names and not several_forms:
                raise TraceFormatError(f"{path}, line {number}: {event.name} is declared twice")
            events.append(event)
            names.add(event.name)
        comment = []
    return events


def _parse_event(line: str, event_id: int, comment: str) -> Event:
    """Parse one event's line; raises ValueError that says what is wrong with it."""
    match = _EVENT.fullmatch(line)
    if match is None:
        raise ValueError(f'expected name(type arg, ...) "format", got {line!r}')
    properties = set((match["properties"] or "").split())
    if unknown := properties - _PROPERTIES:
        raise ValueError(f"unknown property {', '.join(sorted(unknown))}")
    args = _parse_arguments(match["args"])
    template = _parse_format(match["rest"].strip())
    wanted = count_arguments(template)
    if wanted != len(args):
        raise ValueError(f"format {template!r} prints {wanted} values of {len(args)} arguments")
    group = _GROUP.search(comment)
    event = Event(
        id=event_id,
        name=match["name"],
        args=args,
        format=template,
        doc=_GROUP.sub("", comment),
        group=group[1] if group else "",
        disabled="disable" in properties,
    )
    try:
        event.format_args(["" if arg.is_string else 0 for arg in args])
    except (TypeError, ValueError) as error:
        raise ValueError(f"format {template!r} cannot print these arguments: {error}") from error
    return event


def _parse_arguments(text: str) -> tuple[Argument, ...]:
    """Parse ``type name, type name`` or ``void``."""
    if text.strip() == "void":
        return ()
    return tuple(_parse_argument(part.strip()) for part in text.split(","))


def _parse_argument(text: str) -> Argument:
    match = re.fullmatch(r"(.*[\s*])(\w+)", text)
    if match is None:
        raise ValueError(f"expected 'type name' for an argument, got {text!r}")
    ctype, name = " ".join(match[1].replace("*", " * ").split()), match[2]
    words = [word for word in ctype.split() if word != "const"]
    if "*" in words:
        # As tracetool's is_string has it: any pointer to char is recorded as a string.
        is_string = words[0] == "char"
        return Argument(name, ctype, is_string=is_string, is_signed=False, bits=64)
    bits, is_signed = _integer_type(words)
    return Argument(name, ctype, is_string=False, is_signed=is_signed, bits=bits)


def _integer_type(words: list[str]) -> tuple[int, bool]:
    """Return bits and signedness of a C integer type."""
    if len(words) == 1 and words[0] in _INTEGER_TYPES:
        return _INTEGER_TYPES[words[0]]
    if not words or set(words) - {"unsigned", "signed", "int", "long", "short", "char"}:
        raise ValueError(
            f"argument type {' '.join(words)!r} is not allowed: use a standard integer type, "
            "'const char *' for text or 'void *' for any other pointer"
        )
    bits = 64 if "long" in words else 16 if "short" in words else 8 if "char" in words else 32
    return bits, "unsigned" not in words


def _parse_format(text: str) -> str:
    """Join the quoted parts of a format and the PRI macros between them."""
    formats = [""]
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"the format is malformed from {text[position:]!r} on")
        position = match.end()
        if match["comma"]:  # tcg events had two: at translation, then at execution
            formats.append("")
        elif match["macro"]:
            formats[-1] += _expand_macro(match["macro"])
        else:
            formats[-1] += re.sub(
                r"\\(.)", lambda escape: _ESCAPES.get(escape[1], escape[1]), match["text"]
            )
    return formats[-1]


def _expand_macro(name: str) -> str:
    """Return length modifier and letter for ``PRIu64`` and its like."""
    match = _MACRO.fullmatch(name)
    if match is None:
        raise ValueError(f"unknown macro {name} in the format")
    return _MACRO_MODIFIERS.get(match["size"], "l") + match["letter"]
