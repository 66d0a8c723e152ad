"""What a subject reports, and the statistics behind it."""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_RESAMPLES = 2000


class Scale(enum.Enum):
    """How much is measured: pairs of chunks, pairs of whole runs, runs of a large guest."""

    QUICK = (10, 3, 1)
    FULL = (40, 12, 5)

    def __init__(self, chunks: int, runs: int, large_runs: int) -> None:
        self.chunks = chunks
        self.runs = runs
        self.large_runs = large_runs

    def progress(self, count: int, what: str) -> Iterable[int]:
        """Count up to ``count`` and show it on stderr."""
        return tqdm(range(count), desc=what, file=sys.stderr, leave=False)


@dataclass
class Row:
    """One line of the table; ``value`` is what the bound is about, ``interval`` its 95 %."""

    figure: str
    placement: str
    value: float
    bound: float
    unit: str = ""
    interval: tuple[float, float] | None = None
    ours: str = ""
    floor: str = ""
    at_least: bool = False
    samples: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the value, not its interval, keeps the bound."""
        return bool(self.value >= self.bound if self.at_least else self.value <= self.bound)


def not_measured(figure: str, why: str, bound: float, unit: str = "") -> Row:
    """Return the line of a figure that this machine cannot show, with the reason."""
    return Row(figure, "", float("nan"), bound, unit, ours=why)


@dataclass
class Pairs:
    """Latencies in us of both sides, chunk by chunk, each pair taken one after the other."""

    ours: list[np.ndarray] = field(default_factory=list)
    floor: list[np.ndarray] = field(default_factory=list)

    def percentiles(self, q: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the percentile of every chunk, ours and the floor's."""
        return tuple(
            np.array([np.percentile(c, q) for c in side]) for side in (self.ours, self.floor)
        )

    def row(self, figure: str, placement: str, q: float, bound: float) -> Row:
        """Compare a percentile of both sides, pair by pair."""
        ours, floor = self.percentiles(q)
        value, interval = median_ratio(ours, floor)
        return Row(
            f"{figure} p{q:g}", placement, value, bound, "x", interval,
            ours=f"{np.median(ours):.1f} us", floor=f"{np.median(floor):.1f} us",
            samples={
                "ours_us": ours.tolist(), "floor_us": floor.tolist(),
                "ours_ns": _nanoseconds(self.ours), "floor_ns": _nanoseconds(self.floor),
            },
        )  # fmt: skip


def _nanoseconds(chunks: list[np.ndarray]) -> list[list[int]]:
    return [np.rint(chunk * 1e3).astype(int).tolist() for chunk in chunks]


def median_ratio(
    ours: Sequence[float] | np.ndarray, floor: Sequence[float] | np.ndarray
) -> tuple[float, tuple[float, float]]:
    """Return the median of the pairs' ratios and its bootstrap 95 % interval."""
    ratios = np.asarray(ours, float) / np.asarray(floor, float)
    return float(np.median(ratios)), bootstrap(ratios)


def bootstrap(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the median, by resampling; always with the same draws."""
    values = np.asarray(values, float)
    draws = np.random.default_rng(1).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[draws], axis=1), [2.5, 97.5])
    return float(low), float(high)
