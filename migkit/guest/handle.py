"""A guest as the session holds it: its process, its descriptors, its vCPU page."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from migkit.errors import CapabilityError, MigrationError
from migkit.guest.config import GuestConfig, receive_ready, send_config
from migkit.guest.vcpu import VCpu
from migkit.kernel.memory import RamBlock
from migkit.kernel.process import Child
from migkit.kernel.userfaultfd import Userfaultfd

_BIRTH_TIMEOUT_S = 120.0  # a large guest fills its RAM first


class GuestProcess:
    """A guest, alive from :meth:`ready` to :meth:`close`; it dies with this object's socket."""

    def __init__(self, config: GuestConfig, log: Path) -> None:
        """Start the process; it fills its RAM while others start."""
        self.config = config
        self._sock, inner = socket.socketpair()
        self._sock.settimeout(_BIRTH_TIMEOUT_S)
        with inner:
            self.child = Child("migkit.guest", [str(inner.fileno())], [inner.fileno()], log)
        send_config(self._sock, config)
        self.fds: list[int] = []

    def ready(self) -> None:
        """Wait until the guest stands ready, stopped before its first step.

        Raises :class:`CapabilityError` when it could not get what it needs.
        """
        try:
            ready, self.fds = receive_ready(self._sock)
        except TimeoutError:
            raise MigrationError(f"the guest was not ready in {_BIRTH_TIMEOUT_S} s") from None
        except MigrationError as error:
            raise MigrationError(f"{error}: {self.child.last_words()}") from None
        if ready.error:
            raise CapabilityError(f"the guest could not be made: {ready.error}")
        self.info = ready
        ram_fd, *vcpu_fds, uffd_fd = self.fds
        self.uffd = Userfaultfd(uffd_fd)
        config = self.config
        self.ram = RamBlock(config.block, ram_fd, config.memory, config.page_size)
        self.vcpu = VCpu(*(os.dup(fd) for fd in vcpu_fds))

    @property
    def is_ready(self) -> bool:
        """Whether :meth:`ready` has returned and :meth:`close` was not called."""
        return hasattr(self, "vcpu")

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self.child.exit_code is None

    @property
    def is_running(self) -> bool:
        """Whether it is alive and was last asked to run."""
        return self.is_ready and self.vcpu.running and self.is_alive

    @property
    def pid(self) -> int:
        """The process id."""
        return self.child.pid

    def close(self) -> None:
        """End the guest and close all that belongs to it."""
        self._sock.close()
        self.child.kill()
        if self.is_ready:
            self.vcpu.close()
            del self.vcpu
        for fd in self.fds:
            os.close(fd)
        self.fds = []
