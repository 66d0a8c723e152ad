"""The rounds of pre-copy: whether each leaves less to send than the one before, and how fast."""

from __future__ import annotations

import numpy as np
import pandas as pd

from migkit.analysis import schema

_MIB = 1 << 20


def rounds_frame(phases: pd.DataFrame) -> pd.DataFrame:
    """Return the rounds of pre-copy, from the phases; ``schema.describe("rounds")``."""
    mine = phases[(phases["side"] == "source")].reset_index(drop=True)
    is_round = mine["name"].str.startswith("precopy round").to_numpy(np.bool_)
    rounds = mine[is_round]
    # What a round left dirty is what the next phase began with: the next round, or a last scan.
    left = mine["dirty_pages"].shift(-1)[is_round].astype("Int64")
    seconds = rounds["duration_ms"].replace(0.0, np.nan) / 1e3
    begun = rounds["dirty_pages"].astype("Float64").mask(rounds["dirty_pages"] == 0)
    return schema.frame(
        "rounds",
        {
            "round": rounds["name"].str.rsplit(n=1).str[-1].astype("int64"),
            "start_ns": rounds["start_ns"],
            "duration_ms": rounds["duration_ms"],
            "dirty_pages": rounds["dirty_pages"],
            "pages": rounds["pages"],
            "bytes": rounds["bytes"],
            "mib_s": (rounds["bytes"].astype("Float64") / _MIB / seconds).astype("float64"),
            "left_pages": left,
            "left_share": (left.astype("Float64") / begun).astype("float64"),
        },
    )
