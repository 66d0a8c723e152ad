"""Serving faults: read them, request their pages, place what comes, wake who waits.

This is QEMU's fault thread and its place_page. Each function here stands between a guest and its
page, so the way of the common case (one fault, one page of 4 KiB) is as short as it can be
written, and whatever can wait until the page is on its way is done after that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from migkit.errors import MigrationError
from migkit.kernel.userfaultfd import EventType
from migkit.migration import return_path, wire
from migkit.migration.engine import Deadline, GuestParts
from migkit.migration.framing import runs_of
from migkit.migration.loop import Loop
from migkit.migration.pagemap import Row
from migkit.migration.placing import HostPages, Placer, record_address
from migkit.migration.records import Page, Pages
from migkit.migration.return_path import Message
from migkit.migration.stats import Counter
from migkit.migration.wire import TARGET_PAGE
from migkit.trace.emit import Tracer

MAIN, PREEMPT = 0, 1  # channels, as QEMU numbers them

_PAGE_FAULT = int(EventType.PAGEFAULT)
_REQ_PAGES = int(Message.REQ_PAGES)
_PAGE, _ZERO_FLAG = int(wire.RamFlag.PAGE), int(wire.RamFlag.ZERO)
_REMOVAL_S = 10.0  # how long a guest may take to give memory back
_RETRY_S = 0.0001
# Faults are accounted for at once, after so many or so long at the latest: what was not dies with
# an engine that is killed.
_MOST_NOTED, _LATEST_NS = 1024, 100_000_000

Numbers = npt.NDArray[np.int64]
Column = Numbers | int
Runs = list[tuple[int, int]]  # first page, how many


class FaultServer:
    """Answers the faults of one guest with what the channels bring."""

    def __init__(
        self,
        guest: GuestParts,
        placer: Placer,
        pages: npt.NDArray[np.bool_],
        counters: memoryview,
        trace: Tracer,
        loop: Loop,
        send: Callable[[bytes], None],
    ) -> None:
        """Take the parts; ``send`` puts a message on the return path, ``pages`` is a map's rows."""
        self._send = send
        self._loop = loop
        self._uffd = guest.uffd
        self._base = guest.address
        self._size = guest.ram.page_size
        self._name = guest.ram.name
        self._placer = placer
        self._counters = counters
        self._trace = trace
        self._unnamed: str | None = guest.ram.name  # until the first request has named the block
        self._requested_mask = pages[Row.REQUESTED]
        self._requested_mask[:] = False
        # The same bits, faster for one at a time.
        self.requested = self._requested_mask.data
        self._answered = pages[Row.ANSWERED].data
        self._received = placer.received.data
        self.asks = True  # not in an outage: then requests are kept for ask_again()
        self._removing = False  # the guest has given memory back
        guest.uffd.busy_s = 0.0  # while it does we have more to do than to try again
        self.last_fault = 0.0  # time.monotonic()
        self._faults: list[tuple[int, int, int, int]] = []  # page, tid, when read, when asked
        self._answers: list[tuple[int, int, int, int, int]] = []  # page, times, channel, kind
        self._account_at = 0
        self._under_way = 0
        self._traces_ranges = trace.on("ram_load_range")
        self._traces_pages = any(
            trace.on(name)
            for name in (
                "ram_load_postcopy_loop",
                "postcopy_place_page",
                "postcopy_place_page_zero",
            )
        )

    def read_faults(self) -> None:
        """Read the faults that wait and request their pages, each page once."""
        messages = self._uffd.read()
        read = time.monotonic_ns()
        if not self._faults:
            self._account_at = read + _LATEST_NS
        base, size, received, requested = self._base, self._size, self._received, self.requested
        wanted = b""
        for event, flags, address, tid in messages:
            if event != _PAGE_FAULT:
                self._removed(event, flags, address)
                continue
            page = (address - base) // size
            asked = 0
            if received[page]:
                self._answer_here(page)
            elif not requested[page]:
                requested[page] = True
                asked = time.monotonic_ns()
                wanted += return_path.request_pages(page * size, size, self._unnamed)
                self._unnamed = None
            self._faults.append((page, tid, read, asked))
        if wanted and self.asks:
            self._send(wanted)
        self.last_fault = read / 1e9
        if len(self._faults) < _MOST_NOTED and read < self._account_at:
            self._loop.defer(self.account)
        else:
            self.account()

    def ask_again(self) -> None:
        """Ask once more for every page that was asked for and has not come: after a break."""
        self.asks = True
        self._unnamed = self._name
        size = self._size
        for page in np.flatnonzero(self._requested_mask).tolist():
            self._send(return_path.request_pages(page * size, size, self._unnamed))
            self._trace.migrate_send_rp_message(_REQ_PAGES, 12)
            self._unnamed = None

    def _answer_here(self, page: int) -> None:
        """Answer a fault without the source: the page was received before the fault was read."""
        try:
            self._placer.resolve_here(page)
        except BlockingIOError:
            self._read_removals()
            self._uffd.wake(self._base + page * self._size, self._size)
        self._counters[Counter.LOCAL_FAULTS] += 1
        self._trace.postcopy_fault_local(self._name, page * self._size)

    def _removed(self, event: int, start: int, end: int) -> None:
        """Take note of memory that the guest gives back: from now on it reads as zeros.

        What is under way of it comes too late and is not placed. (MADV_DONTNEED cannot be told
        from MADV_REMOVE: of a page that has not come yet it is taken for the same.)
        """
        if event != EventType.REMOVE:
            raise MigrationError(f"userfaultfd sent event {event:#x}, which nobody asked for")
        pages = slice((start - self._base) // self._size, (end - self._base) // self._size)
        self._under_way -= int(np.count_nonzero(self._requested_mask[pages]))
        self._requested_mask[pages] = False
        self._placer.received[pages] = True
        self._placer.holes[pages] = True
        self._removing = True
        self._uffd.wake(start, end - start)  # who waits there asks again

    def _read_removals(self) -> None:
        """Read what keeps the address space busy; faults are made to come again."""
        for event, flags, address, _ in self._uffd.read():
            if event == _PAGE_FAULT:
                self._uffd.wake(address // self._size * self._size, self._size)
            else:
                self._removed(event, flags, address)

    def _insist(self, pages: Iterable[tuple[int, int]]) -> None:
        """Place (page, address; 0 for zeros) one by one while the guest gives memory back."""
        deadline = Deadline(_REMOVAL_S)
        for page, address in pages:
            while not self._received[page]:
                try:
                    if address:
                        self._placer.place_one(page, address)
                    else:
                        self._placer.place_zero(page, 1)
                except BlockingIOError:
                    self._read_removals()
                    time.sleep(_RETRY_S)
                    deadline.check("the end of a REMOVE")

    def _place_lone(self, page: int, address: int) -> None:
        """Place one page, from an address of ours or, if that is 0, of zeros."""
        try:
            if self._removing:
                self._insist(((page, address),))
            elif address:
                self._placer.place_one(page, address)
            else:
                self._placer.place_zero(page, 1)
        except BlockingIOError:
            self._insist(((page, address),))

    def place_one(self, record: Page) -> None:
        """Place a lone page of the preempt channel: a guest waits for it."""
        received = time.monotonic_ns()
        page = record.offset // TARGET_PAGE
        self._place_lone(page, record.address)
        placed = time.monotonic_ns()
        # Where the guest shares our CPU, let it run now and not when our time slice is over.
        os.sched_yield()
        self.requested[page] = False
        self._answered[page] = True
        self._answers.append((page, received, placed, PREEMPT, 0))

    def place(self, pages: Pages, source: HostPages, channel: int) -> None:
        """Place a batch of either channel, and note the pages that were waited for."""
        received = time.monotonic_ns()
        kind = 1 if pages.address == 0 else 0
        if source.huge:
            for page, data in source.assemble(pages):
                self._place_lone(page, 0 if data is None else int(data.ctypes.data))
                kind = 1 if data is None else 0
                self._note(np.array((page,)), [(page, 1)], received, channel, kind)
            return
        numbers = pages.offsets // TARGET_PAGE
        runs = runs_of(numbers)
        try:
            if self._removing:
                self._insist(_addresses(numbers, pages))
            else:
                self._place_runs(runs, pages, source)
        except BlockingIOError:
            self._placer.lenient = True  # some may have been placed, and were not noted
            self._insist(_addresses(numbers, pages))
        self._note(numbers, runs, received, channel, kind)

    def _place_runs(self, runs: Runs, pages: Pages, source: HostPages) -> None:
        """Place a batch run by run: one ioctl each, from where the pages lie in a row."""
        zero = pages.address == 0
        stripped = not zero and len(runs) <= len(pages.offsets) // 2
        if stripped:
            source.strip(pages)
        at = 0
        for first, count in runs:
            if zero:
                self._placer.place_zero(first, count)
            elif stripped:
                self._placer.place(first, count, source.staging_address + at * TARGET_PAGE)
            else:
                # Scattered pages: the kernel takes them from their records as well.
                for i in range(count):
                    self._placer.place_one(first + i, record_address(pages, at + i))
            at += count

    def _note(self, numbers: Numbers, runs: Runs, received: int, channel: int, kind: int) -> None:
        """Note a batch that was placed, and those pages of it that were waited for."""
        placed = time.monotonic_ns()
        waited = numbers[self._requested_mask[numbers]].tolist()
        for page in waited:
            self.requested[page] = False
            self._answered[page] = True
            self._answers.append((page, received, placed, channel, kind))
        unasked = len(numbers) - len(waited)
        self._counters[Counter.BACKGROUND_PAGES] += unasked
        if kind:
            self._counters[Counter.ZERO_PAGES] += unasked
        if self._traces_ranges:
            for first, count in runs:
                self._trace.ram_load_range(
                    self._name, first * self._size, count * self._size, kind, ts=placed
                )
        if self._traces_pages and unasked:
            quiet = np.setdiff1d(numbers, waited) if waited else numbers
            self._trace_pages(quiet * self._size, channel, kind, received, placed)

    def account(self) -> None:
        """Count and trace the faults answered since the last time, all at once.

        A guest waits while a fault is served, so this is done when nobody does.
        """
        counters, trace, name, size = self._counters, self._trace, self._name, self._size
        page, tid, read, asked = _columns(self._faults, 4)
        answered, received, placed, channel, kind = _columns(self._answers, 5)
        self._faults.clear()
        self._answers.clear()
        counters[Counter.FAULTS] += len(page)
        counters[Counter.REQUESTED_PAGES] += len(answered)
        counters[Counter.ZERO_PAGES] += int(kind.sum())

        new = asked > 0
        address, offset, at = self._base + page * size, page * size, answered * size
        added, deleted = self._count_under_way(asked[new], placed)
        trace.many("postcopy_ram_fault_thread_request", address, name, offset, tid, ts=read)
        trace.many("postcopy_page_req_add", address[new], added, ts=asked[new])
        kinds = np.full(len(added), _REQ_PAGES)
        trace.many("migrate_send_rp_message", kinds, 12, ts=asked[new])
        trace.many("postcopy_request_received", name, at, channel, ts=received)
        trace.many("postcopy_request_placed", name, at, kind, ts=placed)
        trace.many("postcopy_page_req_del", self._base + at, deleted, ts=placed)
        if self._traces_pages:
            for zero in (0, 1):
                some = kind == zero
                self._trace_pages(at[some], channel[some], zero, received[some], placed[some])
        counters[Counter.OUTSTANDING] = max(self._under_way, 0)

    def _count_under_way(self, asked: Numbers, placed: Numbers) -> tuple[Numbers, Numbers]:
        """Return how many requests were under way after each of these times."""
        order = np.argsort(np.concatenate((asked, placed)), kind="stable")
        change = np.repeat((1, -1), (len(asked), len(placed)))
        counts = np.empty(len(order), np.int64)
        counts[order] = self._under_way + np.cumsum(change[order])
        self._under_way += len(asked) - len(placed)
        return counts[: len(asked)], counts[len(asked) :]

    def _trace_pages(
        self, offsets: Numbers, channel: Column, kind: int, received: Column, placed: Column
    ) -> None:
        """Emit QEMU's events of each page."""
        trace, flags = self._trace, _ZERO_FLAG if kind else _PAGE
        trace.many("ram_load_postcopy_loop", channel, offsets, flags, ts=received)
        event = "postcopy_place_page_zero" if kind else "postcopy_place_page"
        trace.many(event, self._base + offsets, ts=placed)


def _columns(rows: Sequence[tuple[int, ...]], n_columns: int) -> Numbers:
    return np.array(rows, np.int64).reshape(-1, n_columns).T


def _addresses(numbers: Numbers, pages: Pages) -> Iterator[tuple[int, int]]:
    """Yield the pages of a batch with where they lie in this process, 0 for zeros."""
    for i, page in enumerate(numbers.tolist()):
        yield page, record_address(pages, i) if pages.address else 0
