"""What was asked of a migration that is under way, for the source to look at when it can."""

from __future__ import annotations

from dataclasses import dataclass


class Cancelled(Exception):  # noqa: N818 — not an error: somebody wished it
    """``migrate_cancel`` came before the switchover."""


@dataclass
class Asked:
    """What the session's commands have asked for since the migration began."""

    postcopy: bool = False
    cancel: bool = False
    continue_: bool = False
    take_back: bool = False

    def check_cancel(self) -> None:
        """Raise :class:`Cancelled` when somebody gave up."""
        if self.cancel:
            raise Cancelled
