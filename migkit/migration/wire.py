"""QEMU's migration protocol as bytes: the layouts and the encoders. No I/O happens here.

The stream (source to destination) is a header, then typed sections; integers are big-endian.
Guest RAM travels in the sections of the device ``ram`` as one record a target page:
``be64 (offset | flags)``, the block's name unless CONTINUE, then the page's bytes, or one zero
byte for a page of zeros. What goes back is in :mod:`return_path`; what reads this,
in :mod:`stream`.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

MAGIC = 0x5145564D
VERSION = 3
TARGET_PAGE = 4096
RAM_VERSION = 4
RAM_SECTION = 2  # the section ids that our source gives its two devices
CPU_SECTION = 3

MAX_PACKAGED = 32 << 20  # qemu: MAX_VM_CMD_PACKAGED_SIZE
MAX_DISCARDS = 12  # qemu: MAX_DISCARDS_PER_COMMAND
MAX_DEVICE = 64 << 10  # ours: what a CPU state may take
MAX_BLOCKS = 1024  # ours: how many RAM blocks a list may name


class Section(enum.IntEnum):
    """``QEMU_VM_*``: the type byte of each piece of the stream."""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


class Command(enum.IntEnum):
    """``MIG_CMD_*``: what the source tells the destination to do."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 0xA
    SWITCHOVER_START = 0xB


COMMAND_LENGTHS = {
    Command.OPEN_RETURN_PATH: 0,
    Command.PING: 4,
    Command.POSTCOPY_ADVISE: 16,
    Command.POSTCOPY_LISTEN: 0,
    Command.POSTCOPY_RUN: 0,
    Command.PACKAGED: 4,
    Command.POSTCOPY_RESUME: 0,
    Command.SWITCHOVER_START: 0,
}
"""The length of a command's data, for those of one length."""


class RamFlag(enum.IntFlag):
    """``RAM_SAVE_FLAG_*``: the low bits of a page record's first word."""

    ZERO = 0x02
    MEM_SIZE = 0x04
    PAGE = 0x08
    EOS = 0x10
    CONTINUE = 0x20


PAGE_RECORD = np.dtype([("header", ">u8"), ("data", "u1", (TARGET_PAGE,))])
ZERO_RECORD = np.dtype([("header", ">u8"), ("fill", "u1")])
"""Records of one block in a row (CONTINUE), as numpy sees them."""

_CONTINUE = int(RamFlag.CONTINUE)  # an enum's operators cost a microsecond each
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
EOS = _U64.pack(RamFlag.EOS)
END_OF_STREAM = bytes([Section.EOF])

PING_RETURN_PATH = 1
PING_DISCARDS = 2
PING_PACKAGE = 3
PING_LISTENING = 4
PING_AHEAD = 0x100  # and above: rounds of discards while the guest runs
PING_WINDOW = 0x10000  # and above: those that measure the link


class BlockLayout(NamedTuple):
    """A RAM block as both sides must agree on it; sizes in bytes."""

    name: str
    size: int
    page_size: int


def header() -> bytes:
    """Encode the first eight bytes of a stream."""
    return struct.pack(">II", MAGIC, VERSION)


def configuration(machine: str) -> bytes:
    """Encode the configuration section: the machine type, here the workload's identity."""
    data = machine.encode()
    return bytes([Section.CONFIGURATION]) + _U32.pack(len(data)) + data


def command(kind: Command, data: bytes = b"") -> bytes:
    """Encode a command."""
    return struct.pack(">BHH", Section.COMMAND, kind, len(data)) + data


def ping(value: int) -> bytes:
    """Encode a PING."""
    return command(Command.PING, _U32.pack(value))


def advise(page_size_summary: int) -> bytes:
    """Encode POSTCOPY_ADVISE: the OR of all host page sizes, and the target's page size."""
    return command(Command.POSTCOPY_ADVISE, struct.pack(">QQ", page_size_summary, TARGET_PAGE))


def discard(block: str, ranges: Sequence[tuple[int, int]]) -> bytes:
    """Encode one discard of up to 12 (start, length) in bytes."""
    data = bytes([0]) + short_string(block) + b"\0"
    data += b"".join(struct.pack(">QQ", start, length) for start, length in ranges)
    return command(Command.POSTCOPY_RAM_DISCARD, data)


def packaged(blob: bytes) -> bytes:
    """Encode a package: commands and device sections, read whole before any is acted on."""
    return command(Command.PACKAGED, _U32.pack(len(blob))) + blob


def section_start(section_id: int, name: str, version: int, *, full: bool = False) -> bytes:
    """Encode the head of a START (or FULL) section, which names its device; instance 0."""
    kind = Section.FULL if full else Section.START
    head = struct.pack(">BI", kind, section_id) + short_string(name)
    return head + struct.pack(">II", 0, version)


def section_part(section_id: int, *, end: bool = False) -> bytes:
    """Encode the head of a PART (or END) section of a device already started."""
    return struct.pack(">BI", Section.END if end else Section.PART, section_id)


def section_footer(section_id: int) -> bytes:
    """Encode the footer that closes every section."""
    return struct.pack(">BI", Section.FOOTER, section_id)


def ram_setup(blocks: Iterable[BlockLayout], *, postcopy: bool) -> bytes:
    """Encode the list of RAM blocks; the page size only where QEMU would send it."""
    blocks = list(blocks)
    data = _U64.pack(sum(b.size for b in blocks) | RamFlag.MEM_SIZE)
    for block in blocks:
        data += short_string(block.name) + _U64.pack(block.size)
        if postcopy and block.page_size != TARGET_PAGE:
            data += _U64.pack(block.page_size)
    return data + EOS


def device_state(section_id: int, state: bytes) -> bytes:
    """Encode the CPU as a FULL section: be32 length, then the state."""
    head = section_start(section_id, "cpu", 1, full=True)
    return head + _U32.pack(len(state)) + state + section_footer(section_id)


def page_header(offset: int, flags: int, block: str | None) -> bytes:
    """Encode a page record's head; with ``block`` None it continues the last block."""
    if block is None:
        return _U64.pack(offset | flags | _CONTINUE)
    return _U64.pack(offset | flags) + short_string(block)


def short_string(text: str) -> bytes:
    """Encode a string of up to 255 bytes behind its length."""
    data = text.encode()
    return bytes([len(data)]) + data
