"""Slow links and rate limits: how long a guest waits, and what the whole migration carries.

CRIU's lazy-pages took 1,787 us for a fault (p50) over such a link of 200 Mbit/s, and carried
38 MB/s of 1 GiB under a guest that touches pages at random, on a machine like ours.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.result import Row, bootstrap
from migkit import Migration, Run
from migkit.guest.workloads import Workload
from migkit.migration.states import Status
from migkit.trace import simpletrace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.result import Scale

_CRIU_FAULT_US = 1787.0
_LIMIT = 32 << 20


class Thinker(Workload):
    """Touches a page at random, then thinks for a millisecond."""

    def step(self, ram: Any, state: Any, n: int) -> None:
        """Touch ``n`` pages."""
        first = int(state["step"])
        for step in range(first, first + n):
            ram[(step * 2654435761 + self.seed) % len(ram), 8] += 1
            time.sleep(0.001)


def measure(scale: Scale) -> Iterator[Row]:
    """Measure each figure over several migrations."""
    yield _slow_link(scale)
    yield _throughput(scale)
    yield from _limited(scale)


def _slow_link(scale: Scale) -> Row:
    medians = []
    for _ in scale.progress(scale.large_runs, "200 Mbit/s"):
        with _migrated(Thinker, "256MiB", link="200Mbit/s") as (run, _):
            medians.append(float(run.faults["latency_us"].median()))
    ratios = [median / _CRIU_FAULT_US for median in medians]
    return Row(
        "fault p50, 200 Mbit/s / CRIU's", "scheduler", float(np.median(ratios)), 0.6, "x",
        bootstrap(ratios), ours=f"{np.median(medians):.0f} us", floor=f"{_CRIU_FAULT_US:.0f} us",
        samples={"us": medians},
    )  # fmt: skip


def _throughput(scale: Scale) -> Row:
    rates = []
    for _ in scale.progress(scale.large_runs, "1 GiB random"):
        with _migrated("random", "1GiB") as (_, took_s):
            rates.append((1 << 30) / 1e6 / took_s)
    return Row(
        "1 GiB random, post-copy", "scheduler", float(np.median(rates)), 200.0, "MB/s",
        bootstrap(rates), floor="38 MB/s (CRIU)", at_least=True, samples={"mb_per_s": rates},
    )  # fmt: skip


def _limited(scale: Scale) -> Iterator[Row]:
    """Count the requests that wait because the background is limited, and time all of them."""
    limiter_waits, p999 = [], []
    for _ in scale.progress(scale.large_runs, "32 MB/s"):
        with _migrated("random", "256MiB", rate=2000, max_postcopy_bandwidth=_LIMIT) as (run, _):
            faults = run.faults
            limiter_waits.append(_held_up(run, faults[faults["resolution"] == "requested"]))
            p999.append(float(faults["latency_us"].quantile(0.999)) / 1e3)
    yield Row(
        "requests held up by the limiter", "scheduler", float(max(limiter_waits)), 0.0, "",
        samples={"requests": limiter_waits},
    )  # fmt: skip
    yield Row(
        "fault p99.9, limit 32 MB/s", "scheduler", float(np.median(p999)), 5.0, "ms",
        bootstrap(p999), samples={"ms": p999},
    )  # fmt: skip


def _held_up(run: Run, asked: Any) -> int:
    """Count requests that came while the limiter made the source wait and were sent after it."""
    trace = simpletrace.read(run.path / "source.trace")
    begun = trace["migration_rate_limit_pre"]["ts_ns"].astype(np.int64)
    ended = trace["migration_rate_limit_post"]["ts_ns"].astype(np.int64)
    count = min(len(begun), len(ended))
    if not count:
        raise RuntimeError("the limiter never made the source wait: nothing was measured")
    came = asked["received_by_source_ns"].dropna().to_numpy(np.int64)
    sent = asked.loc[asked["received_by_source_ns"].notna(), "sent_ns"].to_numpy(np.int64)
    wait = np.searchsorted(begun[:count], came, side="right") - 1
    inside = (wait >= 0) & (came < ended[np.maximum(wait, 0)])
    return int(np.count_nonzero(inside & (sent >= ended[np.maximum(wait, 0)])))


@contextlib.contextmanager
def _migrated(
    workload: str | type[Workload], memory: str, **options: Any
) -> Iterator[tuple[Run, float]]:
    """Migrate by post-copy from the start; give the run and how long post-copy took in s."""
    folder = Path(tempfile.mkdtemp(prefix="migkit-bench-"))
    try:
        with Migration(workload, memory, path=folder / "run", probe="off", **options) as migration:
            migration.start()
            migration.start_postcopy()
            begun = time.monotonic()
            run = migration.wait(300)
            took_s = time.monotonic() - begun
        if run.status != Status.COMPLETED:
            raise RuntimeError(f"the migration is {run.status}")
        yield run, took_s
    finally:
        shutil.rmtree(folder, ignore_errors=True)
