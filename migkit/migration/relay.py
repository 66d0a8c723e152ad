"""The link's process: ``python -m migkit.migration.relay LINK CONTROL LIFELINE``.

The source connects here, and each of its channels is connected on to the destination. All of a
direction's channels share one FIFO (:class:`~migkit.migration.link.Fifo`), in the order in which
their bytes come here, so that a small request waits behind a big page as it does on a wire. When
the FIFO is full no channel is read, and the senders feel it. A channel whose receiver does not
read is not read either, and holds up no other.
"""

from __future__ import annotations

import gc
import logging
import math
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migkit.errors import MigrationError
from migkit.kernel.lifeline import die_with
from migkit.migration import channel
from migkit.migration.control import ControlSocket, obey
from migkit.migration.link import Clock, Fifo, Link
from migkit.migration.relayed import CHANNELS, DIRECTIONS, RESET, Channel, Flow

log = logging.getLogger(__name__)

_PIECE_S = 200e-6  # what is read of a channel at once: the wire's grain
_LEAST_PIECE, _MOST_PIECE = 2 << 10, 128 << 10
_BUFFER_S = 2e-3  # what our sockets may hold before the FIFO
_LEAST_BUFFER, _MOST_BUFFER = 64 << 10, 1 << 20
_CONNECT_TIMEOUT_S = 2.0


@dataclass
class Cut:
    """A cut to come: of one channel (None: of all), when ``left`` more bytes are delivered."""

    name: str | None
    direction: str
    left: int

    def hits(self, one: Channel) -> bool:
        """Whether a channel is to be cut."""
        return self.name in (None, one.name)


class Relay:
    """The link between a source and a destination, for one set of channels after the other."""

    def __init__(self, link: Link, control: ControlSocket) -> None:
        """Be steered by ``control``."""
        self._link = link
        self._control = control
        self._piece = link.bytes_in(_PIECE_S, _LEAST_PIECE, _MOST_PIECE)
        self._clock = Clock()
        self._listener: socket.socket | None = None
        self._to, self._peer = "", 0
        self._awaited: list[str] = []
        self._channels: list[Channel] = []
        self._fifos = self._empty_fifos()
        self._delivered = {name: dict.fromkeys(DIRECTIONS, 0) for name in CHANNELS}
        self._cut: Cut | None = None
        self._quitting = False
        self._commands: dict[str, Callable[..., object]] = {
            "listen": self.listen,
            "cut": self.cut,
            "stall": self._clock.stop,
            "resume": self._clock.go_on,
            "query": self.query,
            "quit": self.quit,
        }

    # Commands.

    def listen(self, uri: str, to: str, peer: int) -> dict[str, str]:
        """Wait at ``uri`` for the channels of the process ``peer``, to be connected to ``to``.

        Channels that are still there are closed.
        """
        self._stop_listening()
        for one in self._channels.copy():
            self._close(one)
        self._fifos = self._empty_fifos()
        self._to, self._peer, self._awaited = to, peer, list(CHANNELS)
        self._listener, uri = channel.listen(uri)
        return {"uri": uri}

    def cut(
        self, after_bytes: int = 0, name: str | None = None, direction: str = DIRECTIONS[0]
    ) -> None:
        """Close channels abruptly, now or when so many more bytes of them were delivered."""
        self._cut = Cut(name, direction, after_bytes)
        if not after_bytes and not self._sever(self._cut):
            raise MigrationError("there is no channel that could be cut")

    def query(self) -> dict[str, Any]:
        """Return what was delivered and what each direction's FIFO holds, in bytes."""
        now = self._clock.now()
        delivered = {name: counts.copy() for name, counts in self._delivered.items()}
        for one in self._channels:
            for direction, flow in one.flows.items():
                delivered[one.name][direction] += flow.sent_bytes
        return {
            "stalled": self._clock.stands,
            "cut_in_bytes": self._cut.left if self._cut else None,
            "open": [one.name for one in self._channels],
            "delivered": delivered,
            "queue": {name: fifo.queued_bytes(now) for name, fifo in self._fifos.items()},
            "peak_queue": {name: fifo.peak_queue_bytes for name, fifo in self._fifos.items()},
            "in_transit": {name: fifo.held_bytes for name, fifo in self._fifos.items()},
        }

    def quit(self) -> None:
        """End."""
        self._quitting = True

    # The loop.

    def serve(self) -> None:
        """Relay and obey until ``quit`` or the session is gone."""
        while not self._quitting:
            ready, writable, _ = select.select(*self._awaiting())
            for direction in DIRECTIONS:
                self._read(direction)
            if not self._clock.stands:
                for flow in self._flows():
                    if flow.pending and flow.onward in writable:
                        flow.flush()
                for direction in DIRECTIONS:
                    self._deliver(direction)
                self._settle()
            if self._listener in ready:
                self._accept()
            if self._control in ready:
                self._obey()

    def _awaiting(self) -> tuple[list[Any], list[Any], list[Any], float | None]:
        """Return what select waits for: readers, writers, nothing, and for how long in s.

        select, because epoll from Python counts in ms.
        """
        readers: list[Any] = [self._control]
        if self._listener:
            readers.append(self._listener)
        now, wake = self._clock.now(), math.inf
        for direction, fifo in self._fifos.items():
            wake = min(wake, fifo.arrival)
            readable = [flow for flow in self._flows(direction) if flow.readable]
            if fifo.has_room(now):
                readers += readable
            elif readable:
                wake = min(wake, fifo.refill_at)
                for flow in readable:
                    flow.note_backlog()
        if self._clock.stands:
            return readers, [], [], None
        writers = [flow.onward for flow in self._flows() if flow.pending]
        return readers, writers, [], None if wake == math.inf else max(0.0, wake - now)

    def _deliver(self, direction: str) -> None:
        """Send on all that has arrived in a direction."""
        fifo, now = self._fifos[direction], self._clock.now()
        while (parcel := fifo.pop(now)) is not None:
            one, data = parcel
            flow, cut = one.flows[direction], self._cut
            if flow.closed:
                continue
            if data is RESET:
                self._close(one)
                continue
            if cut and cut.direction == direction and cut.hits(one):
                if not cut.left:
                    continue
                data = data[: cut.left]
                cut.left -= len(data)
            flow.deliver(data)

    def _settle(self) -> None:
        """Cut what is due, when its receiver has taken what it was to get; close what is done."""
        cut = self._cut
        if cut and not cut.left:
            hit = [one for one in self._channels if cut.hits(one)]
            if not any(one.flows[cut.direction].pending for one in hit):
                self._sever(cut)
        for one in self._channels.copy():
            if one.done:
                self._close(one)

    def _read(self, direction: str) -> None:
        """Read a piece of each channel while there is room, of the one longest not read first.

        All are tried: while the FIFO was full select was not asked, and a channel that always
        has more would keep the others out.
        """
        fifo = self._fifos[direction]
        for one in sorted(self._channels, key=lambda one: one.flows[direction].last_read):
            flow, now = one.flows[direction], self._clock.now()
            if not flow.readable or not fifo.has_room(now):
                continue
            try:
                data = flow.read(self._piece)
            except BlockingIOError:
                continue
            flow.last_read = now
            n_bytes = len(data or b"")
            fifo.push(now, n_bytes, (one, data), waited=flow.was_waiting(n_bytes))

    def _accept(self) -> None:
        """Take a channel of the source and connect it on; strangers are turned away."""
        if self._listener is None:
            return
        try:
            near, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        try:
            trusted = channel.is_trusted(near, self._peer)
            far = channel.connect(self._to, _CONNECT_TIMEOUT_S) if trusted else None
        except (OSError, MigrationError) as error:
            log.warning("a channel could not be connected on: %s", error)
            far = None
        if far is None:
            near.close()
            return
        channel.tune(near)
        if math.isfinite(self._link.bytes_per_s):
            size = self._link.bytes_in(_BUFFER_S, _LEAST_BUFFER, _MOST_BUFFER)
            for sock in (near, far):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        self._channels.append(Channel(self._awaited.pop(0), near, far))
        if not self._awaited:
            self._stop_listening()

    def _obey(self) -> None:
        messages = self._control.receive()
        if messages is None:
            self._quitting = True
        for message in messages or []:
            obey(self._control, self._commands, message)

    # Channels.

    def _flows(self, *directions: str) -> Iterator[Flow]:
        for one in self._channels:
            for direction in directions or DIRECTIONS:
                yield one.flows[direction]

    def _sever(self, cut: Cut) -> bool:
        """Carry out a cut; return whether there was something to be cut."""
        hit = [one for one in self._channels if cut.hits(one)]
        for one in hit:
            self._close(one)
        self._cut = None
        return bool(hit)

    def _close(self, one: Channel) -> None:
        for direction, flow in one.flows.items():
            self._delivered[one.name][direction] += flow.sent_bytes
        one.close()
        self._channels.remove(one)

    def _stop_listening(self) -> None:
        if self._listener:
            self._listener.close()
            self._listener = None

    def _empty_fifos(self) -> dict[str, Fifo[tuple[Channel, bytes | None]]]:
        return {direction: Fifo(self._link) for direction in DIRECTIONS}


def main() -> int:
    """Become the relay of the link that the command line names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the session decides what an interrupt means
    link, control_fd, lifeline_fd = Link.parse(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    lifeline = socket.socket(fileno=lifeline_fd)
    die_with(lifeline)
    Path("/proc/self/timerslack_ns").write_text("1")  # else every wait is up to 50 µs longer
    control = ControlSocket(socket.socket(fileno=control_fd))
    gc.freeze()
    gc.disable()  # nothing here makes cycles
    control.event("READY")
    Relay(link, control).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
