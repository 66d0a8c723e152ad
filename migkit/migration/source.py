"""The source of a migration: set-up, pre-copy, switchover, post-copy, the end.

The guest runs here until the switchover; whatever fails before that is a failure of the
migration and not of the guest, which runs on. From the moment at which the package with its CPU
state is sent the guest never runs here again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np

from migkit.errors import MigrationError, ProtocolError
from migkit.guest.vcpu import Word
from migkit.migration import states, wire
from migkit.migration.answers import Answers
from migkit.migration.asked import Asked, Cancelled
from migkit.migration.background import Background
from migkit.migration.channel import RateLimiter
from migkit.migration.control import ControlSocket
from migkit.migration.dirty import DirtyLog, sync
from migkit.migration.discarding import discard_ahead, discard_stale
from migkit.migration.engine import Attachment, Engine
from migkit.migration.outbound import Outbound
from migkit.migration.pacing import Pacing
from migkit.migration.precopy import Precopy
from migkit.migration.return_path import Incoming, Message, PageRequest, Value
from migkit.migration.states import Status
from migkit.migration.stats import Counter
from migkit.migration.supply import PageSupply
from migkit.migration.wire import Command

_RECOVERING = (Status.POSTCOPY_RECOVER_SETUP, Status.POSTCOPY_RECOVER)


class Source(Engine):
    """The migration thread of the source."""

    transitions = states.SOURCE

    def __init__(self, control: ControlSocket, attachment: Attachment) -> None:
        """Stand ready; ``migrate`` begins."""
        super().__init__(control, attachment)
        self.commands |= {
            "migrate": self.migrate,
            "migrate-start-postcopy": self.start_postcopy,
            "migrate_cancel": self.cancel,
            "migrate-pause": self.pause,
            "migrate-continue": self.continue_,
            "take-back": self.take_back,
        }
        self.answers = Answers(self.trace, self.guest.layout)
        self.answers.is_open = bool(attachment.paused_ns)
        self.asked = Asked()
        self.committed = bool(attachment.paused_ns)
        self.guest_stopped = self.committed
        self.completing = False
        self.log: DirtyLog | None = None
        self.out: Outbound | None = None
        self.supply: PageSupply | None = None
        self.pacing: Pacing | None = None
        self.background: Background | None = None

    # Commands.

    def start_postcopy(self) -> None:
        """Switch to post-copy as soon as may be (``migrate-start-postcopy``)."""
        if not self.options.postcopy_ram:
            raise MigrationError("post-copy is off: run with postcopy='manual' to start it by hand")
        self.asked.postcopy = True

    def cancel(self) -> None:
        """Give up before the switchover (``migrate_cancel``)."""
        if self.committed:
            reason = (
                "the guest runs at the destination, part of its memory is still here"
                if self._pages.in_postcopy
                else "the guest has been handed over"
            )
            raise MigrationError(
                f"a migration in {self.state.status} cannot be cancelled: {reason}"
            )
        self.asked.cancel = True

    def pause(self) -> None:
        """Break post-copy's channels off (``migrate-pause``); it can be recovered."""
        if self.state.status != Status.POSTCOPY_ACTIVE:
            raise MigrationError(f"only post-copy can be paused: the source is {self.state.status}")
        self._out.cut()

    def continue_(self) -> None:
        """Go on from ``pre-switchover`` (``migrate-continue``)."""
        if self.state.status != Status.PRE_SWITCHOVER:
            raise MigrationError(
                f"only pre-switchover is continued from: the source is {self.state.status}"
            )
        self.asked.continue_ = True

    def take_back(self) -> None:
        """Let the guest go on here: the destination never ran it, and never will."""
        self.asked.take_back = True
        if not self.is_busy:
            self._resume_guest()
            if self.state.set(Status.POSTCOPY_PAUSED, Status.FAILED):
                self._put_down()

    def migrate(self, uri: str, *, resume: bool = False) -> None:
        """Move the guest to whoever listens at ``uri``, to the end.

        ``resume`` goes on with a migration that is paused.
        """
        old, new = (
            (Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER_SETUP)
            if resume
            else (Status.NONE, Status.SETUP)
        )
        if not self.state.set(old, new):
            raise MigrationError(
                f"the source is {self.state.status}: "
                + ("there is nothing to recover" if resume else "it has migrated already")
            )
        self.later(self._recover if resume else self._migrate)(uri=uri)

    def _migrate(self, uri: str) -> None:
        def begin() -> None:
            self._setup(uri)
            precopy = Precopy(self.options, self._pages, self._pacing, self._log)
            if precopy.run(self.asked, self.answers):
                self._switch_to_postcopy()

        self._to_the_end(begin)

    def _recover(self, uri: str) -> None:
        self._to_the_end(lambda: self._resume(uri))

    def _to_the_end(self, begin: Callable[[], None]) -> None:
        """Begin or resume, then go through to the end, whatever comes of it."""
        try:
            begin()
            if self.state.status == Status.POSTCOPY_ACTIVE:
                limit = self.options.max_postcopy_bandwidth
                self.background = Background(self._pages, self._out, self._pacing, limit)
                self.background.until_low(self.options.downtime_limit)
            self._complete()
        except Cancelled:
            self._cancelled()
        except (OSError, ProtocolError, MigrationError) as error:
            self._failed(error)
        finally:
            self._put_down()

    def _put_down(self) -> None:
        """Close the channels; unless the migration is paused, let go of the guest too."""
        if self.supply:
            self.supply.account()
        if self.out:
            self.out.close()
        if self.state.status == Status.POSTCOPY_PAUSED:
            return
        if self.log:
            self.log.stop()
            self.log = None
        self.trace.migration_thread_after_loop()

    def _connect(self, uri: str) -> Outbound:
        """Open the channels to a destination."""
        options = self.options
        self.out = out = Outbound(
            uri,
            self.ram,
            self.trace,
            preempt=options.postcopy_preempt and options.postcopy_ram,
            on_message=self._on_message,
            check_cancel=self.asked.check_cancel,
        )
        out.loop.watch(self.control.fileno(), self.read_control, rank=2)
        if not self.committed:  # after the switch its memory is all that counts, and that is ours
            out.loop.watch(self.guest.pidfd, self._guest_died, rank=3)
        return out

    # Recovery.

    def _resume(self, uri: str) -> None:
        """Go on over new channels: learn what the destination has, send the rest."""
        trace = self.trace
        out = self._connect(uri)
        self.answers.begin_recovery()
        self.state.set(Status.POSTCOPY_RECOVER_SETUP, Status.POSTCOPY_RECOVER)
        name = self.ram.name
        trace.ram_dirty_bitmap_request(name)
        trace.savevm_send_recv_bitmap(name)
        out.command(Command.RECV_BITMAP, wire.short_string(name))
        out.wait_for(lambda: self.answers.received is not None, "the received bitmap")
        if self.supply is None:  # an engine before us has died, and with it its view of the pages
            self.supply = PageSupply(self.ram, out, self.counters, trace, self.pages)
        if self.answers.received is not None:
            self.supply.continue_on(out, self.answers.received)
        self.pacing = Pacing(self.supply, out, answered=True)
        trace.ram_dirty_bitmap_reload_complete(name)
        trace.savevm_send_postcopy_resume()
        out.command(Command.POSTCOPY_RESUME)
        out.wait_for(lambda: self.answers.resume_acked, "RESUME_ACK")
        self.state.set(Status.POSTCOPY_RECOVER, Status.POSTCOPY_ACTIVE)
        trace.postcopy_pause_continued()

    # Set-up and pre-copy.

    def _setup(self, uri: str) -> None:
        trace, options = self.trace, self.options
        out = self._connect(uri)
        trace.savevm_state_header()
        out.raw(wire.header() + wire.configuration(self.guest.identity))
        if options.uses_return_path:
            trace.open_return_path_on_source()
            trace.source_return_path_thread_entry()
            trace.open_return_path_on_source_continue()
            trace.savevm_send_open_return_path()
            out.command(Command.OPEN_RETURN_PATH)
            self.answers.is_open = True
            out.ping(wire.PING_RETURN_PATH)
        if options.postcopy_ram:
            trace.qemu_savevm_send_postcopy_advise()
            layout = self.guest.layout
            out.command(Command.POSTCOPY_ADVISE, wire.advise(layout.page_size)[5:])
        trace.savevm_state_setup()
        self.log = DirtyLog(self.guest)
        self.log.start()
        out.loop.watch(self.guest.uffd.fd, self.log.read_removals, rank=4)
        self.supply = PageSupply(self.ram, out, self.counters, trace, self.pages)
        self.pacing = Pacing(self.supply, out, answered=options.uses_return_path)
        self.ram.map_present()
        trace.savevm_section_start("ram", wire.RAM_SECTION)
        out.raw(
            wire.section_start(wire.RAM_SECTION, "ram", wire.RAM_VERSION)
            + wire.ram_setup([self.guest.layout], postcopy=options.postcopy_ram)
            + wire.section_footer(wire.RAM_SECTION)
        )
        trace.savevm_section_end("ram", wire.RAM_SECTION, 0)
        out.drain()
        if options.uses_return_path:
            # The destination answers when it has compared everything with what it has.
            out.wait_for(lambda: wire.PING_RETURN_PATH in self.answers.pongs, "the first PONG")
        self.state.set(Status.SETUP, Status.ACTIVE)
        trace.migration_thread_setup_complete()

    # The switchover to post-copy.

    def _switch_to_postcopy(self) -> None:
        trace, out = self.trace, self._out
        discard_ahead(self._pages, self._log, self.answers, self.asked)
        self.hold_announcements()
        trace.postcopy_start()
        self._stop_guest()
        sync(self._log, self._pages)
        out.command(Command.SWITCHOVER_START)
        _, commands = discard_stale(self._pages)
        trace.postcopy_discard_send_finish(self.ram.name, self.ram.n_pages, commands)
        out.ping(wire.PING_DISCARDS)
        self.state.set(Status.DEVICE, Status.POSTCOPY_DEVICE)
        self.asked.check_cancel()
        self.committed = True
        out.package(self.guest.vcpu.load_state(self.guest.state_size))
        trace.postcopy_start_set_run()
        self._pages.enter_postcopy()
        out.loop.forget(self.guest.pidfd)  # a dead source guest is no loss any more
        out.loop.forget(self.guest.uffd.fd)
        out.wait_for(lambda: wire.PING_PACKAGE in self.answers.pongs, "the answer to the package")
        self.release_announcements()
        self.state.set(Status.POSTCOPY_DEVICE, Status.POSTCOPY_ACTIVE)

    def _stop_guest(self) -> None:
        vcpu, waits = self.guest.vcpu, self.options.pause_before_switchover
        new = Status.PRE_SWITCHOVER if waits else Status.DEVICE
        if waits:  # it is told when the guest stands still
            self.hold_announcements()
        self._require(self.state.set(Status.ACTIVE, new))
        self.trace.runstate_set(9, "running", 7, "finish-migrate")
        self.guest_stopped = True
        # It may be giving memory back, which has to be read of before it goes on.
        vcpu.wait(vcpu.ask(run=False), 10.0, (self.guest.uffd.fd, self._log.read_removals))
        stopped = vcpu.words[Word.STOPPED_NS]
        self.trace.guest_stopped(stopped, vcpu.words[Word.STEP])
        if waits:
            self.release_announcements()
            while not self.asked.continue_:
                self._out.loop.turn(1.0)
                self.asked.check_cancel()
            self.hold_announcements()
            self._require(self.state.set(Status.PRE_SWITCHOVER, Status.DEVICE))

    # The end: QEMU's migration_completion().

    def _complete(self) -> None:
        """End the migration from the state that it is in now, and only from that."""
        trace, out = self.trace, self._out
        current = self.state.status
        self.completing = True
        trace.migration_thread_low_pending(self._pages.count_dirty() * self.ram.page_size)
        if current == Status.ACTIVE:
            self._stop_guest()
            current = Status.DEVICE
            self._complete_precopy()
        else:
            trace.migration_completion_postcopy_end()
            if self.background:
                self.background.rest()
            out.last_section()
            out.raw(wire.END_OF_STREAM)
            out.drain()
            self._pages.account()
            trace.migration_completion_postcopy_end_after_complete()
        if self.answers.is_open:
            self.answers.close(self._await_shut, may_break=current == Status.POSTCOPY_ACTIVE)
            if self.answers.rp_error:
                raise MigrationError(self.answers.reason)
        self._pages.count_bytes()
        self.release_announcements()
        self._require(self.state.set(current, Status.COMPLETED))

    def _complete_precopy(self) -> None:
        """Send the rest of RAM and the CPU state, the guest standing still, without a limit."""
        out = self._out
        sync(self._log, self._pages)
        left = np.flatnonzero(self._pages.dirty)
        while len(left):
            batch, left = np.split(left, [out.batch_pages])
            self._pages.send(batch, RateLimiter(0), Counter.PRECOPY_PAGES)
            out.drain()
        self.asked.check_cancel()
        self.committed = True
        out.last_section()
        state = self.guest.vcpu.load_state(self.guest.state_size)
        out.raw(wire.device_state(wire.CPU_SECTION, state) + wire.END_OF_STREAM)
        out.drain()

    def _await_shut(self) -> None:
        self._out.wait_for(lambda: self.answers.rp_error is not None, "SHUT", 60.0)

    # What comes from elsewhere.

    def _on_message(self, message: Incoming) -> None:
        if isinstance(message, PageRequest):
            self._pages.serve(message)
            return
        self.answers.take(message)
        match message:
            case Value(Message.PONG, value) if self.pacing:
                self.pacing.confirm(value)
        if self.answers.gave_up and not self.committed:
            raise MigrationError(self.answers.reason)

    def _guest_died(self) -> None:
        raise MigrationError("the source guest died: " + (self.guest.vcpu.error() or "killed"))

    @staticmethod
    def _require(done: bool) -> None:
        if not done:
            raise Cancelled

    def _cancelled(self) -> None:
        self.release_announcements()
        before = self.state.status
        self.state.set(before, Status.CANCELLING)
        self.answers.abandon(broken=False)
        self._resume_guest()
        self.state.set(Status.CANCELLING, Status.CANCELLED)

    def _failed(self, error: Exception) -> None:
        """Say why, and let the guest run on unless it was handed over."""
        self.release_announcements()
        if self.out:
            with contextlib.suppress(ProtocolError, MigrationError):
                self.out.read_rest()  # a SHUT may have come before the channel was seen to break
        trace, before = self.trace, self.state.status
        stream_error = isinstance(error, OSError)
        broken = isinstance(error, OSError | ProtocolError) and self.answers.rp_error is None
        if before == Status.POSTCOPY_DEVICE and self.committed and broken:
            # The destination may have run the guest: only a recovery can tell.
            self.state.set(before, Status.POSTCOPY_ACTIVE)
            before = Status.POSTCOPY_ACTIVE
        stays = before in _RECOVERING or (before == Status.POSTCOPY_ACTIVE and broken)
        if stays and not self.asked.take_back:
            self.control.event("PAUSED", desc=str(error) or type(error).__name__)
            self.state.set(before, Status.POSTCOPY_PAUSED)
            return
        self.control.event("ERROR", desc=str(error) or type(error).__name__)
        failing = Status.FAILING in states.SOURCE[before]
        if failing:
            self.state.set(before, Status.FAILING)
        if stream_error and not self.completing:
            trace.migration_thread_file_err()
        elif stream_error and not self.answers.is_open:
            trace.migration_completion_file_err()
        self.answers.abandon(broken=stream_error or isinstance(error, ProtocolError))
        if self._guest_is_ours(before):
            self._resume_guest()
        self.state.set(Status.FAILING if failing else before, Status.FAILED)

    def _guest_is_ours(self, status: Status) -> bool:
        """Whether the guest, of a migration that failed in this state, may go on here."""
        # A destination that gives up before it has run the guest has ended its own.
        given_back = self.answers.gave_up and wire.PING_PACKAGE not in self.answers.pongs
        in_switch = status in (Status.DEVICE, Status.POSTCOPY_DEVICE)
        return not self.committed or self.asked.take_back or (given_back and in_switch)

    def _resume_guest(self) -> None:
        """Start the guest if it is we who have stopped it, and have not started it since."""
        if self.guest_stopped:
            self.trace.runstate_set(7, "finish-migrate", 9, "running")
            self.guest.vcpu.start()
            self.guest_stopped = False

    @property
    def _out(self) -> Outbound:
        if self.out is None:
            raise MigrationError("no migration is under way")
        return self.out

    @property
    def _pages(self) -> PageSupply:
        if self.supply is None:
            raise ProtocolError("a page was requested before the migration was set up")
        return self.supply

    @property
    def _pacing(self) -> Pacing:
        if self.pacing is None:
            raise MigrationError("no migration is under way")
        return self.pacing

    @property
    def _log(self) -> DirtyLog:
        if self.log is None:
            raise MigrationError("no migration is under way")
        return self.log
