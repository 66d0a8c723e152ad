"""The source's end of the channels: it sends the stream and reads what comes back.

The main channel carries the stream out and the return path back; the preempt channel carries
requested pages, which so never wait behind background pages in a socket's buffer. Whatever waits
in the loop is interrupted by a request: that is the whole point of it.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

import numpy as np

from migkit.errors import MigrationError
from migkit.kernel.memory import RamBlock
from migkit.migration import bitmap, wire
from migkit.migration.channel import Outgoing, RateLimiter, connect
from migkit.migration.engine import Deadline
from migkit.migration.framing import Indices, PageFramer, runs_of
from migkit.migration.loop import Loop
from migkit.migration.return_path import Incoming, PageRequest, ReturnPathDecoder
from migkit.migration.wire import BlockLayout, Command
from migkit.trace.emit import Tracer

BATCH_BYTES = 1 << 20  # what is framed at once: 256 pages of 4 KiB
_SECTION_BYTES = 16 << 20  # a section is closed now and then, so that its end shows in a trace
_STALL_S = 30.0


class Outbound:
    """Both channels of a source, and the loop that serves them."""

    def __init__(
        self,
        uri: str,
        ram: RamBlock,
        trace: Tracer,
        *,
        preempt: bool,
        on_message: Callable[[Incoming], None],
        check_cancel: Callable[[], None],
    ) -> None:
        """Connect. ``on_message`` gets what the destination says on the return path.

        ``check_cancel`` ends a wait by raising, when somebody gave up meanwhile.
        """
        self.trace = trace
        self.main = Outgoing(connect(uri))
        self.preempt = Outgoing(connect(uri)) if preempt else None
        layout = BlockLayout(ram.name, ram.size, ram.page_size)
        self.batch_pages = max(1, BATCH_BYTES // ram.page_size)
        self._framer = PageFramer(ram, self.batch_pages)
        # Requested pages are framed apart: they come while a batch is half sent.
        self._urgent = PageFramer(ram, 1)
        self._ram = ram
        self._small = ram.page_size == wire.TARGET_PAGE
        self._on_message = on_message
        self._check_cancel = check_cancel
        self._decoder = ReturnPathDecoder({ram.name: bitmap.encoded_size(layout)})
        self.return_path_open = True
        self._in_section = False
        self._section_sent = 0
        self._finished = False
        self.urgent_zeros = 0
        self.loop = Loop()
        self.loop.watch(self.main.sock.fileno(), self._read_return_path, rank=0, urgent=True)
        self.loop.sends(self.main)
        if self.preempt:
            self.loop.watch(self.preempt.sock.fileno(), self._preempt_gone, rank=1)
            self.loop.sends(self.preempt)

    def close(self) -> None:
        """Close both channels."""
        self.loop.close()
        self.main.sock.close()
        if self.preempt:
            self.preempt.sock.close()

    # The loop.

    def drain(self) -> None:
        """Pump until all that was sent is with the kernel."""
        self._flush(lambda: self.main.pending or bool(self.preempt and self.preempt.pending))

    def await_turn(self, limiter: RateLimiter) -> None:
        """Pump until the last batch is with the kernel and the limiter lets the next one go."""
        self.loop.turn(0)
        self._flush(lambda: self.main.pending)
        wait = limiter.wait_s()
        if wait > 0:
            self.trace.migration_rate_limit_pre(int(wait * 1000))
            end = time.monotonic() + wait
            while (left := end - time.monotonic()) > 0:
                self.loop.turn(left)
            self.trace.migration_rate_limit_post(0)

    def _flush(self, waiting: Callable[[], bool]) -> None:
        sent, deadline = self.main.sent_bytes, Deadline(_STALL_S)
        while waiting():
            self.loop.turn(1.0)
            self._check_cancel()
            if self.main.sent_bytes != sent:
                sent, deadline = self.main.sent_bytes, Deadline(_STALL_S)
            deadline.check("room in the main channel")

    def wait_for(
        self, happened: Callable[[], bool], what: str, timeout_s: float = _STALL_S
    ) -> None:
        """Pump until something has happened; raises :class:`TimeoutError` after a time."""
        deadline = Deadline(timeout_s)
        while not happened():
            if not self.return_path_open:
                raise MigrationError(f"the return path ended before {what} came")
            self.loop.turn(0.1)
            self._check_cancel()
            deadline.check(what)

    def _read_return_path(self) -> None:
        try:
            data = self.main.sock.recv(16384)
        except BlockingIOError:
            return
        if not data:
            self.return_path_open = False
            raise ConnectionResetError("the destination closed the main channel")
        for message in self._decoder.feed(data):
            self._on_message(message)
        self.trace.source_return_path_thread_loop_top()

    def read_rest(self) -> None:
        """Read what the destination still said on a return path that has broken since."""
        with contextlib.suppress(OSError):
            while data := self.main.sock.recv(16384):
                for message in self._decoder.feed(data):
                    if not isinstance(message, PageRequest):
                        self._on_message(message)

    def _preempt_gone(self) -> None:
        if self._finished and self.preempt:
            self.loop.forget(self.preempt.sock.fileno())
            return
        raise ConnectionResetError("the destination closed the preempt channel")

    # What is sent.

    def command(self, kind: Command, data: bytes = b"") -> None:
        """Send a command between two sections."""
        self.end_section()
        self.trace.savevm_command_send(kind, len(data))
        self.main.send(wire.command(kind, data))

    def ping(self, value: int) -> None:
        """Send a PING; the destination answers it when it has read all before it."""
        self.trace.savevm_send_ping(value)
        self.command(Command.PING, value.to_bytes(4, "big"))

    def cut(self) -> None:
        """Shut both channels down: the loop will find them broken, here and beyond."""
        for outgoing in (self.main, self.preempt):
            if outgoing:
                with contextlib.suppress(OSError):
                    outgoing.sock.shutdown(socket.SHUT_RDWR)

    def raw(self, data: bytes) -> None:
        """Send bytes between two sections."""
        self.end_section()
        self.main.send(data)

    def package(self, state: bytes) -> None:
        """Send the guest's CPU state, and with it the guest: LISTEN, state, RUN in one piece."""
        trace = self.trace
        trace.savevm_send_postcopy_listen()
        trace.savevm_send_postcopy_run()
        blob = (
            wire.command(Command.POSTCOPY_LISTEN)
            + wire.device_state(wire.CPU_SECTION, state)
            + wire.ping(wire.PING_PACKAGE)
            + wire.command(Command.POSTCOPY_RUN)
        )
        trace.qemu_savevm_send_packaged()
        self.raw(wire.packaged(blob))
        self.ping(wire.PING_LISTENING)

    def begin_section(self) -> None:
        """Begin a section of RAM if none is open."""
        if self._in_section and self.main.sent_bytes - self._section_sent > _SECTION_BYTES:
            self.end_section()
        if not self._in_section:
            self.trace.savevm_state_iterate()
            self.trace.savevm_section_start("ram", wire.RAM_SECTION)
            self.main.send(wire.section_part(wire.RAM_SECTION))
            self._in_section = True
            self._section_sent = self.main.sent_bytes

    def end_section(self) -> None:
        """End the section of RAM if one is open."""
        if self._in_section:
            self.main.send(wire.EOS + wire.section_footer(wire.RAM_SECTION))
            self.trace.savevm_section_end("ram", wire.RAM_SECTION, 0)
            self._in_section = False

    def last_section(self) -> None:
        """Send the END section of RAM, empty: all pages went before it.

        The preempt channel ends with an EOS of its own, for which the destination waits: what
        comes last on the main channel may overtake it.
        """
        if self.preempt:
            self.preempt.send(wire.EOS)
        self._finished = True
        self.end_section()
        self.trace.savevm_section_start("ram", wire.RAM_SECTION)
        self.main.send(
            wire.section_part(wire.RAM_SECTION, end=True)
            + wire.EOS
            + wire.section_footer(wire.RAM_SECTION)
        )
        self.trace.savevm_section_end("ram", wire.RAM_SECTION, 0)

    def pages(self, pages: Indices, present: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> int:
        """Send a batch of pages in ascending order, return how many of them were zero.

        ``present`` (n_pages,) says which may be loaded; the others are zero. The staging buffer
        is in use until :attr:`main` has nothing pending. Requests are answered between framing
        and sending, so these pages must no longer count as dirty.
        """
        self.begin_section()
        zero = ~present[pages]
        loaded = pages[~zero] if zero.any() else pages
        if len(loaded):
            blank = self._framer.zero_mask(loaded)
            if blank.any():
                zero[np.searchsorted(pages, loaded[blank])] = True
                loaded = loaded[~blank]
            if len(loaded):
                framed = self._framer.data(loaded)
                self.loop.glance()
                self.main.send(*framed)
                self._trace_ranges(loaded, 0)
        zeros = pages[zero]
        if len(zeros):
            self.main.send(*self._framer.zeros(zeros))
            self._trace_ranges(zeros, 1)
        return len(zeros)

    def urgent_page(self, page: int, *, present: bool) -> None:
        """Send a requested page ahead of all others."""
        out = self.preempt
        if out is None:
            self.begin_section()
            out = self.main
        zero = not present or self._urgent.is_zero(page)
        if not zero and self._small:
            out.send(*self._urgent.one(page))
            return
        if zero:
            parts = self._urgent.zeros(np.array((page,)))
        else:
            parts = [bytes(part) for part in self._urgent.data(np.array((page,)))]
        out.send(*parts)
        self.urgent_zeros += zero

    def _trace_ranges(self, pages: Indices, kind: int) -> None:
        if self.trace.on("ram_save_range"):
            size = self._ram.page_size
            for first, count in runs_of(pages):
                self.trace.ram_save_range(self._ram.name, first * size, count * size, kind)
