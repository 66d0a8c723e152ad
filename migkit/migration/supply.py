"""Supplying pages: which are still to be sent, in which order, and who asked for them.

The counterpart of :mod:`migkit.migration.serving`. A requested page goes ahead of all others and
of every rate limit; what the background sends next begins behind the last request, where the
guest is likely to look next.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from migkit.errors import ProtocolError
from migkit.kernel.memory import RamBlock
from migkit.migration.channel import RateLimiter
from migkit.migration.framing import Indices
from migkit.migration.outbound import Outbound
from migkit.migration.pagemap import Row
from migkit.migration.return_path import PageRequest
from migkit.migration.stats import Counter
from migkit.trace.emit import Tracer

# While requests come, background batches are short: a request waits for one at most.
_BUSY_S = 0.005
_BUSY_PAGES = 16
_MOST_SERVED = 1024  # requests that are accounted for at once, at the latest


class PageSupply:
    """The pages of one migration at the source."""

    def __init__(
        self,
        ram: RamBlock,
        out: Outbound,
        counters: memoryview,
        trace: Tracer,
        pages: npt.NDArray[np.bool_],
    ) -> None:
        """Take the rows of a page map; begin with every page to be sent."""
        self.ram = ram
        self.out = out
        self.counters = counters
        self.trace = trace
        self.dirty = pages[Row.DIRTY]
        self.at_destination = pages[Row.SENT]
        self.discarded = pages[Row.DISCARDED]  # for whoever watches
        self.dirty[:] = True
        self.at_destination[:] = False
        self.present = ram.present()  # may be loaded: see migkit.kernel.memory
        self.remaining = ram.n_pages  # how many are dirty
        self.in_postcopy = False
        self.cursor = 0
        # Bytes over channels that broke: an engine before us may have used some.
        self._sent_before = counters[Counter.PRECOPY_BYTES] + counters[Counter.POSTCOPY_BYTES]
        self._urgent_before = counters[Counter.PREEMPT_BYTES]
        self.last_request = 0.0
        self.served: list[tuple[int, int, int]] = []  # page, when received, when sent (0: before)

    def count_dirty(self) -> int:
        """Count what is to be sent; return how many pages that is."""
        self.remaining = int(np.count_nonzero(self.dirty))
        self.counters[Counter.REMAINING_PAGES] = self.remaining
        return self.remaining

    def stale(self) -> npt.NDArray[np.bool_]:
        """Return which pages the destination has in a version that is old, (n_pages,) bool."""
        stale: npt.NDArray[np.bool_] = self.dirty & self.at_destination
        return stale

    def enter_postcopy(self) -> None:
        """From here on pages are sent once each, and requests are answered."""
        self.count_bytes()
        self.in_postcopy = True
        self.dirty |= ~self.at_destination
        self.count_dirty()

    def continue_on(self, out: Outbound, received: npt.NDArray[np.bool_]) -> None:
        """Go on over new channels after a break: what was not received is to be sent (again)."""
        if out is not self.out:
            self._sent_before += self.out.main.sent_bytes
            if self.out.preempt:
                self._urgent_before += self.out.preempt.sent_bytes
            self.out = out
        np.logical_not(received, out=self.dirty)
        self.at_destination[:] = received
        self.in_postcopy = True
        self.count_dirty()

    def send(self, batch: Indices, limiter: RateLimiter, n_pages: Counter) -> None:
        """Send pages on the main channel and account for them."""
        counters = self.counters
        self.dirty[batch] = False
        self.remaining -= len(batch)
        counters[Counter.ZERO_PAGES] += self.out.pages(batch, self.present)
        limiter.spend(len(batch) * self.ram.page_size)
        self.count_bytes()
        counters[n_pages] += len(batch)
        counters[Counter.REMAINING_PAGES] = self.remaining

    def count_bytes(self) -> None:
        """Note what the sockets have taken; a part of it is sent by the loop, between batches."""
        out, counters = self.out, self.counters
        if not self.in_postcopy:
            counters[Counter.PRECOPY_BYTES] = out.main.sent_bytes
            return
        sent = self._sent_before + out.main.sent_bytes
        counters[Counter.POSTCOPY_BYTES] = sent - counters[Counter.PRECOPY_BYTES]
        if out.preempt:
            counters[Counter.PREEMPT_BYTES] = self._urgent_before + out.preempt.sent_bytes

    def next_batch(self, most: int) -> Indices | None:
        """Return at most so many dirty pages from the cursor on, None when there are none."""
        if time.monotonic() - self.last_request < _BUSY_S:
            most = min(most, _BUSY_PAGES)
        if not self.remaining:
            return None
        window = 4 * most
        at = self.cursor if self.cursor < len(self.dirty) else 0
        searched = 0
        while searched < 2 * len(self.dirty):
            found = np.flatnonzero(self.dirty[at : at + window])
            if len(found):
                return found[:most] + at
            searched += window
            at += window
            window *= 2
            if at >= len(self.dirty):
                at = 0
        return None

    def serve(self, request: PageRequest) -> None:
        """Send a requested page now, ahead of the background and of any rate limit."""
        received = time.monotonic_ns()
        block, start, length = request
        name, size = self.ram.name, self.ram.page_size
        page, rest = divmod(start, size)
        if block != name or length != size or rest or page >= self.ram.n_pages:
            raise ProtocolError(
                f"a request for {length} bytes at {start:#x} of {block!r}; "
                f"{name!r} has {self.ram.n_pages} pages of {size}"
            )
        if not self.in_postcopy:
            raise ProtocolError("a page was requested before post-copy")
        sent = 0
        if self.dirty[page]:
            sent = time.monotonic_ns()
            self.out.urgent_page(page, present=self.present[page])
            self.dirty[page] = False
            self.remaining -= 1
        if not self.served:
            self.out.loop.defer(self.account)
        self.served.append((page, received, sent))
        self.cursor = page + 1
        self.last_request = received / 1e9
        if len(self.served) >= _MOST_SERVED:
            self.account()

    def account(self) -> None:
        """Count and trace the requests served since the last time, all at once.

        A guest waits while a request is served, so this is done when nobody does.
        """
        if not self.served:
            return
        pages, received, sent = np.array(self.served).T
        self.served.clear()
        asked = sent > 0
        counters, trace, name, size = self.counters, self.trace, self.ram.name, self.ram.page_size
        counters[Counter.REMAINING_PAGES] = self.remaining
        counters[Counter.REQUESTED_PAGES] += int(np.count_nonzero(asked))
        counters[Counter.UNSENT_REQUESTS] += int(np.count_nonzero(~asked))
        counters[Counter.ZERO_PAGES] += self.out.urgent_zeros
        self.out.urgent_zeros = 0
        trace.many("migrate_handle_rp_req_pages", name, pages * size, size, ts=received)
        trace.many("ram_save_queue_pages", name, pages * size, size, ts=received)
        for event, some in (("get_queued_page", asked), ("get_queued_page_not_dirty", ~asked)):
            trace.many(event, name, pages[some] * size, pages[some], ts=received[some])
        trace.many("postcopy_preempt_send_host_page", name, pages[asked], ts=sent[asked])
