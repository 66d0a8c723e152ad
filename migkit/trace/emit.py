"""Emit trace events into shared memory, at a cost that leaves the traced thing as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migkit.errors import OptionError, close_matches
from migkit.trace.drain import DATA_OFFSET
from migkit.trace.generate import emitter, encode_text, record_prefix, record_shape
from migkit.trace.layout import header, mapping_record
from migkit.trace.registry import Registry

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Collection

    import numpy.typing as npt

    from migkit.trace.registry import Event


_MAX_ROWS = 4096


_off: Callable[..., object] = "".format
"""The function of every event that is off: formatting an empty text takes any arguments and does
nothing, in C, in two thirds of the time that an empty function of Python takes."""


class Tracer:
    """Writes a trace into a buffer: ``tracer.migrate_set_state("active")`` emits an event.

    Each event of the registry is a method that takes the event's arguments by position and,
    optionally, ``ts=`` (ns of CLOCK_MONOTONIC; now by default). Integers wrap at 64 bits, text is
    cut after 512 bytes, None is an empty text. When the buffer is full records are dropped and
    counted. A tracer belongs to one thread, whose id its records carry, and is the only writer of
    its buffer (`migkit.trace.drain` has the layout); a buffer that holds a trace is continued.
    """

    def __init__(
        self,
        buffer: mmap.mmap | bytearray,
        enabled: Collection[str],
        *,
        registry: Registry | None = None,
        tid: int,
    ) -> None:
        self._registry = Registry.load() if registry is None else registry
        self._enabled = frozenset(self._registry[name].name for name in enabled)
        self._tid = tid
        self._rows: dict[tuple[str, tuple[bytes, ...]], npt.NDArray[np.void]] = {}
        with memoryview(buffer) as whole:
            self._control = whole[:DATA_OFFSET].cast("Q")
            self._data = whole[DATA_OFFSET:]
        if not self._control[0]:
            self._write_head()
        for event in self._registry:
            vars(self)[event.name] = _off
            if event.name in self._enabled:
                vars(self)[event.name] = emitter(event, self._control, self._data, tid)

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Say which event may be meant: those that exist are found before this is called."""
        hint = close_matches(name, vars(self))
        raise AttributeError(f"no trace event {name!r}; {hint}", name=name, obj=self)

    def on(self, name: str) -> bool:
        """Tell whether an event is on; MissingEventError if there is none of that name."""
        return self._registry[name].name in self._enabled

    def many(self, name: str, *columns: object, ts: int | npt.NDArray[np.integer]) -> None:
        """Emit one event many times, with one store for all records.

        Each integer argument is an array or one int for all records, as is ``ts`` (ns); a string
        argument is one str for all. Arrays have equal lengths; without an array there is one
        record. What does not fit into the buffer is dropped and counted.
        """
        if not self.on(name):
            return
        event = self._registry[name]
        if len(columns) != len(event.args):
            raise TypeError(f"{name} takes {len(event.args)} arguments, got {len(columns)}")
        texts = tuple(
            encode_text(column)
            for arg, column in zip(event.args, columns, strict=True)
            if arg.is_string
        )
        row = self._rows.get((name, texts))
        if row is None:
            if len(self._rows) >= _MAX_ROWS:
                self._rows.clear()
            row = self._rows[name, texts] = self._row(event, texts)
        numbers = {"ts": _integers(name, "ts", ts)}
        for arg, column in zip(event.args, columns, strict=True):
            if not arg.is_string:
                numbers[f"arg {arg.name}"] = _integers(name, arg.name, column)
        (count,) = np.broadcast_shapes((1,), *(column.shape for column in numbers.values()))
        count = 0 if any(not column.size for column in numbers.values()) else count
        at = self._control[0]
        fitting = min(count, (self._data.nbytes - at) // row.itemsize)
        rows = np.ndarray((fitting,), row.dtype, buffer=self._data, offset=at)
        opaque = np.dtype((np.void, row.itemsize))
        rows.view(opaque)[:] = row.view(opaque)
        for field, column in numbers.items():
            rows[field] = column[:fitting] if column.ndim else column
        self._control[1] += count - fitting
        self._control[0] = at + fitting * row.itemsize

    def close(self) -> None:
        """Let go of the buffer; every event is off from now on."""
        self._enabled = frozenset()
        for event in self._registry:
            vars(self)[event.name] = _off
        self._control.release()
        self._data.release()

    def _write_head(self) -> None:
        """Begin the trace: its header and the names of all events."""
        mappings = (mapping_record(event.id, event.name) for event in self._registry)
        head = header() + b"".join(mappings)
        if len(head) > self._data.nbytes:
            raise OptionError(
                f"a trace buffer of {DATA_OFFSET + self._data.nbytes} bytes is too small: "
                f"the names of the events alone take {DATA_OFFSET + len(head)}"
            )
        self._data[: len(head)] = head
        self._control[0] = len(head)

    def _row(self, event: Event, texts: tuple[bytes, ...]) -> npt.NDArray[np.void]:
        """Return a record of an event, one row, in which only the integers are still missing."""
        _, length_tid = record_shape(event, self._tid, texts)
        values: list[object] = [record_prefix(event), 0, length_tid]
        fields: list[tuple[str, npt.DTypeLike]] = [
            ("prefix", "V16"),
            ("ts", np.uint64),
            ("length_tid", np.uint64),
        ]
        remaining = iter(texts)
        for arg in event.args:
            values.append(next(remaining) if arg.is_string else 0)
            number = np.int64 if arg.is_signed else np.uint64
            text = f"V{len(values[-1])}" if isinstance(values[-1], bytes) else ""
            fields.append((f"arg {arg.name}", text or number))
        return np.array([tuple(values)], fields)


def _integers(event: str, name: str, column: object) -> npt.NDArray[np.integer]:
    """Return a column of integers; raises TypeError for anything else."""
    values = np.asarray(column)
    if values.dtype.kind not in "iub" or values.ndim > 1:
        raise TypeError(
            f"{event}: {name} must be an int or a one-dimensional array of integers, "
            f"got {values.dtype} of shape {values.shape}"
        )
    return values
