"""Reading the migration stream: bytes in, events out. No I/O happens here.

The caller receives into the decoder's buffer, reports how much came, and takes events until there
are none. How pages lie in it is the subject of :mod:`migkit.migration.records`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from migkit.errors import ProtocolError
from migkit.migration import wire
from migkit.migration.records import Buffer, NeedMore, PageRecords, Pages
from migkit.migration.wire import TARGET_PAGE, BlockLayout, Command, RamFlag, Section

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_FLAGS = TARGET_PAGE - 1


class Header(NamedTuple):
    """The stream began, with a version that we speak."""

    version: int


class Configuration(NamedTuple):
    """The machine type of the source."""

    machine: str


class CommandReceived(NamedTuple):
    """A command, its length checked; ``data`` is empty for a package."""

    command: Command
    data: bytes


class Packaged(NamedTuple):
    """A whole package; feed it to :meth:`StreamDecoder.nested`."""

    blob: bytes


class SectionBegins(NamedTuple):
    """A section of a device begins."""

    kind: Section
    section_id: int
    name: str


class SectionEnds(NamedTuple):
    """A section's footer was read."""

    section_id: int


class RamSetup(NamedTuple):
    """The source's RAM blocks."""

    blocks: tuple[BlockLayout, ...]


class DeviceState(NamedTuple):
    """The state of a device."""

    name: str
    data: bytes


class EndOfStream(NamedTuple):
    """The EOF byte: nothing follows."""


Event = (
    Header | Configuration | CommandReceived | Packaged | SectionBegins | SectionEnds
    | RamSetup | Pages | DeviceState | EndOfStream
)  # fmt: skip


class StreamDecoder:
    """Turns the bytes of the main channel into events."""

    def __init__(self, blocks: Mapping[str, BlockLayout], capacity: int = 4 << 20) -> None:
        """Know the destination's own blocks: which page sizes come depends on them."""
        self._blocks = blocks
        self.buffer = Buffer(capacity)
        self._records = PageRecords({n: b.size for n, b in blocks.items()}, self.buffer)
        self._names: dict[int, str] = {}
        self._advised = False
        self._parse = self._header
        self._section_id = 0
        self._within_package = False
        self._package = bytearray()
        self._package_size = 0
        self.most_pages = 64

    def continued(self) -> StreamDecoder:
        """Return a decoder for the channel that continues this stream after a break.

        It has no header: sections and commands go on, of devices that were started before.
        """
        other = StreamDecoder(self._blocks, len(self.buffer.data))
        other._names = self._names
        other._advised = self._advised
        other._parse = other._section
        return other

    @classmethod
    def in_postcopy(cls, blocks: Mapping[str, BlockLayout]) -> StreamDecoder:
        """Return a decoder for the rest of a stream of ours that another one has begun to read."""
        decoder = cls(blocks)
        decoder._names = {wire.RAM_SECTION: "ram"}
        decoder._advised = True
        return decoder.continued()

    def next(self) -> Event | None:
        """Return the next event, None when more bytes are needed.

        Raises :class:`ProtocolError` that names the offset, what was expected and what came.
        """
        try:
            return self._parse()
        except NeedMore:
            return None

    def nested(self, blob: bytes) -> Iterator[Event]:
        """Return the events of a package; raises :class:`ProtocolError` if it ends within one."""
        inner = StreamDecoder(self._blocks, len(blob))
        inner._names = self._names
        inner._within_package = True
        inner._parse = inner._section
        inner.buffer.base = self.buffer.offset - len(blob)  # it has just been read
        inner.buffer.view[:] = blob
        inner.buffer.tail = len(blob)
        while inner.buffer.head < len(blob) or inner._parse != inner._section:
            event = inner.next()
            if event is None:
                raise inner._fail(f"a package of {len(blob)} bytes ends within a section")
            yield event

    def _fail(self, message: str) -> ProtocolError:
        return ProtocolError(f"stream at {self.buffer.offset}: {message}")

    def _header(self) -> Event:
        b = self.buffer
        magic, version = b.u32(), b.u32(4)
        if magic != wire.MAGIC:
            raise self._fail(f"magic {magic:#x}, expected {wire.MAGIC:#x}: no migration stream")
        if version != wire.VERSION:
            raise self._fail(f"protocol version {version}, we speak {wire.VERSION}")
        b.head += 8
        self._parse = self._section
        return Header(version)

    def _section(self) -> Event:
        kind = self.buffer.u8()
        match kind:
            case Section.COMMAND:
                return self._command()
            case Section.START | Section.FULL:
                return self._begin_named(Section(kind))
            case Section.PART | Section.END:
                return self._begin(Section(kind))
            case Section.CONFIGURATION:
                return self._configuration()
            case Section.EOF:
                self.buffer.head += 1
                return EndOfStream()
        raise self._fail(f"section type {kind:#x}; a footer was missing or bytes were lost")

    def _configuration(self) -> Event:
        b = self.buffer
        length = b.u32(1)
        if length > 255:
            raise self._fail(f"a machine type of {length} bytes, the limit is 255")
        machine = b.bytes(length, 5).decode(errors="replace")
        b.head += 5 + length
        return Configuration(machine)

    def _command(self) -> Event:
        b = self.buffer
        number, length = b.u16(1), b.u16(3)
        try:
            kind = Command(number)
        except ValueError:
            raise self._fail(f"unknown command {number:#x}") from None
        expected = wire.COMMAND_LENGTHS.get(kind)
        if expected is not None and length != expected:
            raise self._fail(f"{kind.name} with {length} bytes of data, expected {expected}")
        if length > 512:
            raise self._fail(f"{kind.name} with {length} bytes of data, the limit is 512")
        data = b.bytes(length, 5)
        if kind == Command.PACKAGED:
            if self._within_package:
                raise self._fail("a package within a package")
            size = int(_U32.unpack(data)[0])
            if size > wire.MAX_PACKAGED:
                raise self._fail(f"a package of {size} bytes, the limit is {wire.MAX_PACKAGED}")
            self._package, self._package_size = bytearray(), size
            self._parse = self._packaged
        self._advised |= kind == Command.POSTCOPY_ADVISE
        b.head += 5 + length
        return CommandReceived(kind, data)

    def _packaged(self) -> Event:
        """Collect a package as it comes: memory grows with what was sent, not what was claimed."""
        b = self.buffer
        take = min(self._package_size - len(self._package), b.tail - b.head)
        self._package += b.view[b.head : b.head + take]
        b.head += take
        if len(self._package) < self._package_size:
            raise NeedMore
        self._parse = self._section
        return Packaged(bytes(self._package))

    def _begin_named(self, kind: Section) -> Event:
        b = self.buffer
        section_id, name = b.u32(1), b.string(5)
        at = 6 + b.u8(5)
        instance, version = b.u32(at), b.u32(at + 4)
        expected = {"ram": (Section.START, wire.RAM_VERSION), "cpu": (Section.FULL, 1)}
        if name not in expected or instance != 0:
            raise self._fail(f"device {name!r} instance {instance}; we have ram and cpu")
        if (kind, version) != expected[name]:
            raise self._fail(
                f"device {name!r} comes as {kind.name} version {version}, expected "
                f"{expected[name][0].name} version {expected[name][1]}"
            )
        b.head += at + 8
        self._names[section_id] = name
        self._section_id = section_id
        self._parse = self._ram_setup if name == "ram" else self._device
        return SectionBegins(kind, section_id, name)

    def _begin(self, kind: Section) -> Event:
        section_id = self.buffer.u32(1)
        if self._names.get(section_id) != "ram":
            raise self._fail(f"{kind.name} of section {section_id}, which was not started")
        self.buffer.head += 5
        self._section_id = section_id
        self._parse = self._pages
        return SectionBegins(kind, section_id, "ram")

    def _ram_setup(self) -> Event:
        b = self.buffer
        word = b.u64()
        if word & _FLAGS != RamFlag.MEM_SIZE:
            raise self._fail(f"RAM flags {word & _FLAGS:#x}, expected MEM_SIZE")
        total, at = word & ~_FLAGS, 8
        blocks: list[BlockLayout] = []
        while total > 0:
            name = b.string(at)
            at += 1 + b.u8(at)
            size = b.u64(at)
            at += 8
            # Without post-copy the source does not tell its page size: either will do.
            local = self._blocks.get(name)
            page_size = local.page_size if local else TARGET_PAGE
            if self._advised and page_size != TARGET_PAGE:
                page_size = b.u64(at)
                at += 8
            if not 0 < size <= total:
                raise self._fail(f"RAM block {name!r} of {size} bytes, {total} were left to name")
            if len(blocks) == wire.MAX_BLOCKS:
                raise self._fail(f"more than {wire.MAX_BLOCKS} RAM blocks")
            total -= size
            blocks.append(BlockLayout(name, size, page_size))
        if b.u64(at) != RamFlag.EOS:
            raise self._fail("the list of RAM blocks does not end with EOS")
        b.head += at + 8
        self._parse = self._footer
        return RamSetup(tuple(blocks))

    def _pages(self) -> Event:
        pages = self._records.next(self.most_pages)
        if pages is not None:
            return pages
        self._parse = self._footer
        return self._footer()

    def _device(self) -> Event:
        b = self.buffer
        length = b.u32()
        if length > wire.MAX_DEVICE:
            raise self._fail(f"a CPU state of {length} bytes, the limit is {wire.MAX_DEVICE}")
        data = b.bytes(length, 4)
        b.head += 4 + length
        self._parse = self._footer
        return DeviceState(self._names[self._section_id], data)

    def _footer(self) -> Event:
        b = self.buffer
        kind, section_id = b.u8(), b.u32(1)
        if (kind, section_id) != (Section.FOOTER, self._section_id):
            raise self._fail(
                f"{kind:#x} {section_id}, expected the footer of section {self._section_id}"
            )
        b.head += 5
        self._parse = self._section
        return SectionEnds(section_id)
