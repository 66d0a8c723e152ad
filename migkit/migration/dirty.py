"""Dirty logging at the source: which pages the guest has written since it was last asked."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from migkit.kernel.pagemap import Category, Pagemap
from migkit.kernel.userfaultfd import Register
from migkit.migration.engine import Deadline, GuestParts
from migkit.migration.framing import runs_of
from migkit.migration.stats import Counter
from migkit.migration.supply import PageSupply

_BUSY_S = 10.0  # how long a guest may take to give memory back
_RETRY_S = 0.0001


class DirtyLog:
    """PAGEMAP_SCAN over a guest's RAM, as page numbers. See :mod:`migkit.kernel.pagemap`."""

    def __init__(self, guest: GuestParts) -> None:
        """Open the guest's page map; nothing is logged before :meth:`start`."""
        self._guest = guest
        self._pagemap = Pagemap(guest.pid)
        self._given_back = np.zeros(guest.ram.n_pages, np.bool_)

    def start(self) -> None:
        """Begin: from now on every write is remembered."""
        guest = self._guest
        guest.uffd.register(guest.address, guest.ram.size, Register.WP)
        deadline = Deadline(_BUSY_S)
        while not self._protect():  # the guest is giving memory back, and waits for us
            self.read_removals()
            time.sleep(_RETRY_S)
            deadline.check("the end of a REMOVE")

    def _protect(self) -> bool:
        try:
            self._guest.uffd.write_protect(self._guest.address, self._guest.ram.size)
        except BlockingIOError:
            return False
        return True

    def read_removals(self) -> None:
        """Read which memory the guest gives back (REMOVE): it waits until that is read.

        What was protected stays so, and does not show as written. And the guest gives it back
        only after we have read of it, so such a page counts as dirty from then on.
        """
        guest = self._guest
        for _, start, end, _ in guest.uffd.read():
            size = guest.ram.page_size
            first, last = (start - guest.address) // size, (end - guest.address) // size
            self._given_back[first:last] = True

    def scan(self) -> list[tuple[int, int]]:
        """Return the pages written or given back since the last scan, as runs (first, how many)."""
        guest = self._guest
        regions = self._pagemap.scan(guest.address, guest.ram.size, Category.WRITTEN, protect=True)
        first = (regions["start"] - guest.address) // guest.ram.page_size
        count = (regions["end"] - regions["start"]) // guest.ram.page_size
        runs = list(zip(first.tolist(), count.tolist(), strict=True))
        return runs + runs_of(np.flatnonzero(self._given_back))

    def stop(self) -> None:
        """End: lift the protection and close the page map."""
        guest = self._guest
        guest.uffd.unregister(guest.address, guest.ram.size)
        self._pagemap.close()


def mark(bitmap: npt.NDArray[np.bool_], runs: list[tuple[int, int]]) -> int:
    """Set the pages of ``runs`` in a bitmap (n_pages,); return how many pages they are."""
    total = 0
    for first, count in runs:
        bitmap[first : first + count] = True
        total += count
    return total


def sync(log: DirtyLog, supply: PageSupply) -> None:
    """Have what the log found sent again: it is dirty, and it may be loaded."""
    supply.trace.migration_bitmap_sync_start()
    runs = log.scan()
    found = mark(supply.dirty, runs)
    mark(supply.present, runs)
    supply.counters[Counter.DIRTY_PAGES] = found
    supply.count_dirty()
    supply.trace.migration_bitmap_sync_end(found)
