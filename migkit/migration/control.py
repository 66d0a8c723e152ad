"""The control socket: the session steers an engine by JSON lines, in the manner of QMP.

``{"execute": "migrate", "arguments": {...}, "id": 1}`` is answered by ``{"return": {}, "id": 1}``
or ``{"error": {"class": ..., "desc": ...}, "id": 1}``; in between come
``{"event": "MIGRATION", "data": {"status": "active"}, "ts_ns": ...}``.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from migkit.errors import MigkitError, MigrationError, ProtocolError

MAX_LINE = 1 << 20


def event_message(name: str, **data: Any) -> dict[str, Any]:
    """Return an event that happens now; it may be sent later."""
    return {"event": name, "data": data, "ts_ns": time.monotonic_ns()}


class ControlSocket:
    """One end of a control socket: whole messages out, whole messages in."""

    def __init__(self, sock: socket.socket) -> None:
        """Speak over a connected stream socket."""
        self.sock = sock
        self._data = bytearray()

    def fileno(self) -> int:
        """Return the descriptor, for poll."""
        return self.sock.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; the socket is blocking or has room, messages are small."""
        self.sock.sendall(json.dumps(message).encode() + b"\n")

    def event(self, name: str, **data: Any) -> None:
        """Send an event."""
        self.send(event_message(name, **data))

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that have come, None when the peer is gone.

        Raises :class:`ProtocolError` for what is no JSON object or longer than a line may be.
        """
        try:
            data = self.sock.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except ConnectionError:
            return None
        if not data:
            return None
        self._data += data
        if len(self._data) > MAX_LINE:
            raise ProtocolError(f"a control message of more than {MAX_LINE} bytes")
        *lines, rest = self._data.split(b"\n")
        self._data = bytearray(rest)
        return [self._parse(bytes(line)) for line in lines if line.strip()]

    @staticmethod
    def _parse(line: bytes) -> dict[str, Any]:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"control: {line[:60]!r} is no JSON: {error}") from error
        if not isinstance(message, dict):
            raise ProtocolError(f"control: {line[:60]!r} is no JSON object")
        return message


def obey(
    control: ControlSocket,
    commands: Mapping[str, Callable[..., object]],
    message: Mapping[str, Any],
) -> None:
    """Carry out the command that came in a message, and answer it."""
    name, answer = str(message.get("execute")), {"id": message.get("id")}
    try:
        if name not in commands:
            raise MigrationError(f"unknown command {name!r}")
        result = commands[name](**message.get("arguments", {}))
    except (MigkitError, TypeError) as error:
        control.send({"error": {"class": type(error).__name__, "desc": str(error)}, **answer})
    else:
        control.send({"return": result if result is not None else {}, **answer})
