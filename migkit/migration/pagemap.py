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
    """The rows of the map, by index: three of the source, then those of the destination."""

    DIRTY = 0  # to be sent
    SENT = 1  # some version of it is at the destination
    DISCARDED = 2  # a version of it was at the destination and was thrown away
    RECEIVED = 3  # its last version is here
    HOLE = 4  # of those: zeros, for which no memory was taken before the guest touches it
    REQUESTED = 5  # a guest waits for it
    ANSWERED = 6  # it came because a guest waited for it


class PageState(enum.IntEnum):
    """What is to be seen of a page; of several pages in one cell the greatest is shown."""

    AT_SOURCE = 0  # only there
    SENT = 1  # in pre-copy; in post-copy: under way
    DIRTY_AGAIN = 2  # sent, and written to since, as of the last scan
    DISCARDED = 3  # the destination threw its old version away
    BACKGROUND = 4  # placed in post-copy without a request
    ANSWERED = 5  # placed because the guest waited for it
    REQUESTED = 6  # the guest waits for it


def page_states(
    source: npt.NDArray[np.bool_], destination: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """Combine the rows of both engines into a :class:`PageState` a page, (n_pages,).

    Where a later rule holds it overrides an earlier one. After a recovery the source counts as
    SENT what was received; who wants to know how it came remembers.
    """
    dirty, sent = source[Row.DIRTY], source[Row.SENT]
    received = destination[Row.RECEIVED]
    begun = dirty.any() or received.any()
    states = np.where(dirty | ~begun, np.uint8(PageState.AT_SOURCE), np.uint8(PageState.SENT))
    states[dirty & sent] = PageState.DIRTY_AGAIN
    states[dirty & source[Row.DISCARDED] & ~sent] = PageState.DISCARDED
    states[received & ~dirty & ~sent] = PageState.BACKGROUND
    states[received & destination[Row.ANSWERED]] = PageState.ANSWERED
    states[destination[Row.REQUESTED]] = PageState.REQUESTED
    return states


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
