"""Rules about time: stages in order, a limiter that starves nobody, figures that add up."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from migkit.analysis.requests import STALL_US
from migkit.analysis.rule import (
    BOTH,
    DESTINATION,
    SOURCE,
    Finding,
    NotApplicableError,
    clock_error_ns,
)
from migkit.analysis.schema import STAGES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from migkit.analysis.analyses import Analyses

_KERNEL = ("fault", "blocked", "woken", "running")
_AT_SOURCE = frozenset({"received_by_source", "sent"})
_SPIN_NS = 100_000
_MANY_SPINS = 100
_ROUNDING_MS = 1  # QEMU reports whole ms


def stages_in_order(run: Analyses) -> Iterator[Finding]:
    """Find faults that the source answered whose stages are not in order."""
    run.need("postcopy_ram_fault_thread_request")
    faults = run.faults[run.faults["resolution"] == "requested"]
    engine = tuple(s for s in STAGES if s not in _KERNEL)
    for path in (engine, _KERNEL):
        for one, two in pairwise(path):
            before, after = faults[f"{one}_ns"], faults[f"{two}_ns"]
            crossing = (one in _AT_SOURCE) != (two in _AT_SOURCE)
            slack = clock_error_ns(run) if crossing else 0
            wrong = faults[(after + slack < before).fillna(value=False).astype(bool)]
            if len(wrong):
                early = (before - after)[wrong.index].max() / 1e3
                yield Finding(
                    BOTH if crossing else DESTINATION, int(wrong["ts_ns"].iloc[0]), len(wrong),
                    f"{two} came before {one} in {len(wrong):,} faults, by {early:,.1f} us at most;"
                    f" the first is on page {wrong['page'].iloc[0]:,}",
                )  # fmt: skip


def limiter_waits(run: Analyses) -> Iterator[Finding]:
    """Find a rate limiter that spins: it is to wait some ms and is back at once, over and over."""
    run.need("migration_rate_limit_pre", "migration_rate_limit_post")
    trace = run.traces["source"]
    begin, end = trace["migration_rate_limit_pre"], trace["migration_rate_limit_post"]
    count = min(len(begin), len(end))
    begin, end = begin[np.argsort(begin["ts_ns"])][:count], end[np.argsort(end["ts_ns"])][:count]
    waited_ns = end["ts_ns"].astype(np.int64) - begin["ts_ns"].astype(np.int64)
    spins = (begin["ms"] >= 1) & (waited_ns >= 0) & (waited_ns < _SPIN_NS)
    n_spins = int(np.count_nonzero(spins))
    if n_spins >= _MANY_SPINS:
        mine = begin["ts_ns"][spins].astype(np.int64)
        yield Finding(
            SOURCE, int(mine[0]), n_spins,
            f"the rate limiter spun: {n_spins:,} times within {(mine[-1] - mine[0]) / 1e6:,.0f} ms "
            f"it was to wait, {begin['ms'][spins].mean():.0f} ms on the average, and was back "
            f"after {waited_ns[spins].max() / 1e3:.0f} us at most",
        )  # fmt: skip


def limiter_starves_nobody(run: Analyses) -> Iterator[Finding]:
    """Find requests that the source did not answer because it kept to a rate limit."""
    run.need("migration_rate_limit_pre", "migration_rate_limit_post")
    stalled = run.requests[run.requests["stalled"].fillna(value=False).astype(bool)]
    if len(stalled):
        yield Finding(
            SOURCE, int(stalled["ts_ns"].iloc[0]), len(stalled),
            f"{len(stalled):,} requests waited {STALL_US / 1e3:.0f} ms or more while the source "
            f"was limited, the longest {stalled['limited_us'].max() / 1e3:,.1f} ms",
        )  # fmt: skip


def blocktime_adds_up(run: Analyses) -> Iterator[Finding]:
    """Find figures of query-migrate's blocktime that contradict each other."""
    reported = (run.meta.get("query_migrate") or {}).get("dst") or {}
    if "postcopy-blocktime" not in reported:
        raise NotApplicableError("no query-migrate with postcopy-blocktime is kept with the run")
    whole, each = reported["postcopy-blocktime"], reported.get("postcopy-vcpu-blocktime") or []
    if each and whole > min(each) + _ROUNDING_MS:
        yield Finding(
            DESTINATION, None, 1,
            f"all vCPUs were blocked at once for {whole:,} ms (postcopy-blocktime), but one of "
            f"them only for {min(each):,} ms (postcopy-vcpu-blocktime)",
        )  # fmt: skip
    yield from _mean_fits_distribution(reported)


def _mean_fits_distribution(reported: Mapping[str, Any]) -> Iterator[Finding]:
    counts = np.array(reported.get("postcopy-latency-dist") or [], np.float64)
    if not counts.sum() or "postcopy-latency" not in reported:
        return
    edges_us = 2.0 ** np.arange(len(counts) + 1)
    least = float((counts * np.concatenate([[0.0], edges_us[1:-1]])).sum() / counts.sum())
    most = float((counts * edges_us[1:]).sum() / counts.sum())
    mean_us = reported["postcopy-latency"] / 1e3
    # The last bucket has no end.
    if mean_us < least or (mean_us > most and not counts[-1]):
        yield Finding(
            DESTINATION, None, 1,
            f"the mean latency is {mean_us:,.0f} us (postcopy-latency), but that of the "
            f"{counts.sum():,.0f} faults in postcopy-latency-dist is from {least:,.0f} to "
            f"{most:,.0f} us",
        )  # fmt: skip
