"""The kernel's side of a page fault, seen with eBPF.

Four tracepoints (``exceptions:page_fault_user`` and ``page_fault_kernel``,
``sched:sched_switch`` and ``sched_waking``) are joined in the kernel to one record a fault:
taken, blocked, woken, running. Faults that the kernel takes on a process's behalf by
get_user_pages (mlock, process_vm_readv, O_DIRECT) raise no exception and are not seen.

``Probe`` attaches, ``available`` says what this machine lacks, ``records`` has the columns.
"""

from migkit.probe.capability import ProbeCapability, available
from migkit.probe.probe import Probe, ProbeResult, ProbeStatus, Watch
from migkit.probe.records import FAULT_DTYPE, ErrorCode, FaultFlag, FaultRecords

__all__ = [
    "FAULT_DTYPE",
    "ErrorCode",
    "FaultFlag",
    "FaultRecords",
    "Probe",
    "ProbeCapability",
    "ProbeResult",
    "ProbeStatus",
    "Watch",
    "available",
]
