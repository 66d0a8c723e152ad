"""Whole migrations of a writing guest: their downtime, and the memory that the engines need."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from benchmarks.result import Row, bootstrap, not_measured
from migkit.kernel.memory import memory_available
from migkit.migration.session import Session
from migkit.migration.states import Status
from migkit.trace import simpletrace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.result import Scale

_RATE = 20_000  # page writes a second
_SIZES = {256: 5.0, 4096: 15.0}  # MiB: bound of the downtime in ms
_RSS_BOUND_MIB = 120.0


def measure(scale: Scale) -> Iterator[Row]:
    """Migrate the workload 'random' after one round of pre-copy, at both sizes."""
    for mib, bound_ms in _SIZES.items():
        if memory_available() < 2.2 * mib * 2**20:
            yield not_measured(f"downtime p50, {mib} MiB", "too little memory", bound_ms, "ms")
            continue
        runs = scale.runs if mib < 1024 else scale.large_runs
        done = [_migrate(mib) for _ in scale.progress(runs, f"downtime, {mib} MiB")]
        downtimes = [downtime for downtime, _ in done]
        yield Row(
            f"downtime p50, {mib} MiB", "scheduler", float(np.median(downtimes)), bound_ms, "ms",
            bootstrap(downtimes), samples={"ms": downtimes},
        )  # fmt: skip
        for role in ("source", "destination"):
            peaks = [rss[role] for _, rss in done]
            yield Row(
                f"RssAnon of the {role}, {mib} MiB", "scheduler", max(peaks), _RSS_BOUND_MIB,
                "MiB", samples={"mib": peaks},
            )  # fmt: skip


def _migrate(mib: int) -> tuple[float, dict[str, float]]:
    """Return the downtime in ms and the highest RssAnon of both engines in MiB."""
    folder = Path(tempfile.mkdtemp(prefix="migkit-bench-"))
    try:
        with Session(
            "random", mib << 20, path=folder / "run", rate=_RATE, postcopy="1 round", probe="off"
        ) as session:
            session.start()
            with _RssWatch(session) as watch:
                status = session.await_end(300)
            if status != Status.COMPLETED:
                raise RuntimeError(f"the migration is {status}: {session.errors}")
            run = session.record()
        stopped = simpletrace.read(run.trace("source"))["guest_stopped"]["ts"][0]
        started = simpletrace.read(run.trace("destination"))["guest_started"]["ts"][0]
        return (int(started) - int(stopped)) / 1e6, watch.peak_mib
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _RssWatch:
    """Reads RssAnon of both engines every 20 ms, and keeps the highest."""

    def __init__(self, session: Session) -> None:
        engines = session._engines  # noqa: SLF001
        self.peak_mib = dict.fromkeys(engines, 0.0)
        self._pids = {role: engine.child.pid for role, engine in engines.items()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            for role, pid in self._pids.items():
                self.peak_mib[role] = max(self.peak_mib[role], _rss_anon_mib(pid))


def _rss_anon_mib(pid: int) -> float:
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0
