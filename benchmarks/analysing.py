"""All analyses and the report of a run with a million faults, which are made up.

The rest of the run, phases, states and samples, is the first sample's, as they are.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import migkit
from benchmarks.result import Row, Scale
from migkit.analysis import Run
from migkit.analysis.faults import STAGE_EVENTS
from migkit.probe.records import FAULT_DTYPE
from migkit.trace.decode import event_dtype
from migkit.trace.folder import RunFolder
from migkit.view.export import FRAMES

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from migkit.trace.simpletrace import Trace

_PAGE = 4096
_BASE = 0x7F00_0000_0000
_APART_NS = 20_000
_MOST_STAGE_NS = 20_000
_BOUND_S = 20.0
_FAULTS = {Scale.QUICK: 100_000, Scale.FULL: 1_000_000}
_REPEATS = 3
# Per page there is nothing but its fault: these say more of the sample's own pages.
_LEFT_OUT = ("ram_save_range", "ram_load_range", "get_queued_page_not_dirty",
             "postcopy_fault_local")  # fmt: skip


def measure(scale: Scale) -> Iterator[Row]:
    """Time every frame, the check, every figure and the report, from raw traces on."""
    count = _FAULTS[scale]
    recording = _MadeUp(count)
    taken: list[dict[str, float]] = [_analyse(recording) for _ in range(_REPEATS)]
    whole = [sum(part.values()) for part in taken]
    best = taken[int(np.argmin(whole))]
    dearest = max(best, key=lambda name: best[name])
    yield Row(
        f"analyses and report, {count:,} faults", "scheduler", min(whole), _BOUND_S, "s",
        ours=f"{dearest} {best[dearest]:.1f} s", samples={"s": taken},
    )  # fmt: skip


def _analyse(recording: _MadeUp) -> dict[str, float]:
    """Return how long each part took, s."""
    run = Run(recording)
    taken: dict[str, float] = {}

    def timed(name: str, make: Any) -> None:
        begun = time.perf_counter()
        make()
        taken[name] = time.perf_counter() - begun

    for name in FRAMES:
        if name == "events":
            continue  # reading's benchmark has it
        timed(name, lambda name=name: getattr(run, name))
    timed("check", run.check)
    timed("query_blocktime", run.query_blocktime)
    with tempfile.TemporaryDirectory() as folder:
        timed("report", lambda: run.export.html(Path(folder) / "report.html"))
    assert len(run.faults) == len(recording.records)
    return taken


class _MadeUp:
    """The parts of a run, in memory."""

    def __init__(self, count: int) -> None:
        sample = migkit.sample("first-postcopy")
        self.path = sample.path
        self._samples = RunFolder.open(sample.path).load_samples()
        self._meta = sample.meta
        self._meta["guests"]["destination"]["address"] = _BASE
        self._meta["options"]["memory"] = count * _PAGE
        faults, self.records = _faults(count, int(sample.downtime["end_ns"].iloc[-1]))
        self._traces = {side: _with(sample.traces[side], events) for side, events in faults.items()}

    def load_meta(self) -> dict[str, Any]:
        return self._meta

    def read_trace(self, role: str) -> Trace:
        return self._traces[role]

    def load_samples(self) -> npt.NDArray[np.void]:
        return self._samples

    def load_probe(self, dtype: np.dtype[np.void]) -> npt.NDArray[np.void]:
        assert dtype == FAULT_DTYPE
        return self.records


def _with(trace: Trace, events: dict[str, dict[str, Any]]) -> Trace:
    """Return a trace with events of faults in the place of its own."""
    arrays = {name: rows for name, rows in trace.events.items() if name not in _LEFT_OUT}
    for name, fields in events.items():
        rows = np.zeros(len(fields["ts_ns"]), event_dtype(trace.registry[name]))
        for field, values in fields.items():
            rows[field] = values
        arrays[name] = rows
    return replace(trace, events=arrays)


def _faults(count: int, begin_ns: int) -> tuple[dict[str, dict[str, dict[str, Any]]], Any]:
    """Return the events of both sides, and the kernel's records: each page once, 8 threads."""
    random = np.random.default_rng(1)
    page = random.permutation(count)
    offset, tid = page * _PAGE, random.integers(1, 9, count)
    steps = random.integers(100, _MOST_STAGE_NS, (count, 10))
    fault, blocked, read, requested, heard, sent, received, placed, woken, running = (
        begin_ns + np.arange(1, count + 1)[:, None] * _APART_NS + np.cumsum(steps, axis=1)
    ).T
    block = {"rbname": "pc.ram"}
    events = {
        "source": {
            STAGE_EVENTS["received_by_source"]: {
                "ts_ns": heard, "start": offset, "len": _PAGE, **block
            },
            STAGE_EVENTS["sent"]: {"ts_ns": sent, "offset": page, "str": "pc.ram"},
        },
        "destination": {
            STAGE_EVENTS["read"]: {
                "ts_ns": read, "offset": offset, "pid": tid, "hostaddr": _BASE + offset,
                "ramblock": "pc.ram",
            },
            STAGE_EVENTS["requested"]: {"ts_ns": requested, "addr": _BASE + offset},
            STAGE_EVENTS["received"]: {"ts_ns": received, "offset": offset, "channel": 1, **block},
            STAGE_EVENTS["placed"]: {"ts_ns": placed, "offset": offset, **block},
        },
    }  # fmt: skip
    records = np.zeros(count, FAULT_DTYPE)
    records["address"], records["tid"] = _BASE + offset, tid
    for name, times in (("fault", fault), ("blocked", blocked), ("woken", woken),
                        ("running", running)):  # fmt: skip
        records[f"{name}_ns"] = times
    return events, records
