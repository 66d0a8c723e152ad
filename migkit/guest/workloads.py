"""Workloads: what a guest computes. Deterministic, so that a migrated guest can be checked.

A workload's whole future follows from its RAM, its CPU state and its parameters; the same steps
leave the same bytes wherever and however often the guest was moved between them. Randomness is
counter-based (``hash(seed, step)``): the CPU state is a step number plus the workload's own fields.

A class of one's own subclasses :class:`Workload`, declares ``state_dtype`` and defines ``step``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from migkit.errors import OptionError, close_matches

Ram = npt.NDArray[np.uint8]  # (n_pages, page_size)
State = np.void  # one record of Workload.full_dtype(): "step" u64, then the workload's own fields


class Workload:
    """What a guest does; subclass it for a guest of your own.

    ``params`` maps the workload's parameters to their defaults; they become attributes.
    """

    name: ClassVar[str] = ""
    state_dtype: ClassVar[np.dtype[np.void]] = np.dtype([])
    params: ClassVar[Mapping[str, float]] = {}

    def __init__(self, seed: int = 1, **params: float) -> None:
        """Set the parameters; an unknown one raises :class:`OptionError`."""
        self.seed = seed
        for name in params:
            if name not in self.params:
                raise OptionError(
                    f"workload {self.label()} has no parameter {name!r}: "
                    + (close_matches(name, self.params) if self.params else "it takes none")
                )
        for name, default in self.params.items():
            setattr(self, name, params.get(name, default))

    @classmethod
    def label(cls) -> str:
        """Return the name by which people know the workload."""
        return cls.name or cls.__name__

    @classmethod
    def full_dtype(cls) -> np.dtype[np.void]:
        """Return the CPU state's layout: a packed record that begins with ``step``."""
        own = [(name, cls.state_dtype[name]) for name in cls.state_dtype.names or ()]
        return np.dtype([("step", "<u8"), *own])

    def prepare(self, ram: Ram, state: State) -> None:
        """Fill RAM before the first step, as a guest that has booted would have.

        The default marks every page but the last sixteenth, which stays zero.
        """
        del state
        used = len(ram) - len(ram) // 16
        words = ram.view(np.uint64)
        words[:used, 0] = np.arange(1, used + 1, dtype=np.uint64)

    def step(self, ram: Ram, state: State, n: int) -> None:
        """Execute ``n`` steps from ``state["step"]`` on, each writing at most one page.

        ``step(n)`` must leave what ``n`` times ``step(1)`` leaves: the guest cuts its time into
        quanta as it likes. The guest itself advances ``state["step"]`` afterwards.
        """
        raise NotImplementedError(f"workload {self.label()} defines no step(ram, state, n)")


class Memtest(Workload):
    """Increment the first byte of every page in order.

    At any stop all bytes are equal but for one edge, where the value drops by one: the check of
    QEMU's own migration tests.
    """

    name = "memtest"

    def prepare(self, ram: Ram, state: State) -> None:
        """Start with zeros in the first byte; the second makes every page count."""
        del state
        ram[:, 1] = 1

    def step(self, ram: Ram, state: State, n: int) -> None:
        """Increment the next ``n`` pages' first bytes."""
        at = int(state["step"]) % len(ram)
        while n > 0:
            count = min(n, len(ram) - at)
            ram[at : at + count, 0] += 1
            n -= count
            at = 0


class Random(Workload):
    """Write one pseudo-random word of one pseudo-random page a step."""

    name = "random"

    def step(self, ram: Ram, state: State, n: int) -> None:
        """Add to ``n`` words; sums commute, so a quantum may be done at once."""
        draw = hash_steps(self.seed, int(state["step"]), n)
        words = ram.reshape(-1).view(np.uint64)
        per_page = np.uint64(ram.shape[1] // 8)
        page = draw % np.uint64(len(ram))
        index = page * per_page + (draw >> np.uint64(40)) % per_page
        np.add.at(words, index.astype(np.intp), draw | np.uint64(1))


class Hotset(Workload):
    """Read and write pages with Zipf's popularity.

    ``working_set`` is the share of RAM that is ever touched, ``write_share`` the share of steps
    that write, ``alpha`` Zipf's exponent. Reads go to a word that is never written and into the
    checksum of the CPU state: a page that came over wrongly is noticed even where it is only read.
    """

    name = "hotset"
    state_dtype = np.dtype([("checksum", "<u8")])
    params: ClassVar[Mapping[str, float]] = {"working_set": 0.25, "write_share": 0.5, "alpha": 1.1}
    working_set: float
    write_share: float
    alpha: float

    def __init__(self, seed: int = 1, **params: float) -> None:
        """Check that the shares are shares."""
        super().__init__(seed, **params)
        for name in ("working_set", "write_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise OptionError(f"{name} of {getattr(self, name)} is not a share from 0 to 1")
        self._popularity: npt.NDArray[np.float64] = np.empty(0)
        self._stride = 1

    def step(self, ram: Ram, state: State, n: int) -> None:
        """Draw ``n`` pages; write to some, read from the others."""
        pages = self._draw_pages(ram, state, n)
        coin = hash_steps(self.seed + 1, int(state["step"]), n)
        writes = (coin >> np.uint64(11)) < np.uint64(int(self.write_share * (1 << 53)))
        words = ram.reshape(-1).view(np.uint64)
        base = pages * (ram.shape[1] // 8)
        np.add.at(words, base[writes] + 1, coin[writes] | np.uint64(1))
        read = words[base[~writes]] * np.uint64(0x9E3779B97F4A7C15)
        state["checksum"] = np.add.reduce(np.append(read, state["checksum"]))  # wraps

    def _draw_pages(self, ram: Ram, state: State, n: int) -> npt.NDArray[np.intp]:
        if not len(self._popularity):
            count = max(1, int(len(ram) * self.working_set))
            weights = np.arange(1, count + 1, dtype=np.float64) ** -self.alpha
            self._popularity = np.cumsum(weights) / weights.sum()
            self._stride = next(
                s for s in range(int(len(ram) * 0.618) | 1, 2 * len(ram) + 3)
                if np.gcd(s, len(ram)) == 1
            )  # fmt: skip
        uniform = (hash_steps(self.seed, int(state["step"]), n) >> np.uint64(11)) * 2.0**-53
        rank = np.searchsorted(self._popularity, uniform).clip(max=len(self._popularity) - 1)
        return (rank * self._stride % len(ram)).astype(np.intp)


WORKLOADS: Mapping[str, type[Workload]] = {w.name: w for w in (Memtest, Random, Hotset)}
"""The workloads known by name."""


def find_workload(name: str) -> type[Workload]:
    """Return the workload of a name; raises :class:`OptionError` with the closest ones."""
    if name not in WORKLOADS:
        raise OptionError(f"no workload {name!r}: " + close_matches(name, WORKLOADS))
    return WORKLOADS[name]


def hash_steps(seed: int, first: int, n: int) -> npt.NDArray[np.uint64]:
    """Return splitmix64(seed, step) for ``n`` steps from ``first`` on, (n,) uint64.

    S. Vigna's splitmix64, https://prng.di.unimi.it/splitmix64.c.
    """
    golden = 0x9E3779B97F4A7C15
    start = (seed * 0xD1342543DE82EF95 + (first + 1) * golden) & 0xFFFFFFFFFFFFFFFF
    z = np.arange(n, dtype=np.uint64) * np.uint64(golden) + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
