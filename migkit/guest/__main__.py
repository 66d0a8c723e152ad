"""The guest process: ``python -m migkit.guest FD``, with FD a socket to the session.

It reads one configuration, makes its RAM, its vCPU page and its userfaultfd, hands all of them
to the session and then steps its workload whenever the vCPU page says so. It keeps a reference
to its own userfaultfd: when every handler has died it waits for its pages, it is never fed zeros.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time
import traceback

import numpy as np

from migkit.errors import CapabilityError
from migkit.guest.config import GuestConfig, GuestReady, receive_config, send_ready
from migkit.guest.vcpu import VCpu, Word
from migkit.guest.workloads import Workload
from migkit.kernel.capability import MIGRATION_FEATURES
from migkit.kernel.lifeline import die_with
from migkit.kernel.memory import RamBlock
from migkit.kernel.userfaultfd import Userfaultfd

# A quantum of steps between two looks at the run flag: long enough that looking costs little,
# short enough that a guest stops within some tens of microseconds.
_QUANTUM_SHORT_NS = 60_000
_QUANTUM_LONG_NS = 120_000
_QUANTUM_MAX = 4096

_SLEEP_NS = 200_000  # a rated guest that sleeps sleeps at least so long, and then catches up
_CATCH_UP_NS = 10_000_000  # what it missed by standing still longer than this it has missed


class Guest:
    """A workload, its RAM and CPU state, and the loop that steps it."""

    def __init__(self, workload: Workload, ram: RamBlock, vcpu: VCpu, rate: float) -> None:
        """Take the parts; ``rate`` is in steps a second, 0 for as many as there can be."""
        self.workload = workload
        self.ram = ram.pages
        self.vcpu = vcpu
        self.rate = rate
        self._states = np.zeros(1, workload.full_dtype())
        self.state = self._states[0]
        self._quantum = 1

    def run_for_ever(self) -> None:
        """Obey the run flag until the process is ended from outside."""
        words = self.vcpu.words
        while True:
            seq = words[Word.RUN_SEQ]
            if seq % 2:
                self._load()
                self._run(seq)
                self.publish()
            else:
                self.vcpu.acknowledge(seq)
                self.vcpu.sleep(seq, None)

    def _run(self, seq: int) -> None:
        """Step until the run flag is no longer ``seq``."""
        words = self.vcpu.words
        step, state, ram, vcpu = self.workload.step, self.state, self.ram, self.vcpu
        total = int(state["step"])
        begun = now = time.monotonic_ns()
        origin = now - int(1e9 / self.rate) if self.rate else now  # the first step is due at once
        paced = 0
        words[Word.STEP] = total
        words[Word.STARTED_NS] = begun
        words[Word.FIRST_STEP_NS] = 0
        vcpu.acknowledge(seq)
        while words[Word.RUN_SEQ] == seq:
            n = self._quantum
            if self.rate:
                due = int((now - origin) * self.rate / 1e9) - paced
                if due < 1:
                    vcpu.sleep(seq, max(_SLEEP_NS, 1e9 / self.rate) / 1e9)
                    now = time.monotonic_ns()
                    continue
                if due > self.rate * _CATCH_UP_NS / 1e9 + 1:
                    origin, paced, due = now, 0, 1
                n = min(n, due)
                paced += n
            before = time.monotonic_ns()
            step(ram, state, n)
            now = time.monotonic_ns()
            total += n
            state["step"] = total
            words[Word.STEP] = total
            words[Word.HEARTBEAT_NS] = now
            words[Word.BUSY_NS] += now - before
            if not words[Word.FIRST_STEP_NS]:
                words[Word.FIRST_STEP_NS] = now
            self._adapt(now - before, n)
        words[Word.STOPPED_NS] = max(now, words[Word.HEARTBEAT_NS])

    def _adapt(self, took_ns: int, n: int) -> None:
        if took_ns > _QUANTUM_LONG_NS:
            self._quantum = max(1, n // 2)
        elif took_ns < _QUANTUM_SHORT_NS and n == self._quantum:
            self._quantum = min(_QUANTUM_MAX, 2 * n)
        self.vcpu.words[Word.QUANTUM] = self._quantum

    def publish(self) -> None:
        """Store the CPU state on the vCPU page; from then on it belongs to the other side."""
        self.vcpu.store_state(self._states.tobytes())

    def _load(self) -> None:
        self._states[:] = np.frombuffer(
            self.vcpu.load_state(self._states.nbytes), self._states.dtype
        )


def main() -> int:
    """Become the guest that the session on the inherited socket describes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the session decides what an interrupt means
    sock = socket.socket(fileno=int(sys.argv[1]))
    config = receive_config(sock)
    try:
        guest, ready, fds = _make(config)
    except Exception as error:  # noqa: BLE001 — the session is told, whatever it was
        send_ready(sock, GuestReady(error=f"{type(error).__name__}: {error}"), [])
        return 1
    send_ready(sock, ready, fds)
    die_with(sock)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        guest.run_for_ever()
    except Exception:  # noqa: BLE001 — the session finds the message in the vCPU page
        guest.vcpu.fail(traceback.format_exc())
        return 1
    return 0


def _make(config: GuestConfig) -> tuple[Guest, GuestReady, list[int]]:
    if config.cpu is not None:
        os.sched_setaffinity(0, {config.cpu})
    workload = config.spec.load()
    ram = RamBlock.create(config.block, config.memory, config.page_size)
    if config.lock:
        ram.lock()
    vcpu = VCpu.create()
    guest = Guest(workload, ram, vcpu, config.rate)
    if config.populate:
        workload.prepare(guest.ram, guest.state)
    guest.publish()  # before anyone is told that it is ready, and may load another state
    user_mode_only = False
    try:
        uffd = Userfaultfd.create(MIGRATION_FEATURES)
    except CapabilityError:
        user_mode_only = True
        uffd = Userfaultfd.create(MIGRATION_FEATURES, user_mode_only=True)
    ready = GuestReady(
        pid=os.getpid(), address=ram.address, user_mode_only=user_mode_only,
        state_size=workload.full_dtype().itemsize,
    )  # fmt: skip
    return guest, ready, [ram.fd, vcpu.page_fd, vcpu.kick_fd, vcpu.ack_fd, uffd.fd]


if __name__ == "__main__":
    sys.exit(main())
