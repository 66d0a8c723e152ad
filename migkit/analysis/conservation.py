"""Rules about pages: each is sent before it is placed, placed once, and comes if asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migkit.analysis.rule import BOTH, DESTINATION, Finding, NotApplicableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from migkit.analysis.analyses import Analyses
    from migkit.analysis.join import Ints

_EXAMPLES = 3


def placed_once(run: Analyses) -> Iterator[Finding]:
    """Find pages that were placed more than once in post-copy."""
    ts, page = _placed(run)
    order = np.lexsort((ts, page))
    ts, page = ts[order], page[order]
    again = np.flatnonzero(page[1:] == page[:-1]) + 1
    if len(again):
        first = again[np.argmin(ts[again])]
        yield Finding(
            DESTINATION, int(ts[first]), len(again),
            f"{len(again):,} pages were placed again: {_pages(run, page[again])}",
        )  # fmt: skip


def placed_was_sent(run: Analyses) -> Iterator[Finding]:
    """Find pages that came to be placed though the source neither pushed nor answered them."""
    if run.meta.get("engine") == "qemu":
        raise NotApplicableError("QEMU's source has no event for the pages that it pushes")
    run.need("ram_save_range", "postcopy_preempt_send_host_page")
    ts, page = _placed(run)
    source, size = run.traces["source"], run.page_size
    ranges = source["ram_save_range"]
    _, pushed = _expand(ranges, size)
    alone = source["postcopy_preempt_send_host_page"]["offset"].astype(np.int64)
    strange = np.flatnonzero(~np.isin(page, np.concatenate([pushed, alone])))
    if len(strange):
        yield Finding(
            DESTINATION, int(ts[strange].min()), len(strange),
            f"{len(strange):,} pages were placed that the source has not sent: "
            f"{_pages(run, page[strange])}",
        )  # fmt: skip


def requests_answered(run: Analyses) -> Iterator[Finding]:
    """Find faults whose page never came, though the migration completed."""
    run.need("postcopy_ram_fault_thread_request", "postcopy_request_placed")
    if run.status != "completed":
        raise NotApplicableError(f"the migration did not complete: {run.status}")
    ended = run.traces["destination"]["postcopy_ram_listen_thread_exit"]
    if run.meta.get("destination_status") != "completed" and not len(ended):
        raise NotApplicableError("the destination's trace does not reach its end")
    lost = run.faults[run.faults["resolution"] == "unresolved"]
    if len(lost):
        yield Finding(
            BOTH, int(lost["ts_ns"].iloc[0]), len(lost),
            f"{len(lost):,} faults were never answered: {_pages(run, lost['page'].to_numpy())}",
        )  # fmt: skip


def records_kept(run: Analyses) -> Iterator[Finding]:
    """Find traces that have lost records: what is missing there cannot be judged."""
    for where, count in run.records_lost.items():
        if count:
            side = where if where in ("source", "destination") else DESTINATION
            yield Finding(
                side, None, count, f"{count:,} records of the {where} were lost: no room for them"
            )  # fmt: skip


def _placed(run: Analyses) -> tuple[Ints, Ints]:
    """Return when which page was placed in post-copy, in no order; QEMU's are addresses."""
    trace = run.traces["destination"]
    listen = trace["loadvm_postcopy_handle_listen"]["ts_ns"]
    if not len(listen):
        raise NotApplicableError("the migration did not come to post-copy")
    ranges = trace["ram_load_range"]
    if len(ranges):
        ts, page = _expand(ranges, run.page_size)
        alone = trace["postcopy_request_placed"]
        alone = alone[~np.isin(alone["ts_ns"], ranges["ts_ns"])]
        ts = np.concatenate([ts, alone["ts_ns"].astype(np.int64)])
        page = np.concatenate([page, alone["offset"].astype(np.int64) // run.page_size])
    else:
        run.need("postcopy_place_page")
        both = [trace["postcopy_place_page"], trace["postcopy_place_page_zero"]]
        ts = np.concatenate([rows["ts_ns"] for rows in both]).astype(np.int64)
        page = np.concatenate([rows["host_addr"] for rows in both]).astype(np.int64)
    after = ts >= int(listen.min())
    return ts[after], page[after]


def _expand(ranges: npt.NDArray[np.void], size: int) -> tuple[Ints, Ints]:
    """Return stamp and number of each page of ranges."""
    count = ranges["len"].astype(np.int64) // size
    first = np.repeat(ranges["offset"].astype(np.int64) // size, count)
    within = np.arange(len(first)) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(ranges["ts_ns"].astype(np.int64), count), first + within


def _pages(run: Analyses, pages: npt.NDArray[np.int64]) -> str:
    """Name some pages: numbers, or addresses of a QEMU's."""
    some = np.unique(pages)[:_EXAMPLES].tolist()
    names = [f"{page:#x}" if page >= run.n_pages else f"{page:,}" for page in some]
    return ", ".join(names) + (", ..." if len(np.unique(pages)) > len(some) else "")
