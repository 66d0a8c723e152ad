"""How much may be under way: about what the link carries in a round trip.

What has been sent and has not arrived cannot be overtaken, and a guest that needs such a page can
only wait for it. So the source lets no more be under way than keeps the link busy: the delivery
rate times the shortest round trip, and a little more, which also lets the estimate grow while the
link has room. Both are measured by PING and PONG, as BBR does by acknowledgements.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

LITTLE_SLACK_S = 2e-3
"""Beyond the round trip: what keeps a link busy whose ends are not always awake."""
MUCH_SLACK_S = 20e-3
"""The same where no page is waited for: fewer PINGs, longer batches."""

_PINGS = 4  # in a window
_SAMPLES = 16  # the rate is the highest of so many
_GROWTH = 1.25  # a rate that is so much higher has grown; so much more than it carries is sent
_PATIENCE = 3  # at first the window doubles, until the rate has not grown for so many trips
_FAST = 400e6  # bytes/s: from here on no bound is needed, and PINGs would cost more than they give
_FAST_PING_BYTES = 16 << 20


class _Mark(NamedTuple):
    """What was true when a PING was sent."""

    value: int
    at: float
    sent: int
    confirmed: int
    confirmed_at: float
    was_full: bool


class Window:
    """The bound on one channel; times are of time.monotonic()."""

    def __init__(self, first_ping: int, least_bytes: int) -> None:
        """Take the number of the first PING, and how many bytes may always be under way."""
        self.slack_s = LITTLE_SLACK_S
        self._next = first_ping
        self._least = least_bytes
        self._marks: deque[_Mark] = deque()
        self._rates: deque[float] = deque(maxlen=_SAMPLES)
        self._trip = math.inf
        self._plateau = 0.0  # the rate from which it would have to grow
        self._patience = _PATIENCE  # trips that are left for it to grow
        self._trip_ends = 0
        self._confirmed = 0
        self._confirmed_at = 0.0
        self._marked = 0
        self._full = False

    def begin(self, sent: int, now: float) -> None:
        """Begin to count on a channel on which ``sent`` bytes went before."""
        self._marks.clear()
        self._confirmed = self._marked = sent
        self._confirmed_at = now

    @property
    def bytes(self) -> float:
        """How many bytes may be under way."""
        if not self._rates:
            return self._least
        rate = max(self._rates)
        if rate >= _FAST:
            return math.inf
        gain = 2 if self._patience else _GROWTH
        return max(self._least, gain * rate * (self._trip + self.slack_s))

    @property
    def is_answered(self) -> bool:
        """Whether all PINGs were answered."""
        return not self._marks

    def has_room(self, sent: int) -> bool:
        """Whether more may be sent when ``sent`` bytes were, over all."""
        room = sent - self._confirmed < self.bytes
        self._full = self._full or not room
        return room

    def ping_due(self, sent: int) -> bool:
        """Whether a PING is to follow what was sent."""
        return sent - self._marked >= min(self.bytes / _PINGS, _FAST_PING_BYTES)

    def ping(self, sent: int, now: float) -> int:
        """Note that a PING goes out behind ``sent`` bytes; return its value."""
        self._next += 1
        mark = _Mark(self._next, now, sent, self._confirmed, self._confirmed_at, self._full)
        self._marks.append(mark)
        self._marked, self._full = sent, False
        return self._next

    def confirm(self, value: int, now: float) -> None:
        """Note that a PING was answered: all before it has arrived."""
        while self._marks and self._marks[0].value <= value:
            mark = self._marks.popleft()
            self._confirmed, self._confirmed_at = mark.sent, now
            if mark.value != value:
                continue
            self._trip = min(self._trip, now - mark.at)
            rate = (mark.sent - mark.confirmed) / max(now - mark.confirmed_at, 1e-6)
            # Where less was sent than might have been, the rate is the sender's, not the link's.
            if mark.was_full or not self._rates or rate > max(self._rates):
                self._rates.append(rate)
            if mark.confirmed >= self._trip_ends:
                self._trip_ends = self._marked
                self._look_for_growth(was_full=mark.was_full)

    def _look_for_growth(self, *, was_full: bool) -> None:
        rate = max(self._rates)
        if rate >= _GROWTH * self._plateau:
            self._plateau, self._patience = rate, _PATIENCE if self._patience else 0
        elif was_full and self._patience:
            self._patience -= 1
