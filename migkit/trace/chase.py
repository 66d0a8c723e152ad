"""Find where the records of a simpletrace begin, without a Python step per record.

A record tells its length, so each one is found through the one before: a pointer chase, which
numpy cannot do along one chain but can along thousands side by side. The file is cut into as
many lanes, the first plausible record of each is guessed, and all lanes are chased in lockstep,
one gather a step. A guess may be wrong (payload bytes can look like a record), so nothing found
is believed before its link is: the true chain starts at a known record and each candidate must
end where the next begins. `Candidates.run_from` tells how far that holds; from there the reader
steps record by record until it meets a candidate again. Wrong guesses cost time, nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from migkit.trace.layout import HEADER, MAX_EVENT_ID, MIN_LENGTH, RECORD, TYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)

WORD = np.dtype(np.uint64)

_LENGTH_AT = 24
_LANE_BYTES = 16384
_CHUNK = 1 << 15
_MAX_LANES = 1024
_GUESS_BYTES = 512
_GUESS_LENGTH = 8192
_STEPS_A_ROUND = 32


def gather(data: Bytes, at: Offsets, dtype: np.dtype[Scalar]) -> npt.NDArray[Scalar]:
    """Copy one item of ``dtype`` from each byte offset, at whatever alignment.

    Every offset must leave room for an item. Items travel as opaque bytes: numpy copies a
    structured type field by field, which takes eight times as long.
    """
    opaque = np.dtype((np.void, dtype.itemsize))
    count = data.size - dtype.itemsize + 1
    if not at.size or count <= 0:
        return np.zeros(0, dtype)
    window = np.ndarray((count,), opaque, buffer=data.data, strides=(1,))
    return window[at].view(dtype)


def chunks(count: int) -> Iterator[slice]:
    """Cut an array of records into slices small enough that what is derived stays in the cache.

    Without this most of the time goes to the page faults of large temporary arrays.
    """
    return (slice(begin, begin + _CHUNK) for begin in range(0, count, _CHUNK))


@dataclass(frozen=True)
class Candidates:
    """Offsets that look like whole records, ascending, and after which of them a link breaks."""

    offsets: Offsets
    breaks: npt.NDArray[np.intp]

    def run_from(self, offset: int) -> Offsets:
        """Return the longest run of records that begins at an offset; empty if none does."""
        first = int(np.searchsorted(self.offsets, offset))
        if first == self.offsets.size or self.offsets[first] != offset:
            return self.offsets[:0]
        last = int(self.breaks[np.searchsorted(self.breaks, first)])
        return self.offsets[first : last + 1]


def find_candidates(data: Bytes, start: int) -> Candidates:
    """Chase the records from ``start`` on; what is found is a guess, see the module."""
    guesses = _chase(data, start)
    linked = np.empty(guesses.size, np.bool_)
    good = np.empty(guesses.size, np.bool_)
    for chunk in chunks(guesses.size):
        at = guesses[chunk]
        headers = gather(data, at, HEADER)
        ends = at + headers["length"] + TYPE_BYTES
        good[chunk] = headers["type"] == RECORD
        good[chunk] &= (headers["length"] >= MIN_LENGTH) & (ends <= data.size)
        successors = np.append(guesses[chunk.start + 1 : chunk.stop + 1], -1)[: at.size]
        linked[chunk] = ends == successors
    if not good.all():
        # A good record before a bad one breaks there; the last good one has no successor.
        linked[:-1] &= good[1:]
        guesses, linked = guesses[good], linked[good]
    return Candidates(guesses, np.flatnonzero(~linked))


def _chase(data: Bytes, start: int) -> Offsets:
    """Return the candidates: all lanes in lockstep, then put in the file's order."""
    stop = data.size - HEADER.itemsize + 1  # a record that begins later is cut off
    if start >= stop:
        return np.zeros(0, np.int64)
    firsts = _guess_firsts(data, start, stop)
    limits = np.append(firsts[1:], stop)
    lengths = np.ndarray((stop + 1,), np.uint32, data.data, _LENGTH_AT, strides=(1,))
    found = []
    at = firsts
    while at.size:
        steps = np.empty((_STEPS_A_ROUND, at.size), np.int64)
        for step in steps:
            step[:] = at
            at = at + lengths[at]
            at += TYPE_BYTES
            np.minimum(at, limits, out=at)  # a lane that is done waits at its limit
        by_lane = steps.T
        found.append(by_lane[by_lane < limits[:, None]])
        going = at < limits  # lanes can be of very different lengths: each costs only its own
        at, limits = at[going], limits[going]
    return np.sort(np.concatenate(found), kind="stable")


def _guess_firsts(data: Bytes, start: int, stop: int) -> Offsets:
    """Guess one record's offset at the beginning of each lane; ``start`` is the first."""
    lanes = min(_MAX_LANES, (stop - start) // _LANE_BYTES)
    if lanes < 2:
        return np.array([start])
    bounds = np.linspace(start, stop, lanes, endpoint=False).astype(np.int64)[1:]
    window = (bounds[:, None] + np.arange(_GUESS_BYTES)).ravel()
    window = window[window < stop]
    words = gather(data, window, WORD)
    at = window[words == RECORD]
    headers = gather(data, at, HEADER)
    ends = at + headers["length"] + TYPE_BYTES
    plausible = (headers["length"] >= MIN_LENGTH) & (headers["length"] <= _GUESS_LENGTH)
    plausible &= (headers["id"] <= MAX_EVENT_ID) & (ends < stop)
    at, ends = at[plausible], ends[plausible]
    at = at[gather(data, ends, WORD) == RECORD]
    lane = np.searchsorted(bounds, at, side="right")
    _, first_of_lane = np.unique(lane, return_index=True)
    return np.concatenate([[start], at[first_of_lane]])
