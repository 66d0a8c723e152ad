"""An engine as the session holds it: its process, its control socket, what it shares."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

from migkit.errors import MigrationError
from migkit.guest.handle import GuestProcess
from migkit.kernel.process import Child
from migkit.migration.control import ControlSocket
from migkit.migration.options import Options
from migkit.migration.stats import Counters
from migkit.trace.drain import Drain, create_buffer, map_buffer

_START_TIMEOUT_S = 60.0
_ANSWER_TIMEOUT_S = 30.0


class EngineProcess:
    """A source or a destination, alive from here to :meth:`close`."""

    def __init__(
        self, role: str, log: Path, on_event: Callable[[str, dict[str, Any]], None]
    ) -> None:
        """Start the process. ``on_event(role, message)`` gets its events, from :meth:`read`."""
        self.role = role
        self._on_event = on_event
        outer, inner = socket.socketpair()
        self._lifeline, inner_lifeline = socket.socketpair()
        with inner, inner_lifeline:
            fds = [inner.fileno(), inner_lifeline.fileno()]
            self.child = Child("migkit.migration", [role, *map(str, fds)], fds, log)
        self.control = ControlSocket(outer)
        self.counters = Counters.create()
        self._trace_fd = create_buffer(name=f"migkit-trace-{role}")
        self._drain: Drain | None = None
        self._draining = threading.Lock()  # the reading thread drains, whoever quits does so last
        self._answers: dict[int, dict[str, Any]] = {}
        self._next_id = 0
        self._changed = threading.Condition()
        self.ready = False
        self.gone = False

    def attach(
        self,
        guest: GuestProcess,
        identity: str,
        options: Options,
        events: Collection[str],
        file: BinaryIO,
    ) -> None:
        """Give the engine its guest; its trace goes to ``file``."""
        self._drain = Drain(map_buffer(self._trace_fd), file)
        config = {
            "pid": guest.pid,
            "address": guest.info.address,
            "identity": identity,
            "state_size": guest.info.state_size,
            "block": guest.ram.name,
            "memory": guest.ram.size,
            "page_size": guest.ram.page_size,
            "options": options.as_dict(),
            "events": sorted(events),
        }
        fds = [*guest.fds, self._trace_fd, self.counters.fd]
        socket.send_fds(self.control.sock, [json.dumps(config).encode()], fds)
        self.await_(lambda: self.ready, "readiness", _START_TIMEOUT_S)

    def execute(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Have a command carried out; raises :class:`MigrationError` with the engine's reason."""
        with self._changed:
            self._next_id += 1
            number = self._next_id
        try:
            self.control.send({"execute": command, "arguments": arguments, "id": number})
        except OSError as error:
            raise MigrationError(f"the {self.role} process is gone: {self._why()}") from error
        self.await_(lambda: number in self._answers, f"an answer to {command}", _ANSWER_TIMEOUT_S)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise MigrationError(f"{command}: {answer['error'].get('desc')}")
        result: dict[str, Any] = answer.get("return", {})
        return result

    def await_(self, happened: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Wait until the reading thread has seen something."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not happened():
                left = deadline - time.monotonic()
                if self.gone:
                    raise MigrationError(f"the {self.role} process died: {self._why()}")
                if left <= 0:
                    raise MigrationError(f"{what} of the {self.role} did not come in {timeout_s} s")
                self._changed.wait(min(left, 0.5))

    def read(self) -> None:
        """Take what the engine sent; called by the session's one reading thread."""
        messages = self.control.receive()
        with self._changed:
            if messages is None:
                self.gone = True
            for message in messages or []:
                if message.get("event") == "READY":
                    self.ready = True
                elif "event" in message:
                    self._on_event(self.role, message)
                elif isinstance(message.get("id"), int):
                    self._answers[message["id"]] = message
            self._changed.notify_all()

    def drain(self) -> None:
        """Save what the engine has traced since the last time."""
        with self._draining:
            if self._drain:
                self._drain.pump()

    def quit(self) -> None:
        """Let the engine end, by force if it must be, and save the rest of its trace."""
        if self._drain is None and self.child.pidfd < 0:
            return
        if not self.gone:
            try:
                self.control.send({"execute": "quit"})
                self.child.wait(5.0)
            except OSError:
                pass
        self.child.kill()
        with self._draining:
            if self._drain:
                self._drain.close()
                self._drain = None

    def close(self) -> None:
        """Quit and close everything."""
        self.quit()
        self.gone = True
        self.control.sock.close()
        self._lifeline.close()
        if self._trace_fd >= 0:
            self.counters.close()
            os.close(self._trace_fd)
            self._trace_fd = -1

    def _why(self) -> str:
        words = self.child.last_words()
        code = self.child.exit_code
        return words or ("it still runs" if code is None else f"exit code {code}")
