"""The event loop of an engine: what is waited for, in order of urgency.

epoll, because it costs the same however many descriptors are watched; of those that are ready at
once the one that was registered as most urgent is served first.
"""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable

from migkit.migration.channel import Outgoing

_OUT = int(select.EPOLLOUT)
_IDLE_S = 0.05  # longer than a tick, so that no timer has to be programmed for it


class Loop:
    """Calls a handler for each descriptor that is readable or gone, and sends what waits."""

    def __init__(self) -> None:
        """Begin with nothing to wait for."""
        self._epoll = select.epoll()
        self._urgent = select.epoll()
        self._handlers: dict[int, Callable[[], object]] = {}
        self._outgoing: dict[int, Outgoing] = {}
        self._rank: dict[int, int] = {}
        self._deferred: Callable[[], None] | None = None

    def watch(
        self, fd: int, handler: Callable[[], object], rank: int, *, urgent: bool = False
    ) -> None:
        """Call ``handler`` when a descriptor is readable or gone; the lowest rank goes first.

        An ``urgent`` one is also looked at by :meth:`glance`.
        """
        self._handlers[fd] = handler
        self._rank[fd] = rank
        self._epoll.register(fd, select.EPOLLIN)
        if urgent:
            self._urgent.register(fd, select.EPOLLIN)

    def sends(self, outgoing: Outgoing) -> None:
        """Send what waits on a watched socket as soon as there is room."""
        fd = outgoing.sock.fileno()
        self._outgoing[fd] = outgoing
        outgoing.on_wait = lambda: self._epoll.modify(fd, select.EPOLLIN | select.EPOLLOUT)

    def forget(self, fd: int) -> None:
        """Watch a descriptor no longer, if it still is."""
        if fd not in self._handlers:
            return
        self._epoll.unregister(fd)
        with contextlib.suppress(FileNotFoundError):
            self._urgent.unregister(fd)
        del self._handlers[fd]
        self._outgoing.pop(fd, None)

    def defer(self, work: Callable[[], None]) -> None:
        """Do ``work``, once, when nothing has been ready for a while."""
        self._deferred = work

    def turn(self, timeout_s: float) -> None:
        """Wait for something, at most a time, and handle all that is ready."""
        if self._deferred and timeout_s > _IDLE_S:
            ready = self._epoll.poll(_IDLE_S)
            if not ready:
                work, self._deferred = self._deferred, None
                work()
                return
        else:
            ready = self._epoll.poll(timeout_s)
        if len(ready) > 1:
            ready.sort(key=self._by_rank)
        for fd, event in ready:
            if event & _OUT and self._outgoing[fd].flush():
                self._epoll.modify(fd, select.EPOLLIN)
            if event != _OUT and fd in self._handlers:
                self._handlers[fd]()

    def glance(self) -> None:
        """Handle what is urgent and ready now, in the middle of something that is neither."""
        for fd, _ in self._urgent.poll(0):
            if fd in self._handlers:
                self._handlers[fd]()

    def close(self) -> None:
        """Close the epoll descriptors."""
        self._epoll.close()
        self._urgent.close()

    def _by_rank(self, entry: tuple[int, int]) -> int:
        return self._rank[entry[0]]
