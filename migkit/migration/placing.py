"""Placing pages in the destination guest's RAM, by what the phase allows.

Before the guest runs pages are written to the file. In post-copy they are placed by
``UFFDIO_COPY`` and ``UFFDIO_ZEROPAGE`` alone: atomically, waking whoever waits. A place already
taken is legal only for a page that the received bitmap has.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from migkit.errors import MigrationError, ProtocolError
from migkit.kernel.memory import PAGE_SIZE
from migkit.migration.engine import GuestParts
from migkit.migration.framing import runs_of
from migkit.migration.pagemap import Row
from migkit.migration.records import RECORD_BYTES, Pages
from migkit.migration.wire import TARGET_PAGE


class Placer:
    """Guest RAM as the destination fills it, with the received bitmap."""

    def __init__(self, guest: GuestParts, pages: npt.NDArray[np.bool_]) -> None:
        """Take the rows of a page map; it says what was received before us."""
        self._ram = guest.ram
        self._uffd = guest.uffd
        self._address = guest.address
        self._size = guest.ram.page_size
        self.received = pages[Row.RECEIVED]
        self._received = self.received.data  # the same bits, faster for one at a time
        self.holes = pages[Row.HOLE]
        self.lenient = False  # a page may have been placed and not noted: by an engine that died
        self._zero = np.zeros(self._size if self._size > PAGE_SIZE else 0, np.uint8)

    def write(self, pages: npt.NDArray[np.int64], data: npt.NDArray[np.uint8] | None) -> None:
        """Write pages (n,) from an array (n, page_size) while no guest runs; None is zeros."""
        if data is None:
            # What was never written is a hole, which reads as zeros; what was becomes one again.
            for first, count in runs_of(pages[self.received[pages] & ~self.holes[pages]]):
                self._ram.discard(first * self._size, count * self._size)
            self.holes[pages] = True
        else:
            at = 0
            for first, count in runs_of(pages):
                self._ram.write(first, data[at : at + count])
                at += count
            self.holes[pages] = False
        self.received[pages] = True

    def discard(self, start: int, length: int) -> None:
        """Throw a range away; raises :class:`ProtocolError` outside the block."""
        if start % self._size or length % self._size or not 0 < start + length <= self._ram.size:
            raise ProtocolError(
                f"discard of {length:#x} bytes at {start:#x}: not whole pages of {self._size} "
                f"within {self._ram.size:#x}"
            )
        self._ram.discard(start, length)
        first, count = start // self._size, length // self._size
        self.received[first : first + count] = False
        self.holes[first : first + count] = False

    def place_one(self, page: int, address: int) -> None:
        """Place one page that lies at ``address`` of this process."""
        size = self._size
        if self._uffd.copy(self._address + page * size, address, size) < size:
            self._taken(page)
        self._received[page] = True

    def place(self, first: int, count: int, address: int) -> None:
        """Place pages that lie in a row at ``address`` of this process."""
        size = self._size
        target, length = self._address + first * size, count * size
        done = 0
        while done < length:
            done += self._uffd.copy(target + done, address + done, length - done)
            if done < length:
                self._taken(first + done // size)
                done += size
        self.received[first : first + count] = True

    def place_zero(self, first: int, count: int) -> None:
        """Place zero pages."""
        size = self._size
        target, length = self._address + first * size, count * size
        if size > PAGE_SIZE:  # hugetlbfs has no UFFDIO_ZEROPAGE
            for page in range(first, first + count):
                self.place(page, 1, int(self._zero.ctypes.data))
            return
        done = 0
        while done < length:
            done += self._uffd.zeropage(target + done, length - done)
            if done < length:
                self._taken(first + done // size)
                done += size
        self.received[first : first + count] = True

    def resolve_here(self, page: int) -> None:
        """Answer a fault on a page that was received: fill a hole, or wake who saw it too late."""
        if self.holes[page]:
            self.place_zero(page, 1)
            self.holes[page] = False
        self._uffd.wake(self._address + page * self._size, self._size)

    def _taken(self, page: int) -> None:
        if not self.received[page] and not self.lenient:
            raise MigrationError(
                f"page {page} was present before it was received: something other than "
                "userfaultfd wrote to guest memory"
            )


class HostPages:
    """Makes host pages of the pages of 4 KiB that come over one channel.

    With a host page of 4 KiB this is the identity. A huge page's target pages come in a row; it
    is handed on when it is whole, so that it can be placed atomically. Each channel has one of
    its own: a huge page half received on one is not disturbed by the other.
    """

    def __init__(self, page_size: int) -> None:
        """Know the host page size."""
        self._per_host = page_size // TARGET_PAGE
        self._buffer = np.zeros((1, page_size if self._per_host > 1 else 0), np.uint8)
        self._page = -1
        self._next = 0
        self._any = False
        # Runs of small pages are taken out of their records here, to be placed by one ioctl.
        self._staging = np.zeros((256, TARGET_PAGE), np.uint8)
        self.staging_address = int(self._staging.ctypes.data)

    @property
    def huge(self) -> bool:
        """Whether host pages are larger than target pages."""
        return self._per_host > 1

    def strip(self, pages: Pages) -> npt.NDArray[np.uint8]:
        """Copy the pages of a batch out of their records; return them as (n, 4096)."""
        rows = self._staging[: len(pages.offsets)]
        rows[:] = pages.data
        return rows

    def assemble(self, pages: Pages) -> list[tuple[int, npt.NDArray[np.uint8] | None]]:
        """Add a batch; return the huge pages that became whole: (page, (1, size) or None).

        The array is valid until the next one begins, so there is at most one with data.
        Raises :class:`ProtocolError` when the pages of a huge page do not come in a row.
        """
        whole: list[tuple[int, npt.NDArray[np.uint8] | None]] = []
        zero = pages.address == 0
        data = None if zero else pages.data
        numbers = pages.offsets // TARGET_PAGE
        at = 0
        while at < len(numbers):
            page, inside = divmod(int(numbers[at]), self._per_host)
            if inside == 0 and self._next in (0, self._per_host):
                self._page, self._next, self._any = page, 0, False
            count = min(self._per_host - inside, len(numbers) - at)
            in_a_row = bool((np.diff(numbers[at : at + count]) == 1).all())
            if (page, inside) != (self._page, self._next) or not in_a_row:
                raise ProtocolError(
                    f"target page {int(numbers[at])} came while huge page {self._page} was "
                    f"complete up to {self._next} of {self._per_host}"
                )
            target = self._buffer[0].reshape(self._per_host, TARGET_PAGE)[inside : inside + count]
            if data is None:
                target[:] = 0
            else:
                target[:] = data[at : at + count]
                self._any = True
            self._next = inside + count
            at += count
            if self._next == self._per_host:
                whole.append((page, self._buffer if self._any else None))
                if self._any and at < len(numbers):
                    self._buffer = self._buffer.copy()
        return whole


def record_address(pages: Pages, i: int) -> int:
    """Return where the i-th page of a batch lies in this process."""
    return pages.address + i * RECORD_BYTES
