"""What source and destination share: the process, its guest, its trace, its control socket.

An engine is one process with one thread and one poll loop (:mod:`migkit.migration.__main__`).
The session's first message attaches it to a guest and hands it the descriptors of
all that it shares; every later one is a command. While a migration runs the engine looks at the
control socket between two chunks of pages.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from migkit.errors import MigrationError
from migkit.guest.vcpu import VCpu
from migkit.kernel.memory import RamBlock
from migkit.kernel.userfaultfd import Userfaultfd
from migkit.migration.control import ControlSocket, event_message, obey
from migkit.migration.options import Options
from migkit.migration.pagemap import PageMap
from migkit.migration.states import StateMachine, Status
from migkit.migration.stats import Counters
from migkit.migration.wire import BlockLayout
from migkit.trace.drain import map_buffer
from migkit.trace.emit import Tracer

_MAX_FDS = 16


@dataclass(frozen=True)
class GuestParts:
    """A guest as an engine holds it."""

    pid: int
    pidfd: int
    address: int  # where the guest maps its RAM
    identity: str
    state_size: int
    ram: RamBlock
    vcpu: VCpu
    uffd: Userfaultfd

    @property
    def layout(self) -> BlockLayout:
        """The guest's RAM block as it is announced."""
        return BlockLayout(self.ram.name, self.ram.size, self.ram.page_size)


@dataclass(frozen=True)
class Attachment:
    """All that the session gives an engine."""

    guest: GuestParts
    options: Options
    trace: Tracer
    counters: Counters
    pages: npt.NDArray[np.bool_]  # the rows of a page map
    paused_ns: int
    """When the engine died in whose place we are in a paused migration; 0: there was none."""


class Engine:
    """The common ground of :class:`~migkit.migration.source.Source` and its counterpart."""

    transitions: Mapping[Status, frozenset[Status]]

    def __init__(self, control: ControlSocket, attachment: Attachment) -> None:
        """Take what the session gave."""
        self.control = control
        self.guest = attachment.guest
        self.ram = attachment.guest.ram
        self.options = attachment.options
        self.trace = attachment.trace
        self.counters = attachment.counters.words
        self.pages = attachment.pages
        self.state = StateMachine(self.transitions, self._announce)
        if attachment.paused_ns:
            self.state = StateMachine(self.transitions, self._announce, Status.POSTCOPY_PAUSED)
            self.trace.migrate_set_state(Status.POSTCOPY_PAUSED.value, ts=attachment.paused_ns)
        self.commands: dict[str, Callable[..., object]] = {
            "query-migrate": self.query,
            "quit": self.quit,
        }
        self.quitting = False
        self._busy = False
        self._held: list[dict[str, Any]] | None = None
        self._ask_later: tuple[Callable[..., object], dict[str, Any]] | None = None

    def serve(self) -> None:
        """Obey commands until ``quit`` or the session is gone."""
        while not self.quitting:
            select.select([self.control], [], [])
            self.read_control()
            if self._ask_later:
                command, arguments = self._ask_later
                self._ask_later = None
                self._busy = True
                command(**arguments)
                self._busy = False

    def later(self, command: Callable[..., object]) -> Callable[..., object]:
        """Make a long command one that is answered at once and carried out after the answer."""

        def accept(**arguments: Any) -> None:
            self._ask_later = (command, arguments)

        return accept

    def read_control(self) -> None:
        """Carry out the commands that have come.

        Raises :class:`MigrationError` when they end a migration that is under way.
        """
        messages = self.control.receive()
        if messages is None:
            raise MigrationError("the session is gone")
        for message in messages:
            obey(self.control, self.commands, message)
        if self.quitting and self._busy:
            raise MigrationError("the session ended while the migration was under way")

    @property
    def is_busy(self) -> bool:
        """Whether a long command is being carried out."""
        return self._busy

    def query(self) -> dict[str, object]:
        """Return the state, for ``query-migrate``."""
        return {"status": self.state.status}

    def quit(self) -> None:
        """End, when the command that is being carried out has."""
        self.quitting = True

    def hold_announcements(self) -> None:
        """Keep new states, stamped with when they were new, until they are released.

        While no guest runs anywhere the session is not to be woken: it would want a CPU.
        """
        self._held = self._held or []

    def release_announcements(self) -> None:
        """Tell the session what was held back."""
        held, self._held = self._held or [], None
        for message in held:
            self.control.send(message)

    def _announce(self, status: Status) -> None:
        self.trace.migrate_set_state(status.value)
        message = event_message("MIGRATION", status=status.value)
        if self._held is None:
            self.control.send(message)
        else:
            self._held.append(message)


def attach(control: ControlSocket) -> Attachment:
    """Receive the session's first message with its descriptors."""
    data, fds, _, _ = socket.recv_fds(control.sock, 1 << 20, _MAX_FDS)
    config = json.loads(data)
    ram_fd, page_fd, kick_fd, ack_fd, uffd, trace_fd, counters_fd, map_fd = fds
    ram = RamBlock(config["block"], ram_fd, config["memory"], config["page_size"])
    guest = GuestParts(
        pid=config["pid"],
        pidfd=os.pidfd_open(config["pid"]),
        address=config["address"],
        identity=config["identity"],
        state_size=config["state_size"],
        ram=ram,
        vcpu=VCpu(page_fd, kick_fd, ack_fd),
        uffd=Userfaultfd(uffd),
    )
    options = Options.from_dict(config["options"])
    trace = Tracer(map_buffer(trace_fd), config["events"], tid=threading.get_native_id())
    rows = PageMap(map_fd, ram.n_pages).rows()
    return Attachment(guest, options, trace, Counters(counters_fd), rows, config["paused_ns"])


class Deadline:
    """A time by which something must have happened."""

    def __init__(self, seconds: float) -> None:
        """Start the clock."""
        self._at = time.monotonic() + seconds
        self._seconds = seconds

    def check(self, what: str) -> None:
        """Raise :class:`TimeoutError`, which in post-copy is a break, when the time is over."""
        if time.monotonic() > self._at:
            raise TimeoutError(f"{what} did not come within {self._seconds} s")
