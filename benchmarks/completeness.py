"""Whether the probe misses anything: its faults against userfaultfd's, and every stage of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import placement
from benchmarks.faults import PAGES
from benchmarks.guest import IDLE, PAGE, Ours
from benchmarks.result import Row, not_measured
from migkit.probe import Probe, Watch, available
from migkit.trace import simpletrace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.result import Scale
    from migkit.probe import ProbeResult

# The stages of a page that is requested, and which event's timestamp says so on which side.
_EVENTS = {
    "read": ("destination", "postcopy_ram_fault_thread_request"),
    "requested": ("destination", "postcopy_page_req_add"),
    "received_by_source": ("source", "migrate_handle_rp_req_pages"),
    "sent": ("source", "postcopy_preempt_send_host_page"),
    "received": ("destination", "postcopy_request_received"),
    "placed": ("destination", "postcopy_request_placed"),
}
_ORDER = ("fault", "blocked", *_EVENTS, "woken", "running")
_FIELDS = {
    "postcopy_page_req_add": "addr",
    "migrate_handle_rp_req_pages": "start",
}


def measure(scale: Scale) -> Iterator[Row]:
    """Take faults with the probe attached; every page faults at most once here."""
    probe_here = available()
    if not probe_here.ok:
        yield not_measured("pages: probe / userfaultfd", f"no probe: {probe_here}", 1.0)
        return
    where = placement.TWO
    with Ours(PAGES, where, **IDLE) as ours, placement.aside(where):
        guest = ours.hold().guest
        address = guest.info.address
        with Probe([Watch(guest.pid, address, guest.ram.size)]) as probe:
            for _ in scale.progress(scale.chunks, "completeness"):
                ours.touch(1000)
            seen = probe.stop()
        run = ours.session.record()
        traces = {side: simpletrace.read(run.trace(side)) for side in ("source", "destination")}
    yield from _rows(where.name, seen, _stage_times(traces, address), address)


def _stage_times(traces: dict[str, simpletrace.Trace], address: int) -> dict[str, np.ndarray]:
    """Return per stage the time of every page, 0 where there is none."""
    times = {}
    for stage, (side, event) in _EVENTS.items():
        records = traces[side][event]
        at = records[_FIELDS.get(event, "offset")].astype(np.int64)
        if stage == "requested":
            at -= address
        pages = at if stage == "sent" else at // PAGE
        times[stage] = np.zeros(PAGES, np.int64)
        times[stage][pages] = records["ts_ns"].astype(np.int64)
    return times


def _rows(
    where: str, seen: ProbeResult, times: dict[str, np.ndarray], address: int
) -> Iterator[Row]:
    records = seen.records
    pages = (records["address"].astype(np.int64) - address) // PAGE
    reported = np.flatnonzero(times["read"])
    caught = np.isin(reported, pages).mean()
    counts: dict[str, Any] = {"faults": len(records), "reported_pages": len(reported)}
    yield Row(
        "pages: probe / userfaultfd", where, float(caught), 1.0, "", at_least=True,
        ours=f"{len(np.unique(pages))} pages", floor=f"{len(reported)} pages", samples=counts,
    )  # fmt: skip
    yield Row("records lost by the probe", where, float(seen.lost), 0.0)
    for stage in ("fault", "blocked", "woken", "running"):
        times[stage] = np.zeros(PAGES, np.int64)
        times[stage][pages] = records[f"{stage}_ns"].astype(np.int64)
    slept = np.flatnonzero(times["blocked"])
    table = np.array([times[stage][slept] for stage in _ORDER])
    # These are stamped after a system call whose effect another CPU may have seen already.
    for cause, effect in (("requested", "received_by_source"), ("sent", "received")):
        row = _ORDER.index(cause)
        table[row] = np.minimum(table[row], table[_ORDER.index(effect)])
    placed, woken = _ORDER.index("placed"), _ORDER.index("woken")
    table[placed] = np.minimum(table[placed], table[woken])
    good = (table > 0).all(axis=0) & (np.diff(table, axis=0) >= 0).all(axis=0)
    yield Row(
        "stages complete and in order", where, float(good.mean()) * 100, 99.5, "%", at_least=True,
        ours=f"{int(good.sum())} of {len(slept)}",
    )  # fmt: skip
