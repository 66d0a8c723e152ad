"""The vCPU page: one shared page through which a guest is stopped, read, loaded and started.

Everything is a little-endian u64 word, written by one side only and read by the other at any
time, but for the CPU state, which belongs to the guest while it runs and to whoever stopped it
while it is stopped.

``run_seq`` is a sequence number, not a boolean: odd asks to run, even to stop, and every change
adds one, so that "stop, run, stop" in quick succession is never lost. The guest copies it to
``ack_seq`` once it acts on it and then adds one to the ``ack`` eventfd; the other side adds one
to ``kick`` after changing ``run_seq``, which also ends a sleep of the guest.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
import select
import time
from collections.abc import Callable

from migkit.errors import MigrationError

PAGE_BYTES = 4096
STATE_OFFSET = 1024
STATE_BYTES = PAGE_BYTES - STATE_OFFSET
ERROR_OFFSET = 512
ERROR_BYTES = STATE_OFFSET - ERROR_OFFSET


class Word(enum.IntEnum):
    """The words of the page, by index. Times are CLOCK_MONOTONIC in ns."""

    RUN_SEQ = 0  # written by whoever steers
    ACK_SEQ = 1
    STEP = 2  # steps executed since the guest was born, over all its migrations
    BUSY_NS = 3  # time spent in steps
    QUANTUM = 4  # steps between two looks at run_seq
    STOPPED_NS = 5  # when the last step before the stop had ended
    STARTED_NS = 6  # when the first step after the start began
    FIRST_STEP_NS = 7  # when that first step had ended
    HEARTBEAT_NS = 8  # when a step last ended
    ERROR_SIZE = 9


class VCpu:
    """A mapping of the vCPU page with the two eventfds that go with it."""

    def __init__(self, page_fd: int, kick_fd: int, ack_fd: int) -> None:
        """Map the page and adopt the descriptors."""
        self.page_fd = page_fd
        self.kick_fd = kick_fd
        self.ack_fd = ack_fd
        self._map = mmap.mmap(page_fd, PAGE_BYTES, mmap.MAP_SHARED)
        self._bytes = memoryview(self._map)
        self.words = self._bytes.cast("Q")

    @classmethod
    def create(cls) -> VCpu:
        """Create a page, stopped, and its eventfds."""
        fd = os.memfd_create("migkit-vcpu", os.MFD_CLOEXEC)
        os.ftruncate(fd, PAGE_BYTES)
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        return cls(fd, os.eventfd(0, flags), os.eventfd(0, flags))

    def close(self) -> None:
        """Unmap the page and close its descriptors."""
        self.words.release()
        self._bytes.release()
        self._map.close()
        for fd in (self.page_fd, self.kick_fd, self.ack_fd):
            os.close(fd)

    # What the steering side does.

    @property
    def running(self) -> bool:
        """Whether the guest was last asked to run."""
        return self.words[Word.RUN_SEQ] % 2 == 1

    def ask(self, *, run: bool) -> int:
        """Ask the guest to run or to stop; return the sequence number to wait for."""
        seq = self.words[Word.RUN_SEQ]
        if (seq % 2 == 1) != run:
            seq += 1
            self.words[Word.RUN_SEQ] = seq
            os.eventfd_write(self.kick_fd, 1)
        return seq

    def wait(
        self, seq: int, timeout_s: float, serve: tuple[int, Callable[[], object]] | None = None
    ) -> None:
        """Wait until the guest has acted on a request.

        ``serve`` is a descriptor and what to call when it is readable: the guest may need that.

        Raises :class:`MigrationError` after ``timeout_s``: a guest that waits for a page of its
        memory cannot act.
        """
        deadline = time.monotonic() + timeout_s
        words = self.words
        while words[Word.ACK_SEQ] < seq:
            left = deadline - time.monotonic()
            if left <= 0 or words[Word.ERROR_SIZE]:
                verb = "start" if seq % 2 else "stop"
                reason = self.error() or "it may wait for a page, or be stopped or dead"
                raise MigrationError(f"the guest did not {verb} within {timeout_s} s: {reason}")
            fds = [self.ack_fd, serve[0]] if serve else [self.ack_fd]
            ready, _, _ = select.select(fds, [], [], min(left, 0.1))
            if serve and serve[0] in ready:
                serve[1]()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.ack_fd)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop the guest and wait until it stands still."""
        self.wait(self.ask(run=False), timeout_s)

    def start(self, timeout_s: float = 10.0) -> None:
        """Start the guest and wait until it has begun."""
        self.wait(self.ask(run=True), timeout_s)

    def load_state(self, size: int) -> bytes:
        """Return the CPU state of a stopped guest."""
        return bytes(self._bytes[STATE_OFFSET : STATE_OFFSET + size])

    def store_state(self, state: bytes) -> None:
        """Set the CPU state of a stopped guest."""
        if len(state) > STATE_BYTES:
            raise MigrationError(f"a CPU state of {len(state)} bytes exceeds {STATE_BYTES}")
        self._bytes[STATE_OFFSET : STATE_OFFSET + len(state)] = state

    def error(self) -> str:
        """Return what the guest died of, or an empty string."""
        size = min(self.words[Word.ERROR_SIZE], ERROR_BYTES)
        return bytes(self._bytes[ERROR_OFFSET : ERROR_OFFSET + size]).decode(errors="replace")

    # What the guest does.

    def acknowledge(self, seq: int) -> None:
        """Tell that a request has been acted on."""
        self.words[Word.ACK_SEQ] = seq
        os.eventfd_write(self.ack_fd, 1)

    def sleep(self, seq: int, timeout_s: float | None) -> None:
        """Sleep until the request is no longer ``seq``, or for a time."""
        if self.words[Word.RUN_SEQ] != seq:
            return
        select.select([self.kick_fd], [], [], timeout_s)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.kick_fd)

    def fail(self, message: str) -> None:
        """Leave a message for whoever finds the guest dead; the end of a long one counts."""
        data = message.encode()[-ERROR_BYTES:]
        self._bytes[ERROR_OFFSET : ERROR_OFFSET + len(data)] = data
        self.words[Word.ERROR_SIZE] = len(data)
