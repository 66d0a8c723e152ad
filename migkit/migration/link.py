"""A link of given bandwidth and latency: what it is, and when what enters it arrives. No I/O.

On a wire a message waits for all that was sent before it: its last byte departs when the wire has
carried everything ahead of it, and arrives one latency later. Times are in s, by :class:`Clock`.
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from migkit.errors import OptionError

_EXAMPLES = "write '200Mbit/s, 1ms', '25MB/s', 'unlimited' or 'unlimited, 500us'"
_BANDWIDTH = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(bit|bytes?|b)/s", re.IGNORECASE)
_LATENCY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(us|µs|ms|s)", re.IGNORECASE)
_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_LONGEST_S = 10.0
_SLOWEST = 1000.0  # bytes/s: slower, and a page takes longer than any engine waits

_QUEUE_S = 250e-6
_LEAST_QUEUE, _MOST_QUEUE = 8 << 10, 1 << 20
_MOST_IN_FLIGHT = 64 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Link:
    """What connects source and destination; the same in both directions."""

    bytes_per_s: float = math.inf
    latency_s: float = 0.0
    """One way."""

    @classmethod
    def parse(cls, text: str) -> Link:
        """Parse ``"BANDWIDTH"`` or ``"BANDWIDTH, LATENCY"``; raises :class:`OptionError`.

        A bandwidth is ``unlimited`` or a decimal number of bit/s or B/s, as in 200Mbit/s and
        25MB/s; a latency is in us, ms or s.
        """
        bandwidth, comma, latency = (part.strip() for part in text.partition(","))
        rate, delay = _BANDWIDTH.fullmatch(bandwidth), _LATENCY.fullmatch(latency)
        if not (rate or bandwidth.lower() == "unlimited") or (comma and not delay):
            raise OptionError(f"link {text!r}: {_EXAMPLES}")
        bytes_per_s, latency_s = math.inf, 0.0
        if rate:
            bits = rate[3].lower() == "bit"
            bytes_per_s = float(rate[1]) * _FACTORS[rate[2].lower()] / (8 if bits else 1)
        if delay:
            latency_s = float(delay[1]) * _SECONDS[delay[2].lower()]
        if bytes_per_s < _SLOWEST:
            raise OptionError(f"link {text!r}: a bandwidth is at least 8kbit/s; {_EXAMPLES}")
        if latency_s > _LONGEST_S:
            raise OptionError(f"link {text!r}: a latency is at most {_LONGEST_S:g} s")
        return cls(bytes_per_s, latency_s)

    def bytes_in(self, seconds: float, least: int, most: int) -> int:
        """Return what the link carries in a time, within bounds."""
        carried = self.bytes_per_s * seconds if seconds else 0.0  # the rate may be infinity
        return int(min(max(carried, least), most))


class Fifo(Generic[T]):
    """One direction of a link, shared by all its channels.

    What has not departed is the queue; it is bounded, and short (250 µs of the bandwidth) as that
    of a network card is, for a requested page waits behind it. What has departed is in flight.
    """

    def __init__(self, link: Link) -> None:
        """Begin with an empty link."""
        self._rate, self._latency_s = link.bytes_per_s, link.latency_s
        self.queue_limit = link.bytes_in(_QUEUE_S, _LEAST_QUEUE, _MOST_QUEUE)
        self._queue_s = self.queue_limit / self._rate
        # The bandwidth bounds what is held to the queue and one latency's worth; this is for links
        # of unlimited bandwidth, or nearly so.
        in_flight = link.bytes_in(2 * link.latency_s, self.queue_limit, _MOST_IN_FLIGHT)
        self._most_held = 2 * self.queue_limit + in_flight
        self._free_at = 0.0
        self._parcels: deque[tuple[float, int, T]] = deque()
        self.held_bytes = 0
        """What has entered and not arrived: the queue and what is in flight."""
        self.peak_queue_bytes = 0

    def push(self, now: float, n_bytes: int, parcel: T, *, waited: bool = False) -> None:
        """Let a parcel enter the link, behind all that is in it.

        One that ``waited`` was there before the link was free: the wire carried it without a
        gap, however late it is pushed.
        """
        begin = self._free_at if waited else max(now, self._free_at)
        self._free_at = begin + n_bytes / self._rate
        self._parcels.append((self._free_at + self._latency_s, n_bytes, parcel))
        self.held_bytes += n_bytes
        self.peak_queue_bytes = max(self.peak_queue_bytes, self.queued_bytes(now))

    def pop(self, now: float) -> T | None:
        """Take the next parcel that has arrived, None if none has."""
        if not self._parcels or self._parcels[0][0] > now:
            return None
        if self.held_bytes >= self._most_held:  # the wire stood idle: too much was in flight
            self._free_at = max(self._free_at, now)
        _, n_bytes, parcel = self._parcels.popleft()
        self.held_bytes -= n_bytes
        return parcel

    def queued_bytes(self, now: float) -> int:
        """Return how much has not departed."""
        if math.isinf(self._rate):
            return self.held_bytes if not self._latency_s else 0
        return max(0, round((self._free_at - now) * self._rate))

    @property
    def arrival(self) -> float:
        """When the next parcel arrives; infinity when the link is empty."""
        return self._parcels[0][0] if self._parcels else math.inf

    def has_room(self, now: float) -> bool:
        """Whether more may enter."""
        return self.held_bytes < self._most_held and self._free_at - self._queue_s <= now

    @property
    def refill_at(self) -> float:
        """When the queue is down to its half; infinity when parcels have to arrive first."""
        if self.held_bytes >= self._most_held:
            return math.inf
        return self._free_at - self._queue_s / 2


class Clock:
    """The link's time, in s: it stands still while the link is stalled."""

    def __init__(self) -> None:
        """Start it."""
        self._behind = 0.0
        self._stopped: float | None = None

    def now(self) -> float:
        """Return the time."""
        return time.monotonic() - self._behind if self._stopped is None else self._stopped

    @property
    def stands(self) -> bool:
        """Whether it stands still."""
        return self._stopped is not None

    def stop(self) -> None:
        """Stop it."""
        self._stopped = self.now()

    def go_on(self) -> None:
        """Let it go on from where it stands."""
        self._behind = time.monotonic() - self.now()
        self._stopped = None
