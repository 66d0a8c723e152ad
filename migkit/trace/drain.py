"""The shared memory that a trace is emitted into, and its way into a file.

A buffer is a control page and, from DATA_OFFSET on, a trace that only grows. The first word
(u64) of the control page is the number of valid bytes of trace, stored after each record is
complete: whoever maps the buffer reads a whole trace up to there, at any moment, and one whose
writer was killed loses nothing. (That the record is visible before the word is x86's order of
stores.) The second word counts the records for which there was no room. The memory behind the
buffer is allocated as it is written; `Drain` copies to a file what is new and gives it back.
"""

from __future__ import annotations

import mmap
import os
import time
from typing import TYPE_CHECKING

from migkit.errors import TraceFormatError
from migkit.trace.layout import dropped_record

if TYPE_CHECKING:
    from typing import BinaryIO

DATA_OFFSET = 4096
BUFFER_BYTES = 64 << 30
"""Address space, not memory: what a trace may grow to while its writer lives."""

_COPY_BYTES = 4 << 20


def create_buffer(size: int = BUFFER_BYTES, name: str = "migkit-trace") -> int:
    """Return the descriptor of a new sparse memfd; its owner closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def map_buffer(fd: int) -> mmap.mmap:
    """Map a buffer, shared and writable; the descriptor may be closed afterwards."""
    return mmap.mmap(fd, os.fstat(fd).st_size)


def published(buffer: mmap.mmap | bytearray) -> bytes:
    """Copy the trace that a buffer holds by now; what a drain gave back reads as zeros."""
    with memoryview(buffer) as view, view[:8].cast("Q") as control:
        return bytes(view[DATA_OFFSET : DATA_OFFSET + control[0]])


class Drain:
    """Copies a buffer's trace to a binary file as it grows; used by one thread."""

    def __init__(self, buffer: mmap.mmap | bytearray, file: BinaryIO) -> None:
        self._buffer = buffer
        self._file = file
        self._view = memoryview(buffer)
        self._control = self._view[:16].cast("Q")
        self._drained = DATA_OFFSET
        self._punched = DATA_OFFSET
        self._closed = False

    def pump(self) -> int:
        """Copy what is new to the file and free its memory; return the number of bytes.

        Raises TraceFormatError when the number of valid bytes is one that cannot be.
        """
        begin, end = self._drained, DATA_OFFSET + self._control[0]
        if not begin <= end <= len(self._view):
            raise TraceFormatError(
                f"the trace buffer's count of valid bytes is {end - DATA_OFFSET}, expected "
                f"{begin - DATA_OFFSET} to {len(self._view) - DATA_OFFSET}: something wrote over it"
            )
        while self._drained < end:
            chunk = self._view[self._drained : min(end, self._drained + _COPY_BYTES)]
            self._file.write(chunk)
            self._drained += len(chunk)
            self._punch()
        if end > begin:
            self._file.flush()  # for whoever follows it
        return end - begin

    def close(self) -> None:
        """Copy the rest, note how many records were dropped, let go of the buffer.

        The writer should have ended: what it emits later is lost. The file stays open.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.pump()
            if self._control[1]:
                record = dropped_record(self._control[1], time.monotonic_ns(), 0)
                self._file.write(record)
            self._file.flush()
        finally:
            self._control.release()
            self._view.release()

    def _punch(self) -> None:
        """Free the pages that are copied whole (MADV_REMOVE is fallocate's PUNCH_HOLE)."""
        end = self._drained // mmap.PAGESIZE * mmap.PAGESIZE
        if isinstance(self._buffer, mmap.mmap) and end > self._punched:
            self._buffer.madvise(mmap.MADV_REMOVE, self._punched, end - self._punched)
            self._punched = end
