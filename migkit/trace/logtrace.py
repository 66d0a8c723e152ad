"""A log of QEMU as a trace: one numpy array per event, like one read from simpletrace.

Each event's text is parsed into its arguments when it is first asked for, with the form of the
event that fits; what no known form fits stays text in a field ``args``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from migkit.errors import TraceWarning
from migkit.trace.dialect import Dialect, canonical, text_event
from migkit.trace.loglines import Log, read_log
from migkit.trace.scan import scan, scannable
from migkit.trace.simpletrace import Trace

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from migkit.trace.registry import Event, Registry

_NAMED = 10
_TRIED = 1000
"""How many lines decide on the form of an event."""


@dataclass(frozen=True)
class LogTrace(Trace):
    """A trace that was read from a log; ``log`` has its lines."""

    log: Log = field(kw_only=True)
    events: _LogEvents

    @property
    def span_ns(self) -> tuple[int, int]:
        """When the first and the last event occurred."""
        return int(self.log.ts_ns.min()), int(self.log.ts_ns.max())

    def shifted(self, offset_ns: int) -> LogTrace:
        """Return the same with its times on another clock."""
        log = replace(self.log, ts_ns=self.log.ts_ns + offset_ns)
        return replace(self, log=log, events=self.events.on(log))


def read(
    source: str | os.PathLike[str] | bytes,
    registry: Registry | None = None,
    progress: Callable[[int], None] | None = None,
) -> LogTrace:
    """Read a log; ``registry`` has the events of the QEMU that wrote it, by default those we know.

    Events that no registry has are there with one field ``args``; ``unknown`` counts them.
    Raises TraceFormatError for what is no log of trace events.
    """
    log = read_log(source, progress)
    events = _LogEvents(log, Dialect(registry))
    counts = np.bincount(log.code, minlength=len(log.names)).tolist()
    unknown = {
        name: count
        for name, count in zip(log.names, counts, strict=True)
        if canonical(name) in events.as_text
    }
    notes = list(log.warnings)
    if unknown:
        most = sorted(unknown.items(), key=lambda item: (-item[1], item[0]))
        which = ", ".join(f"{name} ({count})" for name, count in most[:_NAMED])
        more = f" and {len(most) - _NAMED} more" if len(most) > _NAMED else ""
        notes.append(
            "the registry lacks these events, or their form, and their arguments stay text: "
            f"{which}{more}; the trace-events file of that QEMU has them"
        )
    return LogTrace(
        registry=events.registry, events=events, n_records=len(log), unknown=unknown,
        warnings=tuple(notes), log=log,
    )  # fmt: skip


class _LogEvents(Mapping[str, "npt.NDArray[np.void]"]):
    """Parses an event's lines when they are asked for; by canonical name."""

    def __init__(self, log: Log, dialect: Dialect) -> None:
        self._log = log
        self._codes: dict[str, list[int]] = {}
        for code, name in enumerate(log.names):
            self._codes.setdefault(canonical(name), []).append(code)
        # numpy sorts 16 bits by radix, ten times as fast.
        few = len(log.names) <= 1 << 16
        self._order = np.argsort(log.code.astype(np.uint16) if few else log.code, kind="stable")
        self._bounds = np.cumsum(np.bincount(log.code, minlength=len(log.names)))
        self._arrays: dict[str, npt.NDArray[np.void]] = {}
        self._others: frozenset[str] = frozenset()
        self._forms = {name: self._form(name, dialect) for name in self._codes}
        self.as_text = {name for name, form in self._forms.items() if form.id < 0}
        self.registry = dialect.registry(self._forms.values())

    def on(self, log: Log) -> _LogEvents:
        """Return the events of the same lines, their times moved."""
        other = copy.copy(self)
        vars(other).update(_log=log, _arrays={})
        return other

    def joined(self, others: Mapping[str, npt.NDArray[np.void]]) -> _LogEvents:
        """Return these events and others, which no line has."""
        joined = copy.copy(self)
        vars(joined).update(_arrays={**self._arrays, **others}, _others=frozenset(others))
        return joined

    def __getitem__(self, name: str) -> npt.NDArray[np.void]:
        if name not in self._arrays:
            self._arrays[name] = self._parse(name, self._forms[name])
        return self._arrays[name]

    def __contains__(self, name: object) -> bool:
        return name in self._forms or name in self._others

    def __iter__(self) -> Iterator[str]:
        yield from self._forms
        yield from self._others

    def __len__(self) -> int:
        return len(self._forms) + len(self._others)

    def _rows(self, name: str) -> npt.NDArray[np.intp]:
        """Return the lines of an event, in the file's order."""
        first = np.concatenate([[0], self._bounds[:-1]])
        parts = [self._order[first[c] : self._bounds[c]] for c in self._codes[name]]
        return parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts))

    def _texts(self, rows: npt.NDArray[np.intp]) -> Any:
        return self._log.args.take(pa.array(rows))

    def _form(self, name: str, dialect: Dialect) -> Event:
        """Return the form that fits the most of an event's first lines, text if none fits any."""
        texts = self._texts(self._rows(name)[:_TRIED])
        originals = [self._log.names[code] for code in self._codes[name]]
        candidates = [f for o in originals for f in dialect.forms(o) if scannable(f)]
        best, most = text_event(name), 0
        for event in candidates:
            fitting = int(scan(event, texts)[1].sum())
            if fitting > most:
                best, most = event, fitting
            if most == len(texts):
                break
        return best

    def _parse(self, name: str, event: Event) -> npt.NDArray[np.void]:
        lines = self._rows(name)
        rows, fits = scan(event, self._texts(lines))
        if not fits.all():
            first = int(lines[np.argmin(fits)])
            text = self._texts(lines[~fits][:1])[0].as_py()
            warnings.warn(
                f"{int((~fits).sum())} of {len(lines)} records of {name} do not have the form "
                f"{event.format!r}: only their text is known. The first is record {first}, "
                f"{text[:80]!r}",
                TraceWarning,
                stacklevel=3,
            )
        lines = lines[fits]
        rows["ts_ns"], rows["tid"] = self._log.ts_ns[lines], self._log.tid[lines]
        rows["seq"] = lines
        return rows
