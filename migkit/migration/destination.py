"""The destination of a migration: it loads, listens for faults, places pages, closes.

One thread, one poll loop. What is waited for most urgently is looked at first: a fault, then
requested pages, then the stream. The stream is read in pieces, so that none of the others waits
longer than a piece takes.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct

import numpy as np

from migkit.errors import MigkitError, MigrationError, ProtocolError
from migkit.guest.vcpu import Word
from migkit.kernel.userfaultfd import Register
from migkit.migration import bitmap, return_path, states, wire
from migkit.migration.control import ControlSocket
from migkit.migration.engine import Attachment, Deadline, Engine
from migkit.migration.inbound import Inbound
from migkit.migration.loading import Loader, require_memory, require_same, require_same_blocks
from migkit.migration.loop import Loop
from migkit.migration.placing import HostPages, Placer
from migkit.migration.records import Page, Pages
from migkit.migration.return_path import Message
from migkit.migration.serving import MAIN, PREEMPT, FaultServer
from migkit.migration.states import POSTCOPY_ORDER, PostcopyState, Status
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
)
from migkit.migration.wire import Command

_SOURCE_TIMEOUT_S = 60.0


class Destination(Engine):
    """The incoming side: main loop, listen thread and fault thread of QEMU in one."""

    transitions = states.DESTINATION

    def __init__(self, control: ControlSocket, attachment: Attachment) -> None:
        """Stand ready; ``migrate-incoming`` begins."""
        super().__init__(control, attachment)
        self.commands |= {
            "migrate-incoming": self.incoming,
            "migrate-recover": self.recover,
            "migrate-pause": self.pause,
        }
        self.placer = Placer(self.guest, self.pages)
        self.postcopy = PostcopyState.NONE
        self.loop = Loop()
        self.inbound = Inbound(
            self.loop,
            self.guest.layout,
            preempt=self.options.postcopy_preempt and self.options.postcopy_ram,
            on_connected=self._connected,
            on_event=self._handle,
            on_requested=self._place_requested,
            last_fault=lambda: self.server.last_fault,
        )
        self.server = FaultServer(
            self.guest,
            self.placer,
            self.pages,
            self.counters,
            self.trace,
            self.loop,
            self.inbound.send,
        )
        self._main_pages = HostPages(self.ram.page_size)
        self._preempt_pages = HostPages(self.ram.page_size)
        self.loader = Loader(self.ram, self.placer, self._main_pages, self.counters, self.trace)
        self._rp_open = False
        self._guest_seen = False
        self._stream_ended = False
        self._listening = False
        self._source_due: Deadline | None = None
        self._broken: Exception | None = None
        self.loop.watch(control.fileno(), self.read_control, rank=3)
        self.loop.watch(self.guest.pidfd, self._guest_died, rank=4)
        if attachment.paused_ns:
            self._take_over()

    def _take_over(self) -> None:
        """Go on in the place of an engine that died while the guest ran here.

        What it had read of faults died with it: the guest's threads are woken, so that they
        fault, and tell, again.
        """
        self.postcopy = PostcopyState.RUNNING
        self.placer.lenient = True
        self.server.asks = False
        self.inbound.take_over()
        self._rp_open = True
        self._listen_for_faults()
        self.loop.watch(self.guest.vcpu.ack_fd, self._see_guest, rank=5)
        self.guest.uffd.wake(self.guest.address, self.ram.size)

    # Commands.

    def incoming(self, uri: str, peer: int | None = None) -> dict[str, str]:
        """Listen at ``uri`` (``migrate-incoming``); return where, and load what comes.

        ``peer`` is the process id of the source: whoever else connects is turned away.
        """
        uri = self.inbound.listen(uri, peer)
        self._source_due = Deadline(_SOURCE_TIMEOUT_S)
        self.state.set(Status.NONE, Status.SETUP)
        self.later(self._load)()
        return {"uri": uri}

    def recover(self, uri: str, peer: int | None = None) -> dict[str, str]:
        """Listen anew at ``uri`` for the source of a paused migration (``migrate-recover``).

        A source that missed the last SHUT is paused though we have completed: it may come again
        and is told once more.
        """
        if self.state.status not in (Status.POSTCOPY_PAUSED, Status.COMPLETED):
            raise MigrationError(f"only a paused migration can be recovered: {self._here()}")
        uri = self.inbound.listen(uri, peer)
        if not self.is_busy:
            self.later(self._load)()
        return {"uri": uri}

    def pause(self) -> None:
        """Break post-copy's channels off (``migrate-pause``); it can be recovered."""
        if self.state.status != Status.POSTCOPY_ACTIVE:
            raise MigrationError(f"only post-copy can be paused: {self._here()}")
        self._broken = ConnectionAbortedError("paused by hand")

    def _here(self) -> str:
        return f"the destination is {self.state.status}"

    # The loop.

    def _load(self) -> None:
        """Serve channels and faults until the stream has ended, through every break."""
        self._stream_ended = False
        try:
            while not self._ended():
                try:
                    self.loop.turn(1.0)
                    if self._source_due:
                        self._source_due.check("the source's connection")
                    if self._broken:
                        raise self._broken
                except (OSError, ProtocolError) as error:
                    self._pause(error)
            self._check_complete()
            self._finish()
        except (OSError, MigkitError) as error:
            self._failed(error)
        finally:
            self.server.account()
            self.inbound.close()

    def _ended(self) -> bool:
        """Whether both channels have come to their end; either may be first."""
        return self._stream_ended and (self.inbound.preempt_ended or not self._listening)

    def _connected(self) -> None:
        self._source_due = None
        if self.state.status == Status.SETUP:
            self.state.set(Status.SETUP, Status.ACTIVE)
        elif self.state.status == Status.POSTCOPY_PAUSED:
            self.state.set(Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER)

    # Breaks.

    def _pause(self, error: Exception) -> None:
        """Keep what has come and wait for a new source; raise the error if we cannot wait.

        The guest runs here, and the other part of its memory is at the source. Faults are read
        on: those on pages that are here are answered, the others are asked for after the break.
        """
        self._broken = None
        if isinstance(error, ProcessLookupError):
            self._guest_died()  # UFFDIO_COPY notices before the pidfd tells
        before = self.state.status
        can_wait = before in (Status.POSTCOPY_ACTIVE, Status.POSTCOPY_RECOVER)
        if not can_wait or self.postcopy != PostcopyState.RUNNING:
            raise error
        self.release_announcements()
        trace = self.trace
        trace.postcopy_pause_incoming()
        trace.postcopy_pause_fault_thread()
        self.inbound.drop()
        self.server.asks = False
        self._main_pages = HostPages(self.ram.page_size)
        self._preempt_pages = HostPages(self.ram.page_size)
        self._stream_ended = False
        self.control.event("PAUSED", desc=str(error) or type(error).__name__)
        self.state.set(before, Status.POSTCOPY_PAUSED)

    def _send_bitmap(self, data: bytes) -> None:
        """Tell which pages are here, after a break."""
        name = data[1:].decode(errors="replace")
        self.trace.loadvm_handle_recv_bitmap(name)
        require_same("RAM block of the bitmap", name, self.ram.name)
        raw = bitmap.encode(self.placer.received, self.guest.layout)
        self.trace.migrate_send_rp_message(Message.RECV_BITMAP, 1 + len(name))
        self.inbound.send(return_path.received_bitmap(name, raw))

    def _resume(self) -> None:
        """Go on after a break: ask again for what is outstanding."""
        trace = self.trace
        trace.loadvm_postcopy_handle_resume()
        if self.state.status != Status.COMPLETED and not self.state.set(
            Status.POSTCOPY_RECOVER, Status.POSTCOPY_ACTIVE
        ):
            raise ProtocolError(f"RESUME out of turn: {self._here()}")
        trace.postcopy_pause_fault_thread_continued()
        trace.postcopy_pause_incoming_continued()
        self._reply(Message.RESUME_ACK, return_path.resume_ack())
        self.server.ask_again()

    # The stream.

    def _handle(self, event: Event) -> None:
        match event:
            case Pages():
                if self._listening:
                    self.server.place(event, self._main_pages, MAIN)
                else:
                    self.loader.write(event)
            case SectionBegins() | SectionEnds() | Header():
                pass
            case CommandReceived(command, data):
                self._command(command, data)
            case Configuration(machine):
                require_same("workload (machine type)", machine, self.guest.identity)
            case RamSetup(blocks):
                require_same_blocks(blocks, self.guest.layout)
                require_memory(self.guest)
                if self.options.switchover_ack:
                    self.trace.loadvm_approve_switchover(0)
                    self._reply(Message.SWITCHOVER_ACK, return_path.switchover_ack())
            case Packaged(blob):
                self._package(blob)
            case DeviceState(_, data):
                self._load_cpu(data)
            case EndOfStream():
                self._end_of_stream()

    def _place_requested(self, pages: Page | Pages) -> None:
        if isinstance(pages, Page):
            self.server.place_one(pages)
        else:
            self.server.place(pages, self._preempt_pages, PREEMPT)

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
                require_same("host page sizes", summary, self.ram.page_size)
                require_same("target page size", target, wire.TARGET_PAGE)
            case Command.POSTCOPY_RAM_DISCARD:
                trace.loadvm_postcopy_ram_handle_discard()
                self._go(PostcopyState.DISCARD)
                self.loader.discard(data)
            case Command.PACKAGED:
                trace.loadvm_handle_cmd_packaged(int.from_bytes(data, "big"))
            case Command.POSTCOPY_LISTEN:
                self._listen()
            case Command.POSTCOPY_RUN:
                self._run_guest()
            case Command.SWITCHOVER_START:
                pass
            case Command.RECV_BITMAP:
                self._send_bitmap(data)
            case Command.POSTCOPY_RESUME:
                self._resume()

    def _package(self, blob: bytes) -> None:
        self.hold_announcements()
        self.trace.loadvm_handle_cmd_packaged_received(0)
        for event in self.inbound.decoder.nested(blob):
            self._handle(event)
        self.trace.loadvm_handle_cmd_packaged_main(0)
        self.trace.process_incoming_migration_co_postcopy_end_main()

    def _load_cpu(self, data: bytes) -> None:
        require_same("size of the CPU state", len(data), self.guest.state_size)
        self.guest.vcpu.store_state(data)

    # Post-copy.

    def _listen(self) -> None:
        """From here on faults of the guest are ours, and pages are placed atomically."""
        self.trace.loadvm_postcopy_handle_listen("")
        self._go(PostcopyState.LISTENING)
        self._listen_for_faults()
        self.state.set(Status.ACTIVE, Status.POSTCOPY_ACTIVE)
        self.trace.postcopy_ram_listen_thread_start()

    def _listen_for_faults(self) -> None:
        trace, guest = self.trace, self.guest
        trace.postcopy_ram_fault_thread_entry()
        guest.uffd.register(guest.address, guest.ram.size, Register.MISSING)
        trace.postcopy_ram_enable_notify()
        self.loop.watch(guest.uffd.fd, self.server.read_faults, rank=0, urgent=True)
        self._listening = self.inbound.listening = True

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
        self.inbound.send(data)

    def _go(self, new: PostcopyState) -> None:
        if new not in POSTCOPY_ORDER[self.postcopy]:
            raise ProtocolError(f"post-copy cannot go from {self.postcopy} to {new}")
        self.postcopy = new

    # The end.

    def _guest_died(self) -> None:
        reason = self.guest.vcpu.error() or "it was killed"
        if self._listening:
            raise MigrationError(
                "the guest's memory is lost for good: the destination guest died in post-copy "
                f"({reason})"
            )
        raise MigrationError(f"the destination guest died: {reason}")

    def _end_of_stream(self) -> None:
        self._stream_ended = True

    def _check_complete(self) -> None:
        missing = len(self.placer.received) - int(np.count_nonzero(self.placer.received))
        if missing:
            raise ProtocolError(f"the stream ended with {missing} pages missing")

    def _finish(self) -> None:
        before = self.state.status
        if before == Status.COMPLETED:
            pass  # the source comes again, for a SHUT that it missed
        elif self._listening:
            self._stop_listening()
        else:
            self._run_guest()
        self._await_guest()
        if self._rp_open:
            self._reply(Message.SHUT, return_path.shut(0))
            self._drain()
        self.server.account()  # who hears that we have completed finds the counters complete
        if before != Status.COMPLETED:
            self.state.set(before, Status.COMPLETED)
            self.trace.process_incoming_migration_co_end(0)

    def _stop_listening(self) -> None:
        """Give the guest's faults back to the kernel: all its pages are here."""
        trace = self.trace
        trace.postcopy_ram_listen_thread_exit()
        self._go(PostcopyState.END)
        trace.postcopy_ram_incoming_cleanup_entry()
        trace.postcopy_ram_incoming_cleanup_join()
        trace.postcopy_ram_fault_thread_quit()
        trace.postcopy_ram_fault_thread_exit()
        # Holes that were never touched are zero pages now; whoever waits on one is woken.
        self.guest.uffd.unregister(self.guest.address, self.ram.size)
        self.loop.forget(self.guest.uffd.fd)
        trace.postcopy_ram_incoming_cleanup_closeuf()
        trace.postcopy_ram_incoming_cleanup_exit()

    def _await_guest(self) -> None:
        deadline = Deadline(10.0)
        while not self._guest_seen:
            ready, _, _ = select.select([self.guest.vcpu.ack_fd, self.guest.pidfd], [], [], 0.1)
            if self.guest.pidfd in ready:
                self._guest_died()
            self._see_guest()
            deadline.check("the guest's first step")

    def _drain(self) -> None:
        """Wait until the return path is with the kernel; a broken one is the source's to find."""
        main, deadline = self.inbound.main, Deadline(10.0)
        with contextlib.suppress(ConnectionError):
            while main and not main.flush():
                select.select([], [main.sock], [], 0.1)
                deadline.check("room in the return path")

    def _failed(self, error: Exception) -> None:
        """Report; before the switch nothing is lost, after it what came is kept."""
        self.release_announcements()
        self.control.event("ERROR", desc=str(error) or type(error).__name__)
        if self.state.status == Status.COMPLETED:
            return  # the guest is here, whole; a source that came again for a SHUT is still unsure
        self.state.set(self.state.status, Status.FAILED)
        if self.postcopy not in (PostcopyState.RUNNING, PostcopyState.END):
            # As a QEMU that fails to load exits: the source may then run its guest again.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.guest.pidfd, signal.SIGKILL)
        if self._rp_open:
            self._reply(Message.SHUT, return_path.shut(1))
            self._drain()
