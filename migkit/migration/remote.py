"""A process that the session steers: its control socket, its lifeline, what it shares."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from migkit.errors import MigrationError
from migkit.guest.handle import GuestProcess
from migkit.kernel.process import Child
from migkit.migration.control import ControlSocket
from migkit.migration.options import Options
from migkit.migration.pagemap import PageMap
from migkit.migration.stats import Counters
from migkit.trace.drain import Drain, create_buffer, map_buffer

_START_TIMEOUT_S = 60.0
_ANSWER_TIMEOUT_S = 30.0


class Remote:
    """A child process with a control socket, alive from here to :meth:`close`.

    It is started as ``python -m MODULE ARGUMENTS... CONTROL LIFELINE``, the last two being
    descriptors: when the session is gone, so is the other end of the lifeline.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        log: Path,
        on_event: Callable[[str, dict[str, Any]], None],
    ) -> None:
        """Start the process. ``on_event(name, message)`` gets its events, from :meth:`read`."""
        self.name = name
        self._command = module, arguments, log
        self._on_event = on_event
        self._changed = threading.Condition()
        self._next_id = 0
        self._launch()

    def _launch(self) -> None:
        module, arguments, log = self._command
        outer, inner = socket.socketpair()
        self._lifeline, inner_lifeline = socket.socketpair()
        with inner, inner_lifeline:
            fds = [inner.fileno(), inner_lifeline.fileno()]
            self.child = Child(module, [*arguments, *map(str, fds)], fds, log)
        self.control = ControlSocket(outer)
        self._answers: dict[int, dict[str, Any]] = {}
        self._ready = False
        self.gone = False

    def await_ready(self) -> None:
        """Wait until the process says that it stands ready."""
        self._await(lambda: self._ready, "readiness", _START_TIMEOUT_S)

    def execute(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Have a command carried out; raises :class:`MigrationError` with the reason given."""
        with self._changed:
            self._next_id += 1
            number = self._next_id
        try:
            self.control.send({"execute": command, "arguments": arguments, "id": number})
        except OSError as error:
            raise MigrationError(f"the {self.name} process is gone: {self.last_words()}") from error
        self._await(lambda: number in self._answers, f"an answer to {command}", _ANSWER_TIMEOUT_S)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise MigrationError(f"{command}: {answer['error'].get('desc')}")
        result: dict[str, Any] = answer.get("return", {})
        return result

    def tell(self, command: str) -> None:
        """Have a command carried out, if it can be, and do not wait for the answer."""
        with contextlib.suppress(OSError):
            self.control.send({"execute": command})

    def _await(self, happened: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Wait until the reading thread has seen something."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not happened():
                left = deadline - time.monotonic()
                if self.gone:
                    raise MigrationError(f"the {self.name} process died: {self.last_words()}")
                if left <= 0:
                    raise MigrationError(f"{what} of the {self.name} did not come in {timeout_s} s")
                self._changed.wait(min(left, 0.5))

    def read(self) -> None:
        """Take what the process sent; called by the session's one reading thread."""
        messages = self.control.receive()
        with self._changed:
            if messages is None:
                self.gone = True
            for message in messages or []:
                if message.get("event") == "READY":
                    self._ready = True
                elif "event" in message:
                    self._on_event(self.name, message)
                elif isinstance(message.get("id"), int):
                    self._answers[message["id"]] = message
            self._changed.notify_all()

    def quit(self) -> None:
        """Let the process end, by force if it must be."""
        if not self.gone and self.child.pidfd >= 0:
            with contextlib.suppress(OSError):
                self.control.send({"execute": "quit"})
                self.child.wait(5.0)
        self.child.kill()

    def close(self) -> None:
        """Quit and close the sockets."""
        self.quit()
        self.gone = True
        self._close_sockets()

    def _close_sockets(self) -> None:
        self.control.sock.close()
        self._lifeline.close()

    def last_words(self) -> str:
        """Say what is known of its end."""
        words = self.child.last_words()
        code = self.child.exit_code
        return words or ("it still runs" if code is None else f"exit code {code}")


class EngineProcess(Remote):
    """A source or a destination, with the trace and the counters that it shares with us."""

    def __init__(
        self,
        role: str,
        n_pages: int,
        log: Path,
        on_event: Callable[[str, dict[str, Any]], None],
    ) -> None:
        """Start the process; :meth:`attach` makes it an engine for a guest of ``n_pages``."""
        self.counters = Counters.create()
        self.pages = PageMap.create(n_pages)
        self._trace_fd = create_buffer(name=f"migkit-trace-{role}")
        self._drain: Drain | None = None
        self._draining = threading.Lock()  # the reading thread drains, whoever quits does so last
        super().__init__(role, "migkit.migration", [role], log, on_event)

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
        self._config = {
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
        self._guest = guest
        self._send_config(0)

    def restart(self, paused_ns: int) -> None:
        """Put a new process in the place of one that died in post-copy, its migration paused.

        It goes on with the same guest, the same trace, the same counters and page map.
        """
        self.child.kill()
        self._close_sockets()
        self._launch()
        self._send_config(paused_ns)

    def _send_config(self, paused_ns: int) -> None:
        fds = [*self._guest.fds, self._trace_fd, self.counters.fd, self.pages.fd]
        config = json.dumps({**self._config, "paused_ns": paused_ns})
        socket.send_fds(self.control.sock, [config.encode()], fds)
        self.await_ready()

    def drain(self) -> None:
        """Save what the engine has traced since the last time."""
        with self._draining:
            if self._drain:
                self._drain.pump()

    def quit(self) -> None:
        """Let the engine end, by force if it must be, and save the rest of its trace."""
        super().quit()
        with self._draining:
            drain, self._drain = self._drain, None
            if drain:
                drain.close()

    def close(self) -> None:
        """Quit and close everything."""
        super().close()
        if self._trace_fd >= 0:
            self.counters.close()
            self.pages.close()
            os.close(self._trace_fd)
            self._trace_fd = -1
