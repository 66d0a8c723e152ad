"""Discards: the destination throws away what it has in a version that is old."""

from __future__ import annotations

import numpy as np

from migkit.migration import wire
from migkit.migration.framing import runs_of
from migkit.migration.stats import Counter
from migkit.migration.supply import PageSupply


def discard_stale(supply: PageSupply) -> tuple[int, int]:
    """Have stale pages thrown away; return how many pages those are, and by how many commands."""
    ram, trace = supply.ram, supply.trace
    size, name = ram.page_size, ram.name
    stale = supply.stale()
    runs = runs_of(np.flatnonzero(stale))
    supply.at_destination &= ~stale
    supply.discarded |= stale
    commands: list[bytes] = []
    for at in range(0, len(runs), wire.MAX_DISCARDS):
        some = [(first * size, count * size) for first, count in runs[at : at + wire.MAX_DISCARDS]]
        trace.qemu_savevm_send_postcopy_ram_discard(name, 16 * len(some) + 3 + len(name))
        for start, length in some:
            trace.postcopy_discard_send_range(name, start // size, length // size)
        commands.append(wire.discard(name, some))
    supply.out.raw(b"".join(commands))
    n_pages = sum(count for _, count in runs)
    supply.counters[Counter.DISCARDED_PAGES] += n_pages
    return n_pages, len(commands)
