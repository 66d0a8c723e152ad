"""The received bitmap: how a destination tells, after a break, which pages it has.

On the return path it is ``be64 size``, one bit a *target* page in little-endian order, padded to
8 bytes, and ``be64 0x0123456789abcdef`` (QEMU's ``ramblock_recv_bitmap_send``). A host page that
is larger than a target page counts as received when all of its target pages are.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from migkit.errors import ProtocolError
from migkit.migration.wire import TARGET_PAGE, BlockLayout

Mask = npt.NDArray[np.bool_]

_U64 = struct.Struct(">Q")
_END = 0x0123456789ABCDEF
_PADDING = 8


def encoded_size(block: BlockLayout) -> int:
    """Return how many bytes follow a RECV_BITMAP message for a block."""
    return 2 * _U64.size + _bitmap_bytes(block)


def encode(received: Mask, block: BlockLayout) -> bytes:
    """Encode which host pages of a block were received, (n_pages,) bool."""
    bits = np.packbits(np.repeat(received, block.page_size // TARGET_PAGE), bitorder="little")
    size = _bitmap_bytes(block)
    return _U64.pack(size) + bits.tobytes().ljust(size, b"\0") + _U64.pack(_END)


def decode(data: bytes, block: BlockLayout) -> Mask:
    """Return which host pages were received; raises :class:`ProtocolError` for a wrong frame."""
    if len(data) != encoded_size(block):
        raise ProtocolError(
            f"{len(data)} bytes for the received bitmap of {block.name!r}, "
            f"expected {encoded_size(block)}"
        )
    size, expected = _U64.unpack_from(data)[0], _bitmap_bytes(block)
    if size != expected:
        raise ProtocolError(
            f"a received bitmap of {size} bytes for {block.name!r}, expected {expected}"
        )
    end = _U64.unpack_from(data, _U64.size + size)[0]
    if end != _END:
        raise ProtocolError(f"a received bitmap that ends in {end:#x}, expected {_END:#x}")
    bits = np.frombuffer(data, np.uint8, size, _U64.size)
    target = np.unpackbits(bits, count=block.size // TARGET_PAGE, bitorder="little")
    return np.asarray(target.reshape(-1, block.page_size // TARGET_PAGE).all(axis=1))


def as_text(bitmap: Mask, *, expected: bool = True, width: int = 64) -> str:
    """Print a bitmap for debugging, as QEMU's ``ram_debug_dump_bitmap`` does.

    A line a ``width`` pages: the first page's number, then ``1`` and ``.``; lines in which every
    page is as ``expected`` are left out.
    """
    lines = []
    for at in range(0, len(bitmap), width):
        row = bitmap[at : at + width]
        if (row != expected).any():
            lines.append(f"{at:#010x}: " + "".join(".1"[bit] for bit in row.tolist()))
    return "\n".join(lines)


def _bitmap_bytes(block: BlockLayout) -> int:
    bits = block.size // TARGET_PAGE
    return -(-bits // (8 * _PADDING)) * _PADDING
