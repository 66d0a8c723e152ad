"""Pacing: no more of a migration is under way than keeps the link busy, at any time.

What lies in buffers and on the link is felt twice. The last pages of pre-copy, for which a guest
stands still, come behind it, so a round ends only when the destination has all of it; and no
requested page can overtake it. :mod:`migkit.migration.window` says how much is let out.

Without a return path nothing is answered: then only the sockets bound what is under way, and a
round ends when they have taken it.
"""

from __future__ import annotations

import time

from migkit.migration import wire
from migkit.migration.channel import RateLimiter
from migkit.migration.framing import Indices
from migkit.migration.outbound import Outbound
from migkit.migration.stats import Counter
from migkit.migration.supply import PageSupply
from migkit.migration.window import MUCH_SLACK_S, Window


class Pacing:
    """Sends batches of pages over one pair of channels."""

    def __init__(self, supply: PageSupply, out: Outbound, *, answered: bool) -> None:
        """Begin on new channels; ``answered`` says whether a PING is."""
        self._supply = supply
        self._out = out
        self._answered = answered
        self._page_size = supply.ram.page_size
        least = (2 if self._page_size == wire.TARGET_PAGE else 1) * self._page_size
        self._window = Window(wire.PING_WINDOW, least)
        self.begin(MUCH_SLACK_S)

    def begin(self, slack_s: float) -> None:
        """Begin to count where all that was sent before is known to have arrived.

        Beyond what the link carries in a round trip, ``slack_s`` worth of it may be under way.
        """
        self._window.slack_s = slack_s
        self._window.begin(self._out.main.queued_bytes, time.monotonic())

    def confirm(self, value: int) -> None:
        """Take the answer to a PING."""
        self._window.confirm(value, time.monotonic())

    @property
    def batch_pages(self) -> int:
        """How many pages may be sent at once."""
        most = self._out.batch_pages
        if self._answered:
            most = int(min(self._window.bytes / 2 / self._page_size, most))
        return max(1, most)

    def await_turn(self, limiter: RateLimiter) -> None:
        """Pump until the limiter and the window let a batch go."""
        out, window = self._out, self._window
        out.await_turn(limiter)
        while self._answered and not window.has_room(out.main.queued_bytes):
            # Requested pages, if they have no channel of their own, are under way as well.
            self._ping_if_due()
            out.wait_for(
                lambda: (
                    window.has_room(out.main.queued_bytes) or window.ping_due(out.main.queued_bytes)
                ),
                "an answer to PING",
            )

    def send(self, batch: Indices, limiter: RateLimiter, n_pages: Counter) -> None:
        """Send pages on the main channel and account for them."""
        self._supply.send(batch, limiter, n_pages)
        self._ping_if_due()

    def await_arrival(self) -> None:
        """Pump until the destination has read all that was sent."""
        if self._answered:
            self._ping()
        self._out.drain()
        self._out.wait_for(lambda: self._window.is_answered, "the end of a round")

    def _ping_if_due(self) -> None:
        if self._answered and self._window.ping_due(self._out.main.queued_bytes):
            self._ping()

    def _ping(self) -> None:
        self._out.ping(self._window.ping(self._out.main.queued_bytes, time.monotonic()))
