"""An engine's counters, in a page of shared memory that the session samples without its help."""

from __future__ import annotations

import enum
import mmap
import os

PAGE_BYTES = 4096


class Counter(enum.IntEnum):
    """The words of the page, by index; pages are host pages, bytes are those of the wire."""

    PRECOPY_BYTES = 0  # source: main channel before post-copy, headers included
    POSTCOPY_BYTES = 1  # source: main channel in post-copy
    PREEMPT_BYTES = 2  # source: preempt channel
    PRECOPY_PAGES = 3  # source sent / destination received, before post-copy
    BACKGROUND_PAGES = 4  # in post-copy, unasked
    REQUESTED_PAGES = 5  # in post-copy, asked for
    ZERO_PAGES = 6  # of all those
    DISCARDED_PAGES = 7
    REMAINING_PAGES = 8  # source: still to be sent
    ROUND = 9  # source: pass over the dirty pages, from 1
    DIRTY_PAGES = 10  # source: found by the last scan
    BANDWIDTH = 11  # source: bytes a second, as last measured
    FAULTS = 12  # destination: messages read from userfaultfd
    LOCAL_FAULTS = 13  # destination: of those, answered without the source
    OUTSTANDING = 14  # destination: requests under way
    UNSENT_REQUESTS = 15  # source: requests for pages that were under way already


class Counters:
    """The mapped page; ``counters.words[Counter.X] += 1`` is the whole interface."""

    def __init__(self, fd: int) -> None:
        """Map a page made by :meth:`create`."""
        self.fd = fd
        self._map = mmap.mmap(fd, PAGE_BYTES, mmap.MAP_SHARED)
        self.words = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls) -> Counters:
        """Create a page of zeros."""
        fd = os.memfd_create("migkit-counters", os.MFD_CLOEXEC)
        os.ftruncate(fd, PAGE_BYTES)
        return cls(fd)

    def close(self) -> None:
        """Unmap the page and close its descriptor."""
        self.words.release()
        self._map.close()
        os.close(self.fd)
