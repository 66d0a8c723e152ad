"""What makes a fault slow: its stages' shares of the latency, at the median and in the tail."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from migkit.analysis import schema
from migkit.analysis.schema import STAGES

DURATIONS = tuple(f"{stage}_us" for stage in STAGES[1:])
QUANTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}

# The stages at a quantile are the mean of this share of all faults around it, five at least.
_NEIGHBOURHOOD = 0.01
_LEAST_NEIGHBOURS = 5


def waited(faults: pd.DataFrame, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the faults that waited for a page from the source and got it, by latency.

    Without the source's trace it is not known whether a page was requested or in flight already:
    those are among them.

    ``columns`` are those wanted; of a million faults, all of them take a second.
    """
    remote = faults["resolution"].isin(["requested", "in_flight"])
    remote |= faults["resolution"].isna() & faults["read_ns"].notna()
    rows = np.flatnonzero(remote & faults["latency_us"].notna())
    order = np.argsort(faults["latency_us"].to_numpy()[rows], kind="stable")
    chosen = faults if columns is None else faults[list(columns)]
    return chosen.iloc[rows[order]]


def latency_quantiles(faults: pd.DataFrame) -> pd.DataFrame:
    """Return how long faults took, a row for each way in which they were resolved, and ``all``.

    Index ``resolution``; columns ``count`` (int64), ``mean_us``, ``p50_us``, ``p90_us``,
    ``p99_us``, ``max_us`` (float64, NaN where no latency is known).
    """
    rows = {}
    groups = {str(name): faults[faults["resolution"] == name] for name in _present(faults)}
    everything = faults[faults["resolution"] != "minor"]
    for name, group in {**groups, "all": everything}.items():
        latency = group["latency_us"].dropna()
        rows[name] = {
            "count": len(group),
            "mean_us": latency.mean(),
            **{f"{key}_us": latency.quantile(q) for key, q in QUANTILES.items()},
            "max_us": latency.max(),
        }
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("resolution")
    return frame.astype({column: "int64" if column == "count" else "float64" for column in frame})


def stage_breakdown(faults: pd.DataFrame) -> pd.DataFrame:
    """Return what the latency consists of, over the faults that the source answered.

    Index ``at``: ``mean``, ``p50``, ``p90``, ``p99``; columns: ``<stage>_us`` (float64, a stage
    that no fault has is NaN) and ``latency_us``, their sum. At a quantile the stages are the mean
    over its neighbourhood, 1 % of all faults, since a single fault's would be chance.
    """
    steps = waited(faults, DURATIONS)
    absent = steps.columns[steps.isna().all()]
    rows = {"mean": steps.fillna(0.0).mean()}
    for key, quantile in QUANTILES.items():
        rows[key] = steps.iloc[_around(len(steps), quantile)].fillna(0.0).mean()
    frame = pd.DataFrame(rows).T.rename_axis("at")
    frame["latency_us"] = frame.sum(axis=1)
    frame[absent] = np.nan
    return frame


def critical_path(faults: pd.DataFrame) -> pd.DataFrame:
    """Return which stage dominates where; ``schema.describe("critical_path")``."""
    parts = stage_breakdown(faults)
    rows = []
    for at, row in parts.iterrows():
        steps = row[list(DURATIONS)].dropna().sort_values(ascending=False, kind="stable")
        steps = steps[steps > 0]
        if steps.empty:
            continue
        names = [str(name).removesuffix("_us") for name in steps.index] + ["", ""]
        times = [*steps.tolist(), float("nan"), float("nan")]
        whole = float(row["latency_us"])
        rows.append((str(at), whole, names[0], times[0], times[0] / whole, names[1], times[1]))
    columns = list(schema.table("critical_path").columns)
    return schema.frame(
        "critical_path", {c: [row[i] for row in rows] for i, c in enumerate(columns)}
    )


def _present(faults: pd.DataFrame) -> list[str]:
    return [str(name) for name in faults["resolution"].cat.categories
            if (faults["resolution"] == name).any()]  # fmt: skip


def _around(count: int, quantile: float) -> slice:
    """Return the places of a quantile's neighbourhood among ``count`` sorted values."""
    half = max(_LEAST_NEIGHBOURS, round(count * _NEIGHBOURHOOD)) // 2
    middle = round(quantile * (count - 1))
    begin = max(0, min(middle - half, count - 2 * half - 1))
    return slice(begin, begin + 2 * half + 1)
