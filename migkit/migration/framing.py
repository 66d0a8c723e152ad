"""Framing guest pages for the wire: which are zero, and how the others become records.

A batch of pages is copied once, behind its headers, into a staging buffer that one ``sendmsg``
takes. Zero pages are found by folding each page's words with OR, at the speed of memory.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from migkit.kernel.memory import RamBlock
from migkit.migration import wire
from migkit.migration.wire import TARGET_PAGE, RamFlag

_HEAD = 64  # most pages that are not zero show it in their first bytes
_ZERO_HEAD = bytes(_HEAD)
_U64 = struct.Struct(">Q")
_PAGE = int(RamFlag.PAGE)
_PAGE_AGAIN = int(RamFlag.PAGE | RamFlag.CONTINUE)
_ZERO_AGAIN = int(RamFlag.ZERO | RamFlag.CONTINUE)

Indices = npt.NDArray[np.intp]


class PageFramer:
    """Frames pages of one RAM block for one channel; its parts are valid until the next call."""

    def __init__(self, ram: RamBlock, most_pages: int) -> None:
        """Make a staging buffer for batches of up to ``most_pages`` host pages."""
        self._ram = ram.pages
        self._flat = ram.pages.reshape(-1).data
        self._page_size = ram.page_size
        self._zero_page = bytes(ram.page_size)
        self._name = ram.name
        self._per_host = ram.page_size // TARGET_PAGE
        self._staging = np.zeros(most_pages * self._per_host, wire.PAGE_RECORD)
        self._bytes = self._staging.view(np.uint8).data
        self._zeros = np.zeros(most_pages * self._per_host, wire.ZERO_RECORD)
        self._named = False

    def zero_mask(self, pages: Indices) -> npt.NDArray[np.bool_]:
        """Return which pages hold only zeros; they must be present, for they are loaded."""
        words = self._rows(pages).view(np.uint64)
        zero: npt.NDArray[np.bool_] = np.logical_not(words[:, : _HEAD // 8].any(axis=1))
        for row in np.flatnonzero(zero):
            zero[row] = not np.bitwise_or.reduce(words[row])
        return zero

    def data(self, pages: Indices) -> list[memoryview | bytes]:
        """Return the records of pages, in ascending order, with their bytes."""
        count = len(pages) * self._per_host
        records = self._staging[:count]
        records["header"] = self._offsets(pages) | _PAGE_AGAIN
        records["data"] = self._rows(pages).reshape(count, TARGET_PAGE)
        return self._named_first(self._bytes[: count * records.itemsize], RamFlag.PAGE, pages)

    def one(self, page: int) -> list[memoryview | bytes]:
        """Return the record of one page of 4 KiB, its bytes where they lie in guest RAM."""
        at = page * TARGET_PAGE
        data = self._flat[at : at + TARGET_PAGE]
        if self._named:
            return [_U64.pack(at | _PAGE_AGAIN), data]
        self._named = True
        return [wire.page_header(at, _PAGE, self._name), data]

    def is_zero(self, page: int) -> bool:
        """Return whether one page, which must be present, holds only zeros."""
        at = page * self._page_size
        if self._flat[at : at + _HEAD] != _ZERO_HEAD:
            return False
        return self._flat[at : at + self._page_size].tobytes() == self._zero_page

    def zeros(self, pages: Indices) -> list[memoryview | bytes]:
        """Return the records of zero pages."""
        count = len(pages) * self._per_host
        records = self._zeros[:count]
        records["header"] = self._offsets(pages) | _ZERO_AGAIN
        return self._named_first(memoryview(records.tobytes()), RamFlag.ZERO, pages)

    def _named_first(
        self, data: memoryview, flag: RamFlag, pages: Indices
    ) -> list[memoryview | bytes]:
        """Let the very first record of a channel name its block."""
        if self._named:
            return [data]
        self._named = True
        offset = int(pages[0]) * self._per_host * TARGET_PAGE
        return [wire.page_header(offset, flag, self._name), data[8:]]

    def _offsets(self, pages: Indices) -> npt.NDArray[np.int64]:
        first = pages.astype(np.int64) * (self._per_host * TARGET_PAGE)
        if self._per_host == 1:
            return first
        inside = np.arange(self._per_host, dtype=np.int64) * TARGET_PAGE
        return (first[:, None] + inside).reshape(-1)

    def _rows(self, pages: Indices) -> npt.NDArray[np.uint8]:
        """Return the pages as rows: a view where they lie in a row, else a copy."""
        first, last = int(pages[0]), int(pages[-1])
        if last - first + 1 == len(pages):
            return self._ram[first : last + 1]
        return self._ram[pages]


def runs_of(pages: Indices) -> list[tuple[int, int]]:
    """Cut page numbers, in whatever order, into runs: a list of (first, how many).

    A batch need not ascend: a requested page may come in the middle of the background's.
    """
    if len(pages) <= 1:
        return [(int(page), 1) for page in pages]
    broken = (pages[1:] - pages[:-1]) != 1
    if not broken.any():
        return [(int(pages[0]), len(pages))]
    breaks = np.flatnonzero(broken) + 1
    starts = np.concatenate(([0], breaks))
    counts = np.diff(np.concatenate((starts, [len(pages)])))
    return list(zip(pages[starts].tolist(), counts.tolist(), strict=True))
