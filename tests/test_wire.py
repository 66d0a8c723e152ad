"""The migration protocol: bytes, states, options, policies and the sockets that carry it."""

import contextlib
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from migkit.errors import MigrationError, OptionError, ProtocolError
from migkit.kernel.memory import PAGE_SIZE, RamBlock
from migkit.migration import channel, return_path, wire
from migkit.migration.channel import Outgoing, RateLimiter, connect, is_trusted, listen
from migkit.migration.control import MAX_LINE, ControlSocket
from migkit.migration.framing import PageFramer, runs_of
from migkit.migration.options import Options, Trigger, format_size, parse_size
from migkit.migration.placing import HostPages
from migkit.migration.policy import Convergence
from migkit.migration.records import Page, Pages, PreemptDecoder
from migkit.migration.return_path import Bitmap, Message, PageRequest, ReturnPathDecoder, Value
from migkit.migration.states import (
    DESTINATION,
    ENDED,
    POSTCOPY_ORDER,
    SOURCE,
    PostcopyState,
    StateMachine,
    Status,
)
from migkit.migration.stream import (
    CommandReceived,
    Configuration,
    DeviceState,
    EndOfStream,
    Header,
    Packaged,
    RamSetup,
    SectionBegins,
    SectionEnds,
    StreamDecoder,
)
from migkit.migration.wire import (
    COMMAND_LENGTHS,
    MAX_PACKAGED,
    TARGET_PAGE,
    BlockLayout,
    Command,
    RamFlag,
    Section,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

HUGE = 2 << 20
DEADLINE_S = 30.0
BLOCKS = {
    "pc.ram": BlockLayout("pc.ram", 64 * TARGET_PAGE, TARGET_PAGE),
    "vga": BlockLayout("vga", 8 * TARGET_PAGE, TARGET_PAGE),
}
RAM = 1  # the id of the RAM section
CPU = 7

# A busy machine is no reason to fail.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


# Encoders: literal bytes.

COMMANDS = {
    "open return path": (wire.command(Command.OPEN_RETURN_PATH), "08 0001 0000"),
    "ping": (wire.ping(0x12345678), "08 0002 0004 12345678"),
    "advise": (wire.advise(0x201000), "08 0003 0010 0000000000201000 0000000000001000"),
    "listen": (wire.command(Command.POSTCOPY_LISTEN), "08 0004 0000"),
    "run": (wire.command(Command.POSTCOPY_RUN), "08 0005 0000"),
    "discard": (
        wire.discard("pc.ram", [(0x1000, 0x1000)] * 2),
        "08 0006 0029 00 06 70632e72616d 00" + " 0000000000001000" * 4,
    ),
    "packaged": (wire.packaged(b"abc"), "08 0007 0004 00000003 616263"),
    "resume": (wire.command(Command.POSTCOPY_RESUME), "08 0009 0000"),
    "recv bitmap": (
        wire.command(Command.RECV_BITMAP, wire.short_string("pc.ram")),
        "08 000a 0007 06 70632e72616d",
    ),
    "switchover start": (wire.command(Command.SWITCHOVER_START), "08 000b 0000"),
}
SECTIONS = {
    "header": (wire.header(), "5145564d 00000003"),
    "configuration": (wire.configuration("pc-q35"), "07 00000006 70632d713335"),
    "start": (wire.section_start(2, "ram", 4), "01 00000002 03 72616d 00000000 00000004"),
    "full": (
        wire.section_start(7, "cpu", 1, full=True),
        "04 00000007 03 637075 00000000 00000001",
    ),
    "part": (wire.section_part(2), "02 00000002"),
    "end": (wire.section_part(2, end=True), "03 00000002"),
    "footer": (wire.section_footer(2), "7e 00000002"),
    "device state": (
        wire.device_state(7, b"\xaa\xbb"),
        "04 00000007 03 637075 00000000 00000001 00000002 aabb 7e 00000007",
    ),
    "end of stream": (wire.END_OF_STREAM, "00"),
}
HUGE_BLOCK = BlockLayout("a", HUGE, HUGE)
RAM_DATA = {
    "setup": (
        wire.ram_setup(BLOCKS.values(), postcopy=True),
        "00000000000480040670632e72616d00000000000400000376676100000000000080000000000000000010",
    ),
    "setup of huge pages for post-copy": (
        wire.ram_setup([HUGE_BLOCK], postcopy=True),
        "0000000000200004 01 61 0000000000200000 0000000000200000 0000000000000010",
    ),
    "setup of huge pages without": (
        wire.ram_setup([HUGE_BLOCK], postcopy=False),
        "0000000000200004 01 61 0000000000200000 0000000000000010",
    ),
    "page": (wire.page_header(0x3000, RamFlag.PAGE, "vga"), "0000000000003008 03 766761"),
    "zero page": (wire.page_header(0x3000, RamFlag.ZERO, "vga"), "0000000000003002 03 766761"),
    "page of the same block": (
        wire.page_header(0x3000, RamFlag.PAGE, None),
        "0000000000003028",
    ),
    "end of section": (wire.EOS, "0000000000000010"),
}
ANSWERS = {
    "shut": (return_path.shut(1), "0001 0004 00000001"),
    "pong": (return_path.pong(3), "0002 0004 00000003"),
    "request": (
        return_path.request_pages(0x5000, 0x1000, "pc.ram"),
        "0003 0013 0000000000005000 00001000 06 70632e72616d",
    ),
    "request of the same block": (
        return_path.request_pages(0x5000, 0x1000, None),
        "0004 000c 0000000000005000 00001000",
    ),
}
LITERAL = {**COMMANDS, **SECTIONS, **RAM_DATA, **ANSWERS}


@pytest.mark.parametrize("what", LITERAL)
def test_what_is_sent_is_what_qemu_sends(what):
    encoded, expected = LITERAL[what]
    assert encoded.hex() == expected.replace(" ", "")


def test_records_as_numpy_sees_them_are_those_that_are_sent():
    record = np.zeros(1, wire.PAGE_RECORD)
    record["header"] = 0x3000 | RamFlag.PAGE | RamFlag.CONTINUE
    assert record.tobytes() == wire.page_header(0x3000, RamFlag.PAGE, None) + bytes(TARGET_PAGE)
    record = np.zeros(1, wire.ZERO_RECORD)
    record["header"] = 0x3000 | RamFlag.ZERO | RamFlag.CONTINUE
    assert record.tobytes() == wire.page_header(0x3000, RamFlag.ZERO, None) + b"\0"


def test_a_name_that_is_too_long_cannot_be_encoded():
    assert wire.short_string("x" * 255) == b"\xff" + b"x" * 255
    with pytest.raises(ValueError, match="256"):
        wire.short_string("x" * 256)
    with pytest.raises(ValueError, match="256"):
        wire.short_string("é" * 128)


# The decoder.


def feed(decoder, data, cuts=(1 << 20,)):
    """Give a decoder bytes in pieces, as a socket would; yield its events."""
    left = memoryview(data)
    for cut in itertools.cycle(cuts):
        if not left:
            return
        room = decoder.buffer.room(cut)
        assert len(room), "the decoder waits for more than it has room for"
        n = min(len(room), len(left))
        room[:n] = left[:n]
        decoder.buffer.tail += n
        left = left[n:]
        while (event := decoder.next()) is not None:
            yield event


def rows_of(pages):
    """The pages of a batch, one by one: block, offset, bytes (None: zeros)."""
    data = [None] * len(pages.offsets) if pages.address == 0 else map(bytes, pages.data)
    return [(pages.block, offset, row) for offset, row in zip(pages.offsets, data, strict=True)]


def decode(decoder, data, cuts=(1 << 20,)):
    """Return what a stream says, whatever batches it came in; packages are opened."""
    said = []
    for event in feed(decoder, data, cuts):
        match event:
            case Pages():
                said.extend(rows_of(event))
            case Packaged(blob):
                said.append([*decoder.nested(blob)])
            case _:
                said.append(event)
    return said


def page(block, number, fill=None, *, named=True):
    """Encode a page record; without ``fill`` that of a page of zeros."""
    flag, payload = (RamFlag.ZERO, b"\0") if fill is None else (RamFlag.PAGE, fill * TARGET_PAGE)
    return wire.page_header(number * TARGET_PAGE, flag, block if named else None) + payload


def command_said(data):
    """What the decoder is to say of an encoded command."""
    return CommandReceived(Command(data[2]), data[5:])


@st.composite
def sections_of_pages(draw):
    """Draw RAM sections; return their bytes and what they say."""
    data, said, last = b"", [], None
    for _ in range(draw(st.integers(0, 3))):
        data += wire.section_part(RAM)
        said.append(SectionBegins(Section.PART, RAM, "ram"))
        for _ in range(draw(st.integers(0, 6))):
            block = draw(st.sampled_from(sorted(BLOCKS)))
            first = draw(st.integers(0, BLOCKS[block].size // TARGET_PAGE - 1))
            fill = draw(st.sampled_from([None, b"a", b"z"]))
            for number in range(first, min(first + 3, BLOCKS[block].size // TARGET_PAGE)):
                named = block != last or draw(st.integers(0, 9)) == 0
                last = block
                data += page(block, number, fill, named=named)
                said.append((block, number * TARGET_PAGE, fill and fill * TARGET_PAGE))
        data += wire.EOS + wire.section_footer(RAM)
        said.append(SectionEnds(RAM))
    return data, said


@st.composite
def packages(draw):
    """Draw a package as QEMU sends it; return its bytes and what it says."""
    state = draw(st.binary(max_size=200))
    blob = wire.command(Command.POSTCOPY_LISTEN) + wire.device_state(CPU, state)
    blob += wire.ping(wire.PING_PACKAGE) + wire.command(Command.POSTCOPY_RUN)
    said = [
        CommandReceived(Command.POSTCOPY_LISTEN, b""),
        SectionBegins(Section.FULL, CPU, "cpu"),
        DeviceState("cpu", state),
        SectionEnds(CPU),
        CommandReceived(Command.PING, b"\0\0\0\3"),
        CommandReceived(Command.POSTCOPY_RUN, b""),
    ]
    data = wire.packaged(blob)
    return data, [CommandReceived(Command.PACKAGED, data[5:9]), said]


@st.composite
def commands(draw):
    """Draw some commands; return their bytes and what they say."""
    drawn = draw(
        st.lists(st.sampled_from([c for c, _ in COMMANDS.values() if c[2] != Command.PACKAGED]))
    )
    return b"".join(drawn), [command_said(data) for data in drawn]


@st.composite
def streams(draw):
    """Draw a whole stream; return its bytes and what it says."""
    machine = draw(st.text(max_size=60))
    data = wire.header() + wire.configuration(machine)
    said = [Header(3), Configuration(machine)]
    data += wire.section_start(RAM, "ram", 4) + wire.ram_setup(BLOCKS.values(), postcopy=True)
    data += wire.section_footer(RAM)
    said += [
        SectionBegins(Section.START, RAM, "ram"),
        RamSetup(tuple(BLOCKS.values())),
        SectionEnds(RAM),
    ]
    pieces = st.lists(st.one_of(sections_of_pages(), packages(), commands()), max_size=5)
    for more, says in draw(pieces):
        data += more
        said += says
    data += wire.section_part(RAM, end=True) + wire.EOS + wire.section_footer(RAM)
    said += [SectionBegins(Section.END, RAM, "ram"), SectionEnds(RAM)]
    return data + wire.END_OF_STREAM, [*said, EndOfStream()]


CUTS = st.lists(st.integers(1, 9000), min_size=1, max_size=12)


@settings(patient, max_examples=60)
@given(stream=streams(), cuts=CUTS)
def test_a_stream_says_the_same_however_it_is_cut(stream, cuts):
    data, said = stream
    assert decode(StreamDecoder(BLOCKS), data, cuts) == said


@settings(patient, max_examples=60)
@given(stream=streams(), cuts=CUTS, most=st.integers(1, 5))
def test_a_stream_says_the_same_in_a_small_buffer_and_in_small_batches(stream, cuts, most):
    data, said = stream
    decoder = StreamDecoder(BLOCKS, capacity=16 << 10)
    decoder.most_pages = most
    assert decode(decoder, data, cuts) == said


def whole_stream():
    """A stream with all that there is in it."""
    pieces = [
        wire.header(),
        wire.configuration("migkit"),
        *(data for data, _ in COMMANDS.values() if data[2] != Command.PACKAGED),
        wire.section_start(RAM, "ram", 4),
        wire.ram_setup(BLOCKS.values(), postcopy=True),
        wire.section_footer(RAM),
        wire.section_part(RAM),
        page("pc.ram", 0, b"x"), page("pc.ram", 1, b"y", named=False),
        page("pc.ram", 9, named=False), page("pc.ram", 10, named=False), page("vga", 7),
        wire.EOS, wire.section_footer(RAM),
        wire.packaged(
            wire.command(Command.POSTCOPY_LISTEN) + wire.device_state(CPU, b"12345678")
            + wire.ping(3) + wire.command(Command.POSTCOPY_RUN)
        ),
        wire.section_part(RAM, end=True),
        page("vga", 1, b"z"),
        wire.EOS, wire.section_footer(RAM),
        wire.END_OF_STREAM,
    ]  # fmt: skip
    return b"".join(pieces)


WHOLE = whole_stream()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 4095, 4097])
def test_a_stream_may_come_in_pieces_of_any_size(size):
    assert decode(StreamDecoder(BLOCKS), WHOLE, [size]) == decode(StreamDecoder(BLOCKS), WHOLE)


def test_a_stream_that_ends_anywhere_says_no_more_than_came():
    said = decode(StreamDecoder(BLOCKS), WHOLE)
    for end in range(0, len(WHOLE), 11):
        less = decode(StreamDecoder(BLOCKS), WHOLE[:end])
        assert less == said[: len(less)]


def test_pages_lie_where_they_were_received():
    data = wire.header() + ram_started() + wire.section_part(RAM)
    data += page("pc.ram", 5, b"x") + page("pc.ram", 6, b"y", named=False)
    data += page("pc.ram", 8, b"z", named=False)
    decoder = StreamDecoder(BLOCKS)
    batches = [event for event in feed(decoder, data) if isinstance(event, Pages)]
    assert [batch.offsets.tolist() for batch in batches] == [[0x5000], [0x6000, 0x8000]]
    base = decoder.buffer.address
    for batch in batches:
        assert base <= batch.address < base + len(data)
        assert np.shares_memory(batch.data, np.frombuffer(decoder.buffer.view, np.uint8))
        assert batch.data.ctypes.data == batch.address


def ram_started(blocks=BLOCKS, *, postcopy=True):
    return (
        wire.section_start(RAM, "ram", 4)
        + wire.ram_setup(blocks.values(), postcopy=postcopy)
        + wire.section_footer(RAM)
    )


@pytest.mark.parametrize("postcopy", [True, False])
def test_the_page_size_of_huge_pages_comes_with_post_copy_only(postcopy):
    blocks = {"a": HUGE_BLOCK}
    data = wire.header() + (wire.advise(HUGE) if postcopy else b"")
    data += ram_started(blocks, postcopy=postcopy)
    assert RamSetup((HUGE_BLOCK,)) in decode(StreamDecoder(blocks), data)


# What the decoder refuses. Each case: the stream, where the fault lies, what the message names.

HEAD = wire.header()
STARTED = HEAD + ram_started()
PART = STARTED + wire.section_part(RAM)
AT_SECTION, AT_RAM, AT_PAGE = len(HEAD), len(STARTED), len(PART)
RAM_SECTION = HEAD + wire.section_start(RAM, "ram", 4)
CPU_SECTION = HEAD + wire.section_start(CPU, "cpu", 1, full=True)
REFUSED = {
    "another magic": (b"QEMU" + b"\0\0\0\3", 0, ["0x51454d55", "0x5145564d"]),
    "another version": (HEAD[:7] + b"\2", 0, ["version 2", "we speak 3"]),
    "an unknown section": (HEAD + b"\x55", AT_SECTION, ["0x55"]),
    "an unknown command": (HEAD + b"\x08\x00\x63\0\0", AT_SECTION, ["0x63"]),
    "a long discard": (
        HEAD + wire.command(Command.POSTCOPY_RAM_DISCARD, bytes(513)),
        AT_SECTION,
        ["POSTCOPY_RAM_DISCARD", "513", "512"],
    ),
    "a large package": (
        HEAD + wire.command(Command.PACKAGED, struct.pack(">I", MAX_PACKAGED + 1)),
        AT_SECTION,
        [str(MAX_PACKAGED + 1), str(MAX_PACKAGED)],
    ),
    "a long machine type": (
        HEAD + b"\x07" + struct.pack(">I", 256),
        AT_SECTION,
        ["256", "255"],
    ),
    "an unknown device": (
        HEAD + wire.section_start(3, "floppy", 1),
        AT_SECTION,
        ["'floppy'", "ram and cpu"],
    ),
    "another instance": (
        HEAD + b"\1\0\0\0\1\3ram" + struct.pack(">II", 5, 4),
        AT_SECTION,
        ["'ram' instance 5"],
    ),
    "RAM of another version": (
        HEAD + wire.section_start(RAM, "ram", 3),
        AT_SECTION,
        ["START version 3", "START version 4"],
    ),
    "RAM at once": (
        HEAD + wire.section_start(RAM, "ram", 4, full=True),
        AT_SECTION,
        ["FULL version 4", "START version 4"],
    ),
    "a section that was not started": (
        HEAD + wire.section_part(9),
        AT_SECTION,
        ["PART of section 9"],
    ),
    "the end of a section of another device": (
        CPU_SECTION + b"\0\0\0\0" + wire.section_footer(CPU) + wire.section_part(CPU, end=True),
        len(CPU_SECTION) + 9,
        ["END of section 7"],
    ),
    "RAM without its size": (
        RAM_SECTION + struct.pack(">Q", 0x1008),
        len(RAM_SECTION),
        ["0x8", "MEM_SIZE"],
    ),
    "a block larger than all": (
        RAM_SECTION + struct.pack(">QB1sQ", 0x1004, 1, b"a", 0x2000),
        len(RAM_SECTION),
        ["'a'", str(0x2000), str(0x1000)],
    ),
    "a block of no size": (
        RAM_SECTION + struct.pack(">QB1sQ", 0x1004, 1, b"a", 0),
        len(RAM_SECTION),
        ["'a' of 0 bytes", str(0x1000)],
    ),
    "blocks that do not end": (
        RAM_SECTION + struct.pack(">QB1sQQ", 0x1004, 1, b"a", 0x1000, 0x20),
        len(RAM_SECTION),
        ["EOS"],
    ),
    "unknown page flags": (
        PART + struct.pack(">Q", 0x1040),
        AT_PAGE,
        ["0x40", "PAGE, ZERO or EOS"],
    ),
    "a page that continues no block": (
        PART + page(None, 1, b"x", named=False),
        AT_PAGE,
        ["0x28", "block name first"],
    ),
    "a zero page that continues no block": (
        PART + page(None, 1, named=False),
        AT_PAGE,
        ["0x22", "block name first"],
    ),
    "a page of an unknown block": (
        PART + page("floppy", 1, b"x"),
        AT_PAGE,
        ["'floppy'", "pc.ram, vga"],
    ),
    "a page outside its block": (
        PART + page("vga", 8, b"x"),
        AT_PAGE,
        ["0x8000", "'vga'", "0x8000 bytes"],
    ),
    "a page far outside": (
        PART + page("vga", (1 << 52) - 1, b"x"),
        AT_PAGE,
        ["0xfffffffffffff000", "0x8000 bytes"],
    ),
    "a zero page outside its block": (
        PART + page("vga", 9),
        AT_PAGE,
        ["0x9000", "0x8000 bytes"],
    ),
    "a further page outside": (
        PART + page("vga", 7) + page("vga", 8, b"x", named=False),
        AT_PAGE + len(page("vga", 7)),
        ["0x8000", "'vga'"],
    ),
    "a further zero page outside": (
        PART + page("vga", 7) + page("vga", 10, named=False),
        AT_PAGE + len(page("vga", 7)),
        ["0xa000", "'vga'"],
    ),
    "a zero page that is not": (PART + page("vga", 7)[:-1] + b"\x09", AT_PAGE, ["ZERO", "0x9"]),
    "a further zero page that is not": (
        PART + page("vga", 7) + page("vga", 6, named=False)[:-1] + b"\x09",
        AT_PAGE + len(page("vga", 7)),
        ["ZERO", "0x9"],
    ),
    "the footer of another section": (
        PART + wire.EOS + wire.section_footer(5),
        AT_PAGE + 8,
        ["0x7e 5", "footer of section 1"],
    ),
    "no footer": (
        PART + wire.EOS + wire.section_part(RAM),
        AT_PAGE + 8,
        ["0x2 1", "footer of section 1"],
    ),
    "a large CPU state": (
        CPU_SECTION + struct.pack(">I", wire.MAX_DEVICE + 1),
        len(CPU_SECTION),
        [str(wire.MAX_DEVICE + 1), str(wire.MAX_DEVICE)],
    ),
}


@pytest.mark.parametrize("size", [1 << 20, 1])
@pytest.mark.parametrize("what", REFUSED)
def test_what_breaks_the_protocol_is_refused_with_its_place_and_what_came(what, size):
    data, at, named = REFUSED[what]
    with pytest.raises(ProtocolError) as refusal:
        decode(StreamDecoder(BLOCKS), data, [size])
    message = str(refusal.value)
    assert message.startswith(f"stream at {at}:"), message
    assert all(value in message for value in named), message


@pytest.mark.parametrize("kind", COMMAND_LENGTHS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("difference", [1, -1, 600])
def test_a_command_of_the_wrong_length_is_refused_with_both(kind, difference):
    length = COMMAND_LENGTHS[kind] + difference
    if length < 0:
        length = 2
    with pytest.raises(ProtocolError) as refusal:
        decode(StreamDecoder(BLOCKS), HEAD + wire.command(kind, bytes(length)))
    expected = f"stream at 8: {kind.name} with {length} bytes of data, "
    assert str(refusal.value) == expected + f"expected {COMMAND_LENGTHS[kind]}"


def test_what_was_said_before_the_fault_was_said():
    decoder = StreamDecoder(BLOCKS)
    said = feed(decoder, HEAD + wire.ping(1) + b"\x55")
    assert next(said) == Header(3)
    assert next(said) == CommandReceived(Command.PING, b"\0\0\0\1")
    with pytest.raises(ProtocolError):
        next(said)


def test_offsets_are_those_of_the_stream_not_of_the_buffer():
    data = STARTED + b"".join(
        wire.section_part(RAM) + page("pc.ram", i, b"x") + wire.EOS + wire.section_footer(RAM)
        for i in range(64)
    )
    with pytest.raises(ProtocolError, match=f"stream at {len(data)}: section type 0x55"):
        decode(StreamDecoder(BLOCKS, capacity=8192), data + b"\x55", [1000])


@pytest.mark.parametrize("name", [b"\xff\xfe", b"\xff" * 255, b""])
def test_a_name_that_is_no_text_is_refused_as_soon_as_it_is_there(name):
    named = bytes([len(name)]) + name
    device = HEAD + struct.pack(">BI", Section.START, RAM) + named + struct.pack(">II", 0, 4)
    with pytest.raises(ProtocolError, match=f"stream at {AT_SECTION}: device"):
        decode(StreamDecoder(BLOCKS), device)
    with pytest.raises(ProtocolError, match=f"stream at {AT_PAGE}: RAM block"):
        decode(StreamDecoder(BLOCKS), PART + struct.pack(">Q", 0x1008) + named)
    setup = RAM_SECTION + struct.pack(">Q", 0x1004) + named + struct.pack(">QQ", 0x1000, 0x10)
    said = decode(StreamDecoder(BLOCKS), setup + wire.section_footer(RAM))
    assert said[-1] == SectionEnds(RAM), "the destination compares names, the decoder need not"


def test_a_list_of_blocks_without_end_is_refused():
    many = b"\1a" + struct.pack(">Q", 1)
    data = RAM_SECTION + struct.pack(">Q", (1 << 40) | RamFlag.MEM_SIZE) + many * 200_000
    with pytest.raises(ProtocolError, match=f"stream at {len(RAM_SECTION)}: .*RAM blocks"):
        decode(StreamDecoder(BLOCKS), data, [1 << 18])


# Packages.


def test_a_package_that_ends_early_is_refused_with_its_place():
    blob = wire.command(Command.POSTCOPY_LISTEN) + wire.device_state(CPU, b"12345678")
    decoder = StreamDecoder(BLOCKS)
    for end in set(range(1, len(blob))) - {len(wire.command(Command.POSTCOPY_LISTEN))}:
        with pytest.raises(ProtocolError, match=r"stream at .*package of .* bytes ends within"):
            list(decoder.nested(blob[:end]))
    assert len(list(decoder.nested(blob))) == 4


def test_a_fault_within_a_package_has_its_place_in_the_stream():
    blob = wire.command(Command.POSTCOPY_LISTEN) + b"\x55"
    with pytest.raises(ProtocolError, match=f"stream at {len(HEAD) + 9 + 5}: section type 0x55"):
        decode(StreamDecoder(BLOCKS), HEAD + wire.packaged(blob))


def test_a_package_may_be_empty():
    empty = decode(StreamDecoder(BLOCKS), HEAD + wire.packaged(b""))
    assert empty == [Header(3), CommandReceived(Command.PACKAGED, bytes(4)), []]


def test_a_package_within_a_package_is_refused():
    blob = wire.packaged(wire.packaged(b""))
    with pytest.raises(ProtocolError, match="package"):
        decode(StreamDecoder(BLOCKS), HEAD + wire.packaged(blob))


def test_a_package_is_given_out_whole_and_what_follows_it_too():
    blob = wire.command(Command.POSTCOPY_LISTEN) * 1000
    data = HEAD + wire.packaged(blob) + wire.ping(4)
    said = list(feed(StreamDecoder(BLOCKS, capacity=1024), data, [100]))
    assert said[2:] == [Packaged(blob), CommandReceived(Command.PING, b"\0\0\0\4")]


def test_memory_grows_with_what_came_not_with_what_was_claimed():
    data = HEAD + wire.command(Command.PACKAGED, struct.pack(">I", MAX_PACKAGED)) + bytes(1000)
    decoder = StreamDecoder(BLOCKS)
    tracemalloc.start()
    try:
        decode(decoder, data, [100])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


# Streams that something has changed on the way.


def payloads():
    """Which bytes of the whole stream are those of pages, where a change is no fault."""
    inside = np.zeros(len(WHOLE), bool)
    for fill in b"xyz":
        at = WHOLE.index(bytes([fill]) * TARGET_PAGE)
        inside[at : at + TARGET_PAGE] = True
    return inside


STRUCTURE = np.flatnonzero(~payloads()).tolist()
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "cut", "repeat"]),
        st.sampled_from(STRUCTURE),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


def changed(data, changes):
    data = bytearray(data)
    for way, at, value in changes:
        match way:
            case "set":
                data[at : at + 1] = bytes([value])
            case "insert":
                data[at:at] = bytes([value])
            case "delete":
                del data[at : at + value % 16 + 1]
            case "cut":
                del data[at:]
            case "repeat":
                data[at:at] = data[at : at + value]
    return bytes(data)


def read_for_ever(decoder, data, cuts):
    """Read as a destination does, packages as well; return how many events there were."""
    count = 0
    for event in feed(decoder, data, cuts):
        events = decoder.nested(event.blob) if isinstance(event, Packaged) else [event]
        for _ in events:
            count += 1
            assert count <= len(data), "a stream has no more events than bytes"
    return count


@settings(patient, max_examples=2000)
@given(changes=CHANGES, cuts=st.sampled_from([[1 << 20], [4097, 100], [9, 5000]]))
def test_a_changed_stream_is_read_or_refused_but_nothing_else(changes, cuts):
    data = changed(WHOLE, changes)
    with contextlib.suppress(ProtocolError):
        read_for_ever(StreamDecoder(BLOCKS, 64 << 10), data, cuts)


@settings(patient, max_examples=150)
@given(data=st.binary(max_size=300), kept=st.sampled_from(STRUCTURE))
def test_noise_after_a_good_beginning_is_read_or_refused_but_nothing_else(data, kept):
    with contextlib.suppress(ProtocolError):
        read_for_ever(StreamDecoder(BLOCKS, 64 << 10), WHOLE[:kept] + data, [1 << 20])


# The preempt channel.


def read_preempt(decoder, data, cuts=(1 << 20,)):
    """Return the pages of a preempt channel, one by one."""
    rows = []
    for event in feed(decoder, data, cuts):
        if isinstance(event, Page):
            at = event.address - decoder.buffer.address
            rows.append(
                (rows[-1][0], event.offset, bytes(decoder.buffer.view[at : at + TARGET_PAGE]))
            )
        else:
            rows.extend(rows_of(event))
    return rows


@patient
@given(
    numbers=st.lists(st.tuples(st.integers(0, 63), st.sampled_from([None, b"a", b"b"]))),
    cuts=st.lists(st.integers(1, 9000) | st.just(TARGET_PAGE + 8), min_size=1, max_size=8),
)
@example(numbers=[(1, b"a"), (2, b"b"), (3, None)], cuts=[TARGET_PAGE + 15, TARGET_PAGE + 8])
def test_requested_pages_arrive_however_their_channel_is_cut(numbers, cuts):
    data = b"".join(
        page("pc.ram", number, fill, named=i == 0) for i, (number, fill) in enumerate(numbers)
    )
    decoder = PreemptDecoder(BLOCKS)
    rows = read_preempt(decoder, data, cuts)
    assert rows == [("pc.ram", n * TARGET_PAGE, fill and fill * TARGET_PAGE) for n, fill in numbers]
    assert not decoder.ended
    assert read_preempt(decoder, wire.EOS, [3]) == []
    assert decoder.ended


def test_a_lone_page_outside_its_block_is_refused():
    data = page("vga", 1, b"x") + page("vga", 7, b"x", named=False)
    outside = page("vga", 8, b"x", named=False)
    with pytest.raises(ProtocolError, match="offset 0x8000 in RAM block 'vga'"):
        read_preempt(PreemptDecoder(BLOCKS), data + outside, [4108, 4104])


def test_a_first_page_without_a_name_is_refused():
    with pytest.raises(ProtocolError, match="with a block name first"):
        read_preempt(PreemptDecoder(BLOCKS), page("vga", 1, b"x", named=False))


@settings(patient, max_examples=200)
@given(changes=CHANGES, cuts=st.sampled_from([[1 << 20], [4104], [4111, 4104]]))
def test_a_changed_preempt_channel_is_read_or_refused_but_nothing_else(changes, cuts):
    data = b"".join(page("vga", i % 8, b"x", named=i == 0) for i in range(4)) + page("vga", 5)
    changes = [(way, at % 40 if at % 3 else at, value) for way, at, value in changes]
    with contextlib.suppress(ProtocolError):
        read_for_ever(PreemptDecoder(BLOCKS), changed(data, changes) + wire.EOS, cuts)


# What a source frames, a destination reads.


@pytest.fixture
def ram():
    ram = RamBlock.create("pc.ram", 64 * PAGE_SIZE)
    ram.pages[::3] = np.arange(0, 64, 3, dtype=np.uint8)[:, None] + np.uint8(1)
    ram.pages[5, 4000] = 1  # far behind its first bytes
    yield ram
    ram.close()


def test_zero_pages_are_told_from_others(ram):
    expected = [not ram.pages[i].any() for i in range(64)]
    framer = PageFramer(ram, 64)
    assert framer.zero_mask(np.arange(64)).tolist() == expected
    some = [1, 3, 4, 5, 20, 63]
    assert framer.zero_mask(np.array(some)).tolist() == [expected[i] for i in some]
    assert [framer.is_zero(i) for i in range(64)] == expected
    assert not expected[5]


@settings(patient, max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    batches=st.lists(
        st.tuples(
            st.sampled_from(["data", "zeros", "one"]),
            st.lists(st.integers(0, 63), min_size=1, max_size=20, unique=True).map(sorted),
        ),
        max_size=8,
    ),
    cuts=CUTS,
)
def test_framed_pages_are_the_pages_of_the_block(ram, batches, cuts):
    framer = PageFramer(ram, 20)
    data, expected = b"", []
    for way, numbers in batches:
        if way == "one":
            parts, sent = framer.one(numbers[0]), numbers[:1]
        else:
            parts, sent = getattr(framer, way)(np.array(numbers)), numbers
        data += b"".join(parts)
        expected += [
            ("pc.ram", n * PAGE_SIZE, None if way == "zeros" else ram.pages[n].tobytes())
            for n in sent
        ]
    assert read_preempt(PreemptDecoder(BLOCKS), data, cuts) == expected


@patient
@given(st.lists(st.integers(0, 40)))
def test_runs_are_the_same_pages_in_the_same_order(pages):
    runs = runs_of(np.array(pages, np.intp))
    assert [page for first, count in runs for page in range(first, first + count)] == pages
    assert all(count > 0 for _, count in runs)
    ends = [(first + count, later) for (first, count), (later, _) in itertools.pairwise(runs)]
    assert all(end != later for end, later in ends), "no two runs could be one"


PER_HUGE = HUGE // TARGET_PAGE


def batch_of(numbers, fill=None):
    """Target pages as a decoder gives them out."""
    records = np.zeros(len(numbers), wire.PAGE_RECORD)
    records["data"] = fill or 0
    offsets = np.array(numbers, np.int64) * TARGET_PAGE
    view = records.view(np.uint8).data
    address = 0 if fill is None else records.ctypes.data + 8
    return Pages("a", offsets, address, view, 8)


def test_huge_pages_are_handed_on_when_they_are_whole():
    pages = HostPages(HUGE)
    whole = []
    for first in range(PER_HUGE, 3 * PER_HUGE, 64):
        for number, data in pages.assemble(batch_of(range(first, first + 64), first // PER_HUGE)):
            whole.append((number, int(data.min()), int(data.max())))
    assert whole == [(1, 1, 1), (2, 2, 2)]
    assert pages.assemble(batch_of(range(PER_HUGE))) == [(0, None)], "all zeros"


@pytest.mark.parametrize("numbers", [[1], [0, 2], [0, PER_HUGE], [0, 0]])
def test_target_pages_of_a_huge_page_that_do_not_come_in_a_row_are_refused(numbers):
    with pytest.raises(ProtocolError, match="came while huge page"):
        HostPages(HUGE).assemble(batch_of(numbers, 1))


# The return path.

SAID = [
    (return_path.shut(0), Value(Message.SHUT, 0)),
    (return_path.pong(3), Value(Message.PONG, 3)),
    (struct.pack(">HHI", 6, 4, 1), Value(Message.RESUME_ACK, 1)),
    (struct.pack(">HH", 7, 0), Value(Message.SWITCHOVER_ACK, 0)),
    (return_path.received_bitmap("pc.ram", bytes(range(24))), Bitmap("pc.ram", bytes(range(24)))),
]
REQUESTS = st.tuples(st.sampled_from(["pc.ram", "vga"]), st.integers(0, 63))


@patient
@given(
    said=st.lists(st.sampled_from(SAID) | REQUESTS),
    cuts=st.lists(st.integers(1, 40) | st.just(16), min_size=1, max_size=8),
)
def test_answers_say_the_same_however_they_are_cut(said, cuts):
    data, expected, last = b"", [], None
    for one in said:
        if isinstance(one[0], bytes):
            data += one[0]
            expected.append(one[1])
        else:
            block, number = one
            start = number * TARGET_PAGE
            named = None if block == last else block
            data += return_path.request_pages(start, TARGET_PAGE, named)
            expected.append(PageRequest(block, start, TARGET_PAGE))
            last = block
    assert answers(ReturnPathDecoder({"pc.ram": 24}), data, cuts) == expected


def answers(decoder, data, cuts=(1 << 20,)):
    found, at = [], 0
    for cut in itertools.cycle(cuts):
        if at >= len(data):
            return found
        found += decoder.feed(data[at : at + cut])
        at += cut
    return found


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (struct.pack(">HH", 2, 513), ["513 bytes", "512"]),
        (struct.pack(">HH", 0, 0), ["type 0 of 0 bytes", "SHUT 1", "SWITCHOVER_ACK 7"]),
        (struct.pack(">HHI", 99, 4, 0), ["type 99 of 4 bytes"]),
        (struct.pack(">HHH", 1, 2, 0), ["type 1 of 2 bytes"]),
        (struct.pack(">HH11x", 4, 11), ["type 4 of 11 bytes"]),
        (struct.pack(">HH12x", 3, 12), ["type 3 of 12 bytes"]),
        (struct.pack(">HH", 3, 0), ["type 3 of 0 bytes"]),
        (struct.pack(">HH12xB3x", 3, 16, 9), ["type 3 of 16 bytes"]),
        (struct.pack(">HHB", 5, 1, 6), ["type 5 of 1 bytes"]),
        (struct.pack(">HH", 5, 4) + b"\3vga", ["bitmap of RAM block 'vga'"]),
        (struct.pack(">HHB", 7, 1, 0), ["type 7 of 1 bytes"]),
    ],
)
def test_an_answer_that_the_protocol_lacks_is_refused_with_its_place(data, named):
    decoder = ReturnPathDecoder()
    first = return_path.pong(1)
    assert decoder.feed(first) == [Value(Message.PONG, 1)]
    with pytest.raises(ProtocolError) as refusal:
        answers(decoder, data, [3])
    message = str(refusal.value)
    assert message.startswith(f"return path at {len(first)}:"), message
    assert all(value in message for value in named), message


@settings(patient, max_examples=200)
@given(data=st.binary(max_size=80), cuts=st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_noise_on_the_return_path_is_read_or_refused_but_nothing_else(data, cuts):
    with contextlib.suppress(ProtocolError):
        answers(ReturnPathDecoder(), data, cuts)


@settings(patient, max_examples=200)
@given(
    messages=st.lists(st.tuples(st.integers(0, 8), st.binary(max_size=24)), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 30), min_size=1, max_size=4),
)
def test_answers_of_any_content_are_read_or_refused_but_nothing_else(messages, cuts):
    data = b"".join(struct.pack(">HH", kind, len(body)) + body for kind, body in messages)
    with contextlib.suppress(ProtocolError):
        assert len(answers(ReturnPathDecoder(), data, cuts)) == len(messages)


# States.

TABLES = {"source": SOURCE, "destination": DESTINATION}


def reachable(table, begin):
    found, left = {begin}, [begin]
    while left:
        new = set(table[left.pop()]) - found
        found |= new
        left += new
    return found


@pytest.mark.parametrize("side", TABLES)
def test_every_state_can_be_reached_and_every_one_can_end(side):
    table = TABLES[side]
    assert reachable(table, Status.NONE) == set(table)
    for status in table:
        assert status == Status.NONE or reachable(table, status) & ENDED, status


def test_all_states_are_states_of_the_source():
    assert set(SOURCE) == set(Status)


def test_post_copy_cannot_be_cancelled_and_what_ended_can_only_begin_anew():
    for status in Status:
        if status.startswith("postcopy"):
            assert Status.CANCELLING not in SOURCE[status]
    for status in ENDED:
        assert SOURCE[status] == {Status.SETUP}


def test_an_outage_of_post_copy_is_a_pause_and_no_end():
    assert Status.POSTCOPY_PAUSED in SOURCE[Status.POSTCOPY_ACTIVE]
    assert Status.POSTCOPY_ACTIVE in reachable(SOURCE, Status.POSTCOPY_PAUSED)
    assert Status.POSTCOPY_ACTIVE in reachable(DESTINATION, Status.POSTCOPY_PAUSED)


def test_post_copy_commands_come_in_their_order():
    assert set(POSTCOPY_ORDER) == set(PostcopyState)
    assert reachable(POSTCOPY_ORDER, PostcopyState.NONE) == set(PostcopyState)
    assert PostcopyState.RUNNING not in POSTCOPY_ORDER[PostcopyState.DISCARD]


def machine_at(status, table=SOURCE):
    """A state machine that has gone the shortest way to a state."""
    ways = {Status.NONE: []}
    left = [Status.NONE]
    while left:
        old = left.pop(0)
        for new in table[old] - ways.keys():
            ways[new] = [*ways[old], new]
            left.append(new)
    announced = []
    machine = StateMachine(table, announced.append)
    for old, new in itertools.pairwise([Status.NONE, *ways[status]]):
        assert machine.set(old, new)
    assert announced == ways[status]
    announced.clear()
    return machine, announced


@pytest.mark.parametrize("side", TABLES)
def test_only_the_transitions_of_the_table_are_made(side):
    table = TABLES[side]
    for old, new in itertools.product(table, Status):
        machine, announced = machine_at(old, table)
        if new in table[old]:
            assert machine.set(old, new)
            assert (machine.status, announced) == (new, [new])
        else:
            with pytest.raises(ValueError, match=f"no transition from {old} to {new}"):
                machine.set(old, new)
            assert (machine.status, announced) == (old, [])


def test_a_state_that_a_side_does_not_have_has_no_transitions():
    machine = StateMachine(DESTINATION, print)
    with pytest.raises(ValueError, match="no transition from device to completed"):
        machine.set(Status.DEVICE, Status.COMPLETED)


@patient
@given(st.lists(st.tuples(st.sampled_from(sorted(SOURCE)), st.integers(0, 9)), max_size=40))
def test_who_expects_another_state_changes_nothing(attempts):
    announced = []
    machine = StateMachine(SOURCE, announced.append)
    expected = [Status.NONE]
    for old, choice in attempts:
        new = sorted(SOURCE[old])[choice % len(SOURCE[old])]
        assert machine.set(old, new) == (old == expected[-1])
        if old == expected[-1]:
            expected.append(new)
        assert machine.status == expected[-1]
        assert announced == expected[1:]


def test_of_all_who_change_a_state_at_once_exactly_one_does():
    for _ in range(50):
        machine, announced = machine_at(Status.ACTIVE)
        ends = sorted(SOURCE[Status.ACTIVE])
        barrier = threading.Barrier(len(ends))
        won = []

        def attempt(new, machine=machine, barrier=barrier, won=won):
            barrier.wait(DEADLINE_S)
            if machine.set(Status.ACTIVE, new):
                won.append(new)

        threads = [threading.Thread(target=attempt, args=(new,)) for new in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == announced == [machine.status]


# Options.


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256MiB", 256 << 20), ("4G", 4 << 30), ("4GB", 4 << 30), ("1.5 GiB", 3 << 29),
        ("2mib", 2 << 20), ("64k", 64 << 10), (" 7 ", 7), ("0", 0), ("1t", 1 << 40), ("12b", 12),
        (4096, 4096), (1e6, 1000000),
    ],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("size", "text"), [(256 << 20, "256MiB"), (4096, "4KiB"), (3 << 30, "3GiB"), (1000, "1000")]
)
def test_sizes_are_written_as_people_read_them(size, text):
    assert format_size(size) == text


@given(st.integers(0, 1 << 45) | st.integers(0, 1 << 12).map(lambda n: n << 20))
def test_a_size_that_is_written_is_read_as_the_same(size):
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1,5G", "1 2", "1PiB", "0x10", "1e6", "4 GG"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(OptionError, match="is not a size: write 256MiB"):
        parse_size(text)


@pytest.mark.parametrize("size", ["9" * 400, float("inf"), float("nan"), "1" * 500 + "T"])
def test_sizes_beyond_numbers_are_refused(size):
    with pytest.raises(OptionError):
        Options.make(memory=size)


@settings(patient, max_examples=150)
@given(st.text(max_size=12) | st.from_regex(r"[0-9. ]{1,6}[kmgtKMGT]?[iI]?[bB]?"))
def test_any_text_is_a_size_or_is_refused(text):
    with contextlib.suppress(OptionError):
        assert parse_size(text) >= 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"memroy": "1G"}, r"no option 'memroy': did you mean 'memory'"),
        ({"post-copy": "off"}, r"no option 'post-copy': did you mean .*'postcopy'"),
        ({"memory": 4097}, "4096 or 8192 would be"),
        ({"memory": 0}, "not a multiple"),
        ({"memory": -4096}, "not a multiple"),
        ({"memory": "3MiB", "page_size": "2MiB"}, "2097152 or 4194304 would be"),
        ({"memory": "100TiB"}, "two guests of 104857600 MiB need .* at most .* will do"),
        ({"memory": []}, "memory"),
        ({"page_size": 8192}, "8192 is not one of 4096"),
        ({"seed": "x"}, "seed 'x' is not a int"),
        ({"seed": -1}, "seed of -1 is not a number from 0 on"),
        ({"rate": -1}, "rate of -1.0 is not a number from 0 on"),
        ({"rate": "fast"}, "rate 'fast' is not a float"),
        ({"rate": "nan"}, "rate"),
        ({"downtime_limit": -0.1}, "downtime_limit of -0.1 is not a number from 0 on"),
        ({"downtime_limit": float("nan")}, "downtime_limit"),
        ({"max_bandwidth": -1}, "max_bandwidth of -1 is not a number from 0 on"),
        ({"max-bandwidth": "quick"}, "'quick' is not a size"),
        ({"transport": "tpc"}, r"transport 'tpc': did you mean 'tcp'\?"),
        ({"transport": "rdma"}, "transport 'rdma': known are: tcp, unix"),
        ({"probe": "maybe"}, "probe 'maybe'"),
        ({"postcopy": "soon"}, "postcopy 'soon': one of 'N rounds'"),
        ({"postcopy_preempt": "perhaps"}, "postcopy_preempt 'perhaps' is not a bool"),
        ({"cpus": "0,0,0"}, "cpus '0,0,0': four numbers, as in 0,0,1,1"),
        ({"cpus": "a,b,c,d"}, "cpus 'a,b,c,d': four numbers"),
        ({"cpus": "0,0,0,100000"}, "this process may use"),
        ({"cpus": "0,0,0,-1"}, "this process may use"),
        ({"trace": 5}, "trace 5 is not a tuple"),
    ],
)
def test_options_that_cannot_be_used_are_refused_with_what_could(values, message):
    with pytest.raises(OptionError, match=message):
        Options.make(**values)


def test_options_are_made_of_what_people_write():
    cpu = min(os.sched_getaffinity(0))
    made = Options.make(**{
        "memory": "16MiB", "max-bandwidth": "1.5G", "postcopy-preempt": "off", "seed": "7",
        "rate": "1000", "trace": "faults,-x", "downtime-limit": 1, "postcopy": "2 rounds",
        "cpus": f"{cpu},{cpu},{cpu},{cpu}", "transport": None,
    })  # fmt: skip
    assert (made.memory, made.max_bandwidth, made.seed) == (16 << 20, 3 << 29, 7)
    assert (made.postcopy_preempt, made.rate, made.downtime_limit) == (False, 1000.0, 1.0)
    assert (made.trace, made.transport) == (("faults", "-x"), "unix")
    assert made.cpu_list() == (cpu,) * 4
    assert made.postcopy_ram


def test_options_survive_json():
    made = Options.make(memory="8MiB", trace=["a", "b"], postcopy="off", return_path=False)
    assert Options.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    assert not made.postcopy_ram
    assert not made.uses_return_path
    assert Options.from_dict({**made.as_dict(), "of a later version": 1}) == made


@pytest.mark.parametrize(
    ("text", "trigger"),
    [
        ("manual", Trigger()),
        ("off", Trigger()),
        ("auto", Trigger(auto=True)),
        ("1 round", Trigger(rounds=1)),
        ("3 Rounds", Trigger(rounds=3)),
        ("0 rounds", Trigger(rounds=0)),
        ("2 s", Trigger(seconds=2)),
        ("0.5s", Trigger(seconds=0.5)),
        (" 250 ms ", Trigger(seconds=0.25)),
    ],
)
def test_when_post_copy_starts_is_read_as_people_write_it(text, trigger):
    assert Trigger.parse(text) == trigger


@pytest.mark.parametrize("text", ["", "1", "rounds", "-1 rounds", "1 hour", "1 round 2 s", "AUTO?"])
def test_what_is_no_trigger_is_refused_with_what_is(text):
    with pytest.raises(OptionError, match="one of 'N rounds', 'N s', 'manual', 'auto', 'off'"):
        Trigger.parse(text)


# Policies. Their clock is ours.


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def rounds(convergence, clock, *left, pages=1000, took_s=1.0):
    """Go through rounds that leave so many pages dirty; return whether post-copy was due."""
    due = []
    sent = 0
    for dirty in left:
        convergence.round_begins(pages)
        clock.now += took_s
        sent += pages * PAGE_SIZE
        convergence.round_ends(dirty, sent)
        due.append(convergence.postcopy_due())
        pages = dirty
    return due


def test_the_bandwidth_is_that_of_the_last_round(clock):
    convergence = Convergence(Options(downtime_limit=0.5), PAGE_SIZE)
    rounds(convergence, clock, 300, 50, took_s=2.0)
    assert convergence.bandwidth == 300 * PAGE_SIZE / 2
    assert convergence.pending == 50 * PAGE_SIZE
    assert convergence.threshold == convergence.bandwidth * 0.5
    assert convergence.rounds == 2


def test_a_round_that_takes_no_time_has_a_bandwidth(clock):
    convergence = Convergence(Options(), PAGE_SIZE)
    rounds(convergence, clock, 10, took_s=0.0)
    assert np.isfinite(convergence.bandwidth)


def test_post_copy_is_due_after_its_rounds(clock):
    convergence = Convergence(Options(postcopy="3 rounds"), PAGE_SIZE)
    assert rounds(convergence, clock, 100, 10, 1, 1) == [False, False, True, True]


def test_post_copy_is_due_after_its_time(clock):
    convergence = Convergence(Options(postcopy="2500 ms"), PAGE_SIZE)
    assert not convergence.postcopy_due()
    assert rounds(convergence, clock, 100, 10, 1) == [False, False, True]


@pytest.mark.parametrize("postcopy", ["manual", "off"])
def test_post_copy_is_never_due_by_itself(clock, postcopy):
    convergence = Convergence(Options(postcopy=postcopy), PAGE_SIZE)
    assert not any(rounds(convergence, clock, *[1000] * 50))


def test_post_copy_is_due_when_two_rounds_in_a_row_dirty_most_of_what_they_sent(clock):
    auto = Options(postcopy="auto")
    assert rounds(Convergence(auto, PAGE_SIZE), clock, 900, 800, 700) == [False, False, True]
    assert not any(rounds(Convergence(auto, PAGE_SIZE), clock, 500, 240, 110, 50, 20))
    patience = rounds(Convergence(auto, PAGE_SIZE), clock, 900, 800, 100, 90, 80)
    assert patience == [False, False, False, False, True]


@patient
@given(
    rate=st.integers(1, 1 << 32),
    sends=st.lists(st.tuples(st.integers(1, 1 << 20), st.floats(0, 0.1)), max_size=40),
)
def test_a_limited_sender_keeps_its_rate_and_is_never_starved(rate, sends):
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(time, "monotonic", clock)
        limiter = RateLimiter(rate)
        begun, sent, largest = clock.now, 0, 0
        for chunk, idle_s in sends:
            clock.now += idle_s
            clock.now += limiter.wait_s()
            # It waited as told. Nothing but rounding may be left to wait for.
            assert limiter.wait_s() <= 1e-9 * clock.now
            assert sent <= rate * (clock.now - begun) * 1.000001 + rate * 0.01 + largest
            limiter.spend(chunk)
            sent, largest = sent + chunk, max(largest, chunk)


def test_without_a_limit_there_is_nothing_to_wait_for():
    limiter = RateLimiter(0)
    limiter.spend(1 << 40)
    assert limiter.wait_s() == 0.0


# Sockets.


@pytest.fixture
def folder():
    """A folder whose name is short enough for a unix socket."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(params=["unix", "tcp"])
def uri(request, folder):
    return f"unix:{folder / 'socket'}" if request.param == "unix" else "tcp:127.0.0.1:0"


def connected(uri, stack):
    """Both ends of a connection made through ``uri``."""
    listener, where = listen(uri)
    stack.enter_context(listener)
    ours = stack.enter_context(connect(where))
    listener.setblocking(True)
    listener.settimeout(DEADLINE_S)
    theirs, _ = listener.accept()
    return ours, stack.enter_context(theirs)


def test_a_side_that_connects_reaches_the_side_that_listens(uri):
    with contextlib.ExitStack() as stack:
        ours, theirs = connected(uri, stack)
        ours.send(b"page")
        theirs.settimeout(DEADLINE_S)
        assert theirs.recv(10) == b"page"
        assert not ours.getblocking()
        assert is_trusted(theirs)
        if ours.family == socket.AF_INET:
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_who_listens_is_told_where_and_does_not_block(uri):
    listener, where = listen(uri)
    with listener:
        assert not listener.getblocking()
        if uri.startswith("tcp"):
            assert where == f"tcp:127.0.0.1:{listener.getsockname()[1]}"
            assert listener.getsockname()[1] > 0
        else:
            assert where == uri
            assert Path(where.removeprefix("unix:")).stat().st_mode & 0o777 == 0o600


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_where_nobody_listens_is_an_error_that_names_the_place(uri):
    listener, where = listen(uri)
    listener.close()
    before = open_descriptors()
    with pytest.raises(MigrationError, match=f"no connection to {where}: .*refused") as refusal:
        connect(where)
    assert open_descriptors() == before, refusal


@pytest.mark.parametrize(
    "wrong",
    ["", "file:/x", "tcp:0.0.0.0:0", "tcp:localhost:1", "tcp:127.0.0.1", "tcp:127.0.0.1:x",
     "tcp:[::1]:1", "tcp::1", "127.0.0.1:1"],
)  # fmt: skip
def test_what_is_no_local_address_is_refused(wrong):
    for way in (listen, connect):
        with pytest.raises(OptionError, match=r"neither unix:PATH nor tcp:127\.0\.0\.1:PORT"):
            way(wrong)


def test_an_address_that_is_taken_is_an_error_and_leaves_no_socket(uri):
    listener, where = listen(uri)
    with listener:
        before = open_descriptors()
        with pytest.raises(MigrationError, match="in use") as refusal:
            listen(where)
        assert open_descriptors() == before, refusal


def test_a_peer_of_another_user_is_not_trusted(folder):
    if os.geteuid() != 0:
        pytest.skip("setuid: only root can be two users")
    path = folder / "socket"
    listener, where = listen(f"unix:{path}")
    with listener:
        with pytest.raises(PermissionError):
            open_as_nobody(path)
        folder.chmod(0o755)
        path.chmod(0o666)
        stranger = open_as_nobody(path)
        listener.settimeout(DEADLINE_S)
        peer, _ = listener.accept()
        with peer:
            assert not is_trusted(peer)
        stranger.communicate(timeout=DEADLINE_S)
        with connect(where):
            peer, _ = listener.accept()
            with peer:
                assert is_trusted(peer)


def open_as_nobody(path):
    """Connect to a unix socket as another user; raise PermissionError when that is refused."""
    script = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)  # nobody\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "try: sock.connect(sys.argv[1])\n"
        "except PermissionError: print('refused', flush=True)\n"
        "else: print('connected', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if process.stdout.readline() == "refused\n":
        process.communicate(timeout=DEADLINE_S)
        raise PermissionError
    return process


@pytest.fixture
def pair():
    """Two ends of a connection of which the first does not block and soon is full."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel.tune(ours)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        theirs.settimeout(DEADLINE_S)
        yield ours, theirs


def drain(outgoing, theirs, size):
    """Receive so many bytes while what waits is sent."""
    data = b""
    while len(data) < size:
        outgoing.flush()
        data += theirs.recv(1 << 16)
    return data


@pytest.mark.parametrize("seed", range(5))
def test_what_is_sent_arrives_in_order_however_full_the_socket_is(pair, seed):
    rng = np.random.default_rng(seed)
    outgoing = Outgoing(pair[0])
    sent = b""
    for _ in range(100):
        parts = [rng.bytes(n) for n in rng.integers(1, 3000, rng.integers(1, 4))]
        if len(parts) == 1:
            outgoing.send_one(parts[0])
        else:
            outgoing.send(*parts)
        sent += b"".join(parts)
    assert outgoing.pending
    assert drain(outgoing, pair[1], len(sent)) == sent
    assert not outgoing.pending
    assert outgoing.sent_bytes == len(sent)


def test_thousands_of_messages_may_wait(pair):
    outgoing = Outgoing(pair[0])
    message = return_path.request_pages(0x1000, 0x1000, None)
    for _ in range(5000):
        outgoing.send_one(message)
    outgoing.send(message, message)
    assert drain(outgoing, pair[1], 5002 * len(message)) == 5002 * message
    assert not outgoing.pending


@pytest.fixture
def controls():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ControlSocket(ours), ControlSocket(theirs)


@pytest.mark.parametrize("size", [1, 7, 65536])
def test_control_messages_arrive_however_they_are_cut(controls, size):
    ours, theirs = controls
    assert theirs.receive() == []
    messages = [{"execute": "migrate", "arguments": {"uri": "é"}, "id": n} for n in range(5)]
    data = "".join(json.dumps(message) + "\n" for message in messages).encode()
    got = []
    for at in range(0, len(data), size):
        ours.sock.sendall(data[at : at + size])
        got += theirs.receive()
    assert got == messages
    ours.event("STOP", why="test")
    (event,) = theirs.receive()
    assert (event["event"], event["data"]) == ("STOP", {"why": "test"})
    ours.sock.close()
    assert theirs.receive() is None


@pytest.mark.parametrize("wrong", [b"{", b"[]", b"5", b"\xff\xfe", b"nothing"])
def test_what_is_no_control_message_is_refused(controls, wrong):
    ours, theirs = controls
    ours.sock.sendall(wrong + b"\n")
    with pytest.raises(ProtocolError, match=r"control: .* is no JSON"):
        theirs.receive()


def test_a_control_message_without_end_is_refused(controls):
    ours, theirs = controls

    def go_on():
        for _ in range(MAX_LINE // 32768 + 2):
            ours.sock.sendall(b"x" * 32768)
            theirs.receive()

    with pytest.raises(ProtocolError, match=f"more than {MAX_LINE} bytes"):
        go_on()
