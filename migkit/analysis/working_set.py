"""The guest's working set over time: what it writes in pre-copy, what it misses in post-copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from migkit.analysis import schema
from migkit.analysis.scans import scans

if TYPE_CHECKING:
    from migkit.trace.simpletrace import Trace

_BINS = 50


def working_set_frame(
    source: Trace, faults: pd.DataFrame, page_size: int, origin_ns: int
) -> pd.DataFrame:
    """Return the working set over time; ``schema.describe("working_set")``.

    In pre-copy a row is a scan for dirty pages, in post-copy one of 50 equal spans of time. In
    post-copy only what was missing is seen: pages that came before the guest touched them are
    not in it (with the eBPF probe they are, as minor faults).
    """
    end, dirty = scans(source, of_qemu="ram_save_round" in source.derived)
    begin = np.concatenate([end[:1], end[:-1]])
    # The first scan finds all of RAM: nobody wrote that since a scan before it.
    begin, end, dirty = begin[1:], end[1:], dirty[1:]
    parts = [_rows("written", begin, end, dirty, np.full(len(end), -1))]
    if len(faults):
        parts.append(_missed(faults))
    rows = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    span_s = (rows["end"] - rows["start"]) / 1e9
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(span_s > 0, rows["pages"] / span_s, np.nan)
    kinds = schema.table("working_set").columns["kind"].choices
    return schema.frame(
        "working_set",
        {
            "kind": [kinds[code] for code in rows["kind"]],
            "start_ns": rows["start"],
            "end_ns": rows["end"],
            "time_s": (rows["end"] - origin_ns) / 1e9,
            "pages": rows["pages"],
            "bytes": rows["pages"] * page_size,
            "pages_s": rate,
            "total_pages": pd.arrays.IntegerArray(rows["total"], rows["total"] < 0),
        },
    )


def _missed(faults: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return the pages that the guest touched first, in equal spans of post-copy."""
    first = faults.groupby(["block", "page"], sort=False)["ts_ns"].min().to_numpy(np.int64)
    edges = np.linspace(first.min(), first.max() + 1, _BINS + 1).astype(np.int64)
    pages, _ = np.histogram(first, edges)
    pages = pages.astype(np.int64)
    return _rows("touched", edges[:-1], edges[1:], pages, np.cumsum(pages))


def _rows(
    kind: str, start: np.ndarray, end: np.ndarray, pages: np.ndarray, total: np.ndarray
) -> dict[str, np.ndarray]:
    code = schema.table("working_set").columns["kind"].choices.index(kind)
    return {"kind": np.full(len(start), code), "start": start, "end": end, "pages": pages,
            "total": total}  # fmt: skip
