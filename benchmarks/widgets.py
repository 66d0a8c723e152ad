"""What the Console takes of the migration that it shows, and the Explorer of one's patience.

The Console is watched without a browser: a browser on the same two CPUs is work of its own.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from benchmarks import placement
from benchmarks.faults import TOUCHES
from benchmarks.guest import IDLE, PAGE, Ours
from benchmarks.result import Pairs, Row, median_ratio
from migkit.analysis.run import Run
from migkit.migration.session import Session
from migkit.migration.states import Status
from migkit.widgets.console import Console
from migkit.widgets.explorer import Explorer
from migkit.widgets.live import Live

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.result import Scale

_GIB_PAGES = (1 << 30) // PAGE
_STEPS = 40


def measure(scale: Scale) -> Iterator[Row]:
    """Measure the Console's rate and cost, the Explorer's waits, and what an import takes."""
    yield _import()
    yield from _latency(scale)
    yield from _throughput(scale)
    yield from _explorer(_GIB_PAGES if scale is scale.QUICK else 1_000_000)


def _import() -> Row:
    code = "import time; t = time.perf_counter(); import migkit; print(time.perf_counter() - t)"
    command = [sys.executable, "-c", code]
    took = [
        float(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
        for _ in range(5)
    ]
    return Row("import migkit", "", float(np.median(took)), 0.5, "s", samples={"s": took})


class _Watched:
    """A session shown by a Console, as often as the Console does it."""

    def __init__(self, session: Session) -> None:
        self.console = Console(probe="off")
        self._console_of(session)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.seconds = 0.0

    def _console_of(self, session: Session) -> None:
        self.live = Live(session)
        n_pages = len(self.live.history.states)
        self.console._map.resize(n_pages, session.options.page_size)  # noqa: SLF001
        self.console._migration = session  # type: ignore[assignment]  # noqa: SLF001

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.console._migration = None  # noqa: SLF001

    def _run(self) -> None:
        begun = time.monotonic()
        self.console._show_until(self._stop.is_set, self.live, self._stop)  # noqa: SLF001
        self.seconds = time.monotonic() - begun


def _latency(scale: Scale) -> Iterator[Row]:
    """Compare chunks of faults of a guest of 1 GiB, with a Console and without."""
    where, pairs = placement.TWO, Pairs()
    with Ours(_GIB_PAGES, where, **IDLE) as ours:
        ours.hold()
        with placement.aside(where):
            ours.touch(TOUCHES)
            for number in range(scale.chunks):
                for watched in (True, False) if number % 2 else (False, True):
                    shown = _Watched(ours.session) if watched else contextlib.nullcontext()
                    with shown:
                        chunk = ours.touch(TOUCHES)
                    (pairs.ours if watched else pairs.floor).append(chunk)
    yield pairs.row("fault latency, Console / none", where.name, 50, 1.10)


def _throughput(scale: Scale) -> Iterator[Row]:
    """Compare whole migrations of 1 GiB, with a Console and without; count its updates."""
    speeds: dict[bool, list[float]] = {True: [], False: []}
    rates = []
    for number in scale.progress(scale.runs, "1 GiB, with a Console and without"):
        for watched in (True, False) if number % 2 else (False, True):
            speed, rate = _migrate(watched=watched)
            speeds[watched].append(speed)
            if watched:
                rates.append(rate)
    ratio, interval = median_ratio(speeds[True], speeds[False])
    mib_s = {watched: f"{np.median(speed):,.0f} MiB/s" for watched, speed in speeds.items()}
    yield Row(
        "throughput, Console / none", "scheduler", ratio, 0.90, "x", interval,
        ours=mib_s[True], floor=mib_s[False], at_least=True,
        samples={"with": speeds[True], "without": speeds[False]},
    )  # fmt: skip
    yield Row(
        "Console updates a second, 1 GiB", "scheduler", float(np.median(rates)), 10.0, "/s",
        at_least=True, samples={"rates": rates},
    )  # fmt: skip


def _migrate(*, watched: bool) -> tuple[float, float]:
    """Return MiB a second of a migration, and how often a second a Console showed it."""
    folder = Path(tempfile.mkdtemp(prefix="migkit-bench-"))
    try:
        with Session(
            "random", 1 << 30, path=folder / "run", rate=20_000, postcopy="1 round", probe="off"
        ) as session:
            session.start()
            begun = time.monotonic()
            shown = _Watched(session) if watched else contextlib.nullcontext()
            with shown:
                status = session.await_end(300)
            took = time.monotonic() - begun
            if status != Status.COMPLETED:
                raise RuntimeError(f"the migration is {status}: {session.errors}")
            source = session.query()["source"]
        names = ("precopy_bytes", "postcopy_bytes", "preempt_bytes")
        mib = sum(source[name] for name in names) / (1 << 20)
        rate = shown.console.updates / shown.seconds if watched else 0.0
        return mib / took, rate
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _explorer(n_faults: int) -> Iterator[Row]:
    """Record a guest that faults on every page; open the run, then slide through it."""
    with Ours(n_faults, placement.FREE, eager=True, **IDLE) as ours:
        status = ours.session.await_end(600)
        if status != Status.COMPLETED:
            raise RuntimeError(f"the migration is {status}: {ours.session.errors}")
        path = ours.session.record().path
        begun = time.perf_counter()
        explorer = Explorer(Run.load(path))
        opened = time.perf_counter() - begun
        slides = []
        for step in np.random.default_rng(1).permutation(400)[:_STEPS].tolist():
            begun = time.perf_counter()
            explorer._slider.value = step  # noqa: SLF001
            slides.append((time.perf_counter() - begun) * 1e3)
        what = f"{len(explorer.run.faults):,} faults"
    yield Row("Explorer, open", what, opened, 5.0, "s")
    yield Row("Explorer, a step p95", what, float(np.percentile(slides, 95)), 200.0, "ms",
              samples={"ms": slides})  # fmt: skip
