"""The background of post-copy: what nobody has asked for yet, from the last request on."""

from __future__ import annotations

import time

from migkit.migration.channel import RateLimiter
from migkit.migration.outbound import Outbound
from migkit.migration.pacing import Pacing
from migkit.migration.stats import Counter
from migkit.migration.supply import PageSupply
from migkit.migration.window import LITTLE_SLACK_S


class Background:
    """Sends what is dirty over one pair of channels."""

    def __init__(
        self, supply: PageSupply, out: Outbound, pacing: Pacing, bytes_per_s: float
    ) -> None:
        """Begin after the switchover, or a break; ``bytes_per_s`` is the limit, 0 for none."""
        self._supply = supply
        self._out = out
        self._pacing = pacing
        self._limiter = RateLimiter(bytes_per_s)
        self._begun = time.monotonic()
        self._before = out.main.queued_bytes
        pacing.begin(LITTLE_SLACK_S)

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

    def _send_some(self) -> None:
        supply, pacing = self._supply, self._pacing
        batch = supply.next_batch(pacing.batch_pages)
        if batch is None:
            return
        supply.cursor = int(batch[-1]) + 1
        pacing.await_turn(self._limiter)  # a request moves the cursor behind its page
        batch = batch[supply.dirty[batch]]  # requests may have taken some
        if len(batch):
            pacing.send(batch, self._limiter, Counter.BACKGROUND_PAGES)
