"""What the destination answered: the source's view of the return path, from its opening to its end.

Here is ``rp_error``: how the return path ended. 0 is a SHUT that says that all is well, another
number what the destination's SHUT reported, and :data:`BROKE` a path that broke before SHUT came.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from migkit.errors import ProtocolError
from migkit.migration import bitmap, return_path, wire
from migkit.migration.return_path import Bitmap, Incoming, Message, Value
from migkit.migration.wire import BlockLayout
from migkit.trace.emit import Tracer

BROKE = -1


class Answers:
    """All that a destination has said, over all channels of one migration."""

    def __init__(self, trace: Tracer, layout: BlockLayout) -> None:
        """Begin before the return path is opened."""
        self._trace = trace
        self._layout = layout
        self.is_open = False
        self.pongs: set[int] = set()
        self.rp_error: int | None = None
        self.received: npt.NDArray[np.bool_] | None = None  # after a break
        self.resume_acked = False
        self.switchover_acked = False

    def take(self, message: Incoming) -> None:
        """Take a message off the return path that is no request for a page."""
        trace = self._trace
        match message:
            case Value(Message.PONG, value):
                trace.source_return_path_thread_pong(value)
                if value < wire.PING_WINDOW:
                    self.pongs.add(value)
            case Value(Message.RESUME_ACK, value):
                trace.source_return_path_thread_resume_ack(value)
                self.resume_acked = value == return_path.RESUME_ACK_VALUE
            case Value(Message.SWITCHOVER_ACK):
                trace.source_return_path_thread_switchover_acked()
                self.switchover_acked = True
            case Bitmap(name, data):
                trace.ram_dirty_bitmap_reload_begin(name)
                self.received = bitmap.decode(data, self._layout)
            case Value(Message.SHUT, error):
                trace.source_return_path_thread_shut(error)
                self.rp_error = error
            case _:
                raise ProtocolError(f"the destination sent {message} out of turn")

    def begin_recovery(self) -> None:
        """Forget what was said of an earlier recovery."""
        self.received, self.resume_acked = None, False

    @property
    def gave_up(self) -> bool:
        """Whether the destination closed the return path with an error."""
        return self.rp_error not in (None, 0, BROKE)

    @property
    def reason(self) -> str:
        """Say what an ``rp_error`` other than 0 means."""
        if self.rp_error == BROKE:
            return "the return path broke before the destination closed it"
        return f"the destination closed the return path with error {self.rp_error}"

    def close(self, wait: Callable[[], None], *, may_break: bool) -> None:
        """Close the return path: ``wait`` for SHUT; one that breaks instead is an rp_error too.

        Where it ``may_break``, in post-copy, that is no end: :class:`ConnectionError` is raised.
        """
        self._trace.migration_return_path_end_before()
        broken = False
        try:
            wait()
        except ConnectionError:
            if may_break:
                raise
            broken = True
        self._end(broken=broken)

    def abandon(self, *, broken: bool) -> None:
        """Close a return path that is still open when the migration has come to nothing."""
        if self.is_open:
            self._trace.migration_return_path_end_before()
            self._end(broken=broken)

    def _end(self, *, broken: bool) -> None:
        trace = self._trace
        if broken and self.rp_error is None:
            trace.source_return_path_thread_bad_end()
            self.rp_error = BROKE
        else:
            trace.source_return_path_thread_end()
        trace.migration_return_path_end_after(self.rp_error or 0)
        self.is_open = False
