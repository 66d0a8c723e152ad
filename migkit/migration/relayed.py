"""A channel that goes through the relay: two sockets, and what flows between them.

Ends and resets go through the link behind the data, as parcels of their own, so who closes after
a last message does not lose it.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import socket
import termios

from migkit.migration.channel import Outgoing

CHANNELS = ("main", "preempt")  # in the order in which the source connects
DIRECTIONS = ("to_destination", "to_source")

END = b""  # the sender has said that no more comes
RESET = None  # the sender's socket is broken


class Flow:
    """One channel in one direction: the socket that it is read from, the one it goes on to."""

    def __init__(self, end: socket.socket, onward: socket.socket) -> None:
        """Read ``end``, send on ``onward``; both are non-blocking."""
        self._end = end
        self._out = Outgoing(onward)
        self._read_all = False
        self._delivered_all = False
        self.closed = False  # nothing goes through any more
        self.last_read = 0.0
        self._known_bytes = 0

    def fileno(self) -> int:
        """Return the descriptor that is read, for select."""
        return self._end.fileno()

    @property
    def onward(self) -> socket.socket:
        """The socket on which it goes on, for select."""
        return self._out.sock

    @property
    def sent_bytes(self) -> int:
        """How much has been delivered."""
        return self._out.sent_bytes

    @property
    def pending(self) -> bool:
        """Whether something has arrived that the receiver does not take yet."""
        return self._out.pending and not self.closed

    @property
    def readable(self) -> bool:
        """Whether it may be read: more can come, and the receiver has taken what there was."""
        return not (self._read_all or self.closed or self._out.pending)

    @property
    def done(self) -> bool:
        """Whether it has come to its end."""
        return self.closed or (self._delivered_all and not self.pending)

    def note_backlog(self) -> None:
        """Look how much has come that the link has no room for."""
        size = array.array("i", [0])
        fcntl.ioctl(self._end, termios.FIONREAD, size)
        self._known_bytes = size[0]

    def was_waiting(self, n_bytes: int) -> bool:
        """Whether what was read is of the backlog that was noted."""
        waited = 0 < n_bytes <= self._known_bytes
        self._known_bytes = max(0, self._known_bytes - n_bytes)
        return waited

    def read(self, most: int) -> bytes | None:
        """Read a piece, :data:`END` or :data:`RESET`; raises BlockingIOError when none is there."""
        try:
            data = self._end.recv(most)
        except ConnectionError:
            self._read_all = True
            return RESET
        self._read_all = not data
        return data

    def deliver(self, data: bytes) -> None:
        """Send on a piece that has arrived, or that it was the last."""
        try:
            if data == END:
                self._delivered_all = True
            elif not self._out.send(data):
                self._known_bytes = 0  # it waits for its receiver now, not for the link
            self._end_when_sent()
        except ConnectionError:  # the receiver is gone: who reads from it will find out
            self.closed = True

    def flush(self) -> None:
        """Send on what the receiver did not take before."""
        try:
            self._out.flush()
            self._end_when_sent()
        except ConnectionError:
            self.closed = True

    def _end_when_sent(self) -> None:
        if self._delivered_all and not self._out.pending:
            with contextlib.suppress(OSError):  # ENOTCONN: it has closed its end too
                self._out.sock.shutdown(socket.SHUT_WR)


class Channel:
    """One connection of the source, and the one that continues it to the destination."""

    def __init__(self, name: str, near: socket.socket, far: socket.socket) -> None:
        """Join the socket to the source and the one to the destination."""
        self.name = name
        self.flows = dict(zip(DIRECTIONS, (Flow(near, far), Flow(far, near)), strict=True))
        self._sockets = (near, far)

    @property
    def done(self) -> bool:
        """Whether both directions have come to their ends."""
        return all(flow.done for flow in self.flows.values())

    def close(self) -> None:
        """Close both sockets; what is still on its way is lost."""
        for flow in self.flows.values():
            flow.closed = True
        for sock in self._sockets:
            sock.close()
