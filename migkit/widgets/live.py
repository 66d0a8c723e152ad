"""What is known of a migration while it runs, gathered without the help of those that run it.

Counters, statuses and the page map come out of shared memory, latencies and events out of the
trace files that the session writes anyway. No engine and no guest is woken for a look.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from migkit.trace.folder import ROLES
from migkit.trace.follow import Follower
from migkit.trace.registry import Registry
from migkit.widgets.history import PageHistory

if TYPE_CHECKING:
    from migkit.migration.session import Session
    from migkit.trace.simpletrace import Trace

SENT = ("precopy_bytes", "postcopy_bytes", "preempt_bytes")
"""The source's counters of what it has sent."""

_EVENTS_SHOWN = 12
_RATE_S = 0.4
_CURVE_POINTS = 150
_BINS_A_DECADE = 100
_DECADES = 9  # from 1 us to 1,000 s


@dataclass
class Latencies:
    """A histogram of fault latencies over logarithmic bins, so that a million cost no more."""

    counts: np.ndarray[Any, np.dtype[np.int64]] = field(
        default_factory=lambda: np.zeros(_DECADES * _BINS_A_DECADE, np.int64)
    )
    greatest_us: float = 0.0

    def add(self, us: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        """Take latencies in us."""
        if len(us):
            bins = (np.log10(np.maximum(us, 1.0)) * _BINS_A_DECADE).astype(np.int64)
            self.counts += np.bincount(
                np.minimum(bins, len(self.counts) - 1), minlength=len(self.counts)
            )
            self.greatest_us = max(self.greatest_us, float(us.max()))

    def __len__(self) -> int:
        """Return how many were taken."""
        return int(self.counts.sum())

    def quantile_us(self, share: float) -> float:
        """Return a quantile, to 1.2 %; 0 when there is none."""
        below = np.cumsum(self.counts)
        if not below[-1]:
            return 0.0
        place = int(np.searchsorted(below, share * below[-1]))
        return min(float(10 ** ((place + 0.5) / _BINS_A_DECADE)), self.greatest_us)


class Live:
    """One migration as it is now; :meth:`look` brings it up to date."""

    def __init__(self, session: Session) -> None:
        """Watch a session that has been started."""
        self._session = session
        self._page_size = session.options.page_size
        n_pages = session.options.memory // self._page_size
        self.history = PageHistory(n_pages)
        self.latencies = Latencies()
        """From the reading of the fault to the placing of its page: the kernel's part is not in."""
        self.events: deque[str] = deque(maxlen=_EVENTS_SHOWN)
        """The last trace events of both sides, a line each."""
        self.figures: dict[str, Any] = session.query()
        self.curve: deque[tuple[float, float, str]] = deque(maxlen=_CURVE_POINTS)
        """(s, steps a second, where the guest runs)."""
        self.steps = 0
        self.rate = 0.0
        """Steps a second of the guest, now."""
        self.bandwidth = 0.0
        """Bytes a second that the source sends, now."""
        self.running = ""
        self._recent: deque[tuple[float, int, int]] = deque()
        self._read_ns = np.zeros(n_pages, np.int64)
        self._last_ns = 0
        registry = Registry.load()
        self._followers = {role: Follower(session.folder.trace(role), registry) for role in ROLES}
        self._begun_ns = min((ts for ts, _, _ in session.statuses), default=time.monotonic_ns())

    @property
    def time_s(self) -> float:
        """The time since the migration began."""
        return (time.monotonic_ns() - self._begun_ns) / 1e9

    def look(self) -> None:
        """Take everything in as it is now."""
        self.history.update(self._session.page_map(), self.time_s)
        self.figures = self._session.query()
        self._progress()
        for role, follower in self._followers.items():
            trace = follower.read()
            if role == "destination":
                self._faults(trace)
            self._note_events(role, trace)

    def _progress(self) -> None:
        now = self.time_s
        self.steps = max(self.figures[role]["step"] for role in ROLES)
        self.running = " and ".join(self._session.running_guests)
        recent = self._recent
        sent = sum(self.figures["source"][name] for name in SENT)
        recent.append((now, self.steps, sent))
        while len(recent) > 2 and recent[1][0] < now - _RATE_S:
            recent.popleft()
        then, steps, sent_then = recent[0]
        took = now - then
        self.rate = (self.steps - steps) / took if took else 0.0
        self.bandwidth = (sent - sent_then) / took if took else 0.0
        self.curve.append((now, self.rate, self.running))

    def _faults(self, trace: Trace) -> None:
        read, placed = (
            trace[name] for name in ("postcopy_ram_fault_thread_request", "postcopy_request_placed")
        )
        pages = (read["offset"] // self._page_size).astype(np.int64)
        new = self._read_ns[pages] == 0  # later messages repeat the first
        self._read_ns[pages[new]] = read["ts_ns"][new]
        pages = (placed["offset"] // self._page_size).astype(np.int64)
        begun = self._read_ns[pages]
        known = begun > 0
        self.latencies.add((placed["ts_ns"][known].astype(np.int64) - begun[known]) / 1e3)

    def _note_events(self, role: str, trace: Trace) -> None:
        last = [
            (int(row["ts_ns"]), name, row)
            for name, rows in trace.events.items()
            for row in rows[-_EVENTS_SHOWN:]
        ]
        for ts_ns, name, row in sorted(last, key=lambda one: one[0])[-_EVENTS_SHOWN:]:
            arguments = trace.registry[name].format_args(row.tolist()[3:])
            seconds = (ts_ns - self._begun_ns) / 1e9
            self.events.append(f"{seconds:9.3f} s  {role:<11}  {name} {arguments}")
