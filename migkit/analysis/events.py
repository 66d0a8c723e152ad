"""The events of both processes as frames: all with their text, or one with its arguments."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from migkit.analysis import schema
from migkit.trace.chase import chunks
from migkit.trace.dialect import canonical
from migkit.trace.logtrace import LogTrace
from migkit.trace.printcolumns import print_columns
from migkit.trace.recorded import RecordedEvents

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    import numpy.typing as npt

    from migkit.trace.registry import Event
    from migkit.trace.simpletrace import Trace

_TEXT = pa.large_string()
_AHEAD = 2


def events_frame(traces: Mapping[str, Trace]) -> pd.DataFrame:
    """Return the events of all processes, by time; columns: ``schema.describe("events")``.

    Derived events are not among them: nobody recorded those.
    """
    return frame_of_pieces(traces.items())


def frame_of_pieces(pieces: Iterable[tuple[str, Trace]]) -> pd.DataFrame:
    """Return what `events_frame` does of traces in pieces, each with its process."""
    codes: dict[str, int] = {}
    parts = list(_parts(pieces, codes))
    names = list(codes)
    if not names:
        empty = pd.Categorical([], categories=[])
        return schema.frame("events", {"event": empty, "original": empty})
    ts, side, tid, code = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("ts", "side", "tid", "code")
    )
    text = pa.chunked_array([part.text for part in parts])
    if (ts[1:] < ts[:-1]).any():
        # Of one time by the files' order; sorting what mostly is sorted takes little.
        order = np.argsort(ts, kind="stable")
        ts, side, tid, code = ts[order], side[order], tid[order], code[order]
        text = text.combine_chunks().take(pa.array(order))
    originals = sorted(names)
    events = sorted({canonical(name) for name in names})
    small = np.min_scalar_type(-len(names))
    place = np.array([originals.index(name) for name in names], small)
    canonical_place = np.array([events.index(canonical(name)) for name in names], small)
    return pd.DataFrame(
        {
            "ts_ns": ts,
            "process": _categories(side, schema.SIDES),
            "tid": tid,
            "event": _categories(canonical_place[code], events),
            "original": _categories(place[code], originals),
            "args": text.to_pandas().array,
        },
        copy=False,
    )


def _parts(pieces: Iterable[tuple[str, Trace]], codes: dict[str, int]) -> Iterator[_Part]:
    """Yield the rows of each piece; one is printed while the next one is read."""
    with ThreadPoolExecutor(1) as printer:
        pending: deque[Future[_Part]] = deque()
        for process, trace in pieces:
            pending.append(printer.submit(_part, process, trace, codes))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@dataclass(frozen=True)
class _Part:
    """The rows of a piece in its file's order: columns (n,), ``text`` an Arrow array."""

    ts: npt.NDArray[np.int64]
    side: npt.NDArray[np.int8]
    tid: npt.NDArray[np.int64]
    code: npt.NDArray[np.int32]
    text: Any


def _part(process: str, trace: Trace, codes: dict[str, int]) -> _Part:
    """Return a piece's rows; ``codes`` numbers the names, and learns new ones."""
    side = schema.SIDES.index(process)
    if isinstance(trace, LogTrace):
        log = trace.log
        table = np.array([codes.setdefault(name, len(codes)) for name in log.names], np.int32)
        sides = np.full(len(log), side, np.int8)
        return _Part(log.ts_ns, sides, log.tid, table[log.code], log.args)
    printed = [
        (n, each) for n in trace.events if n not in trace.derived for each in _print(trace, n)
    ]
    if not printed:
        none = np.zeros(0, np.int64)
        return _Part(none, none.astype(np.int8), none, none.astype(np.int32), pa.array([], _TEXT))
    ts, seq, tid = (
        np.concatenate([getattr(each, name) for _, each in printed]).astype(np.int64)
        for name in ("ts", "seq", "tid")
    )
    own = [codes.setdefault(trace.originals.get(n, n), len(codes)) for n, _ in printed]
    code = np.repeat(np.array(own, np.int32), [len(each.seq) for _, each in printed])
    text = pa.concat_arrays([each.text for _, each in printed])
    order = _by_place(seq)
    sides = np.full(len(ts), side, np.int8)
    return _Part(ts[order], sides, tid[order], code[order], text.take(pa.array(order)))


@dataclass(frozen=True)
class _Printed:
    """Some records of one event: columns (n,), ``text`` the Arrow array of their arguments."""

    ts: npt.NDArray[np.uint64]
    seq: npt.NDArray[np.int64]
    tid: npt.NDArray[np.uint32]
    text: Any


def _print(trace: Trace, name: str) -> Iterator[_Printed]:
    """Print the arguments of one event's records as QEMU's log does, some at a time."""
    event = trace.registry[name]
    if isinstance(trace.events, RecordedEvents):
        recorded = trace.events.recorded[name]
        for chunk, (headers, arguments) in zip(
            chunks(len(recorded.seq)), recorded.pieces(), strict=True
        ):
            text = _text(event, arguments, len(headers))
            ts, tid = headers["ts_ns"].copy(), headers["tid"].copy()
            yield _Printed(ts, recorded.seq[chunk], tid, text)
        return
    rows = trace.events[name]
    for chunk in chunks(len(rows)):
        part = rows[chunk]
        arguments = [part[field] for field in (rows.dtype.names or ())[3:]]
        text = _text(event, arguments, len(part))
        yield _Printed(part["ts_ns"], part["seq"].astype(np.int64), part["tid"], text)


def _text(event: Event, arguments: Sequence[npt.NDArray[Any]], count: int) -> Any:
    if not event.args:
        return pa.repeat(pa.scalar(event.format, _TEXT), count)
    return print_columns(event, arguments)


def _by_place(seq: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the order of records by their place in the file, without sorting."""
    first = seq.min()
    place = np.full(int(seq.max() - first) + 1, -1)
    place[seq - first] = np.arange(len(seq))
    order: npt.NDArray[np.int64] = place[place >= 0]
    return order


def event_frame(traces: Mapping[str, Trace], name: str) -> pd.DataFrame:
    """Return one event of all processes: ts_ns, process, tid and a column per argument, by time.

    Integers are int64, so that times may be subtracted (unsigned ones from 2**63 on come out
    negative); strings are ``category``.
    """
    frames = []
    for process, trace in traces.items():
        rows = trace[name]
        frame = pd.DataFrame({"ts_ns": rows["ts_ns"].astype(np.int64)})
        frame["process"] = pd.Categorical([process] * len(rows), categories=list(schema.SIDES))
        frame["tid"] = rows["tid"].astype(np.int64)
        for argument in (rows.dtype.names or ())[3:]:
            text = rows[argument].dtype == object
            frame[argument] = rows[argument] if text else rows[argument].astype(np.int64)
        frames.append(frame)
    result = pd.concat(frames, ignore_index=True).sort_values("ts_ns", kind="stable")
    for column in result.columns[3:]:
        if result[column].dtype == object:
            result[column] = result[column].astype("str").astype("category")
    return result.reset_index(drop=True)


def _categories(codes: npt.NDArray[Any], names: Sequence[str]) -> pd.Categorical[Any]:
    return pd.Categorical.from_codes(codes, dtype=pd.CategoricalDtype(list(names)))
