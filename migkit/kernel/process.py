"""Child processes: started by exec in a session of their own, watched by pidfd, always reaped."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# One thread each: numpy's BLAS would start a pool that a guest or an engine never uses.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Child:
    """A running ``python -m module`` with inherited descriptors; its stderr goes to a file."""

    def __init__(
        self, module: str, arguments: Sequence[str], fds: Sequence[int], log: Path
    ) -> None:
        """Start it. The descriptors keep their numbers in the child."""
        self.name = module
        self.log = log
        # The child must find what this process found, also from a notebook's folder.
        path = os.pathsep.join(p for p in sys.path if p)
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
            )
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)

    @property
    def exit_code(self) -> int | None:
        """The exit code (negative: the signal), or None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; return whether it came."""
        if select.select([self.pidfd], [], [], timeout_s)[0]:
            self._process.wait()
            return True
        return False

    def kill(self) -> None:
        """Kill it if it still runs, reap it, close the pidfd."""
        if self.pidfd < 0:
            return
        if self.exit_code is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        os.close(self.pidfd)
        self.pidfd = -1

    def last_words(self) -> str:
        """Return the end of what it wrote to stderr."""
        try:
            return self.log.read_text(errors="replace")[-2000:].strip()
        except OSError:
            return ""
