"""Watching a migration: one thread reads what the engines say, samples them, saves their traces.

It needs no help of those that it watches, so a guest that waits or an engine that was killed is
still sampled and saved. And it keeps the rule that one guest runs at most, and one at least as
long as its memory is anywhere: see :meth:`Monitor._settle`.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from migkit.errors import ProtocolError, TraceFormatError
from migkit.guest.handle import GuestProcess
from migkit.guest.vcpu import Word
from migkit.migration.pagemap import Row
from migkit.migration.remote import EngineProcess, Remote
from migkit.migration.states import AT_REST, ENDED, Status
from migkit.migration.stats import Counter

SOURCE, DESTINATION = "source", "destination"
ROLES = (SOURCE, DESTINATION)

_SAMPLE_S = 0.02
_UNCONTACTED = {Status.NONE, Status.SETUP}
_POSTCOPY = {
    Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER_SETUP,
    Status.POSTCOPY_RECOVER,
}  # fmt: skip
# The states on the way to post-copy of which an engine does not tell before the guest runs again.
_UNTOLD = {
    SOURCE: (Status.ACTIVE, Status.DEVICE, Status.POSTCOPY_DEVICE, Status.POSTCOPY_ACTIVE),
    DESTINATION: (Status.ACTIVE, Status.POSTCOPY_ACTIVE),
}


class Monitor:
    """What is known of one migration from outside."""

    def __init__(
        self, guests: Mapping[str, GuestProcess], engines: Mapping[str, EngineProcess]
    ) -> None:
        """Take both by role; they may come to be later."""
        self._guests = guests
        self._engines = engines
        self.statuses: list[tuple[int, str, str]] = []
        """(ts_ns, role, status), in the order in which they came."""
        self.errors: list[str] = []
        self.notices: list[str] = []
        self.samples: list[tuple[int, ...]] = []
        """ts_ns, the steps of both guests, the counters of both engines."""
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="migkit-monitor", daemon=True)
        self._given_back = ""  # to whom
        self.ending = False  # who dies from now on was asked to

    def start(self, *others: Remote) -> None:
        """Watch the engines, and ``others`` that are steered too."""
        self._others = others
        self._thread.start()

    @property
    def started(self) -> bool:
        """Whether :meth:`start` was called."""
        return self._thread.ident is not None

    def end(self) -> None:
        """Watch no more."""
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join(10.0)
            self._sample()

    # What is known.

    def status(self, role: str) -> Status:
        """Return the last state that a side told of, or was left in when it died."""
        for _, who, status in reversed(self.statuses):
            if who == role:
                return Status(status)
        return Status.NONE

    def since_ns(self, role: str) -> int:
        """Return when a side entered its state."""
        return next(ts for ts, who, _ in reversed(self.statuses) if who == role)

    def reached(self, role: str, status: str, since: int = 0) -> bool:
        """Whether a side has entered a state, from the ``since``-th status on."""
        return any(who == role and known == status for _, who, known in self.statuses[since:])

    def step(self, role: str) -> int:
        """Return how many steps a guest has executed, over all its migrations."""
        guest = self._guests.get(role)
        return guest.vcpu.words[Word.STEP] if guest and guest.is_ready else 0

    def at_rest(self) -> bool:
        """Whether both sides have ended, or wait for somebody to act."""
        if not self.started:
            return False
        source, destination = self.status(SOURCE), self.status(DESTINATION)
        if self._given_back and source == Status.POSTCOPY_PAUSED:
            return False  # it is about to take the guest back
        # A source that failed early leaves a destination that no one has spoken to.
        return source in AT_REST and destination in AT_REST | _UNCONTACTED

    def wait_for(self, happened: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until something is true of what is known; return whether it is."""
        with self._changed:
            return self._changed.wait_for(happened, timeout_s)

    # The thread.

    def _watch(self) -> None:
        next_sample = time.monotonic()
        while not self._stop.is_set():
            poller = select.poll()
            remotes = (*self._engines.values(), *self._others)
            alive = {each.control.fileno(): each for each in remotes if not each.gone}
            for fd in alive:
                poller.register(fd, select.POLLIN)
            wait = max(0.0, next_sample - time.monotonic())
            for fd, _ in poller.poll(wait * 1000):
                self._read(alive[fd])
            if time.monotonic() >= next_sample:
                next_sample += _SAMPLE_S
                self._sample()

    def _read(self, remote: Remote) -> None:
        with self._changed:
            try:
                remote.read()
            except ProtocolError as error:  # it is not what we started any more
                self.errors.append(f"{remote.name}: {error}")
                remote.child.kill()
            if remote.gone and not self.ending:
                words = remote.last_words()
                self.errors.append(f"{remote.name}: the process died: {words}")
            self._settle()
            self._changed.notify_all()

    def _sample(self) -> None:
        rows = [self._engines[role].counters.words for role in ROLES]
        steps = [self.step(role) for role in ROLES]
        self.samples.append(
            (time.monotonic_ns(), *steps, *(row[c] for row in rows for c in Counter))
        )
        for engine in self._engines.values():
            try:
                engine.drain()
            except (TraceFormatError, OSError) as error:
                text = f"{engine.name}: its trace could not be saved: {error}"
                if text not in self.errors:
                    self.errors.append(text)

    def hear(self, role: str, message: dict[str, Any]) -> None:
        """Note an event that a side sent."""
        data = message.get("data", {})
        with self._changed:
            if message["event"] == "MIGRATION":
                self.statuses.append((message["ts_ns"], role, data["status"]))
            elif message["event"] == "ERROR":
                self.errors.append(f"{role}: {data['desc']}")
            elif message["event"] == "PAUSED":
                self.notices.append(f"{role}: paused: {data['desc']}")

    # Who has the guest.

    def _settle(self) -> None:
        """Decide about a guest whose engines cannot: one has died, or they parted at the switch.

        When the source sends the package it does not know whether the destination will run the
        guest, and a break may leave it in doubt. Here both can be seen: as soon as the
        destination is certain to do nothing more, its vCPU page tells whether its guest was ever
        asked to run. If it was not it is ended, and the source's goes on.
        """
        source, destination = (self._engines[role] for role in ROLES)
        dead = [
            role for role in ROLES
            if self._engines[role].gone and self.status(role) not in ENDED
        ]  # fmt: skip
        in_doubt = self.status(SOURCE) == Status.POSTCOPY_PAUSED
        if self.ending or not (dead or in_doubt):
            return
        never_met = source.gone and self.status(DESTINATION) in _UNCONTACTED
        if not (destination.gone or self._rests(DESTINATION) or never_met):
            return
        guest = self._guests[DESTINATION]
        if not guest.vcpu.words[Word.RUN_SEQ]:
            guest.child.kill()
            self._give_back()
            left = Status.FAILED
        elif not (source.gone or self._rests(SOURCE)):
            return
        else:
            left = self._left_in_postcopy()
        for role in dead:
            self._bury(role, left)

    def _bury(self, role: str, left: Status) -> None:
        """Note the state in which an engine died, and those before it of which it did not tell."""
        known = self.status(role)
        if known == left:
            return
        untold = _UNTOLD[role] if left == Status.POSTCOPY_PAUSED else ()
        passed = untold[untold.index(known) + 1 :] if known in untold else ()
        for status in (*passed, left):
            self.statuses.append((time.monotonic_ns(), role, status.value))

    def _rests(self, role: str) -> bool:
        return self.status(role) in AT_REST

    def _left_in_postcopy(self) -> Status:
        """Return in which state engines have died whose guest has run at the destination."""
        destination = self._engines[DESTINATION]
        if destination.gone and not self._guests[DESTINATION].is_alive:
            self.errors.append("the guest's memory is lost for good: the destination guest died")
            return Status.FAILED
        in_postcopy = any(self.status(role) in _POSTCOPY for role in ROLES)
        if in_postcopy or not destination.pages.snapshot()[Row.RECEIVED].all():
            return Status.POSTCOPY_PAUSED
        return Status.FAILED

    def _give_back(self) -> None:
        """Let the source's guest go on: by its engine if it lives, else by ourselves."""
        source = self._engines[SOURCE]
        if source.gone and self._given_back != "to the guest":
            self._given_back = "to the guest"
            guest = self._guests[SOURCE]
            with contextlib.suppress(OSError):  # its dirty log, if there was one, ends with it
                guest.uffd.unregister(guest.info.address, guest.ram.size)
            guest.vcpu.ask(run=True)
        elif not self._given_back:
            self._given_back = "to the source"
            source.tell("take-back")
