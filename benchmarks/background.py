"""Fault latency while the background transfer runs as fast as it can; whole migrations in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import floor, placement
from benchmarks.guest import HIT_US, Ours
from benchmarks.result import Pairs

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from benchmarks.result import Row, Scale

PAGES = 65536


def measure(scale: Scale) -> Iterator[Row]:
    """Compare ours with the floor on both placements, faults of the background alone."""
    for where in (placement.ONE, placement.TWO):
        pairs = Pairs()
        for _ in scale.progress(scale.runs, f"background, {where.name}"):
            pairs.ours.append(_faults(_ours(where)))
            pairs.floor.append(_faults(floor.background(PAGES, where)))
        yield pairs.row("fault latency, background", where.name, 50, 1.5)
        yield pairs.row("fault latency, background", where.name, 99, float("inf"))


def _ours(where: placement.Placement) -> np.ndarray:
    """Migrate a guest that touches all its pages; return the latencies of all touches."""
    with Ours(PAGES, where, eager=True) as ours:
        ours.finish()
        ours.guest.vcpu.stop()
        return ours.latencies(0, PAGES)


def _faults(latency_us: np.ndarray) -> np.ndarray:
    """Keep the touches that waited: the others found their page there."""
    return latency_us[latency_us > HIT_US]
