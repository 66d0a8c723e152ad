"""What the probe needs of this machine, tried out rather than guessed.

Privilege is a BPF program that the kernel loads, bcc is an import that succeeds, and so on:
no version and no uid is looked at.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from migkit.errors import CapabilityError
from migkit.kernel.capability import Check, run_checks
from migkit.probe.collector import TRACEPOINTS, stack_check_flags
from migkit.probe.headers import REMEDY as HEADERS_REMEDY
from migkit.probe.headers import kernel_headers

if TYPE_CHECKING:
    from collections.abc import Callable

TRACEFS_MOUNTS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))

_IMPORT_BCC = "import bcc; bcc.BPF; print(bcc.__version__)"  # PyPI's bcc has no BPF
_INIT_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO of linux/proc_ns.h
_BPF_SYSCALL = {"x86_64": 321}.get(os.uname().machine, 280)
_BPF_PROG_LOAD = 5
_BPF_PROG_TYPE_TRACEPOINT = 5
_RETURN_0 = bytes.fromhex("b700000000000000 9500000000000000")


@dataclass(frozen=True)
class ProbeCapability:
    """Every check; usable when all the required ones passed."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether a probe can start."""
        return not self.missing

    @property
    def missing(self) -> tuple[Check, ...]:
        """The required checks that failed."""
        return tuple(check for check in self.checks if check.required and not check.ok)

    def __str__(self) -> str:
        """Name what is missing, with remedies."""
        return "; ".join(
            f"{check.name}: {check.outcome} ({check.remedy})" for check in self.missing
        )


def interpreters() -> list[str]:
    """Return the Python interpreters that may have bcc, the distribution's first."""
    found = ["/usr/bin/python3", sys.executable, shutil.which("python3") or "/usr/bin/python3"]
    return list(dict.fromkeys(found))


def bcc_interpreter() -> str:
    """Return the first interpreter that can import bcc; raises CapabilityError."""
    tried = interpreters()
    for interpreter in tried:
        if _bcc_version(interpreter) is not None:
            return interpreter
    raise CapabilityError(f"no interpreter can import bcc (tried {', '.join(tried)})")


@functools.cache
def _bcc_version(interpreter: str) -> str | None:
    try:
        done = subprocess.run(
            [interpreter, "-I", "-c", _IMPORT_BCC],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def mount_tracefs() -> Path:
    """Return where tracefs is, mounting it as systemd does at boot when it is nowhere.

    Raises CapabilityError when it cannot be mounted or lacks one of our tracepoints.
    """
    mounted = [path for path in TRACEFS_MOUNTS if (path / "events").is_dir()]
    if not mounted:
        libc = ctypes.CDLL(None, use_errno=True)
        path = TRACEFS_MOUNTS[0]
        if libc.mount(b"tracefs", os.fsencode(path), b"tracefs", 0, None):
            message = f"cannot mount tracefs on {path}: {os.strerror(ctypes.get_errno())}"
            raise CapabilityError(message)
        mounted = [path]
    for name in TRACEPOINTS:
        event = mounted[0] / "events" / name.replace(":", "/")
        if not os.access(event / "format", os.R_OK):
            raise CapabilityError(f"the kernel has no readable tracepoint {name} at {event}")
    return mounted[0]


def load_program() -> None:
    """Load the smallest tracepoint program there is, and drop it; raises CapabilityError."""
    libc = ctypes.CDLL(None, use_errno=True)
    program = ctypes.create_string_buffer(_RETURN_0, len(_RETURN_0))
    licence = ctypes.create_string_buffer(b"GPL")
    # union bpf_attr: prog_type, insn_cnt, insns, license
    attributes = struct.pack(
        "<IIQQ",
        _BPF_PROG_TYPE_TRACEPOINT,
        len(_RETURN_0) // 8,
        ctypes.addressof(program),
        ctypes.addressof(licence),
    ).ljust(64, b"\0")
    fd = libc.syscall(_BPF_SYSCALL, _BPF_PROG_LOAD, attributes, len(attributes))
    if fd < 0:
        error = os.strerror(ctypes.get_errno())
        raise CapabilityError(f"the kernel refuses to load a BPF program: {error}")
    os.close(fd)


def _load_outcome() -> str:
    load_program()
    return "a tracepoint program loads"


def _pid_namespace_outcome() -> str:
    if Path("/proc/self/ns/pid").stat().st_ino != _INIT_PID_NAMESPACE:
        raise CapabilityError("a nested pid namespace, whose pids are not the kernel's")
    return "the initial one"


def _bcc_outcome() -> str:
    interpreter = bcc_interpreter()
    return f"{interpreter} has bcc {_bcc_version(interpreter)}"


def _headers_outcome() -> str:
    return str(kernel_headers() or "those of the running kernel")


def _tracefs_outcome() -> str:
    return f"{', '.join(TRACEPOINTS)} at {mount_tracefs()}"


def _symbols_outcome() -> str:
    if not stack_check_flags():
        raise CapabilityError("hidden: of a system call's fault the first sleep counts")
    return "the stack tells what a system call's sleep is for"


_CHECKS: tuple[tuple[str, Callable[[], str], str, bool], ...] = (
    ("bpf", _load_outcome, "run as root, or with CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN", True),
    ("pid namespace", _pid_namespace_outcome, "run the container with the host's pids", True),
    (
        "bcc",
        _bcc_outcome,
        "install the distribution's: apt install python3-bpfcc, or dnf install python3-bcc",
        True,
    ),
    ("kernel headers", _headers_outcome, HEADERS_REMEDY, True),
    ("tracefs", _tracefs_outcome, "as root: mount -t tracefs tracefs /sys/kernel/tracing", True),
    ("kernel symbols", _symbols_outcome, "as root: sysctl kernel.kptr_restrict=1", False),
)


def requirements() -> tuple[str, Path | None]:
    """Return the interpreter and the header tree to use; raises CapabilityError."""
    missing = str(available())
    if missing:
        raise CapabilityError(f"this machine cannot run the fault probe: {missing}")
    return bcc_interpreter(), kernel_headers()


def available() -> ProbeCapability:
    """Try out everything a probe needs; what is merely unmounted gets mounted."""
    return ProbeCapability(tuple(run_checks(_CHECKS)))
