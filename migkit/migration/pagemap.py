"""What an engine knows of every page, in shared memory.

It outlives the engine: one that is started in the place of another goes on with it. And whoever
shows a migration while it runs reads it without the engine's help.
"""

from __future__ import annotations

import enum
import mmap
import os

import numpy as np
import numpy.typing as npt


class Row(enum.IntEnum):
    """The rows of the map, by index: two of the source, then those of the destination."""

    DIRTY = 0  # to be sent
    SENT = 1  # some version of it is at the destination
    RECEIVED = 2  # its last version is here
    HOLE = 3  # of those: zeros, for which no memory was taken before the guest touches it
    REQUESTED = 4  # a guest waits for it
    ANSWERED = 5  # it came because a guest waited for it


class PageMap:
    """A bool for every :class:`Row` and page."""

    def __init__(self, fd: int, n_pages: int) -> None:
        """Adopt the descriptor of a map made by :meth:`create`."""
        self.fd = fd
        self._shape = len(Row), n_pages

    @classmethod
    def create(cls, n_pages: int) -> PageMap:
        """Create a map in which nothing is true."""
        fd = os.memfd_create("migkit-pages", os.MFD_CLOEXEC)
        os.ftruncate(fd, len(Row) * n_pages)
        return cls(fd, n_pages)

    def rows(self) -> npt.NDArray[np.bool_]:
        """Map it, for as long as this process lives: (len(Row), n_pages) bool, shared."""
        mapping = mmap.mmap(self.fd, 0, mmap.MAP_SHARED)
        return np.frombuffer(mapping, np.bool_).reshape(self._shape)

    def snapshot(self) -> npt.NDArray[np.bool_]:
        """Copy it as it is now: (len(Row), n_pages) bool."""
        n_rows, n_pages = self._shape
        data = os.pread(self.fd, n_rows * n_pages, 0)
        return np.frombuffer(data, np.bool_).reshape(self._shape)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)
