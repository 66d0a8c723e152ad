"""Where processes run: the same for both sides of a pair, and said beside every figure."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Placement:
    """The CPUs of the (destination) guest, the source and the destination; None is free."""

    name: str
    guest: int | None
    source: int | None
    destination: int | None
    others: int  # where this process stays meanwhile

    @property
    def option(self) -> str:
        """The option ``cpus`` of a session: source guest, source, destination, guest."""
        if self.guest is None:
            return ""
        return f"{self.source},{self.source},{self.destination},{self.guest}"

    @property
    def arguments(self) -> list[str]:
        """The floor's arguments."""
        cpus = (self.guest, self.source, self.destination)
        return ["-1" if cpu is None else str(cpu) for cpu in cpus]


_CPUS = sorted(os.sched_getaffinity(0))
_FIRST, _SECOND = _CPUS[0], _CPUS[1 % len(_CPUS)]

ONE = Placement("1 CPU", _FIRST, _FIRST, _FIRST, _SECOND)
TWO = Placement("2 CPUs", _FIRST, _SECOND, _FIRST, _SECOND)
FREE = Placement("scheduler", None, None, None, _SECOND)

WHAT = (
    f"1 CPU: guest, source, destination on CPU {_FIRST}; "
    f"2 CPUs: guest and destination on CPU {_FIRST}, source on CPU {_SECOND}; "
    f"while chunks of faults are measured the benchmark itself stays on CPU {_SECOND}"
)


@contextlib.contextmanager
def aside(placement: Placement) -> Iterator[None]:
    """Keep this process and its threads' successors off the measured CPU for a while."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {placement.others})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
