"""The events of a trace file, each made an array when it is first asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from migkit.trace.decode import EventRecords

Rows = npt.NDArray[np.void]


class RecordedEvents(Mapping[str, Rows]):
    """The rows of each event by name; ``recorded`` is what they are made of.

    ``others`` are rows of events that are not in the file.
    """

    def __init__(
        self, recorded: Mapping[str, EventRecords], others: Mapping[str, Rows] | None = None
    ) -> None:
        """Take the records; nothing is decoded yet."""
        self.recorded = recorded
        self._others = dict(others or {})
        self._decoded: dict[str, Rows] = {}

    @cached_property
    def span_ns(self) -> tuple[int, int]:
        """When the first and the last recorded event occurred, zeros if none did."""
        stamps = [each.columns("ts_ns")[0] for each in self.recorded.values()]
        ends = [(int(ts.min()), int(ts.max())) for ts in stamps]
        return (min(first for first, _ in ends), max(last for _, last in ends)) if ends else (0, 0)

    def joined(self, others: Mapping[str, Rows]) -> RecordedEvents:
        """Return these events and others, which are not in the file."""
        return RecordedEvents(self.recorded, others)

    def __getitem__(self, name: str) -> Rows:
        """Return an event's rows; KeyError if there are none."""
        if name in self._others:
            return self._others[name]
        if name not in self._decoded:
            self._decoded[name] = self.recorded[name].rows()
        return self._decoded[name]

    def columns(self, name: str, *fields: str) -> tuple[npt.NDArray[Any], ...]:
        """Return some fields of a recorded event, from its rows if they are decoded already."""
        if name not in self._decoded:
            return self.recorded[name].columns(*fields)
        return tuple(self._decoded[name][field] for field in fields)

    def __contains__(self, name: object) -> bool:
        """Tell whether there are any, without decoding them."""
        return name in self.recorded or name in self._others

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        yield from self.recorded
        yield from self._others

    def __len__(self) -> int:
        """Count the events."""
        return len(self.recorded) + len(self._others)
