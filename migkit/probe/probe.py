"""A probe: the parent's side of the collector process.

The collector writes into a memfd that we own, so records are read without its help and
outlive it. It ends when our end of the control socket closes or when we are gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from migkit.errors import CapabilityError, MigkitError, OptionError
from migkit.probe import collector
from migkit.probe.capability import requirements
from migkit.probe.headers import ENVIRONMENT
from migkit.probe.records import FAULT_DTYPE, FaultRecords, last_versions

if TYPE_CHECKING:
    from collections.abc import Iterable

_HERE = Path(__file__).parent
_COLLECTOR = _HERE / "collector.py"
_PROGRAM = _HERE / "faults.bpf.c"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watch:
    """An address range of a process whose faults are recorded, every thread's."""

    pid: int
    start: int
    length: int


@dataclass(frozen=True)
class ProbeStatus:
    """How the records came about, and what to doubt."""

    complete: bool
    """The collector ended when told to: no record is missing but those counted as lost."""
    checks_stack: bool
    """The stack told which sleeps of a system call were its fault's; else the first counted."""
    missed_runs: int
    """Program runs that the kernel skipped, another being active on that CPU: each may be a
    missing fault or stage, of any process."""
    attach_s: float
    """From the start of the collector to its being attached."""
    notices: tuple[str, ...] = ()
    """What a reader of the records should know, in sentences."""


@dataclass(frozen=True)
class ProbeResult:
    """Records as FAULT_DTYPE in order of fault_ns, the number lost, and the status."""

    records: FaultRecords
    lost: int
    status: ProbeStatus


@dataclass
class _Running:
    """A collector process and what connects us to it."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    data_fd: int
    stderr_fd: int
    checks_stack: bool = False
    attach_s: float = 0.0
    ranges: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def close(self) -> None:
        """End the process, reap it, and close everything."""
        self.control.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.data_fd)
        os.close(self.stderr_fd)

    def last_words(self) -> str:
        """Return the end of what the collector wrote to stderr."""
        size = os.fstat(self.stderr_fd).st_size
        tail = os.pread(self.stderr_fd, 2000, max(0, size - 2000))
        return tail.decode(errors="replace").strip()


class Probe:
    """Record the page faults of other processes: ``with Probe([Watch(...)]) as probe: ...``.

    Methods may be called from several threads. Raises CapabilityError when this machine lacks
    something, OptionError for a process or a range that cannot be watched.
    """

    def __init__(self, watches: Iterable[Watch] = (), *, timeout_s: float = 30.0) -> None:
        self._initial = tuple(watches)
        self._timeout_s = timeout_s
        self._lock = threading.RLock()
        self._running: _Running | None = None
        self._result: ProbeResult | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process id of the collector; raises OptionError when none is attached."""
        return self._require().process.pid

    def start(self) -> None:
        """Attach; after it returns, faults in the watched ranges are recorded."""
        with self._lock:
            if self._running is not None:
                raise OptionError("this probe has been started already")
            self._result = None
            began_ns = time.monotonic_ns()
            self._running = _launch(self._timeout_s)
            try:
                self._attach(self._running)
                self._running.attach_s = (time.monotonic_ns() - began_ns) / 1e9
                for watch in self._initial:
                    self.watch(watch.pid, watch.start, watch.length)
            except BaseException:
                self._running.close()
                self._running = None
                raise

    def _attach(self, running: _Running) -> None:
        ready = self._receive(running)
        if "error" in ready:
            raise CapabilityError(
                f"cannot attach the fault probe: {ready['error']}. {running.last_words()}"
            )
        running.checks_stack = ready["checks_stack"]

    def watch(self, pid: int, start: int, length: int) -> None:
        """Add a range; after it returns, faults in it are recorded."""
        with self._lock:
            running = self._require()
            if length <= 0 or start < 0 or start + length > 1 << 64:
                raise OptionError(f"no address range: start {start:#x}, length {length}")
            ranges = [*running.ranges.get(pid, []), (start, start + length)]
            if len(ranges) > collector.MAX_RANGES:
                raise OptionError(f"process {pid}: more than {collector.MAX_RANGES} ranges")
            reply = self._request(running, {"do": "watch", "pid": pid, "ranges": ranges})
            if "error" in reply:
                raise OptionError(reply["error"])
            running.ranges[pid] = ranges

    def unwatch(self, pid: int) -> None:
        """Stop recording a process's faults; what was recorded stays."""
        with self._lock:
            running = self._require()
            if running.ranges.pop(pid, None) is not None:
                self._request(running, {"do": "watch", "pid": pid, "ranges": []})

    def records(self) -> FaultRecords:
        """Return a copy of the records so far, faults in flight included, their stages at 0.

        After the collector's death: those it had delivered. After `stop`: all.
        """
        with self._lock:
            if self._result is not None:
                return self._result.records.copy()
            running = self._require()
            with contextlib.suppress(MigkitError):  # what was delivered stays readable
                self._request(running, {"do": "flush"})
            return _read(running.data_fd)[0]

    def stop(self) -> ProbeResult:
        """Detach and return everything; again and again the same result."""
        with self._lock:
            if self._result is not None:
                return self._result
            running = self._require()
            notices = []
            missed = 0
            try:
                missed = self._request(running, {"do": "stop"})["missed_runs"]
            except MigkitError as error:
                notices.append(f"{error}; the last {collector.TICK_MS} ms or more are missing")
            complete = not notices
            records, lost = _read(running.data_fd)
            if lost:
                notices.append(f"{lost} records were lost: the ring buffer or a map was full")
            if missed:
                notices.append(f"the kernel skipped {missed} program runs")
            if not running.checks_stack:
                notices.append(
                    "kernel symbols are hidden (kernel.kptr_restrict): of a fault inside a system "
                    "call the first sleep counts, whatever it was for"
                )
            for notice in notices:
                _log.info(notice)
            status = ProbeStatus(
                complete, running.checks_stack, missed, running.attach_s, tuple(notices)
            )
            running.close()
            self._running = None
            self._result = ProbeResult(records, lost, status)
            return self._result

    def _require(self) -> _Running:
        if self._running is None:
            raise OptionError("this probe is not running: call start() first")
        return self._running

    def _request(self, running: _Running, request: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(OSError):  # the answer, or its absence, tells
            running.control.send(json.dumps(request).encode())
        return self._receive(running)

    def _receive(self, running: _Running) -> dict[str, Any]:
        """Return the collector's next message; raises MigkitError when it is dead or mute."""
        try:
            message = running.control.recv(65536)
        except TimeoutError:
            # A late answer would be taken for the next request's.
            running.process.kill()
            raise MigkitError(
                f"the fault collector did not answer within {self._timeout_s} s and was killed"
            ) from None
        except OSError:
            message = b""
        if not message:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(2)
            code = running.process.returncode
            raise MigkitError(
                f"the fault collector died (status {code}): {running.last_words() or 'silently'}"
            )
        reply: dict[str, Any] = json.loads(message)
        return reply


def _launch(timeout_s: float) -> _Running:
    """Start the collector; raises CapabilityError when this machine lacks something."""
    interpreter, headers = requirements()
    environment = dict(os.environ)
    if headers is not None:
        environment[ENVIRONMENT] = str(headers)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    data_fd = os.memfd_create("migkit-faults")
    stderr_fd = os.memfd_create("migkit-probe-stderr")
    ours.settimeout(timeout_s)
    command = [interpreter, "-I", str(_COLLECTOR), str(os.getpid())]
    command += [str(theirs.fileno()), str(data_fd), str(_PROGRAM), str(timeout_s)]
    try:
        process = subprocess.Popen(
            command,
            pass_fds=(theirs.fileno(), data_fd),
            stdin=subprocess.DEVNULL,
            stdout=stderr_fd,
            stderr=stderr_fd,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the notebook, not for it
        )
    except BaseException:
        ours.close()
        os.close(data_fd)
        os.close(stderr_fd)
        raise
    finally:
        theirs.close()
    return _Running(process, ours, data_fd, stderr_fd)


def _read(data_fd: int) -> tuple[FaultRecords, int]:
    """Return the records in the collector's file and the number lost."""
    size = os.fstat(data_fd).st_size
    header = os.pread(data_fd, collector.HEADER.size, 0)
    if len(header) < collector.HEADER.size:
        return np.empty(0, FAULT_DTYPE), 0
    ring_full, map_full = collector.HEADER.unpack(header)
    # A collector killed in the middle of a write leaves part of a record.
    n_rows = (size - collector.HEADER.size) // FAULT_DTYPE.itemsize
    data = bytearray(n_rows * FAULT_DTYPE.itemsize)
    filled = os.preadv(data_fd, [data], collector.HEADER.size)
    rows = np.frombuffer(data, FAULT_DTYPE, filled // FAULT_DTYPE.itemsize)
    return last_versions(rows), ring_full + map_full
