"""The walk through the states of a migration: where each side was, how long, and whether legal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from migkit.analysis import schema
from migkit.migration.states import is_known

if TYPE_CHECKING:
    from collections.abc import Mapping

    from migkit.trace.simpletrace import Trace


def states_frame(traces: Mapping[str, Trace], origin_ns: int) -> pd.DataFrame:
    """Return the states that each side went through, in order; ``schema.describe("states")``.

    A transition is legal if it is in the engine's own table, or in QEMU's wider one. A trace that
    begins in the middle has an unknown first state, from which anything is legal.
    """
    rows = []
    for side, trace in traces.items():
        walk = np.sort(trace["migrate_set_state"], order=("ts_ns", "seq"))
        times = [*walk["ts_ns"].tolist(), trace.span_ns[1]]
        old = "none" if len(walk) and walk["new_state"][0] == "setup" else ""
        for i, new in enumerate(walk["new_state"].tolist()):
            fits = not old or is_known(side, old, new)
            rows.append((times[i], side, old, new, max(times[i + 1] - times[i], 0) / 1e6, fits))
            old = new
    rows.sort(key=lambda row: row[0])
    ts = np.array([row[0] for row in rows], np.int64)
    return schema.frame(
        "states",
        {
            "ts_ns": ts,
            "time_s": (ts - origin_ns) / 1e9,
            "side": [row[1] for row in rows],
            "old_state": [row[2] for row in rows],
            "new_state": [row[3] for row in rows],
            "duration_ms": [row[4] for row in rows],
            "legal": [row[5] for row in rows],
        },
    )
