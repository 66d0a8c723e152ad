"""The history of one page: every event of both sides that is about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migkit.analysis.events import events_frame
from migkit.errors import OptionError
from migkit.trace.simpletrace import Trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt
    import pandas as pd

    from migkit.analysis.faults import Guest

# The argument that says which page: in bytes of the RAM block, in pages, or as an address of the
# destination; and the one that says how much, in the same unit.
_BYTES, _PAGES, _ADDRESS = "bytes", "pages", "address"
_FIELDS = {
    "ram_save_range": ("offset", "len", _BYTES),
    "ram_load_range": ("offset", "len", _BYTES),
    "ram_discard_range": ("start", "len", _BYTES),
    "postcopy_discard_send_range": ("start", "length", _PAGES),
    "migrate_handle_rp_req_pages": ("start", "len", _BYTES),
    "ram_save_queue_pages": ("start", "len", _BYTES),
    "get_queued_page": ("tmp_offset", "", _BYTES),
    "get_queued_page_not_dirty": ("tmp_offset", "", _BYTES),
    "postcopy_preempt_send_host_page": ("offset", "", _PAGES),
    "ram_load_postcopy_loop": ("addr", "", _BYTES),
    "postcopy_ram_fault_thread_request": ("offset", "", _BYTES),
    "postcopy_page_req_add": ("addr", "", _ADDRESS),
    "postcopy_page_req_del": ("addr", "", _ADDRESS),
    "postcopy_place_page": ("host_addr", "", _ADDRESS),
    "postcopy_place_page_zero": ("host_addr", "", _ADDRESS),
    "postcopy_request_received": ("offset", "", _BYTES),
    "postcopy_request_placed": ("offset", "", _BYTES),
    "postcopy_fault_local": ("offset", "", _BYTES),
}

_BLOCK_FIELDS = frozenset({"rbname", "ramblock", "block_name", "str"})
_SAME_BLOCK = "(null)"  # QEMU's rbname of a request for a page of the same block as the last


def page_frame(traces: Mapping[str, Trace], page: int, guest: Guest) -> pd.DataFrame:
    """Return all events about a host page, by time; columns: ``schema.describe("events")``.

    Raises OptionError for a page outside the guest's RAM block.
    """
    n_pages = guest.n_bytes // guest.page_size
    if not 0 <= page < n_pages:
        raise OptionError(f"page {page}: the guest has the pages 0 to {n_pages - 1}")
    chosen = {}
    for side, trace in traces.items():
        events = {
            name: trace.events[name][_about(name, trace.events[name], page, guest)]
            for name in trace.events
            if name in _FIELDS
        }
        chosen[side] = Trace(
            trace.registry, {name: rows for name, rows in events.items() if len(rows)}
        )
    return events_frame(chosen)


def _about(name: str, rows: npt.NDArray[np.void], page: int, guest: Guest) -> npt.NDArray[np.bool_]:
    """Return which records of an event are about a page."""
    field, length, unit = _FIELDS[name]
    scale = 1 if unit == _PAGES else guest.page_size
    first = rows[field].astype(np.int64) - (guest.address if unit == _ADDRESS else 0)
    size = rows[length].astype(np.int64) if length else np.full(len(rows), scale)
    found: npt.NDArray[np.bool_] = (first < (page + 1) * scale) & (first + size > page * scale)
    for block in _BLOCK_FIELDS.intersection(rows.dtype.names or ()):
        found &= np.isin(rows[block], [guest.block, _SAME_BLOCK])
    return found
