"""What happened, and when: the registry of trace events, emitting them, and the trace formats.

A process emits through a `Tracer` into shared memory, the session drains that to a file in
QEMU's simpletrace format, and `read` turns the file into one numpy array per event. Engine
processes import this package, so it needs numpy and the standard library alone.
"""

from migkit.trace.drain import Drain, create_buffer, map_buffer
from migkit.trace.emit import Tracer
from migkit.trace.registry import DEFAULT_PATTERNS, Event, Registry
from migkit.trace.simpletrace import Trace, read

__all__ = [
    "DEFAULT_PATTERNS",
    "Drain",
    "Event",
    "Registry",
    "Trace",
    "Tracer",
    "create_buffer",
    "map_buffer",
    "read",
]
