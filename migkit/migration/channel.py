"""Sockets between the two sides: where they listen, how they connect, what waits to be sent.

unix sockets lie in a folder that only the user can enter, and a peer of another uid is turned
away; TCP binds to the loopback address alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from migkit.errors import MigrationError, OptionError

_UCRED = struct.Struct("=iII")
_SEND_BUFFER = 2 << 20  # a batch leaves at once, the next is framed while it is placed
_SO_SNDBUFFORCE = 32
_TCP_NOTSENT_LOWAT = 25
_MOST_PARTS = 1024  # IOV_MAX


def listen(uri: str) -> tuple[socket.socket, str]:
    """Listen at ``unix:PATH`` or ``tcp:127.0.0.1:PORT`` (0: any); return the socket and its URI."""
    kind, _, path = uri.partition(":")
    address = path if kind == "unix" else _host_and_port(uri)
    sock = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(8)
    except OSError as error:
        sock.close()
        raise MigrationError(f"cannot listen at {uri}: {error}") from error
    sock.setblocking(False)
    if kind == "unix":
        Path(path).chmod(0o600)
    else:
        uri = f"tcp:127.0.0.1:{sock.getsockname()[1]}"
    return sock, uri


def connect(uri: str, timeout_s: float = 10.0) -> socket.socket:
    """Connect to a listening side; raises :class:`MigrationError` with the reason."""
    kind, _, path = uri.partition(":")
    address = path if kind == "unix" else _host_and_port(uri)
    sock = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
    sock.settimeout(timeout_s)
    try:
        sock.connect(address)
    except OSError as error:
        sock.close()
        raise MigrationError(f"no connection to {uri}: {error}") from error
    tune(sock)
    return sock


def tune(sock: socket.socket) -> None:
    """Make a socket of a migration non-blocking and prompt."""
    sock.setblocking(False)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER)
    except PermissionError:  # then net.core.wmem_max is the limit
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What the kernel has taken but not sent is what a requested page waits behind.
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _SEND_BUFFER // 2)


def is_trusted(sock: socket.socket, pid: int | None = None) -> bool:
    """Whether a peer that connected may be our source: of our uid and, if given, that process.

    On TCP only the kernel's table of connections tells who the peer is. It is on this machine:
    we listen at the loopback address alone.
    """
    if sock.family == socket.AF_UNIX:
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        peer, uid, _ = _UCRED.unpack(data)
        return uid == os.getuid() and pid in (None, peer)
    uid, inode = _owner(sock.getpeername(), sock.getsockname())
    return uid == os.getuid() and (pid is None or _holds(pid, inode))


def _owner(local: tuple[str, int], remote: tuple[str, int]) -> tuple[int, int]:
    """Return uid and inode of the TCP socket with these ends, (-1, 0) if there is none."""
    ends = [
        f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"
        for host, port in (local, remote)
    ]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1:3] == ends:
            return int(fields[7]), int(fields[9])
    return -1, 0


def _holds(pid: int, inode: int) -> bool:
    """Whether a process of ours has a socket open."""
    wanted = Path(f"socket:[{inode}]")
    with contextlib.suppress(OSError):  # the process is gone
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it closes another one just now
                if entry.readlink() == wanted:
                    return True
    return False


def _nobody() -> None:
    """Be told that something waits, and do nothing."""


class Outgoing:
    """What waits to be sent on a non-blocking socket, and how much was."""

    def __init__(self, sock: socket.socket) -> None:
        """Send on ``sock``."""
        self.sock = sock
        self.sent_bytes = 0
        self.on_wait: Callable[[], object] = _nobody  # called when something begins to wait
        self._parts: deque[memoryview] = deque()

    @property
    def pending(self) -> bool:
        """Whether something waits."""
        return bool(self._parts)

    @property
    def queued_bytes(self) -> int:
        """All that was given to be sent, also what waits."""
        return self.sent_bytes + sum(map(len, self._parts))

    def send_one(self, data: bytes) -> None:
        """Send one small message behind what waits: the shortest way, for requests."""
        if not self._parts:
            try:
                sent = self.sock.send(data)
            except BlockingIOError:
                sent = 0
            self.sent_bytes += sent
            if sent == len(data):
                return
            data = data[sent:]
            self.on_wait()
        self._parts.append(memoryview(data))

    def send(self, *parts: bytes | memoryview) -> bool:
        """Send parts behind what waits; return whether all is with the kernel now.

        The parts must stay as they are until then.
        """
        if not self._parts:
            try:
                sent = self.sock.sendmsg(parts)
            except BlockingIOError:
                sent = 0
            self.sent_bytes += sent
            if sent == sum(map(len, parts)):
                return True
            for part in parts:
                if sent >= len(part):
                    sent -= len(part)
                else:
                    self._parts.append(memoryview(part)[sent:])
                    sent = 0
            self.on_wait()
            return False
        self._parts.extend(map(memoryview, parts))
        return False

    def flush(self) -> bool:
        """Send what waits; return whether all is with the kernel now."""
        while self._parts:
            try:
                sent = self.sock.sendmsg(list(itertools.islice(self._parts, _MOST_PARTS)))
            except BlockingIOError:
                return False
            self.sent_bytes += sent
            while sent:
                part = self._parts[0]
                if sent < len(part):
                    self._parts[0] = part[sent:]
                    break
                sent -= len(part)
                self._parts.popleft()
        return True


class RateLimiter:
    """A token bucket in bytes; requested pages never ask it, background transfer does."""

    _BURST_S = 0.01

    def __init__(self, bytes_per_s: float) -> None:
        """Limit to a rate; 0 is no limit."""
        self.rate = bytes_per_s
        self._tokens = 0.0
        self._at = time.monotonic()

    def wait_s(self) -> float:
        """Return how long to wait before the next chunk: 0 when it may be sent now."""
        if not self.rate:
            return 0.0
        now = time.monotonic()
        burst = self.rate * self._BURST_S
        self._tokens = min(burst, self._tokens + (now - self._at) * self.rate)
        self._at = now
        return 0.0 if self._tokens >= 0 else -self._tokens / self.rate

    def spend(self, n_bytes: int) -> None:
        """Take what was sent out of the bucket; it may go into debt by one chunk."""
        self._tokens -= n_bytes


def _host_and_port(uri: str) -> tuple[str, int]:
    kind, _, rest = uri.partition(":")
    host, _, port = rest.rpartition(":")
    if kind != "tcp" or host != "127.0.0.1" or not port.isdigit():
        raise OptionError(f"{uri!r} is neither unix:PATH nor tcp:127.0.0.1:PORT")
    return host, int(port)
