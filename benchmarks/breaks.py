"""Breaks in post-copy: how soon both sides notice one, and how long recovery takes."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.result import Row, bootstrap
from migkit import Migration
from migkit.migration.states import Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.result import Scale

_BREAKS = 4  # in each migration


def measure(scale: Scale) -> Iterator[Row]:
    """Cut the link of a guest of 1 GiB, again and again, and let it recover."""
    noticed: list[float] = []
    handshakes: list[float] = []
    for _ in scale.progress(scale.large_runs, "cut and recover, 1 GiB"):
        _cut_and_recover(noticed, handshakes)
    for figure, values, bound in (
        ("a cut noticed on both sides, p50", noticed, 50.0),
        ("recovery handshake, 1 GiB, p50", handshakes, 100.0),
    ):
        yield Row(
            figure, "scheduler", float(np.median(values)), bound, "ms", bootstrap(values),
            samples={"ms": values},
        )  # fmt: skip


def _cut_and_recover(noticed: list[float], handshakes: list[float]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="migkit-bench-"))
    try:
        with Migration(
            "random", "1GiB", path=folder / "run", probe="off", rate=2000, link="unlimited",
            max_postcopy_bandwidth=200 << 20,
        ) as migration:  # fmt: skip
            migration.start()
            migration.start_postcopy()
            migration.await_status("postcopy-active")
            for _ in range(_BREAKS):
                time.sleep(0.2)
                begun, known = time.monotonic_ns(), len(migration.statuses)
                migration.link.cut()
                if migration.await_end(60) != Status.POSTCOPY_PAUSED:
                    raise RuntimeError(f"a cut link left the migration {migration.status}")
                pauses = [ts for ts, _, status in migration.statuses[known:]
                          if status == "postcopy-paused"]  # fmt: skip
                noticed.append((max(pauses) - begun) / 1e6)
                known = len(migration.statuses)
                migration.recover()
                ts = {(role, status): ts for ts, role, status in migration.statuses[known:]}
                done = ts["source", "postcopy-active"] - ts["source", "postcopy-recover-setup"]
                handshakes.append(done / 1e6)
            migration.await_end(120)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
