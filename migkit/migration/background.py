"""The background of post-copy: what nobody has asked for yet, from the last request on."""

from __future__ import annotations

import time

from migkit.migration import wire
from migkit.migration.channel import RateLimiter
from migkit.migration.outbound import Outbound
from migkit.migration.stats import Counter
from migkit.migration.supply import PageSupply
from migkit.migration.window import Window


class Background:
    """Sends what is dirty over one pair of channels."""

    def __init__(self, supply: PageSupply, out: Outbound, bytes_per_s: float) -> None:
        """Begin after the switchover, or a break; ``bytes_per_s`` is the limit, 0 for none."""
        self._supply = supply
        self._out = out
        self._limiter = RateLimiter(bytes_per_s)
        small = supply.ram.page_size == wire.TARGET_PAGE
        least = (2 if small else 1) * supply.ram.page_size
        self._window = Window(wire.PING_WINDOW, least)
        self._begun = time.monotonic()
        self._before = out.main.queued_bytes
        self._window.begin(self._before, self._begun)

    def until_low(self, downtime_limit_s: float) -> None:
        """Send until what is left would pass within a time."""
        supply = self._supply
        while supply.remaining:
            took = max(time.monotonic() - self._begun, 0.001)
            bandwidth = (self._out.main.sent_bytes - self._before) / took
            if supply.remaining * supply.ram.page_size <= bandwidth * downtime_limit_s:
                return
            self._send_some()

    def rest(self) -> None:
        """Send all that is left."""
        while self._supply.remaining:
            self._send_some()

    def confirm(self, value: int) -> None:
        """Take the answer to a PING of ours."""
        self._window.confirm(value, time.monotonic())

    def _send_some(self) -> None:
        supply, out = self._supply, self._out
        most = int(min(self._window.bytes / 2, 1 << 40)) // supply.ram.page_size
        batch = supply.next_batch(max(1, most))
        if batch is None:
            return
        supply.cursor = int(batch[-1]) + 1
        out.await_turn(self._limiter)  # a request moves the cursor behind its page
        self._await_room()
        batch = batch[supply.dirty[batch]]  # requests may have taken some
        if not len(batch):
            return
        supply.send(batch, self._limiter, Counter.BACKGROUND_PAGES)
        self._ping_if_due()

    def _await_room(self) -> None:
        out, window = self._out, self._window
        while not window.has_room(out.main.queued_bytes):
            # Requested pages, if they have no channel of their own, are under way as well.
            self._ping_if_due()
            out.wait_for(
                lambda: (
                    window.has_room(out.main.queued_bytes) or window.ping_due(out.main.queued_bytes)
                ),
                "an answer to PING",
            )

    def _ping_if_due(self) -> None:
        main, window = self._out.main, self._window
        if window.ping_due(main.queued_bytes):
            self._out.ping(window.ping(main.queued_bytes, time.monotonic()))
