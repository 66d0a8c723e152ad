"""The engine process: ``python -m migkit.migration ROLE CONTROL LIFELINE``.

CONTROL is a socket to the session; LIFELINE another, on which nothing is ever sent: when the
session is gone the engine is killed, whatever it is doing.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys

from migkit.kernel.lifeline import die_with
from migkit.migration.control import ControlSocket
from migkit.migration.destination import Destination
from migkit.migration.engine import Engine, attach
from migkit.migration.source import Source

_ROLES: dict[str, type[Engine]] = {"source": Source, "destination": Destination}


def main() -> int:
    """Become the engine of the role that the command line names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the session decides what an interrupt means
    role, control_fd, lifeline_fd = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    lifeline = socket.socket(fileno=lifeline_fd)
    die_with(lifeline)
    control = ControlSocket(socket.socket(fileno=control_fd))
    attachment = attach(control)
    cpu = attachment.options.cpu_list()[1 if role == "source" else 2]
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    engine = _ROLES[role](control, attachment)
    # Nothing here makes cycles; a collection in the middle of a fault would be seen in its p99.
    gc.collect()
    gc.freeze()
    gc.disable()
    control.event("READY")
    engine.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
