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
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from migkit.trace.layout import HEADER, LENGTH_AT, MAX_EVENT_ID, MIN_LENGTH, RECORD, TYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)

WORD = np.dtype(np.uint64)

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
class Records:
    """Whole event records: where each begins and its header, of type ``HEADER``."""

    offsets: Offsets
    headers: npt.NDArray[np.void]

    def __getitem__(self, chosen: slice) -> Records:
        return Records(self.offsets[chosen], self.headers[chosen])


@dataclass(frozen=True)
class Candidates:
    """What looks like whole records, ascending, and after which of them a link breaks."""

    records: Records
    breaks: npt.NDArray[np.intp]

    def run_from(self, offset: int) -> Records:
        """Return the longest run of records that begins at an offset; empty if none does."""
        offsets = self.records.offsets
        first = int(np.searchsorted(offsets, offset))
        if first == offsets.size or offsets[first] != offset:
            return self.records[:0]
        last = int(self.breaks[np.searchsorted(self.breaks, first)])
        return self.records[first : last + 1]


def find_candidates(data: Bytes, start: int) -> Candidates:
    """Chase the records from ``start`` on; what is found is a guess, see the module."""
    guesses = _chase(data, start)
    headers = gather(data, guesses, HEADER)
    good = np.empty(guesses.size, np.bool_)
    linked = np.zeros(guesses.size, np.bool_)
    for chunk in chunks(guesses.size):
        lengths = headers["length"][chunk]
        good[chunk] = headers["type"][chunk] == RECORD
        good[chunk] &= lengths >= MIN_LENGTH
        gaps = np.diff(guesses[chunk.start : chunk.stop + 1])
        np.equal(gaps - TYPE_BYTES, lengths[: gaps.size], out=linked[chunk][: gaps.size])
    breaks = np.flatnonzero(~linked)
    good[breaks] &= guesses[breaks] + headers["length"][breaks] + TYPE_BYTES <= data.size
    if not good.all():
        # A good record before a bad one breaks there; the last good one has no successor.
        linked[:-1] &= good[1:]
        guesses, headers, breaks = guesses[good], headers[good], np.flatnonzero(~linked[good])
    return Candidates(Records(guesses, headers), breaks)


def _chase(data: Bytes, start: int) -> Offsets:
    """Return the candidates: all lanes in lockstep, then put in the file's order."""
    stop = data.size - HEADER.itemsize + 1  # a record that begins later is cut off
    if start >= stop:
        return np.zeros(0, np.int64)
    firsts = _guess_firsts(data, start, stop)
    limits = np.append(firsts[1:], stop)
    found = []
    at = firsts
    while at.size:
        steps = _step(data, at)
        at, by_lane = steps[-1], steps[:-1].T
        found.append(by_lane[by_lane < limits[:, None]])
        going = at < limits  # lanes can be of very different lengths: each costs only its own
        at, limits = at[going], limits[going]
    return np.sort(np.concatenate(found), kind="stable")


def _step(data: Bytes, at: Offsets) -> Offsets:
    """Return where each lane goes from its offset on, a row a step.

    Single bytes are gathered several times as fast as words that may lie at any alignment, and
    most records are so short that the lowest byte tells their length, few longer than two tell.
    """
    low, high = data[LENGTH_AT:], data[LENGTH_AT + 1 :]
    steps = np.empty((_STEPS_A_ROUND + 1, at.size), np.int64)
    steps[0] = at
    for here, there in pairwise(steps):
        np.add(here, low.take(here, mode="clip"), out=there)
        np.add(there, TYPE_BYTES, out=there)
    if high.take(steps[:-1], mode="clip").any():
        for here, there in pairwise(steps):
            lengths = high.take(here, mode="clip").astype(np.int64) << 8
            lengths += low.take(here, mode="clip")
            np.add(here, lengths + TYPE_BYTES, out=there)
    return steps


def _guess_firsts(data: Bytes, start: int, stop: int) -> Offsets:
    """Guess one record's offset at the beginning of each lane; ``start`` is the first."""
    lanes = min(_MAX_LANES, (stop - start) // _LANE_BYTES)
    if lanes < 2:
        return np.array([start])
    bounds = np.linspace(start, stop, lanes, endpoint=False).astype(np.int64)[1:]
    windows = sliding_window_view(data, _GUESS_BYTES + 1)[bounds]
    # The first two bytes of RECORD leave few places to look at more closely.
    like_type = (windows[:, :-1] == 1) & (windows[:, 1:] == 0)
    lane, place = divmod(np.flatnonzero(like_type), _GUESS_BYTES)
    at = bounds[lane] + place
    headers = gather(data, at, HEADER)
    ends = at + headers["length"] + TYPE_BYTES
    plausible = (headers["type"] == RECORD) & (headers["id"] <= MAX_EVENT_ID) & (ends < stop)
    plausible &= (headers["length"] >= MIN_LENGTH) & (headers["length"] <= _GUESS_LENGTH)
    at, ends = at[plausible], ends[plausible]
    at = at[gather(data, ends, WORD) == RECORD]
    lane = np.searchsorted(bounds, at, side="right")
    _, first_of_lane = np.unique(lane, return_index=True)
    return np.concatenate([[start], at[first_of_lane]])
