"""A lifeline: a process dies when the other end of a socket closes, whatever it is doing.

A thread that waits for a missing page holds Python's lock, so no thread of the same process can
watch for a parent that died. The kernel can: with O_ASYNC and F_SETSIG it sends a signal when the
peer closes, and SIGKILL ends even a page fault that waits. PDEATHSIG would not do: it follows the
*thread* that created the process.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket

_F_SETSIG = 10


def die_with(sock: socket.socket) -> None:
    """Be killed as soon as ``sock`` has data or its peer is gone; nothing may be sent on it."""
    fcntl.fcntl(sock, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(sock, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(sock, fcntl.F_SETFL, fcntl.fcntl(sock, fcntl.F_GETFL) | os.O_ASYNC)
    # The peer may have closed before the flag was set: then no signal comes.
    if select.select([sock], [], [], 0)[0]:
        os.kill(os.getpid(), signal.SIGKILL)
