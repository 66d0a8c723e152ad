"""The return path: what the destination tells the source, as bytes. No I/O happens here."""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from typing import NamedTuple

from migkit.errors import ProtocolError
from migkit.migration.wire import short_string

MAX_MESSAGE = 512
RESUME_ACK_VALUE = 1  # qemu: MIGRATION_RESUME_ACK_VALUE
_HEAD = struct.Struct(">HH")
_U32 = struct.Struct(">I")
_PAGES = struct.Struct(">QI")


class Message(enum.IntEnum):
    """``MIG_RP_MSG_*``."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


class Value(NamedTuple):
    """A message that carries one number: SHUT (0: all well), PONG, RESUME_ACK."""

    kind: Message
    value: int


class PageRequest(NamedTuple):
    """A request for missing pages: a RAM block, an offset and a length in bytes."""

    block: str
    start: int
    length: int


class Bitmap(NamedTuple):
    """A received bitmap, raw: see :mod:`migkit.migration.bitmap`."""

    block: str
    data: bytes


_WHOLE_REQUEST = struct.Struct(">HHQI")
_REQUEST = _HEAD.pack(Message.REQ_PAGES, _PAGES.size)
_REQ_PAGES = int(Message.REQ_PAGES)

Incoming = Value | PageRequest | Bitmap


def shut(error: int) -> bytes:
    """Encode SHUT, the last message: 0 when all went well."""
    return _HEAD.pack(Message.SHUT, 4) + _U32.pack(error)


def pong(value: int) -> bytes:
    """Encode the answer to a PING."""
    return _HEAD.pack(Message.PONG, 4) + _U32.pack(value)


def resume_ack() -> bytes:
    """Encode RESUME_ACK: the destination is ready to go on after a break."""
    return _HEAD.pack(Message.RESUME_ACK, 4) + _U32.pack(RESUME_ACK_VALUE)


def switchover_ack() -> bytes:
    """Encode SWITCHOVER_ACK: from the destination's side the guest may be switched over."""
    return _HEAD.pack(Message.SWITCHOVER_ACK, 0)


def received_bitmap(block: str, raw: bytes) -> bytes:
    """Encode RECV_BITMAP with the raw bitmap behind it."""
    data = short_string(block)
    return _HEAD.pack(Message.RECV_BITMAP, len(data)) + data + raw


def request_pages(start: int, length: int, block: str | None) -> bytes:
    """Encode a request; with ``block`` None it is for the block of the last one."""
    if block is None:
        return _WHOLE_REQUEST.pack(_REQ_PAGES, _PAGES.size, start, length)
    data = _PAGES.pack(start, length) + short_string(block)
    return _HEAD.pack(Message.REQ_PAGES_ID, len(data)) + data


class ReturnPathDecoder:
    """Turns bytes from the destination into messages, however they were cut."""

    def __init__(self, bitmap_bytes: Mapping[str, int] | None = None) -> None:
        """Begin at the start of a return path.

        ``bitmap_bytes`` says how many raw bytes follow a RECV_BITMAP for each RAM block.
        """
        self._bitmap_bytes = bitmap_bytes or {}
        self._data = bytearray()
        self._offset = 0
        self._block = ""

    def feed(self, data: bytes) -> list[Incoming]:
        """Return the messages that are complete now.

        Raises :class:`ProtocolError` for a type or a length that the protocol does not have.
        """
        if len(data) == _WHOLE_REQUEST.size and not self._data and data.startswith(_REQUEST):
            # What comes while the guest faults, one at a time and waited for.
            self._offset += len(data)
            _, _, start, length = _WHOLE_REQUEST.unpack(data)
            return [PageRequest(self._block, start, length)]
        self._data += data
        messages: list[Incoming] = []
        at = 0
        while len(self._data) - at >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._data, at)
            if length > MAX_MESSAGE:
                raise ProtocolError(
                    f"return path at {self._offset + at}: a message of {length} bytes, "
                    f"the limit is {MAX_MESSAGE}"
                )
            end = at + _HEAD.size + length
            if len(self._data) < end:
                break
            message = self._decode(
                kind, bytes(self._data[at + _HEAD.size : end]), self._offset + at
            )
            if isinstance(message, Bitmap):
                begin, end = end, end + self._bitmap_bytes[message.block]
                if len(self._data) < end:
                    break
                message = Bitmap(message.block, bytes(self._data[begin:end]))
            messages.append(message)
            at = end
        del self._data[:at]
        self._offset += at
        return messages

    def _decode(self, kind: int, body: bytes, offset: int) -> Incoming:
        match kind:
            case Message.SHUT | Message.PONG | Message.RESUME_ACK if len(body) == 4:
                return Value(Message(kind), _U32.unpack(body)[0])
            case Message.REQ_PAGES if len(body) == _PAGES.size:
                return PageRequest(self._block, *_PAGES.unpack(body))
            case Message.REQ_PAGES_ID if body[12:13] and len(body) == _PAGES.size + 1 + body[12]:
                self._block = body[13:].decode(errors="replace")
                return PageRequest(self._block, *_PAGES.unpack_from(body))
            case Message.RECV_BITMAP if body and len(body) == 1 + body[0]:
                block = body[1:].decode(errors="replace")
                if block not in self._bitmap_bytes:
                    raise ProtocolError(
                        f"return path at {offset}: a bitmap of RAM block {block!r}, "
                        f"expected one of {', '.join(self._bitmap_bytes) or 'none'}"
                    )
                return Bitmap(block, b"")
            case Message.SWITCHOVER_ACK if not body:
                return Value(Message.SWITCHOVER_ACK, 0)
        raise ProtocolError(
            f"return path at {offset}: message type {kind} of {len(body)} bytes is none of "
            + ", ".join(f"{m.name} {m.value}" for m in Message)
        )
