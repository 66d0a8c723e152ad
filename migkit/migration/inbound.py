"""The destination's end of the channels: it listens, accepts, reads, and answers.

The counterpart of :mod:`migkit.migration.outbound`. The channels may break and be connected anew
while the loop, which also waits for faults, goes on: what is read from a new main channel
continues the stream that the old one broke off.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

from migkit.migration import channel
from migkit.migration.channel import Outgoing
from migkit.migration.loop import Loop
from migkit.migration.records import RECORD_BYTES, Page, Pages, PreemptDecoder
from migkit.migration.stream import Event, StreamDecoder
from migkit.migration.wire import BlockLayout

_PIECE_PAGES = 256  # what is read of the stream between two looks at the faults
_BUSY_PIECE_PAGES = 8  # the same while faults are coming
_BUSY_S = 0.005


class Inbound:
    """Both channels of a destination, main first, as often as they are connected."""

    def __init__(
        self,
        loop: Loop,
        layout: BlockLayout,
        *,
        preempt: bool,
        on_connected: Callable[[], None],
        on_event: Callable[[Event], None],
        on_requested: Callable[[Page | Pages], None],
        last_fault: Callable[[], float],
    ) -> None:
        """Take who is told: that both channels stand, of the stream, of requested pages.

        ``last_fault`` tells when a fault was last read (time.monotonic()): while some come, the
        stream is read in small pieces.
        """
        self.loop = loop
        self.main: Outgoing | None = None
        self.preempt: socket.socket | None = None
        self.listening = False  # post-copy has begun: faults are looked at between two events
        self._blocks = {layout.name: layout}
        self._wants_preempt = preempt
        self._on_connected = on_connected
        self._on_event = on_event
        self._on_requested = on_requested
        self._last_fault = last_fault
        self._listener: socket.socket | None = None
        self._peer: int | None = None
        self.decoder = StreamDecoder(self._blocks)
        self.preempt_decoder = PreemptDecoder(self._blocks)

    def listen(self, uri: str, peer: int | None) -> str:
        """Wait for the source at ``uri``; return where, as it can be connected to.

        ``peer`` is the process that may connect; None is any process of this user.
        """
        self._stop_listening()
        self._peer = peer
        self._listener, uri = channel.listen(uri)
        self.loop.watch(self._listener.fileno(), self._accept, rank=5)
        return uri

    def _accept(self) -> None:
        """Take the source's channels, main first; strangers are turned away."""
        if self._listener is None:
            return
        with contextlib.suppress(BlockingIOError):
            sock, _ = self._listener.accept()
            if not channel.is_trusted(sock, self._peer):
                sock.close()
                return
            channel.tune(sock)
            if self.main is None:
                self.main = Outgoing(sock)
            else:
                self.preempt = sock
        if self.main and (self.preempt or not self._wants_preempt):
            self._stop_listening()
            self._watch()
            self._on_connected()

    def _watch(self) -> None:
        if self.main is None:
            return
        if self.preempt:
            self.loop.watch(self.preempt.fileno(), self._read_preempt, rank=1, urgent=True)
        self.loop.watch(self.main.sock.fileno(), self._read_main, rank=2)
        self.loop.sends(self.main)

    def _stop_listening(self) -> None:
        if self._listener:
            self.loop.forget(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def drop(self) -> None:
        """Close both channels; the next ones continue the stream where it was broken off."""
        for sock in (self.main and self.main.sock, self.preempt):
            if sock:
                self.loop.forget(sock.fileno())
                sock.close()
        self.main = self.preempt = None
        self.decoder = self.decoder.continued()
        self.preempt_decoder = PreemptDecoder(self._blocks)

    def take_over(self) -> None:
        """Expect the rest of a stream that an engine before us has begun to read."""
        self.decoder = StreamDecoder.in_postcopy(self._blocks)

    def close(self) -> None:
        """Close everything."""
        self._stop_listening()
        self.drop()

    def send(self, data: bytes) -> None:
        """Send a message on the return path.

        What cannot be sent is not an error here: the reader of the channel will find it broken.
        """
        if self.main:
            with contextlib.suppress(ConnectionError):
                self.main.send_one(data)

    @property
    def preempt_ended(self) -> bool:
        """Whether the preempt channel, if there is one, has come to its end."""
        return self.preempt is None or self.preempt_decoder.ended

    def _read_main(self) -> None:
        if self.main is None:
            return
        decoder = self.decoder
        buffer = decoder.buffer
        busy = time.monotonic() - self._last_fault() < _BUSY_S
        decoder.most_pages = most = _BUSY_PIECE_PAGES if busy else _PIECE_PAGES
        try:
            n = self.main.sock.recv_into(buffer.room(most * RECORD_BYTES))
        except BlockingIOError:
            return
        if n == 0:
            raise ConnectionResetError("the source closed the main channel")
        buffer.tail += n
        while buffer.head < buffer.tail and (event := decoder.next()) is not None:
            if self.listening:
                self.loop.glance()
            self._on_event(event)

    def _read_preempt(self) -> None:
        preempt, decoder = self.preempt, self.preempt_decoder
        if preempt is None:
            return
        buffer = decoder.buffer
        try:
            n = preempt.recv_into(buffer.room(64 << 10))
        except BlockingIOError:
            return
        if n == 0:
            if self.listening and not decoder.ended:
                raise ConnectionResetError("the source closed the preempt channel")
            self.loop.forget(preempt.fileno())
            return
        buffer.tail += n
        while buffer.head < buffer.tail and (event := decoder.next()) is not None:
            self._on_requested(event)
