"""Bulk transfer: bytes a second of post-copy's background when no page is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks import floor, placement
from benchmarks.guest import PAGE, Ours
from benchmarks.result import Row, median_ratio
from migkit.migration.states import Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.result import Scale

PAGES = 131072


def measure(scale: Scale) -> Iterator[Row]:
    """Compare ours with the floor on both placements."""
    for where in (placement.ONE, placement.TWO):
        rates: dict[str, list[float]] = {"ours": [], "floor": []}
        for _ in scale.progress(scale.runs, f"bulk, {where.name}"):
            rates["ours"].append(PAGES * PAGE / _ours(where))
            rates["floor"].append(PAGES * PAGE / floor.bulk(PAGES, where))
        value, interval = median_ratio(rates["ours"], rates["floor"])
        medians = {side: f"{np.median(rate) / 1e9:.2f} GB/s" for side, rate in rates.items()}
        yield Row(
            "bulk transfer", where.name, value, 0.8, "x", interval, **medians, at_least=True,
            samples={f"{side}_bytes_per_s": rate for side, rate in rates.items()},
        )  # fmt: skip


def _ours(where: placement.Placement) -> float:
    """Migrate a guest that touches nothing; return the seconds from post-copy to SHUT."""
    with Ours(PAGES, where) as ours:
        ours.finish()
        begun, ended = map(ours.status_ns, (Status.POSTCOPY_ACTIVE, Status.COMPLETED))
    return (ended - begun) / 1e9
