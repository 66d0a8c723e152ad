"""Valid inputs to begin from, made by migkit's own encoders."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from migkit.migration import bitmap, wire
from migkit.migration import return_path as back
from migkit.migration.wire import TARGET_PAGE, BlockLayout, Command, RamFlag
from migkit.probe.records import FAULT_DTYPE
from migkit.trace.drain import DATA_OFFSET, published
from migkit.trace.emit import Tracer
from migkit.trace.folder import FORMAT, SAMPLES_DTYPE
from migkit.trace.layout import dropped_record, header, mapping_record
from migkit.trace.registry import Registry

RAM = "pc.ram"
BLOCKS = {
    RAM: BlockLayout(RAM, 64 * TARGET_PAGE, TARGET_PAGE),
    "huge": BlockLayout("huge", 4 << 20, 2 << 20),
}
_DEEP = b'{"format": 1, "a": ' + b"[" * 800 + b"]" * 800 + b"}\n"  # almost too deep for json
_EVENTS = ("migrate_set_state", "ram_load_range", "postcopy_fault_local", "guest_stopped")
# First bytes of a channel's input, how it is cut: not at all, where requested pages end, often.
_CUTS = (178, 116, 0)
_ODD_CUTS = (23, 77)


def _page(number: int, fill: bytes | None = None, *, named: bool = False) -> bytes:
    """Encode a page of one byte, or of zeros."""
    flag = RamFlag.PAGE if fill else RamFlag.ZERO
    head = wire.page_header(number * TARGET_PAGE, flag, RAM if named else None)
    return head + (fill * TARGET_PAGE if fill else b"\0")


def _cut(*channels: bytes, cuts: tuple[int, ...] = _CUTS) -> list[bytes]:
    return [bytes([cut]) + data for cut in cuts for data in channels]


_SETUP = wire.section_start(2, "ram", wire.RAM_VERSION)
_PLAIN = _SETUP + wire.ram_setup(BLOCKS.values(), postcopy=False) + wire.section_footer(2)
BEGINNING = wire.header() + wire.configuration("random") + _PLAIN
"""A stream as far as the list of RAM blocks."""


def streams() -> list[bytes]:
    """Return streams: pre-copy only, with a switchover, the beginning, and what continues one."""
    zeros = _page(3, named=True) + _page(4) + _page(5)
    part = wire.section_part(2) + zeros + wire.EOS + wire.section_footer(2)
    cpu = wire.device_state(7, b"12345678" * 4)
    last = wire.section_part(2, end=True) + _page(9, b"x", named=True) + _page(10, b"y")
    last += wire.EOS + wire.section_footer(2) + cpu + wire.END_OF_STREAM
    package = wire.command(Command.POSTCOPY_LISTEN) + cpu + wire.command(Command.POSTCOPY_RUN)
    postcopy = (
        wire.header()
        + wire.configuration("random")
        + wire.command(Command.OPEN_RETURN_PATH)
        + wire.ping(wire.PING_RETURN_PATH)
        + wire.advise(TARGET_PAGE | (2 << 20))
        + _SETUP
        + wire.ram_setup(BLOCKS.values(), postcopy=True)
        + wire.section_footer(2)
        + part
        + wire.discard(RAM, [(0, TARGET_PAGE), (8 * TARGET_PAGE, 2 * TARGET_PAGE)])
        + wire.command(Command.SWITCHOVER_START)
        + wire.packaged(package)
        + part
        + wire.END_OF_STREAM
    )
    resumed = wire.command(Command.RECV_BITMAP, wire.short_string(RAM))
    resumed += wire.command(Command.POSTCOPY_RESUME) + part + wire.END_OF_STREAM
    whole = _cut(BEGINNING + part + last, postcopy, BEGINNING)
    return whole + _cut(resumed, part + last, cuts=_ODD_CUTS)


def preempt() -> list[bytes]:
    """Return channels of requested pages."""
    zeros = _page(1, named=True) + _page(2) + _page(63)
    data = _page(1, b"a", named=True) + _page(2, b"b") + _page(3) + _page(0, named=True)
    return _cut(zeros + wire.EOS, data + wire.EOS, zeros) + _cut(data + zeros, cuts=_ODD_CUTS)


def return_path() -> list[bytes]:
    """Return answers of all kinds."""
    requests = back.request_pages(TARGET_PAGE, TARGET_PAGE, RAM)
    requests += back.request_pages(0, TARGET_PAGE, None) * 2
    bitmaps = b"".join(back.received_bitmap(RAM, raw) for raw in bitmaps_of_ram())
    huge = bitmap.encode(np.ones(2, bool), BLOCKS["huge"])
    return _cut(
        back.pong(1) + requests + back.shut(0),
        back.pong(3) + bitmaps + back.resume_ack() + requests,
        back.received_bitmap("huge", huge) + struct.pack(">HH", back.Message.SWITCHOVER_ACK, 0),
    )


def bitmaps_of_ram() -> list[bytes]:
    """Encode received bitmaps of the small block."""
    some = np.arange(64) % 3 == 0
    return [bitmap.encode(mask, BLOCKS[RAM]) for mask in (some, ~some)]


bitmaps = bitmaps_of_ram


def control() -> list[bytes]:
    """Return lines of a control socket."""
    lines: list[object] = [
        {"execute": "migrate", "arguments": {"uri": "unix:/a", "rate": 1e9}, "id": 1},
        {"return": {}, "id": 1},
        {"error": {"class": "GenericError", "desc": "no \u2192"}, "id": 2},
        {"event": "MIGRATION", "data": {"status": "active"}, "ts_ns": 1},
    ]
    return _cut(b"".join(json.dumps(line).encode() + b"\n" for line in lines), _DEEP)


def traces() -> list[bytes]:
    """Return traces: of a tracer, with dropped records, of an unknown event, and cut off."""
    head = header() + b"".join(mapping_record(i, n) for i, n in enumerate(_EVENTS, 1))
    short = head + dropped_record(3, 5, 7)
    number = Registry.load()["guest_stopped"]
    record = struct.pack("=QQQLLQQ", 1, 4, 9, 40, 1, 2, 3)
    texts = struct.pack("=QQQLLL", 1, 1, 9, 24 + 4 + 6, 1, 6) + b"active"
    assert len(number.args) == 2
    unknown = mapping_record(9, "of_another") + struct.pack("=QQQLL", 1, 9, 1, 24, 1)
    return [short, head + record * 40 + texts * 3, head + unknown + texts, head + record[:-3]]


def logs() -> list[bytes]:
    """Return logs of both styles, with lines of something else among them."""
    new = (
        b"2026-11-23T01:28:46.510528Z migrate_set_state new state setup\n"
        b"2026-11-23T01:28:47Z get_queued_page pc.ram/0x3f40000 page_abs=0x3f40\n"
        b"qemu-system-x86_64: warning: TCG\n"
        b"2026-11-23T03:28:46.51+02:00 postcopy_place_page host=(nil)\r\n"
    )
    old = (
        b"15339@1795396430.102113:mark_postcopy_blocktime_begin addr: 0x7f0421cd7000, dd: "
        b"0x55aef0ddd9d0, time: 2113, cpu: 0, already_received: 0\n"
        b"15338@1795396427.987127:migration_rate_limit_pre -5 ms\n15@1.000001:mine x=1"
    )
    return [new, old]


def stream_files() -> list[bytes]:
    """Return the streams as files, and a pre-copy one with a device and its description."""
    described = {"devices": [{"name": "dev", "instance_id": 0, "fields": [{"size": 3}]}]}
    text = json.dumps(described).encode()
    device = wire.section_start(3, "dev", 1, full=True) + b"abc" + wire.section_footer(3)
    return [
        *(stream[1:] for stream in streams()),
        wire.header() + device + b"\0\x06" + struct.pack(">I", len(text)) + text,
    ]


def drains() -> list[bytes]:
    """Return a buffer as a tracer leaves it: the words of control, then the trace."""
    buffer = bytearray(DATA_OFFSET + (64 << 10))
    tracer = Tracer(buffer, _EVENTS, tid=1)
    tracer.guest_stopped(1, 2)
    tracer.close()
    trace = published(buffer)
    return [
        struct.pack("=QQ", length, dropped) + trace[-400:]
        for length, dropped in ((400, 0), (100, 2), (0, 0))
    ]


def events() -> list[bytes]:
    """Return trace-events files, with everything that the syntax has."""
    return [
        b'# Doc. group: a\nmove(int x, uint64_t y) "x=%d y=0x%"PRIx64\n\nnone(void) ""\n',
        b'disable vcpu say(const char *text, void *p, unsigned long n) "%-10s %p %#lx%%"\n',
        b'many(char c, int8_t a, uint16_t b, size_t d) "%c %02hhd %+5hu" " %zu"\n',
        b'star(int w, int p, int n, const char *s) "%*.*d%s"\n',
        b'star(int w, int n) "%*d"\ntcg(uint32_t v) "a", "b %"PRIu32\n',
    ]


def metas() -> list[bytes]:
    """Return run descriptions."""
    meta = {"format": FORMAT, "status": "completed", "options": {"memory": 1 << 20}, "x": [1.5]}
    return [json.dumps(meta, indent=1).encode(), json.dumps({"format": 2}).encode(), _DEEP]


def arrays() -> list[bytes]:
    """Return numpy files: samples, faults, none of either, of another type and shape."""
    return [
        npy(np.zeros(2, SAMPLES_DTYPE)),
        npy(np.zeros(3, FAULT_DTYPE)),
        npy(np.zeros(0, FAULT_DTYPE)),
        npy(np.zeros((2, 2), FAULT_DTYPE)),
        npy(np.zeros(4, "i4")),
    ]


def npy(rows: npt.NDArray[Any]) -> bytes:
    """Return an array as a numpy file."""
    file = io.BytesIO()
    np.save(file, rows)
    return file.getvalue()
