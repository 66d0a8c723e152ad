"""The states of a migration, in one table.

Rule: everything that affects states and transitions lives in this file. A transition is a
compare-and-set, QEMU's ``migrate_set_state(old, new)``: when the state is no longer ``old``
nothing changes and nothing is announced, so that a cancel or an error that came at the same
moment is never overwritten. A transition that the table lacks is a bug and raises.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Mapping
from typing import Any


class Status(enum.StrEnum):
    """QMP's MigrationStatus."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    POSTCOPY_DEVICE = "postcopy-device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILING = "failing"
    FAILED = "failed"


_S = Status
_BEFORE_POSTCOPY = {_S.CANCELLING, _S.FAILING, _S.FAILED}

SOURCE: Mapping[Status, frozenset[Status]] = {
    _S.NONE: frozenset({_S.SETUP}),
    _S.SETUP: frozenset({_S.ACTIVE, *_BEFORE_POSTCOPY}),
    _S.ACTIVE: frozenset({_S.PRE_SWITCHOVER, _S.DEVICE, _S.COMPLETED, *_BEFORE_POSTCOPY}),
    _S.PRE_SWITCHOVER: frozenset({_S.DEVICE, *_BEFORE_POSTCOPY}),
    _S.DEVICE: frozenset({_S.POSTCOPY_DEVICE, _S.COMPLETED, *_BEFORE_POSTCOPY}),
    _S.POSTCOPY_DEVICE: frozenset({_S.POSTCOPY_ACTIVE, _S.FAILING, _S.FAILED}),
    _S.POSTCOPY_ACTIVE: frozenset({_S.POSTCOPY_PAUSED, _S.COMPLETED, _S.FAILED}),
    _S.POSTCOPY_PAUSED: frozenset({_S.POSTCOPY_RECOVER_SETUP, _S.FAILED}),
    _S.POSTCOPY_RECOVER_SETUP: frozenset({_S.POSTCOPY_RECOVER, _S.POSTCOPY_PAUSED}),
    _S.POSTCOPY_RECOVER: frozenset({_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED}),
    _S.CANCELLING: frozenset({_S.CANCELLED}),
    _S.FAILING: frozenset({_S.FAILED}),
    _S.COMPLETED: frozenset({_S.SETUP}),
    _S.CANCELLED: frozenset({_S.SETUP}),
    _S.FAILED: frozenset({_S.SETUP}),
}
"""The source's transitions, as QEMU 10.2 has them without ``wait-unplug``."""

DESTINATION: Mapping[Status, frozenset[Status]] = {
    _S.NONE: frozenset({_S.SETUP}),
    _S.SETUP: frozenset({_S.ACTIVE, _S.FAILED}),
    _S.ACTIVE: frozenset({_S.POSTCOPY_ACTIVE, _S.COMPLETED, _S.FAILED}),
    _S.POSTCOPY_ACTIVE: frozenset({_S.POSTCOPY_PAUSED, _S.COMPLETED, _S.FAILED}),
    _S.POSTCOPY_PAUSED: frozenset({_S.POSTCOPY_RECOVER, _S.FAILED}),
    _S.POSTCOPY_RECOVER: frozenset({_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED}),
    _S.COMPLETED: frozenset(),
    _S.FAILED: frozenset(),
}
"""The destination's transitions."""

_RUNNING = frozenset(SOURCE) - {
    _S.NONE, _S.CANCELLING, _S.CANCELLED, _S.COMPLETED, _S.FAILING, _S.FAILED
}  # fmt: skip

QEMU_SOURCE: Mapping[str, frozenset[str]] = {
    # 7.2 enters post-copy before its guest stops; 10.2 and later cancel whatever runs when they
    # quit, a paused post-copy too (migration_cancel). postcopy-recover-setup came with 9.1.
    # wait-unplug is for failover network cards, colo for a guest that runs at both sides.
    **{state: frozenset({_S.CANCELLING}) for state in _RUNNING},
    _S.SETUP: frozenset({"wait-unplug", _S.CANCELLING}),
    "wait-unplug": frozenset({_S.ACTIVE, *_BEFORE_POSTCOPY}),
    _S.ACTIVE: frozenset({_S.POSTCOPY_ACTIVE, "colo", _S.CANCELLING}),
    "colo": frozenset({_S.COMPLETED, *_BEFORE_POSTCOPY}),
    _S.POSTCOPY_PAUSED: frozenset({_S.POSTCOPY_RECOVER, _S.CANCELLING}),
    _S.DEVICE: frozenset({_S.POSTCOPY_ACTIVE, _S.ACTIVE, _S.CANCELLING}),
}
"""What real QEMUs do at the source beyond :data:`SOURCE`; only traces are judged by it."""

QEMU_DESTINATION: Mapping[str, frozenset[str]] = {
    _S.NONE: frozenset({_S.ACTIVE}),
    _S.ACTIVE: frozenset({_S.POSTCOPY_DEVICE, "colo"}),
    "colo": frozenset({_S.COMPLETED, _S.FAILED}),
    _S.POSTCOPY_DEVICE: frozenset({_S.POSTCOPY_ACTIVE, _S.FAILED}),
    _S.POSTCOPY_PAUSED: frozenset({_S.POSTCOPY_RECOVER_SETUP}),
    _S.POSTCOPY_RECOVER_SETUP: frozenset({_S.POSTCOPY_RECOVER, _S.POSTCOPY_PAUSED}),
}
"""What real QEMUs do at the destination beyond :data:`DESTINATION`."""


def is_known(side: str, old: str, new: str) -> bool:
    """Whether a side may go from ``old`` to ``new``, names as in a trace, by any of the tables."""
    both: tuple[Mapping[Any, frozenset[Any]], ...]
    both = (SOURCE, QEMU_SOURCE) if side == "source" else (DESTINATION, QEMU_DESTINATION)
    return any(new in after for table in both for before, after in table.items() if before == old)


ENDED = frozenset({_S.COMPLETED, _S.CANCELLED, _S.FAILED})
"""States in which nothing moves any more."""

AT_REST = ENDED | {_S.POSTCOPY_PAUSED}
"""States that only somebody from outside leads out of."""

COMMANDS: Mapping[str, frozenset[Status]] = {
    "start": frozenset({_S.NONE}),
    "start_postcopy": frozenset({_S.SETUP, _S.ACTIVE}),
    "continue_": frozenset({_S.PRE_SWITCHOVER}),
    "pause": frozenset({_S.POSTCOPY_ACTIVE}),
    "recover": frozenset({_S.POSTCOPY_PAUSED}),
    "cancel": frozenset(old for old, new in SOURCE.items() if _S.CANCELLING in new),
}
"""In which states of the source a session's command makes sense."""


class PostcopyState(enum.StrEnum):
    """How far the destination is with post-copy, QEMU's PostcopyState."""

    NONE = "none"
    ADVISE = "advise"
    DISCARD = "discard"
    LISTENING = "listening"
    RUNNING = "running"
    END = "end"


POSTCOPY_ORDER: Mapping[PostcopyState, frozenset[PostcopyState]] = {
    PostcopyState.NONE: frozenset({PostcopyState.ADVISE}),
    PostcopyState.ADVISE: frozenset({PostcopyState.DISCARD, PostcopyState.LISTENING}),
    PostcopyState.DISCARD: frozenset({PostcopyState.DISCARD, PostcopyState.LISTENING}),
    PostcopyState.LISTENING: frozenset({PostcopyState.RUNNING}),
    PostcopyState.RUNNING: frozenset({PostcopyState.END}),
    PostcopyState.END: frozenset(),
}
"""Which post-copy command may follow which, at the destination."""


class StateMachine:
    """The state of one side; transitions are announced through a callback."""

    def __init__(
        self,
        table: Mapping[Status, frozenset[Status]],
        announce: Callable[[Status], None],
        status: Status = Status.NONE,
    ) -> None:
        """Begin in a state. ``announce`` is called after each change, outside the lock."""
        self._table = table
        self._announce = announce
        self._lock = threading.Lock()
        self._status = status

    @property
    def status(self) -> Status:
        """The current state."""
        return self._status

    def set(self, old: Status, new: Status) -> bool:
        """Go from ``old`` to ``new``; return False, and change nothing, if we are elsewhere.

        Raises :class:`ValueError` for a transition that is not in the table.
        """
        if new not in self._table.get(old, ()):
            raise ValueError(f"there is no transition from {old} to {new}")
        with self._lock:
            if self._status != old:
                return False
            self._status = new
        self._announce(new)
        return True
