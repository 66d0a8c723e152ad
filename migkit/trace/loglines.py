"""Read QEMU's log of trace events, in the style of any version, into columns; millions of lines.

QEMU 7.2 writes ``TID@SEC.USEC:event args`` and 10.2 ``2026-11-23T01:28:46.510528Z event args``;
both stamp the wall clock. A log may be compressed (.xz, .gz), end in the middle of a line, and
hold lines that are no trace events: those are counted, and the first of them are kept.

A piece of some MiB is taken apart at a time, by numpy where columns are fixed and by Arrow where
they are text, so no Python object is made per line; only what does not look like the common
styles is matched line by line.
"""

from __future__ import annotations

import gzip
import lzma
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from migkit.errors import TraceFormatError
from migkit.trace.chase import gather

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from migkit.trace.chase import Bytes, Offsets

MAX_LINE = 1 << 20
"""A longer line is no trace event: it is skipped, and counted as foreign."""

_PIECE = 1 << 20
_MAX_NAME = 128
_MAX_SECONDS = 9_000_000_000
"""Since 1970; more, in ns, would not fit into 64 bits. It is the year 2255."""
_KEPT = 5
_NEWLINE, _SPACE, _RETURN = 10, 32, 13

_ISO = re.compile(
    rb"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:[.,](\d{1,9}))?(Z|[+-]\d\d:?\d\d)? (?=\w)"
)
_SECONDS = re.compile(rb"(\d{1,10})@(\d{1,10})\.(\d{6}):(?=\w)")
_ISO_FORM = b"0000-00-00T00:00:00.000000Z "
_SECONDS_FORM = b"@0000000000.000000:"
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Log:
    """The trace events of a log, in the file's order.

    ``ts_ns`` (n,) int64 is the wall clock, ns since 1970; ``tid`` (n,) int64 the thread, 0 where
    the style has none; ``code`` (n,) int32 indexes ``names``; ``args`` is an Arrow
    array of ``large_string``, the text behind the name.
    """

    ts_ns: npt.NDArray[np.int64]
    tid: npt.NDArray[np.int64]
    code: npt.NDArray[np.int32]
    names: tuple[str, ...]
    args: Any
    n_lines: int = 0
    n_foreign: int = 0
    """Lines that are no trace event: messages of QEMU, torn lines."""
    foreign: tuple[tuple[int, str], ...] = ()
    """The first of them: line number from 1, and text."""
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ts_ns)


def read_log(
    source: str | os.PathLike[str] | bytes, progress: Callable[[int], None] | None = None
) -> Log:
    """Read a log, or the bytes of one; ``progress`` is told of every piece's bytes.

    Raises TraceFormatError when there is no trace event in it, with the first line there is.
    """
    name = "the log" if isinstance(source, bytes) else str(source)
    reader = _Reader()
    try:
        with _open(source) as file:
            for piece in _pieces(file, reader):
                reader.take(piece)
                if progress:
                    progress(len(piece))
    except (lzma.LZMAError, gzip.BadGzipFile) as error:
        raise TraceFormatError(f"{name} cannot be decompressed: {error}") from error
    except EOFError:
        reader.warn("the compressed log is cut off: what follows is lost")
    return reader.result(name)


def open_plain(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading, decompressed if its first bytes say .xz or .gz."""
    with Path(path).open("rb") as raw:
        magic = raw.read(6)
    if magic == b"\xfd7zXZ\0":
        return lzma.open(path)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(path)  # type: ignore[return-value]
    return Path(path).open("rb")


def _open(source: str | os.PathLike[str] | bytes) -> IO[bytes]:
    if isinstance(source, bytes):
        import io  # noqa: PLC0415

        return io.BytesIO(source)
    return open_plain(source)


def _pieces(file: IO[bytes], reader: _Reader) -> Iterator[bytes]:
    """Yield whole lines, some MiB at a time; the last may lack its newline."""
    rest = b""
    skipping = False
    while piece := file.read(_PIECE):
        if skipping:  # the end of a line that was too long
            _, newline, piece = piece.partition(b"\n")
            skipping = not newline
        whole, newline, tail = piece.rpartition(b"\n")
        if newline:
            yield rest + whole + newline
            rest = tail
        else:
            rest += tail
        if len(rest) > MAX_LINE:
            reader.skip_line(rest)
            rest, skipping = b"", True
    if rest:
        reader.unended = True
        yield rest + b"\n"


@dataclass
class _Reader:
    """Collects pieces' columns."""

    codes: dict[str, int] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(
        default_factory=lambda: {"ts_ns": [], "tid": [], "code": [], "args": []}
    )
    n_lines: int = 0
    n_foreign: int = 0
    foreign: list[tuple[int, str]] = field(default_factory=list)
    zones: set[bytes] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)
    unended: bool = False

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def skip_line(self, begin: bytes) -> None:
        """Count a line that is too long."""
        self._count_foreign(self.n_lines + 1, begin[:200])
        self.n_lines += 1

    def take(self, piece: bytes) -> None:
        """Take whole lines apart."""
        if not piece.isascii():
            piece = piece.decode("utf-8", "backslashreplace").encode()
        data = np.frombuffer(piece, np.uint8)
        ends = np.flatnonzero(data == _NEWLINE)
        starts = np.concatenate([[0], ends[:-1] + 1])
        ts, tid, at = self._stamps(piece, data, starts, ends)
        good = at > 0
        if good.any():
            good = self._names_and_args(data, ts, tid, at, ends, good)
        blank = ends == starts
        for row in np.flatnonzero(~good & ~blank)[:_KEPT].tolist():
            text = piece[starts[row] : ends[row]][:200]
            self._count_foreign(self.n_lines + row + 1, text, count=0)
        self.n_foreign += int((~good & ~blank).sum())
        self.n_lines += len(ends)

    def _count_foreign(self, number: int, text: bytes, count: int = 1) -> None:
        self.n_foreign += count
        if len(self.foreign) < _KEPT:
            self.foreign.append((number, text.decode("utf-8", "backslashreplace")))

    def _stamps(
        self, piece: bytes, data: Bytes, starts: Offsets, ends: Offsets
    ) -> tuple[Offsets, Offsets, Offsets]:
        """Return each line's time, thread and where its event's name begins, 0 for none."""
        ts, tid, at = (np.zeros(len(starts), np.int64) for _ in range(3))
        left = np.arange(len(starts))
        for style in (_iso_stamps, _seconds_stamps):
            rows, *found = style(data, starts[left], ends[left])
            for column, values in zip((ts, tid, at), found, strict=True):
                column[left[rows]] = values
            left = np.delete(left, rows)
        for row in left.tolist():
            line = piece[starts[row] : min(ends[row], starts[row] + 64)]
            if match := _ISO.match(line):
                stamp = _iso_ns(match)
            elif match := _SECONDS.match(line):
                stamp = int(match[2]) * 1_000_000_000 + int(match[3]) * 1000
            else:
                continue
            if stamp is None or not 0 <= stamp < _MAX_SECONDS * 1_000_000_000:
                continue
            ts[row], at[row] = stamp, starts[row] + match.end()
            if match.re is _ISO:
                self.zones.add(match[8] or b"")
            else:
                tid[row] = int(match[1])
        return ts, tid, at

    def _names_and_args(
        self, data: Bytes, ts: Offsets, tid: Offsets, at: Offsets, ends: Offsets, good: Any
    ) -> npt.NDArray[np.bool_]:
        """Append the columns of the lines that have a stamp; return which are events."""
        rows = np.flatnonzero(good)
        begin, end = at[rows], ends[rows]
        end = end - (data[end - 1] == _RETURN)
        spaces = np.append(np.flatnonzero(data == _SPACE), data.size)
        name_end = np.minimum(spaces[np.searchsorted(spaces, begin)], end)
        args_begin = np.minimum(name_end + 1, end)
        # One Arrow array over the piece itself: name, gap, args, gap, name, ...
        bounds = np.stack([begin, name_end, args_begin, end], axis=1).ravel()
        buffers = [None, pa.py_buffer(bounds.astype(np.int64)), pa.py_buffer(data)]
        texts = pa.Array.from_buffers(pa.large_string(), len(bounds) - 1, buffers)
        picks = np.arange(len(rows)) * 4
        encoded = texts.take(pa.array(picks)).dictionary_encode()
        table = np.array([self._code(name) for name in encoded.dictionary.to_pylist()], np.int32)
        code = table[encoded.indices.to_numpy()]
        kept = code >= 0
        if not kept.all():
            good[rows[~kept]] = False
            rows, picks, code = rows[kept], picks[kept], code[kept]
        self.columns["ts_ns"].append(ts[rows])
        self.columns["tid"].append(tid[rows])
        self.columns["code"].append(code)
        self.columns["args"].append(texts.take(pa.array(picks + 2)))
        return good  # type: ignore[no-any-return]

    def _code(self, name: str) -> int:
        """Return an event's index, -1 for what cannot be an event's name."""
        if len(name) > _MAX_NAME or not _IDENTIFIER.fullmatch(name):
            return -1
        return self.codes.setdefault(name, len(self.codes))

    def result(self, name: str) -> Log:
        """Return what was read."""
        if not self.codes:
            if not self.n_lines:
                raise TraceFormatError(f"{name} is empty")
            number, text = self.foreign[0] if self.foreign else (1, "")
            raise TraceFormatError(
                f"{name}, line {number}: expected 'TID@SECONDS.MICROSECONDS:event' or "
                f"'YYYY-MM-DDTHH:MM:SS.uuuuuuZ event', got {text[:80]!r}; none of "
                f"{self.n_lines} lines has a time. QEMU stamps them with -msg timestamp=on"
            )
        if b"" in self.zones:
            self.warn("times without a zone are taken as UTC: were they local, all are shifted")
        if self.n_foreign:
            number, text = self.foreign[0]
            self.warn(
                f"{self.n_foreign} of {self.n_lines} lines are no trace events and were left "
                f"out; the first is line {number}: {text[:80]!r}"
            )
        if self.unended:
            self.warn("the last line has no end: the log may be cut off")
        columns = self.columns
        return Log(
            ts_ns=np.concatenate(columns["ts_ns"]),
            tid=np.concatenate(columns["tid"]),
            code=np.concatenate(columns["code"]),
            names=tuple(self.codes),
            args=pa.concat_arrays(columns["args"]),
            n_lines=self.n_lines,
            n_foreign=self.n_foreign,
            foreign=tuple(self.foreign),
            warnings=tuple(self.warnings),
        )


def _fits(window: npt.NDArray[np.uint8], form: bytes) -> npt.NDArray[np.bool_]:
    """Return which rows have digits where the form has zeros, and else its very bytes."""
    wanted = np.frombuffer(form, np.uint8)
    digit = wanted == ord("0")
    fits: npt.NDArray[np.bool_] = (window[:, ~digit] == wanted[~digit]).all(axis=1)
    fits &= ((window[:, digit] - np.uint8(48)) < 10).all(axis=1)
    return fits


def _number(window: npt.NDArray[np.uint8], columns: slice) -> Offsets:
    """Return the decimal number in some columns of each row."""
    value = np.zeros(len(window), np.int64)
    for column in range(columns.start, columns.stop):
        value *= 10
        value += window[:, column] - np.uint8(48)
    return value


def _windows(data: Bytes, at: Offsets, width: int) -> npt.NDArray[np.uint8]:
    window = gather(data, at, np.dtype(f"V{width}"))
    return window.view(np.uint8).reshape(-1, width)


def _iso_stamps(
    data: Bytes, starts: Offsets, ends: Offsets
) -> tuple[Offsets, Offsets, Offsets, Offsets]:
    """Return the lines in QEMU 10.2's style: rows, their time, no thread, their name's place."""
    width = len(_ISO_FORM)
    rows = np.flatnonzero(ends - starts > width)
    window = _windows(data, starts[rows], width)
    fits = _fits(window, _ISO_FORM)
    rows, window = rows[fits], window[fits]
    dates = _number(window, slice(0, 4)) * 10000 + _number(window, slice(5, 7)) * 100
    dates += _number(window, slice(8, 10))
    hours, minutes, seconds = (_number(window, slice(i, i + 2)) for i in (11, 14, 17))
    day = np.full(len(rows), -1, np.int64)
    for date in np.unique(dates).tolist() if len(dates) and np.ptp(dates) else dates[:1].tolist():
        day[dates == date] = _day(date)
    valid = (day >= 0) & (hours < 24) & (minutes < 60) & (seconds < 61)
    ts = (((day * 24 + hours) * 60 + minutes) * 60 + seconds) * 1_000_000_000
    ts += _number(window, slice(20, 26)) * 1000
    rows = rows[valid]
    return rows, ts[valid], np.zeros(len(rows), np.int64), starts[rows] + width


def _day(date: int) -> int:
    """Return a date's number of days since 1970, -1 if there is no such date."""
    try:
        moment = datetime(date // 10000, date // 100 % 100, date % 100, tzinfo=UTC)
    except ValueError:
        return -1
    seconds = int(moment.timestamp())
    return seconds // 86400 if 0 <= seconds < _MAX_SECONDS else -1


def _seconds_stamps(
    data: Bytes, starts: Offsets, ends: Offsets
) -> tuple[Offsets, Offsets, Offsets, Offsets]:
    """Return the lines in QEMU 7.2's style: rows, their time, thread, their name's place."""
    width, most = len(_SECONDS_FORM), 8
    rows = np.flatnonzero(ends - starts > most + width)
    head = _windows(data, starts[rows], most)
    is_at = head == ord("@")
    digits = is_at.argmax(axis=1)
    some = digits > 0
    rows, head, digits = rows[some], head[some], digits[some]
    window = _windows(data, starts[rows] + digits, width)
    tid = np.zeros(len(rows), np.int64)
    fits = _fits(window, _SECONDS_FORM)
    for column in range(most - 1):
        value = head[:, column] - np.uint8(48)
        inside = column < digits
        fits &= ~inside | (value < 10)
        tid = np.where(inside, tid * 10 + value, tid)
    rows, window, tid, digits = rows[fits], window[fits], tid[fits], digits[fits]
    seconds = _number(window, slice(1, 11))
    fits = seconds < _MAX_SECONDS
    rows, window, tid, digits = rows[fits], window[fits], tid[fits], digits[fits]
    ts = seconds[fits] * 1_000_000_000 + _number(window, slice(12, 18)) * 1000
    return rows, ts, tid, starts[rows] + digits + width


def _iso_ns(match: re.Match[bytes]) -> int | None:
    """Return an uncommon ISO time as ns since 1970; one without a zone is taken as UTC."""
    year, month, day, hour, minute, second = (int(match[i]) for i in range(1, 7))
    try:
        moment = datetime(year, month, day, hour, minute, min(second, 59), tzinfo=UTC)
    except ValueError:
        return None
    seconds = int(moment.timestamp()) + (second == 60)
    zone = (match[8] or b"Z").replace(b":", b"")
    if zone != b"Z":
        offset = int(zone[1:3]) * 3600 + int(zone[3:5]) * 60
        seconds -= offset if zone[:1] == b"+" else -offset
    return seconds * 1_000_000_000 + int((match[7] or b"0").ljust(9, b"0"))
