"""Discards: the destination throws away what it has in a version that is old."""

from __future__ import annotations

import numpy as np

from migkit.migration import wire
from migkit.migration.answers import Answers
from migkit.migration.asked import Asked
from migkit.migration.dirty import DirtyLog, sync
from migkit.migration.framing import runs_of
from migkit.migration.stats import Counter
from migkit.migration.supply import PageSupply

# Discards are sent ahead while the guest still runs, until this few pages are new at once.
_FEW = 64
_MOST_ROUNDS = 8


def discard_ahead(supply: PageSupply, log: DirtyLog, answers: Answers, asked: Asked) -> None:
    """Discard while the guest still runs, until little is new: the rest costs downtime."""
    for ahead in range(_MOST_ROUNDS):
        sync(log, supply)
        count, _ = discard_stale(supply)
        # Only once the destination is through with them is the guest to be stopped.
        value = wire.PING_AHEAD + ahead
        supply.out.ping(value)
        supply.out.drain()
        supply.out.wait_for(lambda value=value: value in answers.pongs, "the discards")  # type: ignore[misc]
        asked.check_cancel()
        if count <= _FEW:
            return


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
