"""The events of both processes as frames: all with their text, or one with its arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from migkit.analysis import schema

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from migkit.trace.registry import Event
    from migkit.trace.simpletrace import Trace


def events_frame(traces: Mapping[str, Trace]) -> pd.DataFrame:
    """Return the events of all processes, by time; columns: ``schema.describe("events")``."""
    parts: dict[str, list[npt.NDArray[Any]]] = {"ts_ns": [], "seq": [], "tid": [], "args": []}
    labels: list[tuple[str, str, int]] = []
    for process, trace in traces.items():
        for name, rows in trace.events.items():
            labels.append((process, name, len(rows)))
            parts["ts_ns"].append(rows["ts_ns"])
            parts["seq"].append(rows["seq"])
            parts["tid"].append(rows["tid"])
            parts["args"].append(_texts(trace.registry[name], rows))
    if not labels:
        return schema.frame("events", {"event": pd.Categorical([], categories=[])})
    joined = {key: np.concatenate(arrays) for key, arrays in parts.items()}
    order = np.lexsort((joined["seq"], joined["ts_ns"]))
    counts = [count for _, _, count in labels]
    names = sorted({name for _, name, _ in labels})
    codes = np.repeat([names.index(name) for _, name, _ in labels], counts)
    sides = np.repeat([schema.SIDES.index(process) for process, _, _ in labels], counts)
    return pd.DataFrame(
        {
            "ts_ns": joined["ts_ns"][order].astype(np.int64),
            "process": _categories(sides[order], schema.SIDES),
            "tid": joined["tid"][order].astype(np.int64),
            "event": _categories(codes[order], names),
            "args": pd.array(joined["args"][order], dtype="str"),
        }
    )


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
