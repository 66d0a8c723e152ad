"""The record of one page fault, as the BPF program writes it.

Stamps are CLOCK_MONOTONIC in ns; 0 means that it did not happen. A fault whose page came
before its thread went to sleep has all three stages at 0.

==========  ====  ===================================================================
field       type  meaning
==========  ====  ===================================================================
fault_ns    u8    the fault's exception was taken
blocked_ns  u8    its thread went to sleep in handle_userfault, for the first time
woken_ns    u8    the last wake-up of such a sleep (a page placed, a signal, a WAKE)
running_ns  u8    the thread was switched in again after that wake-up
address     u8    faulting address, to the byte
ip          u8    instruction that faulted (in the kernel, for a system call's access)
pid         u4    process (tgid), numbered in the initial pid namespace
tid         u4    thread, numbered there as well
error_code  u4    x86's: see `ErrorCode`
flags       u4    see `FaultFlag`
==========  ====  ===================================================================

One exception makes one record. A signal sends a thread that faulted in user mode back to
its instruction, which faults anew: a second record. A system call's access retries inside
the kernel: still the same record, though userfaultfd has several messages.
"""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

FAULT_DTYPE = np.dtype(
    [
        ("fault_ns", "<u8"),
        ("blocked_ns", "<u8"),
        ("woken_ns", "<u8"),
        ("running_ns", "<u8"),
        ("address", "<u8"),
        ("ip", "<u8"),
        ("pid", "<u4"),
        ("tid", "<u4"),
        ("error_code", "<u4"),
        ("flags", "<u4"),
    ]
)
"""64 bytes, naturally aligned: ``struct fault`` of faults.bpf.c."""

FaultRecords = npt.NDArray[np.void]
"""An array of FAULT_DTYPE."""


class ErrorCode(enum.IntFlag):
    """Bits of x86's page fault error code."""

    PROTECTION = 1
    WRITE = 2
    USER = 4
    FETCH = 16


class FaultFlag(enum.IntFlag):
    """Bits of a record's ``flags``."""

    KERNEL_MODE = 1
    """The kernel made the access on the thread's behalf, in a system call."""
    EARLY_WAKE = 2
    """The wake-up overtook the sleep, so woken_ns is not before blocked_ns but may equal it."""


def last_versions(rows: FaultRecords) -> FaultRecords:
    """Keep each fault's last row, in order of fault_ns.

    A fault that was pending when the collector looked is in the file several times; thread and
    fault_ns identify it, since a thread takes one fault at a time.
    """
    order = np.lexsort((np.arange(len(rows)), rows["tid"], rows["fault_ns"]))
    rows = rows[order]
    superseded = (rows["tid"][:-1] == rows["tid"][1:]) & (
        rows["fault_ns"][:-1] == rows["fault_ns"][1:]
    )
    return rows[np.append(~superseded, True)] if len(rows) else rows
