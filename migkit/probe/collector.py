"""The process that runs the BPF program and appends its records to a shared file.

It runs under whichever interpreter has bcc, by file path and in isolated mode, so it
uses the standard library and bcc alone. ``probe.py`` is its parent and imports this
module too, for the limits and the header of the file.

``collector.py PARENT_PID CONTROL_FD DATA_FD PROGRAM TIMEOUT_S``. CONTROL is a SOCK_SEQPACKET
socket, one JSON object a message, each request answered by one object (``{"error": ...}`` if
refused). DATA is a memfd of the parent: a header (HEADER), then records as the kernel
wrote them. The parent's file outlives us, so whatever we have appended is never lost.

A fault that is still pending in the kernel is appended too once it is QUIET_NS old, and
again when it changes; the kernel's final record follows it in the file. So of several rows
with the same thread and fault_ns the last one counts, and that makes each fault's delivery
exactly-once without ever deleting from a map that a running thread writes to.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

MAX_RANGES = 16
"""Address ranges that one process can be watched in."""
MAX_WATCHES = 64
"""Processes that can be watched at once."""
MAX_THREADS = 4096
"""Threads that can have a fault pending, dead ones excluded."""
RING_PAGES = 256
"""Pages of the ring buffer, a power of two: 1 MiB holds 14,500 records of 64 + 8 bytes, more
than 20 ms can bring. Four times as large, it no longer fits a cache: 150 ns more a fault."""

HEADER = struct.Struct("<QQ48x")
"""The data file's first 64 bytes: records lost to a full ring buffer, to a full map."""

TICK_MS = 20
"""How often the ring buffer is emptied; the kernel never wakes us up."""
SNAPSHOT_NS = 250_000_000
"""How often pending faults and counters are read. A read of a map keeps tracing programs off
that CPU for about a microsecond, so this is seldom."""
QUIET_NS = 100_000_000
"""Age of a pending fault's last change from which a snapshot appends it."""

TRACEPOINTS = (
    "exceptions:page_fault_user",
    "exceptions:page_fault_kernel",
    "sched:sched_switch",
    "sched:sched_waking",
)
FAULT_SYMBOLS = (("handle_userfault", "UFFD"), ("asm_exc_page_fault", "ENTRY"))
"""Functions on the stack of a thread that sleeps in a fault which it took in a system call."""

_STAMPS = struct.Struct("<QQQQ")


def symbol_range(symbol: str, lines: list[str]) -> tuple[int, int] | None:
    """Return the first address of a kernel function and that of the next symbol."""
    start = 0
    for line in lines:
        address, _, name = line.split()[:3]
        if start and int(address, 16) > start:
            return start, int(address, 16)
        if not start and name == symbol:
            start = int(address, 16)  # reads as 0 where kptr_restrict hides it
    return None


def stack_check_flags() -> list[str]:
    """Return the compiler flags that name the fault path's symbols; empty when one is hidden."""
    flags = []
    lines = Path("/proc/kallsyms").read_text().splitlines()
    for symbol, prefix in FAULT_SYMBOLS:
        found = symbol_range(symbol, lines)
        if found is None:
            return []
        flags += [f"-D{prefix}_START={found[0]:#x}ULL", f"-D{prefix}_END={found[1]:#x}ULL"]
    return flags


class Collector:
    """The loaded program, its maps, and the file that its records go to."""

    def __init__(self, data_fd: int, program: Path) -> None:
        """Compile, load and attach; raises whatever bcc raises."""
        from bcc import BPF  # noqa: PLC0415  the parent imports this module without bcc

        stack_check = stack_check_flags()
        limits = [
            f"-D{name}={globals()[name]}"
            for name in ("MAX_RANGES", "MAX_WATCHES", "MAX_THREADS", "RING_PAGES")
        ]
        self.checks_stack = bool(stack_check)
        self._bpf = BPF(text=program.read_text(), cflags=limits + stack_check)
        self._data_fd = data_fd
        self._end = HEADER.size
        self._batch: list[bytes] = []
        self._last_seen: dict[int, bytes] = {}  # thread: its pending record as last appended
        self._next_snapshot_ns = 0
        self._pidfds: dict[int, int] = {}  # pid: pidfd
        self.poller = select.poll()
        self._bpf["faults"].open_ring_buffer(self._on_record)
        self._write_header()

    def _on_record(self, _context: object, data: int, size: int) -> int:
        self._batch.append(ctypes.string_at(data, size))
        return 0

    def drain(self) -> None:
        """Append what the ring buffer holds."""
        self._bpf.ring_buffer_consume()
        if self._batch:
            self._append(b"".join(self._batch))
            self._batch.clear()

    def snapshot(self, *, everything: bool = False) -> None:
        """Append pending faults that have changed: those that are quiet, or every one.

        The next `drain` must come after it, so that a final record is later in the file than
        the pending version of the same fault.
        """
        now_ns = time.monotonic_ns()
        if not everything and now_ns < self._next_snapshot_ns:
            return
        self._next_snapshot_ns = now_ns + SNAPSHOT_NS
        changed = []
        for tid, record in self._pending():
            stamps = _STAMPS.unpack_from(record)
            if not stamps[0]:
                continue  # its first fault is being written just now
            quiet = max(stamps) + QUIET_NS < now_ns
            if (everything or quiet) and self._last_seen.get(tid) != record:
                self._last_seen[tid] = record
                changed.append(record)
        if changed:
            self._append(b"".join(changed))
        self._write_header()

    def _pending(self) -> list[tuple[int, bytes]]:
        table = self._bpf["pending"]
        found = []
        for key in table.keys():  # noqa: SIM118  a bcc table is no dict
            try:
                found.append((key.value, bytes(table[key].fault)))
            except KeyError:
                continue  # the thread has died, its record is in the ring buffer
        return found

    def _append(self, rows: bytes) -> None:
        while rows:
            written = os.pwrite(self._data_fd, rows, self._end)
            self._end += written
            rows = rows[written:]

    def _write_header(self) -> None:
        lost = self._bpf["lost"]
        os.pwrite(self._data_fd, HEADER.pack(lost[0].value, lost[1].value), 0)

    def watch(self, pid: int, ranges: list[list[int]]) -> dict[str, Any]:
        """Replace a process's ranges; an empty list ends its watch."""
        watches = self._bpf["watches"]
        key = watches.Key(pid)
        if not ranges:
            self._forget(pid)
            return {}
        if pid not in self._pidfds:
            try:
                self._pidfds[pid] = os.pidfd_open(pid)
            except OSError as error:
                return {"error": f"cannot watch process {pid}: {error.strerror}"}
            self.poller.register(self._pidfds[pid], select.POLLIN)
        leaf = watches.Leaf()
        leaf.n_ranges = len(ranges)
        for index, (start, end) in enumerate(ranges):
            leaf.ranges[index].start, leaf.ranges[index].end = start, end
        watches[key] = leaf
        return {}

    def _forget(self, pid: int) -> None:
        pidfd = self._pidfds.pop(pid, None)
        if pidfd is not None:
            del self._bpf["watches"][self._bpf["watches"].Key(pid)]
            self.poller.unregister(pidfd)
            os.close(pidfd)

    def forget_dead(self, fds: set[int]) -> None:
        """End the watch of processes whose pidfd became readable: their pid can come again."""
        for pid in [pid for pid, pidfd in self._pidfds.items() if pidfd in fds]:
            self._forget(pid)

    def flush(self) -> None:
        """Append every record there is, in flight or not."""
        self.snapshot(everything=True)
        self.drain()

    def finish(self) -> dict[str, Any]:
        """Detach, append the rest and report; once detached, what is pending is final."""
        missed = self._missed_runs()
        for name in TRACEPOINTS:
            self._bpf.detach_tracepoint(name)
        self.drain()
        self.snapshot(everything=True)
        return {"missed_runs": missed}

    def _missed_runs(self) -> int:
        """Count the runs that the kernel skipped, another program being active on that CPU."""
        missed = 0
        for function in self._bpf.funcs.values():
            for line in Path(f"/proc/self/fdinfo/{function.fd}").read_text().splitlines():
                if line.startswith("recursion_misses:"):
                    missed += int(line.split()[1])
        return missed


def serve(parent: int, control: socket.socket, collector: Collector) -> None:
    """Collect until told to stop or until the parent, a pidfd, is gone.

    Its end of the socket closes then, unless a fork of it has a copy.
    """
    collector.poller.register(parent, select.POLLIN)
    collector.poller.register(control, select.POLLIN)
    while True:
        ready = {fd for fd, _ in collector.poller.poll(TICK_MS)}
        collector.snapshot()
        collector.drain()
        collector.forget_dead(ready)
        if parent in ready:
            return
        if control.fileno() in ready:
            message = control.recv(65536)
            if not message:
                return
            request = json.loads(message)
            reply = answer(collector, request)
            control.send(json.dumps(reply).encode())
            if request["do"] == "stop":
                return


def answer(collector: Collector, request: dict[str, Any]) -> dict[str, Any]:
    """Carry out one request and return the reply."""
    if request["do"] == "watch":
        return collector.watch(request["pid"], request["ranges"])
    if request["do"] == "flush":
        collector.flush()
        return {}
    return collector.finish()


def main(parent_pid: int, control_fd: int, data_fd: int, program: Path, timeout_s: float) -> None:
    """Attach, say so, and serve."""
    # Our parent could die while the compiler hangs: then nobody but this alarm ends us.
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    parent = os.pidfd_open(parent_pid)
    if os.getppid() != parent_pid:
        return  # it is dead, and the pid perhaps another's
    control = socket.socket(fileno=control_fd)
    try:
        collector = Collector(data_fd, program)
    except Exception as error:  # noqa: BLE001  bcc raises bare Exceptions
        control.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    control.send(json.dumps({"checks_stack": collector.checks_stack}).encode())
    serve(parent, control, collector)


if __name__ == "__main__":
    _parent_pid, _control_fd, _data_fd = map(int, sys.argv[1:4])
    main(_parent_pid, _control_fd, _data_fd, Path(sys.argv[4]), float(sys.argv[5]))
