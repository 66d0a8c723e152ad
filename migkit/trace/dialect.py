"""The names that QEMU's trace events had from 2015 to today, and how each version prints them.

One canonical name for each event: the one that 7.2 and 11.1 agree on, else 11.1's.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from migkit.trace.registry import Argument, Event, Registry, parse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ALIASES: Mapping[str, str] = {
    # The patch of 2015.
    "migration_thread_end_of_iteration_file_err": "migration_completion_file_err",
    "migration_thread_end_of_iteration_postcopy_end": "migration_completion_postcopy_end",
    "migration_thread_end_of_iteration_postcopy_end_after_complete": (
        "migration_completion_postcopy_end_after_complete"
    ),
    "migration_thread_end_of_iteration_postcopy_end_before_rp": "migration_return_path_end_before",
    "migration_thread_end_of_iteration_postcopy_end_after_rp": "migration_return_path_end_after",
    # 2.8.
    "migration_completion_postcopy_end_before_rp": "migration_return_path_end_before",
    "migration_completion_postcopy_end_after_rp": "migration_return_path_end_after",
    # 7.2.
    "migrate_fd_error": "migrate_error",
    "migrate_fd_cancel": "migration_cancel",
    "migrate_fd_cleanup": "migration_cleanup",
    "mark_postcopy_blocktime_begin": "postcopy_blocktime_begin",
    "mark_postcopy_blocktime_end": "postcopy_blocktime_end",
}
"""The canonical name for each name that some version used."""

_QEMU_EVENTS = Path(__file__).with_name("qemu-events")


def canonical(name: str) -> str:
    """Return an event's canonical name; one without aliases is its own."""
    return ALIASES.get(name, name)


class Dialect:
    """All the forms that an event may have in a trace: of the registry given, then those known."""

    def __init__(self, registry: Registry | None = None) -> None:
        self._own = registry

    def forms(self, original: str) -> tuple[Event, ...]:
        """Return the forms of an event, by the name that the trace has for it; none if unknown.

        They bear the canonical name.
        """
        name = canonical(original)
        found = []
        if self._own is not None and original in self._own:
            found.append(_renamed(self._own[original], name))
        if name in (built_in := Registry.load()):
            found.append(built_in[name])
        return (*found, *_known_forms().get(name, ()))

    def registry(self, events: Iterable[Event]) -> Registry:
        """Return a registry of all canonical events, with these events' forms where they differ.

        Where several forms are known and none is given, it is the first.
        """
        merged = {event.name: event for event in _all_events()}
        if self._own is not None:
            for event in self._own:
                name = canonical(event.name)
                merged[name] = _renamed(event, name)
        return Registry([*(merged | {event.name: event for event in events}).values()])


def text_event(name: str) -> Event:
    """Return the event that stands for an unknown one: its arguments are one string, ``args``."""
    text = Argument("args", "const char *", is_string=True, is_signed=False, bits=64)
    return Event(id=-1, name=name, args=(text,), format="%s")


def _renamed(event: Event, name: str) -> Event:
    if event.name == name:
        return event
    return Event(event.id, name, event.args, event.format, event.doc, event.group, event.disabled)


@functools.cache
def _all_events() -> tuple[Event, ...]:
    """Return one form of every event that we know, ours first."""
    ours = tuple(Registry.load())
    names = {event.name for event in ours}
    others = (forms[0] for name, forms in _known_forms().items() if name not in names)
    return (*ours, *others)


@functools.cache
def _known_forms() -> Mapping[str, tuple[Event, ...]]:
    """Return the forms of qemu-events by canonical name, in the file's order."""
    forms: dict[str, tuple[Event, ...]] = {}
    for event in parse(_QEMU_EVENTS, several_forms=True):
        forms[event.name] = (*forms.get(event.name, ()), event)
    return forms
