"""The requests for missing pages: which were for nothing, and which the rate limiter held up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from migkit.analysis import schema
from migkit.analysis.blocktime import union
from migkit.analysis.outages import overlap_us

if TYPE_CHECKING:
    from migkit.analysis.join import Ints
    from migkit.trace.simpletrace import Trace

STALL_US = 5000.0
"""A request that was not answered for so long while the source was limited has stalled."""

_SAME_WAIT_NS = 200_000
"""A limiter that waits again after so short a time has sent next to nothing in between."""

_COLUMNS = ["ts_ns", "time_s", "block", "page", "tid", "resolution", "outage_us", "requested_ns",
            "received_by_source_ns", "sent_ns", "received_ns", "placed_ns"]  # fmt: skip


def requests_frame(faults: pd.DataFrame, source: Trace) -> pd.DataFrame:
    """Return the requests, one row each; ``schema.describe("requests")``.

    Two threads that wait for one page are one request. Limited means that the source waited in
    its rate limiter, or spun in it, when it had the request and had not sent the page: a source
    that answers past its limiter is not held up by it.
    """
    asked = faults.loc[faults["requested_ns"].notna(), _COLUMNS]
    asked = asked.sort_values("requested_ns", kind="stable")
    one = ["block", "page", "requested_ns"]
    again = asked.duplicated(one, keep=False)
    threads = pd.Series(1, asked.index)
    threads[again] = asked[again].groupby(one, sort=False)["tid"].transform("nunique")
    asked = asked.assign(threads=threads)[~asked.duplicated(one)]
    begin = asked["requested_ns"].to_numpy(np.int64)
    heard = asked["received_by_source_ns"].fillna(asked["requested_ns"]).to_numpy(np.int64)
    end = asked["sent_ns"].fillna(asked["received_ns"]).fillna(asked["placed_ns"])
    # Of a page under way the source has nothing left to do.
    served = end.mask(asked["resolution"] == "in_flight").fillna(0).to_numpy(np.int64)
    limited = overlap_us(heard, served, limited_spans(source))
    wait_us = (asked["placed_ns"] - asked["requested_ns"]).astype("Float64") / 1e3
    return schema.frame(
        "requests",
        {
            "ts_ns": begin,
            "time_s": asked["time_s"].to_numpy() + (begin - asked["ts_ns"].to_numpy()) / 1e9,
            "block": asked["block"],
            "page": asked["page"],
            "threads": asked["threads"],
            "wasted": (asked["resolution"] == "in_flight")
            .astype("boolean")
            .mask(asked["resolution"].isna()),
            "answered": asked["placed_ns"].notna().astype("boolean"),
            "wait_us": wait_us.astype("float64"),
            "limited_us": limited,
            "stalled": pd.array(limited >= STALL_US, "boolean"),
            "outage_us": asked["outage_us"],
        },
    )


def limited_spans(source: Trace) -> Ints:
    """Return when the source's rate limiter let nothing pass, (n, 2) int64, ns, by time."""
    begin = np.sort(source["migration_rate_limit_pre"]["ts_ns"].astype(np.int64))
    end = np.sort(source["migration_rate_limit_post"]["ts_ns"].astype(np.int64))
    if not len(begin) or not len(end):
        return np.zeros((0, 2), np.int64)
    after = np.searchsorted(end, begin, "left")
    begin, after = begin[after < len(end)], after[after < len(end)]
    merged = union(begin, end[after] + _SAME_WAIT_NS)
    merged[:, 1] -= _SAME_WAIT_NS
    return merged
