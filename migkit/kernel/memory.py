"""RAM blocks: guest memory as a memfd that several processes map.

The rule of the house: **a page that is not known to be present is never loaded or stored through
a mapping.** A load from a missing page of a memfd allocates a zero page, silently; a page that
arrives later then finds its place taken and the guest reads zeros. Presence is learned from
SEEK_DATA or ``pread``, which allocate nothing; pages are written with ``pwrite``, thrown away
with PUNCH_HOLE (MADV_DONTNEED would leave them in the file).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from migkit.errors import CapabilityError, OptionError
from migkit.kernel.cgroup import memory_left

PAGE_SIZE = mmap.PAGESIZE
HUGE_PAGE_SIZES = (2 << 20, 1 << 30)

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_MFD_HUGE_SHIFT = 26
_MLOCK_ONFAULT = 1
_MADV_POPULATE_READ = 22  # Linux 5.14; where it is unknown, page tables fill one fault at a time

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mlock2.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)


class RamBlock:
    """A named stretch of guest memory, backed by a memfd, mapped when it is first needed."""

    def __init__(self, name: str, fd: int, size: int, page_size: int = PAGE_SIZE) -> None:
        """Adopt a memfd of ``size`` bytes with host pages of ``page_size`` bytes."""
        self.name = name
        self.fd = fd
        self.size = size
        self.page_size = page_size
        self.n_pages = size // page_size
        self._pages: npt.NDArray[np.uint8] | None = None

    @classmethod
    def create(cls, name: str, size: int, page_size: int = PAGE_SIZE) -> RamBlock:
        """Create an empty block; no page of it is present.

        Raises :class:`OptionError` when the sizes do not fit each other and
        :class:`CapabilityError` when there are not enough huge pages.
        """
        check_size(size, page_size)
        flags = os.MFD_CLOEXEC
        if page_size > PAGE_SIZE:
            flags |= os.MFD_HUGETLB | (page_size.bit_length() - 1) << _MFD_HUGE_SHIFT
        fd = os.memfd_create(f"migkit-{name}", flags)
        os.ftruncate(fd, size)
        return cls(name, fd, size, page_size)

    @property
    def pages(self) -> npt.NDArray[np.uint8]:
        """The block as an array (n_pages, page_size) of uint8; mind the rule of this module."""
        if self._pages is None:
            try:
                mapping = mmap.mmap(self.fd, self.size, mmap.MAP_SHARED)
            except OSError as error:
                raise CapabilityError(self._no_memory(error)) from error
            if self.page_size == PAGE_SIZE:
                mapping.madvise(mmap.MADV_NOHUGEPAGE)
            flat = np.frombuffer(mapping, np.uint8)
            self._pages = flat.reshape(self.n_pages, self.page_size)
        return self._pages

    @property
    def address(self) -> int:
        """The address at which this process maps the block."""
        return int(self.pages.ctypes.data)

    def lock(self) -> None:
        """Lock this process's mapping: each page from when it is there (MLOCK_ONFAULT).

        So no page is asked for, which in post-copy could not be answered. Huge pages stay in
        memory anyway, and mlock2(2) would ask for them all.
        Raises :class:`CapabilityError` beyond RLIMIT_MEMLOCK.
        """
        if self.page_size > PAGE_SIZE:
            return
        if _libc.mlock2(self.address, self.size, _MLOCK_ONFAULT) != 0:
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] >> 10
            raise CapabilityError(
                f"{self.size >> 10} KiB of RAM cannot be locked, the limit is {limit} KiB: run as "
                "root, or raise it (ulimit -l)"
            )

    def write(self, first_page: int, data: npt.NDArray[np.uint8]) -> None:
        """Write whole pages from an array (n, page_size), while no one faults on them.

        hugetlbfs has no write(2), so huge pages are stored through the mapping.
        Raises :class:`IndexError` outside the block: pwrite(2) would make the file longer.
        """
        if not 0 <= first_page <= self.n_pages - len(data):
            raise IndexError(
                f"{len(data)} pages from {first_page} on in {self.name}, which has {self.n_pages}"
            )
        if self.page_size > PAGE_SIZE:
            self.pages[first_page : first_page + len(data)] = data
            return
        view = np.ascontiguousarray(data).reshape(-1).data
        at = first_page * self.page_size
        while view:
            try:
                done = os.pwrite(self.fd, view, at)
            except OSError as error:
                raise CapabilityError(self._no_memory(error)) from error
            at += done
            view = view[done:]

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes without allocating a page, huge or not: what is missing reads as zeros."""
        return os.pread(self.fd, length, offset)

    def discard(self, offset: int, length: int) -> None:
        """Throw pages away (PUNCH_HOLE): they are missing in every process that maps them."""
        mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        if _libc.fallocate(self.fd, mode, offset, length) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), f"discard of {self.name} at {offset:#x}")

    def data_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (start, end) in bytes of what is present, by SEEK_DATA and SEEK_HOLE."""
        end = 0
        while end < self.size:
            try:
                start = os.lseek(self.fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = os.lseek(self.fd, start, os.SEEK_HOLE)
            yield start, end

    def present(self) -> npt.NDArray[np.bool_]:
        """Return which pages are present, (n_pages,) bool."""
        mask = np.zeros(self.n_pages, np.bool_)
        for start, end in self.data_ranges():
            mask[start // self.page_size : -(-end // self.page_size)] = True
        return mask

    def map_present(self) -> None:
        """Set up this process's page tables for what is present, and for nothing else."""
        address = self.address
        for start, end in self.data_ranges():
            _libc.madvise(address + start, end - start, _MADV_POPULATE_READ)

    def close(self) -> None:
        """Close the memfd; a mapping goes with the last array that looks at it."""
        self._pages = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _no_memory(self, error: OSError) -> str:
        size = f"{self.size >> 20} MiB"
        if self.page_size > PAGE_SIZE:
            free = huge_pages_free(self.page_size)
            return (
                f"{size} of RAM need {self.n_pages} huge pages of {self.page_size >> 20} MiB a "
                f"guest, {free} are free: raise /proc/sys/vm/nr_hugepages ({error.strerror})"
            )
        return f"no memory for {size} of RAM: {error.strerror}; {memory_available() >> 20} MiB left"


def check_size(size: int, page_size: int) -> None:
    """Raise :class:`OptionError` unless ``size`` is a positive multiple of a known page size."""
    if page_size != PAGE_SIZE and page_size not in HUGE_PAGE_SIZES:
        known = ", ".join(str(n) for n in (PAGE_SIZE, *HUGE_PAGE_SIZES))
        raise OptionError(f"page size {page_size} is not one of {known}")
    if size <= 0 or size % page_size:
        below = max(size // page_size, 1) * page_size
        raise OptionError(
            f"memory of {size} bytes is not a multiple of the page size {page_size}; "
            f"{below} or {below + page_size} would be"
        )


def memory_available(pid: int | None = None) -> int:
    """Return how much memory a process (this one) may still take, in bytes.

    That is MemAvailable of /proc/meminfo, or less where its control groups allow less.
    """
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
    left = memory_left(os.getpid() if pid is None else pid)
    return available if left is None else min(available, left)


def huge_pages_free(page_size: int) -> int:
    """Return how many huge pages of a size are free and not reserved."""
    folder = Path(f"/sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB")
    try:
        free = int((folder / "free_hugepages").read_text())
        return free - int((folder / "resv_hugepages").read_text())
    except OSError:
        return 0
