"""What a rule about runs is made of, and how a rule says what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from migkit.analysis.analyses import Analyses

SOURCE, DESTINATION, BOTH = "source", "destination", "both"


class NotApplicableError(Exception):
    """A rule cannot judge a run; the message says why."""


@dataclass(frozen=True)
class Finding:
    """A rule that is broken: where, when first (ns, None for the whole run), how often, how."""

    side: str
    ts_ns: int | None
    count: int
    message: str


@dataclass(frozen=True)
class Rule:
    """A rule by its name: what holds in every good run, and the function that looks.

    The function yields a :class:`Finding` for each way in which the run breaks the rule. It raises
    MissingEventError, or :class:`NotApplicableError`, if it cannot tell.
    """

    name: str
    doc: str
    find: Callable[[Analyses], Iterator[Finding]]


def clock_error_ns(run: Analyses) -> int:
    """Return by how much times of one side may be off against the other's: 0 on one clock."""
    alignment = run.meta.get("clock", {}).get("alignment") or {}
    return int(alignment.get("error_ns") or 0)
