"""Read a trace while it is being written: what has come since the last time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from migkit.errors import TraceFormatError
from migkit.trace.layout import header
from migkit.trace.registry import Registry
from migkit.trace.simpletrace import Trace, sort_by_event
from migkit.trace.walk import Walk, check_header

if TYPE_CHECKING:
    import os

MOST_BYTES = 2 << 20


class Follower:
    """Follows one trace file, at most ``most`` bytes at a time; the rest comes the next time."""

    def __init__(
        self, path: str | os.PathLike[str], registry: Registry, most: int = MOST_BYTES
    ) -> None:
        """Begin at the file's beginning; it need not be there yet."""
        self._path = Path(path)
        self._registry = registry
        self._most = most
        self._at = 0
        self._names: dict[int, str] = {}

    def read(self) -> Trace:
        """Return the whole records that are new; raises TraceFormatError for what is none."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                data = np.frombuffer(file.read(self._most), np.uint8)
        except FileNotFoundError:
            return Trace(self._registry)
        start = 0 if self._at else len(header())
        if len(data) <= start:
            return Trace(self._registry)
        if not self._at:
            check_header(data)
        walk = Walk(data, self._registry.forms, self._names, start, more=True)
        walk.run()
        if walk.end == start and len(data) == self._most:
            raise TraceFormatError(
                f"offset {self._at + start}: expected a record, got more than {self._most} bytes"
            )
        self._at += walk.end
        return sort_by_event(data[: walk.end], [walk], self._registry, self._registry.forms)
