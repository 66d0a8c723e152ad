"""Pre-copy: dirty pages go out, round after round, until little is left or post-copy is due."""

from __future__ import annotations

import numpy as np

from migkit.migration.answers import Answers
from migkit.migration.asked import Asked
from migkit.migration.channel import RateLimiter
from migkit.migration.dirty import DirtyLog, sync
from migkit.migration.options import Options
from migkit.migration.pacing import Pacing
from migkit.migration.policy import Convergence
from migkit.migration.stats import Counter
from migkit.migration.supply import PageSupply


class Precopy:
    """The rounds of one migration."""

    def __init__(self, options: Options, supply: PageSupply, pacing: Pacing, log: DirtyLog) -> None:
        """Begin before the first round."""
        self._options = options
        self._supply = supply
        self._pacing = pacing
        self._log = log
        self._convergence = Convergence(options, supply.ram.page_size)

    def run(self, asked: Asked, answers: Answers) -> bool:
        """Send until little enough is left; return whether post-copy is to begin instead.

        Raises :class:`~migkit.migration.asked.Cancelled`.
        """
        supply, pacing, convergence = self._supply, self._pacing, self._convergence
        limiter = RateLimiter(self._options.max_bandwidth)
        while True:
            convergence.round_begins(supply.count_dirty())
            supply.counters[Counter.ROUND] = convergence.rounds + 1
            supply.trace.ram_save_round(convergence.rounds + 1, convergence.pages)
            left = np.flatnonzero(supply.dirty)
            while len(left):
                asked.check_cancel()
                pacing.await_turn(limiter)
                if self._postcopy_due(asked, answers):
                    return True
                batch, left = np.split(left, [pacing.batch_pages])
                pacing.send(batch, limiter, Counter.PRECOPY_PAGES)
                supply.at_destination[batch] = True
            # What were still under way would be missing in what is left, and delay it.
            pacing.await_arrival()
            sync(self._log, supply)
            convergence.round_ends(supply.remaining, supply.out.main.sent_bytes)
            supply.counters[Counter.BANDWIDTH] = int(convergence.bandwidth)
            asked.check_cancel()
            if self._postcopy_due(asked, answers):
                return True
            if convergence.pending <= convergence.threshold and self._may_switch(answers):
                return False

    def _postcopy_due(self, asked: Asked, answers: Answers) -> bool:
        due = asked.postcopy or self._convergence.postcopy_due()
        return self._options.postcopy_ram and due and self._may_switch(answers)

    def _may_switch(self, answers: Answers) -> bool:
        return answers.switchover_acked or not self._options.switchover_ack
