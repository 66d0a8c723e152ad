"""What each decoder may do with any bytes: give out items, or refuse them with its own error.

A target reads an input to its end as the package itself does and checks what comes out. The
errors in ``refusals`` are the only ones allowed; everything else that is raised is a bug, and
so is an input that yields more items than it has bytes, or needs more memory than ``memory``
allows. ``tests/test_hostile.py`` and ``python -m fuzz`` run these same functions.

The first byte of an input for a channel chooses the pieces in which the rest arrives.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import random
import socket
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from fuzz import seeds
from fuzz.seeds import BLOCKS, RAM
from migkit.errors import ProtocolError, TraceFormatError, TraceWarning
from migkit.migration import bitmap
from migkit.migration.control import MAX_LINE, ControlSocket
from migkit.migration.records import RECORD_BYTES, Page, Pages, PreemptDecoder
from migkit.migration.return_path import MAX_MESSAGE, Bitmap, ReturnPathDecoder
from migkit.migration.stream import EndOfStream, Packaged, StreamDecoder
from migkit.migration.streamfile import DeviceBytes, FileDecoder
from migkit.migration.wire import MAX_PACKAGED, TARGET_PAGE
from migkit.probe.records import FAULT_DTYPE, last_versions
from migkit.trace import chase, logtrace
from migkit.trace.decode import event_dtype
from migkit.trace.drain import DATA_OFFSET, Drain, published
from migkit.trace.folder import META, SAMPLES_DTYPE, RunFolder
from migkit.trace.logformat import format_log
from migkit.trace.registry import Registry
from migkit.trace.simpletrace import Trace, read

_STREAM_CAPACITY = 384 << 10  # a list of blocks of the greatest length must fit
_PREEMPT_CAPACITY = 8 << 10  # two records, so that what waits is moved
_PIECES = (1, 9, 100, 4097, RECORD_BYTES, RECORD_BYTES + 1 + len(RAM), 1 << 16)
CUTS = [random.Random(byte).choices(_PIECES, k=3) for byte in range(256)]


@dataclass(frozen=True)
class Target:
    """One decoder, what it may raise, and how its memory may grow.

    ``memory`` is (bytes a byte of input, bytes at least).
    """

    run: Callable[[bytes], None]
    refusals: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    memory: tuple[int, int]
    longest: int

    def __call__(self, data: bytes) -> bool:
        """Run one input; tell whether it was read to its end rather than refused."""
        try:
            self.run(data)
        except self.refusals:
            return False
        return True

    def peak(self, data: bytes) -> int:
        """Return how many bytes one input takes at once, beside what is made only once."""
        self(data)
        tracemalloc.start()
        try:
            self(data)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def most(self, data: bytes) -> int:
        """Return how many bytes an input may take."""
        per_byte, least = self.memory
        return per_byte * len(data) + least


def _pieces(data: bytes) -> Iterator[memoryview]:
    """Cut an input as its first byte says: the same byte always makes the same cuts."""
    if not data:
        return
    sizes = CUTS[data[0]]
    left = memoryview(data)[1:]
    for size in itertools.cycle(sizes):
        if not left:
            return
        yield left[:size]
        left = left[size:]


def _events(decoder: StreamDecoder | PreemptDecoder, data: bytes) -> Iterator[object]:
    """Receive an input into a decoder's own buffer, which never grows; yield its events."""
    buffer, received = decoder.buffer, 0
    for piece in _pieces(data):
        left = piece
        while left:
            room = buffer.room(len(left))
            assert len(room), "the decoder waits for more than it has room for"
            n = min(len(room), len(left))
            room[:n] = left[:n]
            buffer.tail += n
            received += n
            left = left[n:]
            for event in iter(decoder.next, None):
                assert buffer.head <= buffer.tail <= len(buffer.view)
                assert buffer.offset <= received, "the decoder is past what has come"
                yield event


def _check_pages(decoder: StreamDecoder | PreemptDecoder, event: object) -> None:
    """Look at every page that is given out: it lies in its block and in the buffer."""
    buffer = decoder.buffer
    if isinstance(event, Page):
        assert 0 <= event.offset <= max(b.size for b in BLOCKS.values()) - TARGET_PAGE
        assert event.address + TARGET_PAGE <= buffer.address + buffer.tail
    elif isinstance(event, Pages):
        assert event.offsets.min() >= 0
        assert event.offsets.max() <= BLOCKS[event.block].size - TARGET_PAGE
        assert not (event.offsets % TARGET_PAGE).any()
        if event.address:
            assert event.address - buffer.address == event.start
            assert event.data[-1][-1] >= 0


def stream(data: bytes) -> None:
    """Read the main channel as a destination does, packages as well.

    With an odd first byte it is the channel that continues a stream after a break.
    """
    decoder = StreamDecoder(BLOCKS, _STREAM_CAPACITY)
    if data[:1] and data[0] % 2:
        list(_events(decoder, b"\0" + seeds.BEGINNING))
        decoder = decoder.continued()
    count = 0
    for event in _events(decoder, data):
        _check_pages(decoder, event)
        if isinstance(event, Packaged):
            assert len(event.blob) <= min(len(data), MAX_PACKAGED)
            count += sum(1 for _ in decoder.nested(event.blob))
        count += 1
        assert count <= len(data), "more events than bytes"
        if isinstance(event, EndOfStream):
            return


def preempt(data: bytes) -> None:
    """Read the channel of requested pages; with an even first byte all pages are small."""
    blocks = {RAM: BLOCKS[RAM]} if data[:1] and data[0] % 2 == 0 else BLOCKS
    decoder = PreemptDecoder(blocks, _PREEMPT_CAPACITY)
    for count, event in enumerate(_events(decoder, data)):
        _check_pages(decoder, event)
        assert count < len(data), "more pages than bytes"


def return_path(data: bytes) -> None:
    """Read what a destination answers, with the bitmaps in it."""
    sizes = {name: bitmap.encoded_size(block) for name, block in BLOCKS.items()}
    decoder = ReturnPathDecoder(sizes)
    most = 4 + MAX_MESSAGE + max(sizes.values())
    for piece in _pieces(data):
        messages = decoder.feed(bytes(piece))
        assert len(messages) <= len(data), "more messages than bytes"
        assert len(decoder._data) <= most, "more is kept than the longest message"
        for message in messages:
            if isinstance(message, Bitmap):
                block = BLOCKS[message.block]
                assert bitmap.decode(message.data, block).size == block.size // block.page_size


def received_bitmap(data: bytes) -> None:
    """Read a received bitmap: one that is made as long as it must be, then one of any length."""
    size = bitmap.encoded_size(BLOCKS[RAM])
    with contextlib.suppress(ProtocolError):
        assert bitmap.decode(data[:size].ljust(size, b"\0"), BLOCKS[RAM]).size == 64
    bitmap.decode(data, BLOCKS[RAM])


def control(data: bytes) -> None:
    """Read the control socket until the peer is gone."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        end = ControlSocket(ours)
        for piece in _pieces(data):
            theirs.sendall(piece)
            messages = end.receive()
            assert messages is not None
            assert all(isinstance(message, dict) for message in messages)
            assert len(end._data) <= MAX_LINE
        theirs.close()
        assert end.receive() is None


def _read_trace(data: bytes) -> Trace | str:
    """Read a trace; return what is said of it if it is refused."""
    try:
        return read(data)
    except TraceFormatError as error:
        return str(error)


def trace(data: bytes) -> None:
    """Read a trace and print it; in lanes, as long ones are read, or without, it is the same."""
    found = _read_trace(data)
    with mock.patch.multiple(chase, _LANE_BYTES=128, _GUESS_BYTES=64, _STEPS_A_ROUND=2):
        in_lanes = _read_trace(data)
    if isinstance(found, str):
        assert in_lanes == found
        raise TraceFormatError(found)
    assert found.n_records <= len(data) // 32
    assert found.missing_bytes <= len(data)
    lines = list(format_log(found))
    assert len(lines) == sum(rows.size for rows in found.events.values())
    assert isinstance(in_lanes, Trace)
    assert list(format_log(in_lanes)) == lines
    assert (in_lanes.n_records, in_lanes.warnings) == (found.n_records, found.warnings)


def log(data: bytes) -> None:
    """Read a log of QEMU's and parse all its events; each line is an event, foreign or empty."""
    found = logtrace.read(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)
        rows = sum(len(found[name]) for name in found.events)
    lines = data.split(b"\n")
    empty = sum(line in (b"", b"\r") for line in lines[: found.log.n_lines])
    assert rows <= found.n_records <= found.log.n_lines <= len(lines)
    assert found.log.n_lines - empty <= found.n_records + found.log.n_foreign


def stream_file(data: bytes) -> None:
    """Decode a stream out of a file: its pieces lie one behind the other.

    Only the state of a device may be empty.
    """
    end = 0
    for piece in FileDecoder().pieces(io.BytesIO(data)):
        assert piece.offset == end <= piece.end
        assert end < piece.end or isinstance(piece.event, DeviceBytes)
        end = piece.end
    assert end <= len(data)


def drain(data: bytes) -> None:
    """Drain a buffer whose words of control another process has overwritten."""
    control_words, rest = data[:16].ljust(16, b"\0"), data[16:]
    buffer = bytearray(control_words.ljust(DATA_OFFSET, b"\0") + rest)
    assert len(published(buffer)) <= len(rest)
    file = io.BytesIO()
    drained = Drain(buffer, file)
    try:
        drained.pump()
    finally:
        drained.close()
    assert len(file.getvalue()) <= len(rest) + 40


_EXTREMES = (0, 1, -1, (1 << 64) - 1, -(1 << 63))


def trace_events(data: bytes) -> None:
    """Parse a trace-events file and print each of its events with values of its types."""
    with TemporaryDirectory(dir="/dev/shm") as folder:
        file = Path(folder) / "trace-events"
        file.write_bytes(data)
        registry = Registry.load(file)
    for event in registry:
        assert len(event_dtype(event)) == 3 + len(event.args)
        for number in _EXTREMES:
            values = ["text" if arg.is_string else number for arg in event.args]
            assert len(event.format_args(values)) <= len(data) * 64 + 4096


def meta(data: bytes) -> None:
    """Read a run's meta.json."""
    with TemporaryDirectory(dir="/dev/shm") as folder:
        (Path(folder) / META).write_bytes(data)
        assert isinstance(RunFolder.open(folder).load_meta(), dict)


def arrays(data: bytes) -> None:
    """Read a run's samples and its probe's records."""
    with TemporaryDirectory(dir="/dev/shm") as folder:
        run = RunFolder(Path(folder))
        (run.path / "samples.npy").write_bytes(data)
        (run.path / "probe.npy").write_bytes(data)
        refused = 0
        for load in (run.load_samples, lambda: last_versions(run.load_probe(FAULT_DTYPE))):
            try:
                rows = load()
            except TraceFormatError:
                refused += 1
            else:
                assert rows.dtype in {SAMPLES_DTYPE, FAULT_DTYPE}
                assert rows.ndim == 1
                assert rows.nbytes <= len(data)
        assert refused, "one file cannot be both"


TARGETS = {
    "stream": Target(stream, (ProtocolError,), seeds.streams, (16, 2 << 20), 16384),
    "preempt": Target(preempt, (ProtocolError,), seeds.preempt, (16, 2 << 20), 16384),
    "return_path": Target(return_path, (ProtocolError,), seeds.return_path, (128, 64 << 10), 4096),
    "bitmap": Target(received_bitmap, (ProtocolError,), seeds.bitmaps, (64, 64 << 10), 256),
    "control": Target(control, (ProtocolError,), seeds.control, (256, 256 << 10), 4096),
    "trace": Target(trace, (TraceFormatError,), seeds.traces, (64, 2 << 20), 4096),
    "log": Target(log, (TraceFormatError,), seeds.logs, (512, 4 << 20), 4096),
    "stream_file": Target(stream_file, (ProtocolError,), seeds.stream_files, (64, 24 << 20), 16384),
    "drain": Target(drain, (TraceFormatError,), seeds.drains, (8, 128 << 10), 4096),
    "trace_events": Target(trace_events, (TraceFormatError,), seeds.events, (512, 1 << 20), 2048),
    "meta": Target(meta, (TraceFormatError,), seeds.metas, (256, 256 << 10), 4096),
    "arrays": Target(arrays, (TraceFormatError,), seeds.arrays, (32, 1 << 20), 4096),
}
