"""What a guest is told at birth and what it hands over: two messages on an inherited socket."""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import asdict, dataclass, replace

from migkit.errors import MigrationError
from migkit.guest.spec import WorkloadSpec

_SIZES = struct.Struct("=II")  # bytes of JSON, bytes of code
_LIMIT = 64 << 20
_MAX_FDS = 8


@dataclass(frozen=True)
class GuestConfig:
    """What a guest is made of; ``rate`` in steps a second, 0 for unlimited."""

    spec: WorkloadSpec
    memory: int
    page_size: int
    rate: float = 0.0
    populate: bool = True
    block: str = "pc.ram"
    cpu: int | None = None
    lock: bool = False


@dataclass(frozen=True)
class GuestReady:
    """What a guest tells of itself; the descriptors travel beside it.

    They are, in this order: RAM, vCPU page, kick, ack, userfaultfd.
    """

    pid: int = 0
    address: int = 0
    user_mode_only: bool = False
    state_size: int = 0
    error: str = ""


def send_config(sock: socket.socket, config: GuestConfig) -> None:
    """Tell a guest what it is."""
    code = config.spec.code
    text = json.dumps(
        asdict(replace(config, spec=replace(config.spec, code=b""))), default=bytes.hex
    )
    sock.sendall(_SIZES.pack(len(text), len(code)) + text.encode() + code)


def receive_config(sock: socket.socket) -> GuestConfig:
    """Read what :func:`send_config` wrote."""
    text_size, code_size = _SIZES.unpack(_read(sock, _SIZES.size))
    fields = json.loads(_read(sock, text_size))
    code = _read(sock, code_size)
    spec = WorkloadSpec(**{**fields.pop("spec"), "code": code})
    return GuestConfig(spec=spec, **fields)


def send_ready(sock: socket.socket, ready: GuestReady, fds: list[int]) -> None:
    """Hand the guest's parts to the session."""
    socket.send_fds(sock, [json.dumps(asdict(ready)).encode()], fds)


def receive_ready(sock: socket.socket) -> tuple[GuestReady, list[int]]:
    """Read what :func:`send_ready` wrote; raises :class:`MigrationError` on an early end."""
    data, fds, _, _ = socket.recv_fds(sock, 65536, _MAX_FDS)
    if not data:
        raise MigrationError("the guest process ended before it was ready")
    return GuestReady(**json.loads(data)), fds


def _read(sock: socket.socket, size: int) -> bytes:
    if size > _LIMIT:
        raise MigrationError(f"a message of {size} bytes exceeds the limit of {_LIMIT}")
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise MigrationError("the session closed its end before the guest was configured")
        data += part
    return bytes(data)
