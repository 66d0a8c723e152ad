"""userfaultfd: page faults of one address space, delivered as messages on a file descriptor.

A process creates a userfaultfd, which is bound to *its own* address space for ever, registers
ranges of it, and may hand the descriptor to another process. A thread that touches a missing
page of a registered range sleeps until somebody places the page (``UFFDIO_COPY``,
``UFFDIO_ZEROPAGE``) through the descriptor, which also wakes it. All addresses are those of the
creating process, except the source of a copy, which is the caller's.

See the kernel's Documentation/admin-guide/mm/userfaultfd.rst and include/uapi/linux/userfaultfd.h,
whence the numbers and layouts below.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import fcntl
import os
import struct
import time
from typing import Self

from migkit.errors import CapabilityError

_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_USER_MODE_ONLY = 1
_API = 0xAA

_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_UNREGISTER = 0x8010AA01
_UFFDIO_WAKE = 0x8010AA02
_UFFDIO_COPY = 0xC028AA03
_UFFDIO_ZEROPAGE = 0xC020AA04
_UFFDIO_WRITEPROTECT = 0xC018AA06
_UFFDIO_CONTINUE = 0xC020AA07
_USERFAULTFD_IOC_NEW = 0xAA00  # on /dev/userfaultfd

_MODE_DONTWAKE = 1
_COPY_MODE_WP = 2

_MESSAGE = struct.Struct("=B7xQQI4x")  # struct uffd_msg, read as a page fault
_MESSAGE_BYTES = 32
_COPY = struct.Struct("=QQQQq")  # struct uffdio_copy: dst, src, len, mode, copy
_COPY_DONE = 32
_ZEROPAGE = struct.Struct("=QQQq")  # struct uffdio_zeropage: range, mode, zeropage
_ZEROPAGE_DONE = 24
_BURST = 64  # messages per read(2)


class Feature(enum.IntFlag):
    """``UFFD_FEATURE_*``: what a userfaultfd can be asked for when it is created."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16


class Register(enum.IntFlag):
    """``UFFDIO_REGISTER_MODE_*``: which faults of a range become messages."""

    MISSING = 1
    WP = 2
    MINOR = 4


class EventType(enum.IntEnum):
    """``UFFD_EVENT_*``: what a message tells of."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


class FaultFlag(enum.IntFlag):
    """``UFFD_PAGEFAULT_FLAG_*``."""

    WRITE = 1
    WP = 2
    MINOR = 4


Message = tuple[int, int, int, int]
"""An :class:`EventType`; for a page fault its flags, its address (rounded to the page) and the
thread's id; for REMOVE and UNMAP the start and the end of the range, as in the kernel's union."""


class Userfaultfd:
    """A userfaultfd, one's own or one received from the process whose memory it watches."""

    def __init__(self, fd: int) -> None:
        """Adopt a descriptor whose API handshake has been done."""
        self.fd = fd
        self._copy = bytearray(40)
        self._zeropage = bytearray(32)
        self._busy_until = 0.0
        self.busy_s = 1.0
        """How long to try again in an address space that is changing (EAGAIN, nothing placed)."""

    @classmethod
    def create(cls, features: Feature, *, user_mode_only: bool = False) -> Self:
        """Create a userfaultfd of this process with the given features, non-blocking.

        ``user_mode_only`` serves only faults taken in user mode and needs no privilege: a system
        call of the watched process that touches a missing page then fails with EFAULT.

        Raises :class:`CapabilityError` when the kernel or the privilege is missing.
        """
        fd = _new_fd(user_mode_only=user_mode_only)
        try:
            fcntl.ioctl(fd, _UFFDIO_API, bytearray(struct.pack("=QQQ", _API, features, 0)))
        except OSError as error:
            os.close(fd)
            known = supported_features()
            missing = ", ".join(f.name or "?" for f in features & ~known)
            message = f"this kernel's userfaultfd lacks {missing or features!r}: {error.strerror}"
            raise CapabilityError(message + "; it needs Linux 6.7 or newer") from error
        return cls(fd)

    def fileno(self) -> int:
        """Return the descriptor, for poll."""
        return self.fd

    def close(self) -> None:
        """Close this reference. When the last one goes, waiting threads wake and read zeros."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def register(self, start: int, length: int, mode: Register) -> int:
        """Watch a range; return the bit mask of the ioctls that it now supports."""
        argument = bytearray(struct.pack("=QQQQ", start, length, mode, 0))
        fcntl.ioctl(self.fd, _UFFDIO_REGISTER, argument)
        return int(struct.unpack_from("=Q", argument, 24)[0])

    def unregister(self, start: int, length: int) -> None:
        """Stop watching a range and wake all that wait in it, or for a REMOVE to be read."""
        fcntl.ioctl(self.fd, _UFFDIO_UNREGISTER, bytearray(struct.pack("=QQ", start, length)))
        while self.read():
            pass

    def read(self) -> list[Message]:
        """Return the messages that wait, up to 64; an empty list when there are none.

        Duplicates are normal: a thread that takes a signal faults again on the same page.
        """
        try:
            data = os.read(self.fd, _BURST * _MESSAGE_BYTES)
        except BlockingIOError:
            return []
        return list(_MESSAGE.iter_unpack(data))

    def copy(
        self, target: int, source: int, length: int, *, wake: bool = True, protect: bool = False
    ) -> int:
        """Place pages and wake their waiters; return how many bytes were placed.

        Fewer than ``length`` means that the page at ``target + result`` is present already
        (zero: the first one is). ``protect`` places them write-protected.

        Raises :class:`ProcessLookupError` when the watched process is gone and
        :class:`OSError` for all else, ENOENT for a range outside the registered ones.
        """
        mode = (0 if wake else _MODE_DONTWAKE) | (_COPY_MODE_WP if protect else 0)
        argument = self._copy
        done, retry = 0, True
        while retry:
            _COPY.pack_into(argument, 0, target + done, source + done, length - done, mode, 0)
            try:
                fcntl.ioctl(self.fd, _UFFDIO_COPY, argument)
            except OSError as error:
                step, retry = self._interrupted(error, argument, _COPY_DONE)
                done += step
            else:
                done = length
                break
        self._busy_until = 0.0
        return done

    def zeropage(self, target: int, length: int, *, wake: bool = True) -> int:
        """Place zero pages and wake their waiters; the result is that of :meth:`copy`.

        Raises :class:`OSError` EINVAL on huge pages: copy a zero page there.
        """
        mode = 0 if wake else _MODE_DONTWAKE
        argument = self._zeropage
        done, retry = 0, True
        while retry:
            _ZEROPAGE.pack_into(argument, 0, target + done, length - done, mode, 0)
            try:
                fcntl.ioctl(self.fd, _UFFDIO_ZEROPAGE, argument)
            except OSError as error:
                step, retry = self._interrupted(error, argument, _ZEROPAGE_DONE)
                done += step
            else:
                done = length
                break
        self._busy_until = 0.0
        return done

    def _interrupted(self, error: OSError, argument: bytearray, at: int) -> tuple[int, bool]:
        """Return how many bytes were placed before an error, and whether to go on behind them.

        EEXIST says that the first page is present. EAGAIN with progress says that a later one
        is, or that a signal came; EAGAIN without any, that the address space is changing, as
        with an unread REMOVE event: then it is tried again for a while. The field holds -errno
        when nothing was placed.
        """
        if error.errno == errno.EEXIST:
            return 0, False
        if error.errno != errno.EAGAIN:
            raise error
        done = max(int(struct.unpack_from("=q", argument, at)[0]), 0)
        now = time.monotonic()
        if done:
            self._busy_until = 0.0
        elif not self._busy_until:
            self._busy_until = now + self.busy_s
        elif now > self._busy_until:
            self._busy_until = 0.0
            raise error
        if not done:
            time.sleep(0.0001)
        return done, True

    def continue_(self, target: int, length: int) -> None:
        """Map pages that are in the page cache already (MINOR mode) and wake their waiters."""
        fcntl.ioctl(
            self.fd, _UFFDIO_CONTINUE, bytearray(struct.pack("=QQQq", target, length, 0, 0))
        )

    def wake(self, start: int, length: int) -> None:
        """Wake all that wait in a range: they look again and fault again if need be."""
        fcntl.ioctl(self.fd, _UFFDIO_WAKE, bytearray(struct.pack("=QQ", start, length)))

    def write_protect(self, start: int, length: int, *, protect: bool = True) -> None:
        """Write-protect a range, or lift the protection and wake the writers."""
        argument = bytearray(struct.pack("=QQQ", start, length, 1 if protect else 0))
        fcntl.ioctl(self.fd, _UFFDIO_WRITEPROTECT, argument)


def supported_features(*, user_mode_only: bool = True) -> Feature:
    """Ask the kernel which features it has: the handshake with none requested tells."""
    fd = _new_fd(user_mode_only=user_mode_only)
    try:
        argument = bytearray(struct.pack("=QQQ", _API, 0, 0))
        fcntl.ioctl(fd, _UFFDIO_API, argument)
    finally:
        os.close(fd)
    return Feature(struct.unpack_from("=Q", argument, 8)[0])


def _new_fd(*, user_mode_only: bool) -> int:
    number = _SYS_USERFAULTFD.get(os.uname().machine)
    if number is None:
        raise CapabilityError(f"no userfaultfd system call number known for {os.uname().machine}")
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (_USER_MODE_ONLY if user_mode_only else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(number, flags))
    if fd >= 0:
        return fd
    code = ctypes.get_errno()
    # Without CAP_SYS_PTRACE the system call is refused, the device may still be permitted.
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        raise CapabilityError(
            f"userfaultfd was refused: {os.strerror(code)}; run as root, or set "
            "vm.unprivileged_userfaultfd=1, or give yourself access to /dev/userfaultfd"
        ) from None
    try:
        return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, flags)
    except OSError as error:
        raise CapabilityError(f"/dev/userfaultfd refused: {error.strerror}") from error
    finally:
        os.close(device)
