"""The events of both processes as frames: all with their text, or one with its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from migkit.analysis import schema
from migkit.trace.dialect import canonical
from migkit.trace.logtrace import LogTrace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    from migkit.trace.registry import Event
    from migkit.trace.simpletrace import Trace


def events_frame(traces: Mapping[str, Trace]) -> pd.DataFrame:
    """Return the events of all processes, by time; columns: ``schema.describe("events")``.

    Derived events are not among them: nobody recorded those.
    """
    parts = [part for process, trace in traces.items() for part in _parts(process, trace)]
    if not parts:
        empty = pd.Categorical([], categories=[])
        return schema.frame("events", {"event": empty, "original": empty})
    ts, seq, tid = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("ts", "seq", "tid")
    )
    sides = np.repeat([schema.SIDES.index(part.process) for part in parts], _lengths(parts))
    text = pa.concat_arrays([part.args for part in parts])
    codes, names = _joined_codes(parts)
    if len(traces) > 1 or (ts[1:] < ts[:-1]).any():
        order = np.lexsort((seq, ts))
        ts, tid, sides, codes = ts[order], tid[order], sides[order], codes[order]
        text = text.take(pa.array(order))
    canonical_names = [canonical(name) for name in names]
    events = sorted(set(canonical_names))
    table = np.array([events.index(name) for name in canonical_names], np.int32)
    return pd.DataFrame(
        {
            "ts_ns": ts,
            "process": _categories(sides, schema.SIDES),
            "tid": tid,
            "event": _categories(table[codes], events),
            "original": _categories(codes, names),
            "args": text.to_pandas().array,
        }
    )


@dataclass(frozen=True)
class _Part:
    """Some rows of the frame: columns (n,), the names that their codes index."""

    process: str
    ts: npt.NDArray[np.int64]
    seq: npt.NDArray[np.int64]
    tid: npt.NDArray[np.int64]
    code: npt.NDArray[np.int32]
    names: tuple[str, ...]
    args: Any


def _parts(process: str, trace: Trace) -> Iterator[_Part]:
    if isinstance(trace, LogTrace):
        log = trace.log
        seq = np.arange(len(log))
        yield _Part(process, log.ts_ns, seq, log.tid, log.code, log.names, log.args)
        return
    for name, rows in trace.events.items():
        if name not in trace.derived:
            ts, seq, tid = (rows[field].astype(np.int64) for field in ("ts_ns", "seq", "tid"))
            texts = pa.array(_texts(trace.registry[name], rows), pa.large_string())
            original = trace.originals.get(name, name)
            yield _Part(process, ts, seq, tid, np.zeros(len(ts), np.int32), (original,), texts)


def _lengths(parts: Sequence[_Part]) -> list[int]:
    return [len(part.ts) for part in parts]


def _joined_codes(parts: Sequence[_Part]) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Return codes into one sorted list of the names of all parts."""
    names = sorted({name for part in parts for name in part.names})
    index = {name: code for code, name in enumerate(names)}
    tables = [np.array([index[name] for name in part.names], np.int32) for part in parts]
    codes = [table[part.code] for table, part in zip(tables, parts, strict=True)]
    return np.concatenate(codes), names


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


def _texts(event: Event, rows: npt.NDArray[np.void]) -> npt.NDArray[np.object_]:
    """Print the arguments of one event's records as QEMU's log does, (n,) of str."""
    texts = np.empty(len(rows), object)
    if event.args:
        columns = [rows[name].tolist() for name in (rows.dtype.names or ())[3:]]
        texts[:] = [event.format_args(values) for values in zip(*columns, strict=True)]
    else:
        texts[:] = event.format
    return texts
