"""Reading a whole migration stream out of a file, ours or a real QEMU's.

A destination knows its devices and blocks; a reader of a file learns the blocks from the stream
and has no code for any device. QEMU gives a device's state no length, but every section ends with
a footer that repeats its id: a section reaches to the first footer of its own behind which
something begins that can follow it. A pre-copy stream ends with a description that has all sizes,
by which that is checked.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from migkit.migration.records import NeedMore, PageRecords
from migkit.migration.stream import (
    CommandReceived,
    Configuration,
    Event,
    RamSetup,
    SectionBegins,
    StreamDecoder,
)
from migkit.migration.wire import MAGIC, TARGET_PAGE, BlockLayout, Command, RamFlag, Section

MAX_DEVICE = 16 << 20
"""A longer device state, and a longer description, is refused."""

_PIECE = 1 << 20
_MOST_PAGES = 4096
_MOST_SECTIONS = 1 << 16
_FLAGS = TARGET_PAGE - 1
_XBZRLE = 0x40  # RAM_SAVE_FLAG_XBZRLE
_COMPRESSED = 0x100  # RAM_SAVE_FLAG_COMPRESS_PAGE, up to QEMU 9.0
_MULTIFD_FLUSH = 0x200  # RAM_SAVE_FLAG_MULTIFD_FLUSH
_CONTINUE = int(RamFlag.CONTINUE)
_MULTIFD_MAGIC = 0x11223344  # MULTIFD_MAGIC
_FOOTER = struct.Struct(">BI")


class DeviceBytes(NamedTuple):
    """The state of a device, that nobody here understands."""

    name: str
    n_bytes: int


class EncodedPage(NamedTuple):
    """A page that came compressed or as a difference; its bytes are not decoded."""

    block: str
    offset: int
    flag: str


class RamMark(NamedTuple):
    """A word of a RAM section that is no page: its end, or a sync of multifd channels."""

    flag: str


class Description(NamedTuple):
    """The description of all devices behind a pre-copy stream; sizes in bytes by name, instance."""

    sizes: dict[tuple[str, int], int]


FileEvent = Event | DeviceBytes | EncodedPage | RamMark | Description


class Piece(NamedTuple):
    """What was decoded, where it begins and ends in the stream, and whether within a package."""

    offset: int
    end: int
    packaged: bool
    event: FileEvent


class FileDecoder(StreamDecoder):
    """Turns a file's bytes into events, whatever devices and blocks are in it."""

    def __init__(self) -> None:
        super().__init__({}, MAX_DEVICE + 2 * _PIECE)
        self.at_end = False
        """Nothing follows what is in the buffer."""
        self.package_end = 0
        self.instances: dict[int, tuple[str, int]] = {}
        self.most_pages = _MOST_PAGES
        self._sizes: dict[str, int] = {}
        self._records = PageRecords(self._sizes, self.buffer)
        self._block = ""
        self._scanned = 0
        self._addresses = False
        """Each RAM block's address in the guest follows its size: x-ignore-shared."""

    def pieces(self, file: IO[bytes]) -> Iterator[Piece]:
        """Yield all that is in a file, gapless; raise ProtocolError where it cannot go on.

        It ends early, without an error, where the file is cut off.
        """
        buffer = self.buffer
        while True:
            while buffer.head < buffer.tail:
                offset = buffer.offset
                packaged = offset < self.package_end
                event = self.next()
                if event is None:
                    break
                yield Piece(offset, buffer.offset, packaged, event)
            if self.at_end:
                return
            room = buffer.room(_PIECE)
            count = file.readinto(room) if len(room) else 0  # type: ignore[attr-defined]
            buffer.tail += count
            self.at_end = not count

    def _header(self) -> Event:
        """Read the header; of a channel that has none say which it looks like."""
        magic = self.buffer.u32()
        if magic == _MULTIFD_MAGIC:
            what = "a multifd channel, whose packets are not decoded"
        elif magic >> 16 == Section.COMMAND << 8:
            what = (
                "a stream that resumes a paused migration: it has no header, and its first half "
                "named the RAM blocks"
            )
        elif not magic >> 16:
            what = "perhaps the channel of requested pages, which has no header"
        else:
            return super()._header()
        raise self._fail(f"magic {magic:#x}, expected {MAGIC:#x}: no migration stream, but {what}")

    def _section(self) -> FileEvent:  # type: ignore[override]
        if self.buffer.u8() == Section.VMDESCRIPTION:
            return self._description()
        return super()._section()

    def _configuration(self) -> Event:
        event = super()._configuration()
        self._parse = self._after_configuration  # type: ignore[assignment]
        return event

    def _after_configuration(self) -> FileEvent:
        """Read the subsections of the configuration that QEMU has, then go on with sections."""
        b = self.buffer
        if b.u8() != Section.SUBSECTION:
            self._parse = self._section  # type: ignore[assignment]
            return self._section()
        name, at = b.string(1), 6 + b.u8(1)  # a be32 version follows the name
        if name == "configuration/target-page-bits":
            at += 4
        elif name == "configuration/uuid":
            at += 16
        elif name == "configuration/capabilities":
            count = b.u32(at)
            at += 4
            for _ in range(min(count, 256)):
                self._addresses |= b.string(at) == "x-ignore-shared"
                at += 1 + b.u8(at)
        else:
            raise self._fail(f"unknown part of the configuration {name!r}")
        b.need(at)
        b.head += at
        return Configuration(name)

    def _command(self) -> Event:
        event = super()._command()
        if isinstance(event, CommandReceived) and event.command == Command.PACKAGED:
            # What follows is decoded where it lies.
            self.package_end = self.buffer.offset + self._package_size
            self._parse = self._section  # type: ignore[assignment]
        return event

    def _begin_named(self, kind: Section) -> Event:
        b = self.buffer
        section_id, name = b.u32(1), b.string(5)
        at = 6 + b.u8(5)
        instance, _version = b.u32(at), b.u32(at + 4)
        if len(self._names) >= _MOST_SECTIONS:
            raise self._fail(f"more than {_MOST_SECTIONS} sections")
        b.head += at + 8
        self._names[section_id] = name
        self.instances[section_id] = name, instance
        return self._begun(kind, section_id)

    def _begin(self, kind: Section) -> Event:
        section_id = self.buffer.u32(1)
        if section_id not in self._names:
            raise self._fail(f"{kind.name} of section {section_id}, which was not started")
        self.buffer.head += 5
        return self._begun(kind, section_id)

    def _begun(self, kind: Section, section_id: int) -> Event:
        name = self._names[section_id]
        self._section_id = section_id
        self._scanned = 0
        if name != "ram":
            self._parse = self._device  # type: ignore[assignment]
        else:
            self._parse = self._ram_setup if kind == Section.START else self._pages  # type: ignore[assignment]
        return SectionBegins(kind, section_id, name)

    def _ram_setup(self) -> Event:
        """Read the blocks, and learn them; their page size comes only where it is uncommon."""
        b = self.buffer
        word = b.u64()
        if word & _FLAGS != RamFlag.MEM_SIZE:
            raise self._fail(f"RAM flags {word & _FLAGS:#x}, expected MEM_SIZE")
        left, at = word & ~_FLAGS, 8
        blocks = []
        while left > 0:
            name = b.string(at)
            at += 1 + b.u8(at)
            size = b.u64(at)
            at += 8
            page_size = TARGET_PAGE
            # It looks neither like a name, whose length is not 0, nor like the end's flag.
            follows = b.u64(at)
            if self._advised and not follows >> 56 and follows >= 2 * TARGET_PAGE:
                page_size = follows
                at += 8
            at += 8 * self._addresses
            if not name or not 0 < size <= left:
                raise self._fail(f"RAM block {name!r} of {size} bytes, {left} were left to name")
            left -= size
            blocks.append(BlockLayout(name, size, page_size))
            self._sizes[name] = size
        b.head += at
        self._parse = self._pages  # type: ignore[assignment]
        return RamSetup(tuple(blocks))

    def _pages(self) -> FileEvent:  # type: ignore[override]
        b = self.buffer
        word = b.u64()
        flags = word & _FLAGS
        if flags in (RamFlag.EOS, _MULTIFD_FLUSH):
            b.head += 8
            if flags == RamFlag.EOS:
                self._parse = self._footer
                return RamMark("eos")
            return RamMark("multifd_flush")
        if flags & (_XBZRLE | _COMPRESSED):
            return self._encoded(word - flags, flags)
        pages = self._records.next(self.most_pages)
        if pages is None:
            raise self._fail("a RAM section ends twice")
        self._block = pages.block
        return pages

    def _encoded(self, offset: int, flags: int) -> EncodedPage:
        """Step over a page that was sent compressed or as a difference."""
        b = self.buffer
        block, at = self._block, 8
        if not flags & _CONTINUE:
            block = b.string(8)
            at = 9 + b.u8(8)
        if block not in self._sizes or offset >= self._sizes[block]:
            raise self._fail(f"a page at {offset:#x} of RAM block {block!r}, which has no such")
        if flags & _XBZRLE:
            flag, length, at = "xbzrle", b.u16(at + 1), at + 3
        else:
            flag, length, at = "compressed", b.u32(at), at + 4
        if length > 2 * TARGET_PAGE:
            raise self._fail(f"a page encoded in {length} bytes")
        b.need(at + length)
        b.head += at + length
        self._block = block
        self._records.continue_in(block)
        return EncodedPage(block, offset, flag)

    def _device(self) -> DeviceBytes:  # type: ignore[override]
        """Take a device's state: all up to the footer that closes it."""
        b = self.buffer
        name = self._names[self._section_id]
        footer = _FOOTER.pack(Section.FOOTER, self._section_id)
        at = b.head + self._scanned
        while (at := b.data.find(footer, at, b.tail)) >= 0:
            if self._may_follow(at - b.head + len(footer)):
                n_bytes = at - b.head
                b.head = at
                self._parse = self._footer
                return DeviceBytes(name, n_bytes)
            at += 1
        waiting = b.tail - b.head
        if waiting > MAX_DEVICE:
            raise self._fail(f"device {name!r}: no footer within {MAX_DEVICE} bytes")
        self._scanned = max(0, waiting - len(footer))
        raise NeedMore

    def _may_follow(self, at: int) -> bool:
        """Return whether what lies behind a footer, ``at`` from the head, can follow a section."""
        b = self.buffer
        if b.offset + at == self.package_end or self._is_end(at):
            return True
        kind = b.u8(at)
        if kind == Section.EOF:
            found = self._is_end(at + 1) or b.u8(at + 1) == Section.VMDESCRIPTION
        elif kind in (Section.START, Section.FULL):
            name = b.bytes(b.u8(at + 5), at + 6)
            found = name.isascii() and name.decode().isprintable() and bool(name)
        elif kind in (Section.PART, Section.END):
            found = b.u32(at + 1) in self._names
        else:
            commands = Command.__members__.values()
            found = kind == Section.COMMAND and b.u16(at + 1) in commands and b.u16(at + 3) <= 512
        return found

    def _is_end(self, at: int) -> bool:
        """Return whether the file has nothing more, ``at`` from the head."""
        return self.at_end and self.buffer.head + at == self.buffer.tail

    def _description(self) -> Description:
        b = self.buffer
        length = b.u32(1)
        if length > MAX_DEVICE:
            raise self._fail(f"a description of {length} bytes, the limit is {MAX_DEVICE}")
        text = b.bytes(length, 5)
        try:
            sizes = dict(_device_sizes(json.loads(text)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._fail(f"the description of devices is malformed: {error!r}") from error
        b.head += 5 + length
        return Description(sizes)


def _device_sizes(described: dict[str, Any]) -> Iterator[tuple[tuple[str, int], int]]:
    """Yield what the description says of each device: its name, instance, size in bytes."""
    for device in described["devices"]:
        yield (str(device["name"]), int(device["instance_id"])), _fields_size(device)


def _fields_size(described: dict[str, Any]) -> int:
    """Return the bytes of all fields and subsections; a field of a struct includes the struct's."""
    size = 0
    for field in described.get("fields", ()):
        size += int(field["size"]) * int(field.get("array_len", 1))
    for part in described.get("subsections", ()):
        # Its type byte, the length of its name, the name, a be32 version.
        size += 6 + len(part["vmsd_name"]) + _fields_size(part)
    return size
