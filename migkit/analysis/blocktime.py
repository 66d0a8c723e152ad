"""How long the guest stood still on page faults: QEMU's ``postcopy-blocktime``, exactly.

QEMU (capability ``postcopy-blocktime``) reports for each vCPU how long it was blocked, how long
all of them were at once, mean latencies, and the latencies in 24 buckets of powers of two of a
microsecond. It counts from the reading of a fault to the placing of its page; the guest waits
longer, from the fault until its thread runs again. The frames here have both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from migkit.analysis import schema
from migkit.analysis.latency import waited

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from migkit.analysis.join import Ints

BUCKETS = 24
"""The buckets of ``postcopy-latency-dist``; the N-th is from 2**N to 2**(N+1) us."""


def blocktime_frame(
    faults: pd.DataFrame, end_ns: int, threads: Iterable[int] | None = None
) -> pd.DataFrame:
    """Return how long each thread stood still, and all at once; ``schema.describe("blocktime")``.

    A fault that was never resolved lasts until ``end_ns``. ``threads`` are the guest's vCPUs; by
    default those that faulted: one that never did cannot be seen, and then nothing was "all".
    """
    stopped = _stopped(faults)
    tids = sorted(set(stopped["tid"].tolist()) if threads is None else threads)
    rows: list[tuple[object, ...]] = []
    spans = []
    for tid in tids:
        mine = stopped[stopped["tid"] == tid]
        own = union(*_waits(mine, end_ns))
        spans.append(own)
        rows.append(("thread", tid, len(mine), *_lengths_ms(own), mine["latency_us"].mean()))
    if tids:
        everyone = stopped[stopped["tid"].isin(tids)]
        rows.append(
            ("all at once", None, len(everyone), *_lengths_ms(_all_at_once(spans)),
             everyone["latency_us"].mean())
        )  # fmt: skip
    columns = list(schema.table("blocktime").columns)
    return schema.frame("blocktime", {c: [row[i] for row in rows] for i, c in enumerate(columns)})


def standstill(faults: pd.DataFrame, end_ns: int, threads: Iterable[int] | None = None) -> Ints:
    """Return when all threads stood still at once, (n, 2) int64, ns, by time."""
    stopped = _stopped(faults)
    tids = sorted(set(stopped["tid"].tolist()) if threads is None else threads)
    waits = [_waits(stopped[stopped["tid"] == tid], end_ns) for tid in tids]
    return _all_at_once([union(*mine) for mine in waits])


def distribution_frame(faults: pd.DataFrame) -> pd.DataFrame:
    """Return the latencies in QEMU's buckets; ``schema.describe("latency_distribution")``.

    Counts the faults that waited for a page from the source.
    """
    remote = waited(faults, ["latency_us", "read_ns", "placed_ns"])
    latency = remote["latency_us"].to_numpy(np.float64)
    bucket = _bucket(latency)
    counts = np.bincount(bucket, minlength=BUCKETS)
    sums = np.bincount(bucket, weights=latency, minlength=BUCKETS)
    edges = 2.0 ** np.arange(BUCKETS + 1)
    with np.errstate(invalid="ignore"):
        means = sums / counts
    return schema.frame(
        "latency_distribution",
        {
            "from_us": np.concatenate([[0.0], edges[1:-1]]),
            "to_us": np.concatenate([edges[1:-1], [np.inf]]),
            "faults": counts,
            "share": counts / max(len(remote), 1),
            "mean_us": means,
            "engine_faults": np.bincount(
                _bucket(_engine_us(remote).dropna().to_numpy()), minlength=BUCKETS
            ),
        },
    )


def query_migrate(
    faults: pd.DataFrame, end_ns: int, threads: Iterable[int] | None = None
) -> dict[str, Any]:
    """Return what QEMU's ``query-migrate`` would report, in its names and units.

    ``postcopy-blocktime`` and ``postcopy-vcpu-blocktime`` (a list, by thread) in ms,
    ``postcopy-latency`` and ``postcopy-vcpu-latency`` in ns, ``postcopy-latency-dist`` counts.
    All times are those that QEMU measures, from read to placed.
    """
    remote = waited(faults, ["ts_ns", "latency_us", "tid", "resolution", "read_ns", "placed_ns"])
    remote = remote.assign(ts_ns=remote["read_ns"], latency_us=_engine_us(remote))
    remote = remote.dropna(subset=["ts_ns", "latency_us"]).astype({"ts_ns": "int64"})
    frame = blocktime_frame(remote, end_ns, threads)
    per_thread = frame[frame["who"] == "thread"]
    whole = frame[frame["who"] == "all at once"]["blocktime_ms"]
    return {
        "postcopy-blocktime": int(whole.sum()),
        "postcopy-vcpu-blocktime": [int(ms) for ms in per_thread["blocktime_ms"]],
        "postcopy-latency": _whole_ns(remote["latency_us"].mean()),
        "postcopy-vcpu-latency": [_whole_ns(us) for us in per_thread["mean_latency_us"]],
        "postcopy-latency-dist": distribution_frame(faults)["engine_faults"].tolist(),
    }


def union(begin: Ints, end: Ints) -> Ints:
    """Return spans of time as spans that do not touch, (n, 2) int64, by time."""
    if not len(begin):
        return np.zeros((0, 2), np.int64)
    order = np.argsort(begin, kind="stable")
    begin, latest = begin[order], np.maximum.accumulate(end[order])
    fresh = np.concatenate([[True], begin[1:] > latest[:-1]])
    last = np.concatenate([np.flatnonzero(fresh)[1:] - 1, [len(begin) - 1]])
    return np.stack([begin[fresh], latest[last]], axis=1)


def _stopped(faults: pd.DataFrame) -> pd.DataFrame:
    """Return the faults that made a thread stand still, also those whose end is not known."""
    stopped = faults["latency_us"].notna() | (faults["resolution"] == "unresolved")
    return faults.loc[stopped, ["ts_ns", "latency_us", "tid"]]


def _waits(faults: pd.DataFrame, end_ns: int) -> tuple[Ints, Ints]:
    """Return when the waits of faults began and ended, ns."""
    begin = faults["ts_ns"].to_numpy(np.int64)
    latency = faults["latency_us"].to_numpy(np.float64)
    known = ~np.isnan(latency)
    waited_ns = np.rint(np.where(known, latency, 0.0) * 1e3).astype(np.int64)
    return begin, np.where(known, begin + waited_ns, np.maximum(end_ns, begin))


def _all_at_once(spans: list[Ints]) -> Ints:
    """Return when all of several spans hold at once, given those of each thread."""
    if not spans:
        return np.zeros((0, 2), np.int64)
    times = np.concatenate([part[:, column] for column in (0, 1) for part in spans])
    step = np.repeat([1, -1], len(times) // 2)
    # At the same instant one ends before another begins: nothing is blocked for no time.
    order = np.lexsort((step, times))
    times, depth = times[order], np.cumsum(step[order])
    whole = np.flatnonzero(depth == len(spans))
    return np.stack([times[whole], times[whole + 1]], axis=1)


def _lengths_ms(spans: Ints) -> tuple[float, float]:
    """Return the sum and the longest of spans, ms."""
    lengths = (spans[:, 1] - spans[:, 0]) / 1e6
    return float(lengths.sum()), float(lengths.max(initial=0.0))


def _bucket(us: npt.NDArray[np.float64]) -> Ints:
    """Return QEMU's bucket of each latency: the position of its highest bit, in whole us."""
    whole = np.maximum(us, 1.0).astype(np.int64)
    # frexp is exact where log2 rounds: 2**n - 1 stays below 2**n.
    _, exponent = np.frexp(whole.astype(np.float64))
    return np.minimum(exponent.astype(np.int64) - 1, BUCKETS - 1)


def _engine_us(faults: pd.DataFrame) -> pd.Series:
    """Return how long the faults took as an engine sees it, from read to placed, us."""
    span = (faults["placed_ns"] - faults["read_ns"]).astype("Float64")
    return span.clip(lower=0).astype("float64") / 1e3


def _whole_ns(us: float) -> int:
    return 0 if np.isnan(us) else int(us * 1e3)
