"""Dirty logging at the source: which pages the guest has written since it was last asked."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from migkit.kernel.pagemap import Category, Pagemap
from migkit.kernel.userfaultfd import Register
from migkit.migration.engine import GuestParts


class DirtyLog:
    """PAGEMAP_SCAN over a guest's RAM, as page numbers. See :mod:`migkit.kernel.pagemap`."""

    def __init__(self, guest: GuestParts) -> None:
        """Open the guest's page map; nothing is logged before :meth:`start`."""
        self._guest = guest
        self._pagemap = Pagemap(guest.pid)

    def start(self) -> None:
        """Begin: from now on every write is remembered."""
        guest = self._guest
        guest.uffd.register(guest.address, guest.ram.size, Register.WP)
        guest.uffd.write_protect(guest.address, guest.ram.size)

    def scan(self) -> list[tuple[int, int]]:
        """Return the pages written since the last scan, as runs (first, how many)."""
        guest = self._guest
        regions = self._pagemap.scan(guest.address, guest.ram.size, Category.WRITTEN, protect=True)
        first = (regions["start"] - guest.address) // guest.ram.page_size
        count = (regions["end"] - regions["start"]) // guest.ram.page_size
        return list(zip(first.tolist(), count.tolist(), strict=True))

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
