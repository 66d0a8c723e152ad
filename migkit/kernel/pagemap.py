"""PAGEMAP_SCAN: which pages of a process were written, found and reset in one pass.

A range registered with userfaultfd in WP mode with ``UFFD_FEATURE_WP_ASYNC`` keeps a dirty bit a
page: write-protecting a page clears it, and the first write sets it again in the kernel, without
a message and without a handler. ``PAGEMAP_SCAN`` on ``/proc/PID/pagemap`` (Linux 6.7) returns the
written ranges and write-protects them again, atomically for each page: no write is ever lost.

The bits belong to one address space. Several processes over one memory are scanned each.
A page that was never touched counts as written until ``UFFDIO_WRITEPROTECT`` went over the whole
range, so begin with that.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import struct
from typing import Self

import numpy as np
import numpy.typing as npt

from migkit.errors import CapabilityError

_PAGEMAP_SCAN = 0xC0606610
_PM_SCAN_WP_MATCHING = 1
_PM_SCAN_CHECK_WPASYNC = 2
_ARGUMENT = struct.Struct("=12Q")  # struct pm_scan_arg
_WALK_END = struct.Struct("=Q")

REGION_DTYPE = np.dtype([("start", "u8"), ("end", "u8"), ("categories", "u8")])
"""``struct page_region``: a range of addresses in bytes, end exclusive, and its categories."""

_BATCH = 16384  # regions per system call


class Category(enum.IntFlag):
    """``PAGE_IS_*``: what PAGEMAP_SCAN can tell of a page."""

    WPALLOWED = 1 << 0
    WRITTEN = 1 << 1
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7


class Pagemap:
    """The page map of a process, open for scanning."""

    def __init__(self, pid: int) -> None:
        """Open ``/proc/pid/pagemap``; raises :class:`CapabilityError` when that is refused."""
        try:
            self.fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            raise CapabilityError(
                f"/proc/{pid}/pagemap: {error.strerror}; run as the same user or as root"
            ) from error
        self._regions = np.zeros(_BATCH, REGION_DTYPE)

    def close(self) -> None:
        """Close the page map."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def scan(
        self, start: int, length: int, category: Category, *, protect: bool = False
    ) -> npt.NDArray[np.void]:
        """Return the regions whose pages have all of ``category``, as :data:`REGION_DTYPE`.

        ``protect`` write-protects what it returns, which clears WRITTEN; the range must then be
        registered in WP mode with WP_ASYNC, else :class:`OSError` EPERM.

        Raises :class:`CapabilityError` on a kernel without PAGEMAP_SCAN.
        """
        flags = _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC if protect else 0
        end = start + length
        found: list[npt.NDArray[np.void]] = []
        at = start
        while at < end:
            argument = bytearray(
                _ARGUMENT.pack(
                    _ARGUMENT.size, flags, at, end, 0, self._regions.ctypes.data, _BATCH,
                    0, 0, category, 0, category,
                )
            )  # fmt: skip
            try:
                count = fcntl.ioctl(self.fd, _PAGEMAP_SCAN, argument)
            except OSError as error:
                if error.errno == errno.ENOTTY:
                    raise CapabilityError(
                        "PAGEMAP_SCAN is not available: it needs Linux 6.7 or newer "
                        f"(this is {os.uname().release}): {error.strerror}"
                    ) from error
                raise
            found.append(self._regions[:count].copy())
            at = int(_WALK_END.unpack_from(argument, 32)[0])
        return found[0] if len(found) == 1 else np.concatenate([self._regions[:0], *found])
