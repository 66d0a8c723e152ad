"""Page records: guest memory on the wire, in RAM sections and on the preempt channel. No I/O.

A decoder owns the buffer that its channel is received into, and hands pages out as views of it:
they are valid until the next call of :meth:`Buffer.room`. Each channel has a decoder of its own,
so a batch of one is never overwritten by another.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from migkit.errors import ProtocolError
from migkit.migration import wire
from migkit.migration.wire import TARGET_PAGE, BlockLayout, RamFlag

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
RECORD_BYTES = wire.PAGE_RECORD.itemsize
_FLAGS = TARGET_PAGE - 1
# Plain numbers: this is the path of every page, and an enum's operators cost a microsecond.
_PAGE, _ZERO, _EOS = int(RamFlag.PAGE), int(RamFlag.ZERO), int(RamFlag.EOS)
_PAGE_AGAIN = int(RamFlag.PAGE | RamFlag.CONTINUE)
_ZERO_AGAIN = int(RamFlag.ZERO | RamFlag.CONTINUE)


class Pages(NamedTuple):
    """A batch of page records of one block.

    ``offsets`` (n,) are bytes into the block, int64. ``address`` is that of the first page's
    first byte, 0 for zero pages; the next page lies :data:`RECORD_BYTES` further.
    """

    block: str
    offsets: npt.NDArray[np.int64]
    address: int
    view: memoryview
    start: int

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """The pages' bytes, (n, 4096) uint8, where they were received."""
        shape = (len(self.offsets), TARGET_PAGE)
        return np.ndarray(shape, np.uint8, self.view, self.start, (RECORD_BYTES, 1))


class Page(NamedTuple):
    """A lone page record with data, as requested pages come; the block is the last one named."""

    offset: int
    address: int


class NeedMore(Exception):  # noqa: N818 — control flow between the decoders, never seen outside
    """The buffer ends inside what is being read."""


class Buffer:
    """Received bytes that wait to be decoded, with their place in the stream."""

    def __init__(self, capacity: int) -> None:
        """Allocate ``capacity`` bytes, once."""
        self.data = bytearray(capacity)
        self.view = memoryview(self.data)
        self.address = int(np.frombuffer(self.data, np.uint8).ctypes.data)
        self.head = 0
        self.tail = 0
        self.base = 0  # stream offset of view[0]

    @property
    def offset(self) -> int:
        """The stream offset of what is read next."""
        return self.base + self.head

    def room(self, limit: int) -> memoryview:
        """Return where up to ``limit`` bytes may be received; makes room by moving what waits."""
        if self.head == self.tail:
            self.base += self.head
            self.head = self.tail = 0
        elif len(self.view) - self.tail < limit:
            waiting = self.tail - self.head
            self.view[:waiting] = self.view[self.head : self.tail]
            self.base += self.head
            self.head, self.tail = 0, waiting
        return self.view[self.tail : self.tail + limit]

    def need(self, n: int, at: int = 0) -> int:
        """Return where ``n`` bytes lie, ``at`` behind the head; raise NeedMore if they do not."""
        start = self.head + at
        if start + n > self.tail:
            raise NeedMore
        return start

    def u8(self, at: int = 0) -> int:
        """Return the byte at a place behind the head."""
        return self.data[self.need(1, at)]

    def u16(self, at: int = 0) -> int:
        """Return the be16 at a place behind the head."""
        return int(_U16.unpack_from(self.data, self.need(2, at))[0])

    def u32(self, at: int = 0) -> int:
        """Return the be32 at a place behind the head."""
        return int(_U32.unpack_from(self.data, self.need(4, at))[0])

    def u64(self, at: int = 0) -> int:
        """Return the be64 at a place behind the head."""
        return int(_U64.unpack_from(self.data, self.need(8, at))[0])

    def bytes(self, n: int, at: int = 0) -> bytes:
        """Return ``n`` bytes at a place behind the head."""
        start = self.need(n, at)
        return bytes(self.view[start : start + n])

    def string(self, at: int = 0) -> str:
        """Return the short string at a place; it takes 1 + its length in bytes."""
        return self.bytes(self.u8(at), at + 1).decode(errors="replace")


class PageRecords:
    """Reads page records: those within a RAM section, or a preempt channel, which has no others."""

    def __init__(self, sizes: Mapping[str, int], buffer: Buffer) -> None:
        """Know the blocks' sizes in bytes, to refuse what lies outside."""
        self._sizes = sizes
        self._buffer = buffer
        self._block = ""
        self._limit = 0  # the highest offset in that block

    def next(self, most: int) -> Pages | None:
        """Return the next batch of at most ``most`` pages, None at the end of a section.

        Raises :class:`ProtocolError` for unknown flags, blocks or offsets.
        """
        b = self._buffer
        word = b.u64()
        flags = word & _FLAGS
        if flags == _PAGE_AGAIN and self._block:
            if b.tail - b.head < 2 * RECORD_BYTES:
                return self._one(word - flags)
            return self._batch(flags, most)
        if flags == _ZERO_AGAIN and self._block:
            return self._batch(flags, most)
        if flags == _EOS:
            b.head += 8
            return None
        if flags in (_PAGE, _ZERO):
            return self._first(word - flags, flags)
        raise ProtocolError(
            f"stream at {b.offset}: page flags {flags:#x}; expected PAGE, ZERO or EOS"
            + ("" if self._block else ", with a block name first")
        )

    def continue_in(self, block: str) -> None:
        """Take records without a name to be of a block, which a record of another kind named."""
        self._block, self._limit = block, self._sizes[block] - TARGET_PAGE

    def lone(self) -> Page | None:
        """Return the one record that the buffer holds, if it is one of data for a known block.

        The shortest way: a guest waits for this page.
        """
        b = self._buffer
        word = _U64.unpack_from(b.data, b.head)[0]
        if word & _FLAGS != _PAGE_AGAIN or not self._block or word > self._limit + _PAGE_AGAIN:
            return None
        start = b.head + 8
        b.head = b.tail
        return Page(word - _PAGE_AGAIN, b.address + start)

    def _one(self, offset: int) -> Pages:
        """Read a lone record, as requested pages come: without numpy's cost per array."""
        b = self._buffer
        start = b.need(TARGET_PAGE, 8)
        if offset > self._limit:
            raise self._outside(offset)
        b.head = start + TARGET_PAGE
        return Pages(self._block, np.array((offset,)), b.address + start, b.view, start)

    def _first(self, offset: int, flags: int) -> Pages:
        """Read a record that names its block."""
        b = self._buffer
        name = b.string(8)
        if name not in self._sizes:
            raise ProtocolError(
                f"stream at {b.offset}: RAM block {name!r}, we have {', '.join(self._sizes)}"
            )
        start = b.need(TARGET_PAGE if flags == _PAGE else 1, 9 + b.u8(8))
        self._block, self._limit = name, self._sizes[name] - TARGET_PAGE
        if offset > self._limit:
            raise self._outside(offset)
        offsets = np.array((offset,), np.int64)
        if flags == _ZERO:
            self._check_fill(b.view[start : start + 1])
            b.head = start + 1
            return Pages(name, offsets, 0, b.view, 0)
        b.head = start + TARGET_PAGE
        return Pages(name, offsets, b.address + start, b.view, start)

    def _batch(self, flags: int, most: int) -> Pages:
        """Read all that follow in a row with the same flags."""
        b = self._buffer
        dtype = wire.PAGE_RECORD if flags == _PAGE_AGAIN else wire.ZERO_RECORD
        count = min((b.tail - b.head) // dtype.itemsize, most)
        if count == 0:
            raise NeedMore
        records = np.frombuffer(b.view, dtype, count, b.head)
        words = records["header"].astype(np.uint64)
        same = (words & _FLAGS) == flags
        if not same.all():
            count = int(same.argmin())
            words, records = words[:count], records[:count]
        offsets = words - flags
        highest = int(offsets.max())
        if highest > self._limit:
            raise self._outside(highest)
        start = b.head + 8
        if flags == _ZERO_AGAIN:
            self._check_fill(memoryview(records["fill"].tobytes()))
        b.head += count * dtype.itemsize
        address = 0 if flags == _ZERO_AGAIN else b.address + start
        return Pages(self._block, offsets.astype(np.int64), address, b.view, start)

    def _outside(self, offset: int) -> ProtocolError:
        return ProtocolError(
            f"stream at {self._buffer.offset}: offset {offset:#x} in RAM block {self._block!r}, "
            f"which has {self._sizes[self._block]:#x} bytes"
        )

    def _check_fill(self, fill: memoryview) -> None:
        if any(fill):
            raise ProtocolError(
                f"stream at {self._buffer.offset}: a ZERO page filled with {max(fill):#x}, "
                "expected 0"
            )


class PreemptDecoder:
    """Turns the bytes of the preempt channel into pages; it carries nothing else."""

    def __init__(self, blocks: Mapping[str, BlockLayout], capacity: int = 256 << 10) -> None:
        """Know the destination's own blocks."""
        self.ended = False  # EOS was read: all requested pages have come
        self._small = all(b.page_size == TARGET_PAGE for b in blocks.values())
        self.buffer = Buffer(capacity)
        self._records = PageRecords({n: b.size for n, b in blocks.items()}, self.buffer)

    def next(self) -> Page | Pages | None:
        """Return the next page or batch, None when more bytes are needed or :attr:`ended`."""
        if self._small and self.buffer.tail - self.buffer.head == RECORD_BYTES:
            page = self._records.lone()
            if page:
                return page
        try:
            pages = self._records.next(64)
        except NeedMore:
            return None
        self.ended |= pages is None
        return pages
