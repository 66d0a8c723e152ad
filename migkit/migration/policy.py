"""When to go on, when to end, when to switch: decided from what the rounds of pre-copy showed."""

from __future__ import annotations

import time

from migkit.migration.options import Options, Trigger

# Pre-copy does not converge when a round leaves more than this share of itself dirty again,
# twice in a row; QEMU's throttle-trigger-threshold, and its patience.
_DIRTY_AGAIN = 0.5
_PATIENCE = 2


class Convergence:
    """The history of the rounds, and what follows from it."""

    def __init__(self, options: Options, page_size: int) -> None:
        """Begin before the first round."""
        self._trigger = Trigger.parse(options.postcopy)
        self._downtime_limit = options.downtime_limit
        self._page_size = page_size
        self._begun = time.monotonic()
        self._sent = 0
        self._stubborn = 0
        self.rounds = 0  # completed
        self.pages = 0  # dirty at the begin of this round
        self.pending = 0.0  # bytes
        self.bandwidth = 0.0  # bytes a second, of the last round

    def round_begins(self, dirty_pages: int) -> None:
        """Note that a pass over so many pages begins."""
        self.pages = dirty_pages
        self._round_begun = time.monotonic()

    def round_ends(self, dirty_pages: int, sent_bytes: int) -> None:
        """Note that the pass is over and left so many pages dirty; all bytes sent until now."""
        took = max(time.monotonic() - self._round_begun, 1e-6)
        self.bandwidth = (sent_bytes - self._sent) / took
        self._sent = sent_bytes
        self.rounds += 1
        self.pending = dirty_pages * self._page_size
        again = self.rounds > 1 and dirty_pages > _DIRTY_AGAIN * self.pages
        self._stubborn = self._stubborn + 1 if again else 0

    @property
    def threshold(self) -> float:
        """How many bytes may be left for the guest to stand still: what passes in the limit."""
        return self.bandwidth * self._downtime_limit

    def postcopy_due(self) -> bool:
        """Whether the option ``postcopy`` says to switch now."""
        trigger = self._trigger
        return (
            self.rounds >= trigger.rounds
            or time.monotonic() - self._begun >= trigger.seconds
            or (trigger.auto and self._stubborn >= _PATIENCE)
        )
