"""Comparing runs: the same figures of each, their ratios, and how sure one can be of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from migkit.analysis import schema
from migkit.analysis.faults import STAGE_EVENTS
from migkit.analysis.latency import waited
from migkit.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    import pandas as pd
    from matplotlib.figure import Figure

    from migkit.analysis.run import Run

_DRAWS = 4000
_CONFIDENCE = (2.5, 97.5)
_CELL = ["value", "ratio", "low", "high"]
_QUANTILES = {"fault latency p50": 0.5, "fault latency p90": 0.9, "fault latency p99": 0.99}


@dataclass(frozen=True)
class Group:
    """Runs under one name: one run, or repetitions of it."""

    name: str
    runs: tuple[Run, ...]
    latency_us: npt.NDArray[np.float64] = field(repr=False)
    """Latencies of the faults that waited for the source, of all its runs, ascending."""

    @classmethod
    def of(cls, name: str, runs: Run | Sequence[Run]) -> Group:
        """Make a group of a run, or of several; OptionError without any."""
        some = tuple(runs) if isinstance(runs, Sequence) else (runs,)
        if not some:
            raise OptionError(f"compare: {name} has no runs")
        parts = [waited(run.faults, ["latency_us"])["latency_us"] for run in some]
        return cls(name, some, np.sort(np.concatenate(parts)).astype(np.float64))


@dataclass(frozen=True)
class Comparison:
    """Groups of runs side by side: ``frame``, and ``plot()``."""

    groups: tuple[Group, ...]
    frame: pd.DataFrame = field(repr=False)
    """``schema.describe("comparison")``: one row a figure and group."""

    def plot(self) -> Figure:
        """Draw the ratios with their intervals, and the distributions of latency."""
        from migkit.view.compare import plot_comparison  # noqa: PLC0415 — matplotlib on demand

        return plot_comparison(self)

    def __str__(self) -> str:
        """Return a table for a terminal."""
        rows = {
            f"{figure}, {unit}": [_cell(*cell) for cell in some[_CELL].to_numpy()]
            for (figure, unit), some in self.frame.groupby(["figure", "unit"], sort=False)
        }
        columns = [[group.name, *cells] for group, cells in
                   zip(self.groups, zip(*rows.values(), strict=True), strict=True)]  # fmt: skip
        widths = [max(len(cell) for cell in column) for column in columns]
        first = max(len(name) for name in rows)
        lines = []
        for name, *cells in zip(["", *rows], *columns, strict=True):
            texts = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
            lines.append("  ".join([f"{name:<{first}}", *texts]))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return str(self.frame.to_html())


def compare(*runs: Run | Sequence[Run], names: Sequence[str] | None = None) -> Comparison:
    """Line runs of any engine up; the first is what the others are measured by.

    Each argument is a run, or a list of repetitions, which are taken together. ``names`` are
    what they are called, by default their folders'. Intervals are bootstrap 95 % intervals of
    the ratio: of latencies over the faults, of other figures over repetitions, where a group has
    at least two in both.

    Raises OptionError for fewer than two arguments, or for names that do not fit.
    """
    if len(runs) < 2:
        raise OptionError(f"compare wants two runs at least, got {len(runs)}")
    chosen = list(names) if names is not None else _names(runs)
    if len(chosen) != len(runs) or len(set(chosen)) != len(chosen):
        raise OptionError(f"names {chosen}: expected {len(runs)} different ones, one for each run")
    groups = tuple(Group.of(name, some) for name, some in zip(chosen, runs, strict=True))
    random = np.random.default_rng(1)  # the same intervals every time
    rows: list[tuple[object, ...]] = []
    for name, unit, read in _FIGURES:
        values = [np.array([_known(read(run)) for run in group.runs]) for group in groups]
        draws = [_means(some[~np.isnan(some)], random) for some in values]
        rows += _rows(name, unit, groups, [_mean(some) for some in values], draws)
    for name, quantile in _QUANTILES.items():
        points = [_quantile(group.latency_us, quantile) for group in groups]
        draws = [_quantiles(group.latency_us, quantile, random) for group in groups]
        rows += _rows(name, "us", groups, points, draws)
    columns = list(schema.table("comparison").columns)
    frame = schema.frame("comparison", {c: [row[i] for row in rows] for i, c in enumerate(columns)})
    return Comparison(groups, frame)


def _names(runs: Sequence[Run | Sequence[Run]]) -> list[str]:
    """Name groups by their first run; the same name twice gets a number."""
    names: list[str] = []
    for number, some in enumerate(runs, 1):
        first = next(iter(some), None) if isinstance(some, Sequence) else some
        name = _name(first) if first is not None else f"run {number}"
        names.append(f"{name} ({number})" if name in names else name)
    return names


def _name(run: Run) -> str:
    """Return a run's name: a sample's, or its folder's."""
    if sample := run.meta.get("sample"):
        return str(sample["name"])
    return run.path.resolve().name if run.path.is_dir() else run.path.resolve().parent.name


def _source_ms(run: Run, *phases: str) -> float | None:
    mine = run.phases[run.phases["side"] == "source"]
    if phases:
        mine = mine[mine["name"].isin(phases)]
    return float(mine["duration_ms"].sum()) if len(mine) else None


def _blocktime_ms(run: Run) -> float | None:
    if STAGE_EVENTS["read"] not in run.recorded:
        return None
    whole = run.blocktime.loc[run.blocktime["who"] == "all at once", "blocktime_ms"]
    return float(whole.iloc[0]) if len(whole) else None


def _waiting_faults(run: Run) -> float | None:
    known = STAGE_EVENTS["read"] in run.recorded
    return float(len(waited(run.faults, ["latency_us"]))) if known else None


_FIGURES: tuple[tuple[str, str, Callable[[Run], float | None]], ...] = (
    ("total time", "ms", _source_ms),
    ("post-copy", "ms", lambda run: _source_ms(run, "post-copy", "completion")),
    ("downtime", "ms", lambda run: run.downtime.attrs["total_ms"]),
    ("blocktime", "ms", _blocktime_ms),
    ("faults that waited", "faults", _waiting_faults),
)


def _rows(
    name: str, unit: str, groups: Sequence[Group], points: Sequence[float],
    draws: Sequence[npt.NDArray[np.float64]],
) -> list[tuple[object, ...]]:  # fmt: skip
    """Return a row a group: its value, its ratio to the first, and the ratio's interval."""
    rows: list[tuple[object, ...]] = []
    for number, (group, point, some) in enumerate(zip(groups, points, draws, strict=True)):
        low = high = np.nan
        ratio = 1.0 if not number else point / points[0] if points[0] else np.nan
        if number and len(some) and len(draws[0]):
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = some / draws[0]
            if np.isfinite(ratios).all():
                low, high = np.percentile(ratios, _CONFIDENCE)
        rows.append((name, unit, group.name, len(group.runs), point, ratio, low, high))
    return rows


def _known(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _mean(values: npt.NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def _means(values: npt.NDArray[np.float64], random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return bootstrap means of repetitions; none of a single value, whose spread is unknown."""
    if len(values) < 2:
        return np.zeros(0)
    drawn = random.integers(0, len(values), (_DRAWS, len(values)))
    means: npt.NDArray[np.float64] = values[drawn].mean(axis=1)
    return means


def _quantile(ordered: npt.NDArray[np.float64], q: float) -> float:
    return float(np.quantile(ordered, q)) if len(ordered) else np.nan


def _quantiles(
    ordered: npt.NDArray[np.float64], q: float, random: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Return bootstrap quantiles of ordered values, without drawing all of them each time.

    The k-th smallest of n draws from n values is the value at n times the k-th smallest of n
    uniform numbers, which has the distribution Beta(k, n + 1 - k).
    """
    n = len(ordered)
    if n < 2:
        return np.zeros(0)
    k = min(int(q * n) + 1, n)
    places = (random.beta(k, n + 1 - k, _DRAWS) * n).astype(np.int64)
    drawn: npt.NDArray[np.float64] = ordered[np.minimum(places, n - 1)]
    return drawn


def _cell(value: float, ratio: float, low: float, high: float) -> str:
    if np.isnan(value):
        return "unknown"
    text = f"{value:,.1f}"
    if np.isnan(ratio) or ratio == 1.0:
        return text
    interval = "" if np.isnan(low) else f" ({low:.2f}-{high:.2f})"
    return f"{text}  x{ratio:.2f}{interval}"
