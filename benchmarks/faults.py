"""Fault latency when nothing else moves: one fault at a time, random pages, no background."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import placement
from benchmarks.floor import FaultFloor
from benchmarks.guest import IDLE, Ours
from benchmarks.result import Pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

    from benchmarks.result import Row, Scale

PAGES = 65536
TOUCHES = 500  # a chunk: some tens of ms, so that both sides of a pair see the same machine


def measure(scale: Scale) -> Iterator[Row]:
    """Compare ours with the floor on both placements."""
    for where in (placement.ONE, placement.TWO):
        with Ours(PAGES, where, **IDLE) as ours, FaultFloor(PAGES, where) as floor:
            pairs = interleave(ours.hold().touch, floor.touch, where, scale.chunks)
        yield pairs.row("fault latency, idle", where.name, 50, 1.3)
        yield pairs.row("fault latency, idle", where.name, 99, 1.6)


def interleave(
    ours: Callable[[int], np.ndarray],
    floor: Callable[[int], np.ndarray],
    where: placement.Placement,
    count: int,
) -> Pairs:
    """Take chunks of both sides in turn, each side first in every other pair."""
    pairs = Pairs()
    with placement.aside(where):
        ours(TOUCHES)
        floor(TOUCHES)
        for number in range(count):
            turns = [(pairs.ours, ours), (pairs.floor, floor)]
            for chunks, touch in turns if number % 2 else reversed(turns):
                chunks.append(touch(TOUCHES))
    return pairs
