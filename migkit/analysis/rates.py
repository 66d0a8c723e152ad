"""How fast the guests ran and pages came, between one sample and the next."""

from __future__ import annotations

import numpy as np
import pandas as pd

_MIB = 1 << 20

KINDS = ("precopy", "background", "requested")
"""How a page may have come."""


def rates_frame(
    samples: pd.DataFrame, page_size: int, answered_ns: pd.Series | None = None
) -> pd.DataFrame:
    """Return a row per interval between two samples, all columns float64.

    ``time_s`` (the middle of the interval), ``source_steps_s`` and ``destination_steps_s`` (steps
    a second; NaN while that guest does not run), and ``precopy_mib_s``, ``background_mib_s`` and
    ``requested_mib_s`` (what came at the destination, as MiB of guest RAM a second).

    ``answered_ns`` are the times at which requested pages were placed. The engine counts those
    pages when no fault waits, often not before all have come: its counter is right at the end,
    but says little of when, and is used only if no times are given.
    """
    samples = samples.drop_duplicates("ts_ns")
    seconds = samples["ts_ns"].diff().to_numpy() / 1e9
    source, destination = (samples[f"{side}_step"] for side in ("source", "destination"))
    # The destination guest goes on counting where the source guest stopped; what the source did
    # in the interval of the switchover is not its.
    began = destination.where(destination > 0, source.max())
    gone_on = destination.gt(0).to_numpy()
    rates = {
        "time_s": samples["time_s"].rolling(2).mean().to_numpy(),
        "source_steps_s": np.where(_moving(source), source.diff() / seconds, np.nan),
        "destination_steps_s": np.where(gone_on, began.diff() / seconds, np.nan),
    }
    for kind in KINDS:
        pages = samples[f"destination_{kind}_pages"].diff().to_numpy()
        rates[f"{kind}_mib_s"] = pages * page_size / _MIB / seconds
    if answered_ns is not None and len(answered_ns) and len(samples) > 1:
        counts, _ = np.histogram(answered_ns.astype("int64"), samples["ts_ns"])
        pages = np.concatenate([[np.nan], counts])
        rates["requested_mib_s"] = pages * page_size / _MIB / seconds
    return pd.DataFrame(rates).iloc[1:].reset_index(drop=True).astype("float64")


def _moving(steps: pd.Series) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return where a counter is still to change, from its first change on."""
    values = steps.to_numpy()
    if not len(values):
        return np.zeros(0, np.bool_)
    before = np.concatenate([values[:1], values[:-1]])
    moving: np.ndarray[tuple[int], np.dtype[np.bool_]]
    moving = (before < values[-1]) & (values > values[0])
    return moving
