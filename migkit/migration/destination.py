"""The destination of a migration: it loads, listens for faults, places pages, closes.

One thread, one poll loop. What is waited for most urgently is looked at first: a fault, then
requested pages, then the stream. The stream is read in pieces, so that none of the others waits
longer than a piece takes.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time

import numpy as np

from migkit.errors import MigkitError, MigrationError, ProtocolError
from migkit.guest.vcpu import Word
from migkit.kernel.userfaultfd import Register
from migkit.migration import channel, return_path, states, wire
from migkit.migration.channel import Outgoing
from migkit.migration.control import ControlSocket
from migkit.migration.engine import Attachment, Deadline, Engine
from migkit.migration.framing import runs_of
from migkit.migration.loop import Loop
from migkit.migration.placing import HostPages, Placer
from migkit.migration.records import RECORD_BYTES, Page, Pages, PreemptDecoder
from migkit.migration.return_path import Message
from migkit.migration.serving import MAIN, PREEMPT, FaultServer
from migkit.migration.states import POSTCOPY_ORDER, PostcopyState, Status
from migkit.migration.stats import Counter
from migkit.migration.stream import (
    CommandReceived,
    Configuration,
    DeviceState,
    EndOfStream,
    Event,
    Header,
    Packaged,
    RamSetup,
    SectionBegins,
    SectionEnds,
    StreamDecoder,
)
from migkit.migration.wire import Command

_PIECE_PAGES = 256  # what is read of the stream between two looks at the faults
_BUSY_PIECE_PAGES = 8  # the same while faults are coming
_BUSY_S = 0.005
_SOURCE_TIMEOUT_S = 60.0


class Destination(Engine):
    """The incoming side: main loop, listen thread and fault thread of QEMU in one."""

    transitions = states.DESTINATION

    def __init__(self, control: ControlSocket, attachment: Attachment) -> None:
        """Stand ready; ``migrate-incoming`` begins."""
        super().__init__(control, attachment)
        self.commands["migrate-incoming"] = self.incoming
        self.placer = Placer(self.guest)
        self.postcopy = PostcopyState.NONE
        blocks = {self.ram.name: self.guest.layout}
        self.decoder = StreamDecoder(blocks)
        self.preempt_decoder = PreemptDecoder(blocks)
        self._main_pages = HostPages(self.ram.page_size)
        self._preempt_pages = HostPages(self.ram.page_size)
        self._rp_open = False
        self._guest_seen = False
        self._stream_ended = False
        self._listening = False

    # Setting up.

    def incoming(self, uri: str) -> dict[str, str]:
        """Listen at ``uri`` (``migrate-incoming``); return where, and load what comes."""
        self.listener, uri = channel.listen(uri)
        self.state.set(Status.NONE, Status.SETUP)
        self.later(self._load)()
        return {"uri": uri}

    def _load(self) -> None:
        self.loop = Loop()
        self.main: Outgoing | None = None
        self.preempt: socket.socket | None = None
        try:
            self._accept()
            self.state.set(Status.SETUP, Status.ACTIVE)
            try:
                self._serve_channels()
            finally:
                self.server.account()
            self._check_complete()
            self._finish()
        except (OSError, MigkitError) as error:
            self._failed(error)
        finally:
            self.loop.close()
            for sock in (self.main and self.main.sock, self.preempt, self.listener):
                if sock:
                    sock.close()

    def _accept(self) -> None:
        """Wait for the source's channels, main first; strangers are turned away."""
        poller = select.poll()
        poller.register(self.listener, select.POLLIN)
        poller.register(self.control, select.POLLIN)
        deadline = Deadline(_SOURCE_TIMEOUT_S)
        preempt = self.options.postcopy_preempt and self.options.postcopy_ram
        while not self.main or (preempt and not self.preempt):
            for fd, _ in poller.poll(1000):
                if fd == self.control.fileno():
                    self.read_control()
                    continue
                sock, _ = self.listener.accept()
                if not channel.is_trusted(sock):
                    sock.close()
                    continue
                channel.tune(sock)
                if self.main is None:
                    self.main = Outgoing(sock)
                else:
                    self.preempt = sock
            deadline.check("the source's connection")

    # The loop.

    def _serve_channels(self) -> None:
        main = self._main
        loop = self.loop
        self.server = FaultServer(
            self.guest, self.placer, self.counters, self.trace, loop, main.send_one
        )
        if self.preempt:
            loop.watch(self.preempt.fileno(), self._read_preempt, rank=1, urgent=True)
        loop.watch(main.sock.fileno(), self._read_main, rank=2)
        loop.sends(main)
        loop.watch(self.control.fileno(), self.read_control, rank=3)
        loop.watch(self.guest.pidfd, self._guest_died, rank=4)
        while not self._ended():
            loop.turn(1.0)

    def _ended(self) -> bool:
        """Whether both channels have come to their end; either may be first."""
        waits_for_preempt = self.preempt is not None and self._listening
        return self._stream_ended and (self.preempt_decoder.ended or not waits_for_preempt)

    def _read_main(self) -> None:
        busy = time.monotonic() - self.server.last_fault < _BUSY_S
        buffer = self.decoder.buffer
        self.decoder.most_pages = most = _BUSY_PIECE_PAGES if busy else _PIECE_PAGES
        room = buffer.room(most * RECORD_BYTES)
        try:
            n = self._main.sock.recv_into(room)
        except BlockingIOError:
            return
        if n == 0:
            raise ConnectionResetError("the source closed the main channel")
        buffer.tail += n
        while buffer.head < buffer.tail and (event := self.decoder.next()) is not None:
            if self._listening:
                self.loop.glance()
            self._handle(event)

    def _read_preempt(self) -> None:
        preempt, buffer = self.preempt, self.preempt_decoder.buffer
        if preempt is None:
            return
        try:
            n = preempt.recv_into(buffer.room(64 << 10))
        except BlockingIOError:
            return
        if n == 0:
            if self._listening and not self.preempt_decoder.ended:
                raise ConnectionResetError("the source closed the preempt channel")
            self.loop.forget(preempt.fileno())
            return
        buffer.tail += n
        while buffer.head < buffer.tail and (event := self.preempt_decoder.next()) is not None:
            if isinstance(event, Page):
                self.server.place_one(event)
            else:
                self.server.place(event, self._preempt_pages, PREEMPT)

    # The stream.

    def _handle(self, event: Event) -> None:
        match event:
            case Pages():
                if self._listening:
                    self.server.place(event, self._main_pages, MAIN)
                else:
                    self._write(event)
            case SectionBegins() | SectionEnds() | Header():
                pass
            case CommandReceived(command, data):
                self._command(command, data)
            case Configuration(machine):
                self._check("workload (machine type)", machine, self.guest.identity)
            case RamSetup(blocks):
                self._check_blocks(blocks)
            case Packaged(blob):
                self._package(blob)
            case DeviceState(_, data):
                self._load_cpu(data)
            case EndOfStream():
                self._end_of_stream()

    def _command(self, command: Command, data: bytes) -> None:
        trace = self.trace
        trace.loadvm_process_command(command.name, len(data))
        match command:
            case Command.OPEN_RETURN_PATH:
                self._rp_open = True
            case Command.PING:
                value = int.from_bytes(data, "big")
                trace.loadvm_process_command_ping(value)
                self._reply(Message.PONG, return_path.pong(value))
            case Command.POSTCOPY_ADVISE:
                trace.loadvm_postcopy_handle_advise()
                self._go(PostcopyState.ADVISE)
                summary, target = struct.unpack(">QQ", data)
                self._check("host page sizes", summary, self.ram.page_size)
                self._check("target page size", target, wire.TARGET_PAGE)
            case Command.POSTCOPY_RAM_DISCARD:
                self._discard(data)
            case Command.PACKAGED:
                trace.loadvm_handle_cmd_packaged(int.from_bytes(data, "big"))
            case Command.POSTCOPY_LISTEN:
                self._listen()
            case Command.POSTCOPY_RUN:
                self._run_guest()
            case Command.SWITCHOVER_START:
                pass
            case _:
                raise ProtocolError(f"command {command.name} out of turn")

    def _check(self, what: str, theirs: object, ours: object) -> None:
        if theirs != ours:
            raise MigrationError(f"{what}: the source has {theirs}, the destination has {ours}")

    def _check_blocks(self, blocks: tuple[wire.BlockLayout, ...]) -> None:
        ours = self.guest.layout
        names = ", ".join(block.name for block in blocks)
        self._check("RAM blocks", names, ours.name)
        self._check(f"size of RAM block {ours.name}", blocks[0].size, ours.size)
        self._check(f"page size of RAM block {ours.name}", blocks[0].page_size, ours.page_size)

    def _write(self, pages: Pages) -> None:
        """Load pages before post-copy, while no guest runs."""
        zero = pages.address == 0
        source = self._main_pages
        if source.huge:
            for page, data in source.assemble(pages):
                self.placer.write(np.array((page,)), data)
                self._loaded(1, zero=data is None)
        else:
            numbers = pages.offsets // wire.TARGET_PAGE
            self.placer.write(numbers, None if zero else source.strip(pages))
            self._loaded(len(numbers), zero=zero)
        if self.trace.on("ram_load_range"):
            self._trace_load(pages)

    def _loaded(self, count: int, *, zero: bool) -> None:
        self.counters[Counter.PRECOPY_PAGES] += count
        if zero:
            self.counters[Counter.ZERO_PAGES] += count

    def _trace_load(self, pages: Pages) -> None:
        zero = pages.address == 0
        for first, count in runs_of(pages.offsets // wire.TARGET_PAGE):
            self.trace.ram_load_range(
                self.ram.name, first * wire.TARGET_PAGE, count * wire.TARGET_PAGE, zero
            )

    def _discard(self, data: bytes) -> None:
        trace = self.trace
        trace.loadvm_postcopy_ram_handle_discard()
        self._go(PostcopyState.DISCARD)
        name_end = 2 + data[1] if len(data) > 1 else 0
        ranges = data[name_end + 1 :]
        if len(data) < 3 or data[0] != 0 or len(ranges) % 16 or len(ranges) > 16 * 12:
            raise ProtocolError(f"a discard of {len(data)} bytes, version {data[:1].hex()}")
        name = data[2:name_end].decode(errors="replace")
        self._check("RAM block to discard from", name, self.ram.name)
        trace.loadvm_postcopy_ram_handle_discard_header(name, len(ranges))
        for start, length in struct.iter_unpack(">QQ", ranges):
            self.placer.discard(start, length)
            self.counters[Counter.DISCARDED_PAGES] += length // self.ram.page_size
            trace.ram_discard_range(name, start, length)
        trace.loadvm_postcopy_ram_handle_discard_end()

    def _package(self, blob: bytes) -> None:
        self.hold_announcements()
        self.trace.loadvm_handle_cmd_packaged_received(0)
        for event in self.decoder.nested(blob):
            self._handle(event)
        self.trace.loadvm_handle_cmd_packaged_main(0)
        self.trace.process_incoming_migration_co_postcopy_end_main()

    def _load_cpu(self, data: bytes) -> None:
        self._check("size of the CPU state", len(data), self.guest.state_size)
        self.guest.vcpu.store_state(data)

    # Post-copy.

    def _listen(self) -> None:
        """From here on faults of the guest are ours, and pages are placed atomically."""
        trace, guest = self.trace, self.guest
        trace.loadvm_postcopy_handle_listen("")
        self._go(PostcopyState.LISTENING)
        trace.postcopy_ram_fault_thread_entry()
        guest.uffd.register(guest.address, guest.ram.size, Register.MISSING)
        trace.postcopy_ram_enable_notify()
        self.loop.watch(guest.uffd.fd, self.server.read_faults, rank=0, urgent=True)
        self.state.set(Status.ACTIVE, Status.POSTCOPY_ACTIVE)
        self._listening = True
        trace.postcopy_ram_listen_thread_start()

    def _run_guest(self) -> None:
        self.trace.loadvm_postcopy_handle_run()
        if self._listening:
            self._go(PostcopyState.RUNNING)
        self.trace.runstate_set(6, "inmigrate", 9, "running")
        self.loop.watch(self.guest.vcpu.ack_fd, self._see_guest, rank=5)
        self.guest.vcpu.ask(run=True)
        os.sched_yield()  # the guest has stood still long enough: let it have this CPU

    def _see_guest(self) -> None:
        """Note the guest's first instruction, once."""
        words = self.guest.vcpu.words
        if words[Word.ACK_SEQ] == words[Word.RUN_SEQ]:
            self.loop.forget(self.guest.vcpu.ack_fd)
            self.trace.guest_started(words[Word.STARTED_NS], words[Word.STEP])
            self._guest_seen = True
            self.release_announcements()

    # What goes back.

    def _reply(self, kind: Message, data: bytes) -> None:
        if not self._rp_open:
            raise ProtocolError(f"{kind.name} is due, but the return path was not opened")
        self.trace.migrate_send_rp_message(kind, len(data) - 4)
        self._main.send_one(data)

    def _go(self, new: PostcopyState) -> None:
        if new not in POSTCOPY_ORDER[self.postcopy]:
            raise ProtocolError(f"post-copy cannot go from {self.postcopy} to {new}")
        self.postcopy = new

    # The end.

    def _guest_died(self) -> None:
        raise MigrationError(
            "the destination guest died: "
            + (self.guest.vcpu.error() or "killed")
            + ("; its memory is lost" if self._listening else "")
        )

    def _end_of_stream(self) -> None:
        self._stream_ended = True

    def _check_complete(self) -> None:
        missing = len(self.placer.received) - int(np.count_nonzero(self.placer.received))
        if missing:
            raise ProtocolError(f"the stream ended with {missing} pages missing")

    def _finish(self) -> None:
        trace = self.trace
        if self._listening:
            trace.postcopy_ram_listen_thread_exit()
            self._go(PostcopyState.END)
            trace.postcopy_ram_incoming_cleanup_entry()
            trace.postcopy_ram_incoming_cleanup_join()
            trace.postcopy_ram_fault_thread_quit()
            trace.postcopy_ram_fault_thread_exit()
            # Holes that were never touched are zero pages now; whoever waits on one is woken.
            self.guest.uffd.unregister(self.guest.address, self.ram.size)
            trace.postcopy_ram_incoming_cleanup_closeuf()
            trace.postcopy_ram_incoming_cleanup_exit()
        else:
            self._run_guest()
        self._await_guest()
        old = Status.POSTCOPY_ACTIVE if self._listening else Status.ACTIVE
        if self._rp_open:
            self._reply(Message.SHUT, return_path.shut(0))
            self._drain()
        self.state.set(old, Status.COMPLETED)
        trace.process_incoming_migration_co_end(0)

    def _await_guest(self) -> None:
        deadline = Deadline(10.0)
        while not self._guest_seen:
            select.select([self.guest.vcpu.ack_fd], [], [], 0.1)
            self._see_guest()
            deadline.check("the guest's first step")

    def _drain(self) -> None:
        deadline = Deadline(10.0)
        while not self._main.flush():
            select.select([], [self._main.sock], [], 0.1)
            deadline.check("room in the return path")

    def _failed(self, error: Exception) -> None:
        """Report; before the guest ran nothing is lost, after it what came is kept."""
        self.release_announcements()
        self.control.event("ERROR", desc=str(error) or type(error).__name__)
        before = self.state.status
        if before == Status.POSTCOPY_ACTIVE and isinstance(error, OSError):
            self.trace.postcopy_pause_fault_thread()
            self.state.set(before, Status.POSTCOPY_PAUSED)
        else:
            self.state.set(before, Status.FAILED)
            if self._rp_open and self.main:
                try:
                    self._reply(Message.SHUT, return_path.shut(1))
                    self._drain()
                except (OSError, MigkitError):
                    pass

    @property
    def _main(self) -> Outgoing:
        if self.main is None:
            raise MigrationError("no source is connected")
        return self.main
