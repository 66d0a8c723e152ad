"""Reading traces: simpletrace against a plain Python loop and Parquet, QEMU's logs by the line.

Each figure is the best of some warm repeats, as reading alternates with what it is compared with;
memory is that of a process of its own.
"""

from __future__ import annotations

import lzma
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from benchmarks.result import Row, Scale
from migkit.analysis.events import events_frame, frame_of_pieces
from migkit.analysis.samples import TRACES
from migkit.trace import logtrace
from migkit.trace.layout import HEADER, MAPPING, RECORD, header, mapping_record
from migkit.trace.registry import Registry
from migkit.trace.simpletrace import read_pieces, walk_pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from migkit.trace.chase import Records

_EVENTS = (
    "postcopy_ram_fault_thread_request", "postcopy_page_req_add", "migrate_handle_rp_req_pages",
    "postcopy_preempt_send_host_page", "postcopy_request_received", "postcopy_request_placed",
    "postcopy_place_page", "savevm_state_iterate",
)  # fmt: skip
# VmHWM, not ru_maxrss: that one also counts what the parent had before exec.
_CONVERT = (
    "import re, sys; from migkit.analysis.parquet import write_events; "
    "write_events({'source': sys.argv[1]}, sys.argv[2]); "
    "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024)"
)


def measure(scale: Scale) -> Iterator[Row]:
    """Measure what reading a trace takes."""
    n_records, repeats = (1_000_000, 2) if scale is Scale.QUICK else (5_000_000, 5)
    with tempfile.TemporaryDirectory() as scratch:
        yield from _simpletrace(Path(scratch), n_records, repeats)
        yield from _convert(Path(scratch), 10 * n_records)
    yield from _logs(repeats)


def _simpletrace(scratch: Path, n_records: int, repeats: int) -> Iterator[Row]:
    file, parquet = scratch / "trace", scratch / "parquet"
    _write(file, n_records)
    what = f"{n_records / 1e6:g} million records"
    yield _ratio(
        "offsets, typed headers / loop", lambda: _headers(file), lambda: _loop_headers(file),
        30, repeats, what,
    )  # fmt: skip
    _frame(file).to_parquet(parquet)
    yield _ratio(
        "whole frame / loop", lambda: _frame(file), lambda: _loop_frame(file), 10, repeats, what
    )
    yield _ratio(
        "whole frame / pandas from Parquet", lambda: _frame(file),
        lambda: pd.read_parquet(parquet), 0.2, repeats, what,
    )  # fmt: skip


def _ratio(
    figure: str,
    ours: Callable[[], object],
    other: Callable[[], object],
    bound: float,
    repeats: int,
    what: str,
) -> Row:
    """Compare the best times of two ways to the same."""
    times: dict[str, list[float]] = {"ours": [], "other": []}
    for _ in range(repeats):
        for name, call in (("ours", ours), ("other", other)):
            begun = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begun)
    best = {name: min(taken) for name, taken in times.items()}
    return Row(
        figure, what, best["other"] / best["ours"], bound, "x", at_least=True,
        ours=f"{best['ours']:.2f} s", floor=f"{best['other']:.2f} s", samples=times,
    )  # fmt: skip


def _convert(scratch: Path, n_records: int) -> Iterator[Row]:
    """Convert, and half as much: time must not grow faster than size."""
    seconds, memory = [], 0
    for count in (n_records // 2, n_records):
        file = scratch / "large"
        _write(file, count)
        begun = time.perf_counter()
        command = [sys.executable, "-c", _CONVERT, file, scratch / "converted"]
        done = subprocess.run(command, check=True, capture_output=True, timeout=1800)
        seconds.append(time.perf_counter() - begun)
        memory = int(done.stdout)
        file.unlink()
    what = f"{n_records / 1e6:g} million records"
    samples = {"seconds": seconds}
    yield Row("convert to Parquet, memory", what, memory / (1 << 30), 1.0, "GiB",
              ours=f"{seconds[1]:.0f} s", samples=samples)  # fmt: skip
    yield Row("convert, time for twice as much", what, seconds[1] / seconds[0], 2.3, "x",
              samples=samples)  # fmt: skip


def _logs(repeats: int) -> Iterator[Row]:
    """Read all sample logs, decompressed before, to frames."""
    logs = [lzma.decompress(file.read_bytes()) for file in sorted(TRACES.glob("qemu-*/*.log.xz"))]
    n_lines = sum(log.count(b"\n") for log in logs)
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        for log in logs:
            events_frame({"source": logtrace.read(log)})
        seconds.append(time.perf_counter() - begun)
    yield Row(
        "QEMU log lines to a frame", f"{n_lines / 1e6:.2f} million lines",
        n_lines / min(seconds) / 1e6, 1.0, "M/s", at_least=True, ours=f"{min(seconds):.2f} s",
        samples={"seconds": seconds},
    )  # fmt: skip


class _Header(NamedTuple):
    """What the loop makes of a record's header."""

    event_id: int
    ts_ns: int
    length: int
    tid: int


def _headers(file: Path) -> list[Records]:
    return [walk.records for _, walk in walk_pieces(file, Registry.load().forms)]


def _loop_headers(file: Path) -> tuple[list[int], list[_Header]]:
    """Do the same a record at a time, as QEMU's scripts/simpletrace.py goes through a file."""
    offsets, headers = [], []
    with file.open("rb") as trace:
        at = len(trace.read(len(header())))
        while word := trace.read(8):
            if struct.unpack("=Q", word)[0] == MAPPING:
                _, length = struct.unpack("=QL", trace.read(12))
                at += 20 + len(trace.read(length))
                continue
            head = _Header(*struct.unpack("=QQLL", trace.read(24)))
            offsets.append(at)
            headers.append(head)
            at += 32 + len(trace.read(head.length - 24))
    return offsets, headers


def _frame(file: Path) -> pd.DataFrame:
    return frame_of_pieces(("source", piece) for piece in read_pieces(file))


def _loop_frame(file: Path) -> pd.DataFrame:
    """Build the same frame a record at a time."""
    raw = file.read_bytes()
    registry = Registry.load()
    names: dict[int, str] = {}
    rows = []
    at = len(header())
    while at < len(raw):
        kind, event_id = struct.unpack_from("=QQ", raw, at)
        if kind == MAPPING:
            (length,) = struct.unpack_from("=L", raw, at + 16)
            names[event_id] = raw[at + 20 : at + 20 + length].decode()
            at += 20 + length
            continue
        _, _, ts_ns, length, tid = struct.unpack_from("=QQQLL", raw, at)
        event = registry[names[event_id]]
        place, values = at + 32, []
        for argument in event.args:
            if argument.is_string:
                (size,) = struct.unpack_from("=L", raw, place)
                values.append(raw[place + 4 : place + 4 + size].decode())
                place += 4 + size
            else:
                values.append(struct.unpack_from("=Q", raw, place)[0])
                place += 8
        rows.append((ts_ns, "source", tid, event.name, event.name, event.format_args(values)))
        at += 8 + length
    columns = ["ts_ns", "process", "tid", "event", "original", "args"]
    frame = pd.DataFrame(rows, columns=columns).sort_values("ts_ns", kind="stable")
    names_of = dict.fromkeys(("process", "event", "original"), "category")
    return frame.astype(names_of).reset_index(drop=True)


def _write(file: Path, n_records: int) -> None:
    """Write a trace of the events of faults, with plausible arguments."""
    registry = Registry.load()
    events = [registry[name] for name in _EVENTS]
    fields: list[tuple[str, object]] = []
    for i, event in enumerate(events):
        fields.append((f"head{i}", HEADER))
        for j, argument in enumerate(event.args):
            if argument.is_string:
                fields += [(f"length{i}.{j}", "<u4"), (f"text{i}.{j}", "S6")]
            else:
                fields.append((f"value{i}.{j}", "<u8"))
    rng = np.random.default_rng(1)
    with file.open("wb") as out:
        out.write(header())
        for i, event in enumerate(events):
            out.write(mapping_record(i, event.name))
        ts_ns, left = 10**12, n_records // len(events)
        while left:
            count = min(left, 50_000)
            rows = np.zeros(count, np.dtype(fields))
            steps = ts_ns + np.arange(count) * 8000
            for i, event in enumerate(events):
                head = rows[f"head{i}"]
                payload = sum(10 if argument.is_string else 8 for argument in event.args)
                head["type"], head["id"], head["length"] = RECORD, i, 24 + payload
                head["ts_ns"], head["tid"] = steps + i * 1000, 1000 + i % 3
                for j, argument in enumerate(event.args):
                    if argument.is_string:
                        rows[f"length{i}.{j}"], rows[f"text{i}.{j}"] = 6, b"pc.ram"
                    else:
                        scale = 4096 if argument.bits == 64 else 1
                        rows[f"value{i}.{j}"] = rng.integers(0, 1 << 11, count) * scale
            rows.tofile(out)
            ts_ns, left = int(steps[-1]) + 8000, left - count
