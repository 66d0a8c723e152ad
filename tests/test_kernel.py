"""What the kernel does with missing pages, tried on the kernel that runs these tests.

migkit's design rests on these answers, so each of them is a test. A process that waits for a
page holds Python's lock: whatever may wait does so in a process of its own, behind a deadline.
"""

import contextlib
import ctypes
import errno
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from typing import NamedTuple

import numpy as np
import pytest

from migkit.errors import CapabilityError, OptionError
from migkit.kernel.capability import Check, kernel_checks, run_checks
from migkit.kernel.memory import PAGE_SIZE, RamBlock, check_size, huge_pages_free, memory_available
from migkit.kernel.pagemap import Category, Pagemap
from migkit.kernel.process import Child
from migkit.kernel.userfaultfd import (
    EventType,
    FaultFlag,
    Feature,
    Register,
    Userfaultfd,
    supported_features,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

HUGE = 2 << 20
NOBODY = 65534
DEADLINE_S = 30.0
A_WHILE_S = 0.15  # how long we watch that something does not happen
NONE = Feature(0)
MISSING = Feature.MISSING_SHMEM
WP_ASYNC = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_ASYNC
MADV_REMOVE, MADV_COLLAPSE = 9, 25

libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip

# A process that carries out snippets and answers each; one that waits for a page does not answer.
PROCESS = """
import ctypes, errno, json, mmap, os, signal, socket, sys, threading
from migkit.kernel.lifeline import die_with
from migkit.kernel.memory import PAGE_SIZE, RamBlock
from migkit.kernel.pagemap import Category, Pagemap
from migkit.kernel.userfaultfd import Feature, Register, Userfaultfd
control = socket.socket(fileno=int(sys.argv[1]))
libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
libc.mlock.argtypes = ctypes.c_void_p, ctypes.c_size_t
names = dict(globals())
while message := control.recv(65536):
    snippet, values = json.loads(message)
    names.update(values, answer=None, fds=[])
    try:
        exec(snippet, names)
        reply = {"answer": names["answer"]}
    except OSError as error:
        reply = {"errno": error.errno}
    except Exception as error:
        reply = {"error": repr(error)}
    socket.send_fds(control, [json.dumps(reply).encode()], names["fds"])
"""

BECOME_A_GUEST = """
ram = RamBlock("ram", ram_fd, size, page_size)
uffd = Userfaultfd.create(Feature(features), user_mode_only=user_mode_only)
if mode:
    uffd.register(ram.address, ram.size, Register(mode))
answer, fds = ram.address, [uffd.fd]
"""

# A process that changes its uid stops being inspectable by that uid; we want it to be.
BECOME_NOBODY = """
PR_SET_DUMPABLE = 4
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
"""

READ_OTHER_PROCESS = """
class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
into = ctypes.create_string_buffer(length)
ours = Iovec(ctypes.addressof(into), length)
theirs = Iovec(address, length)
n = libc.process_vm_readv(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
answer = list(into.raw[:n]) if n >= 0 else -ctypes.get_errno()
"""


class Message(NamedTuple):
    """A message as :meth:`Userfaultfd.read` returns it, with names for its parts."""

    event: int
    flags: int
    address: int
    tid: int


class Process:
    """A process that carries out snippets of Python, one at a time."""

    def __init__(self, *inherited):
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(DEADLINE_S)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROCESS, str(theirs.fileno())],
                pass_fds=(theirs.fileno(), *inherited),
            )
        self.pid = self.process.pid
        self.fds = []

    def begin(self, snippet, **values):
        self.control.send(json.dumps([snippet, values]).encode())

    def end(self):
        data, self.fds, _, _ = socket.recv_fds(self.control, 65536, 4)
        reply = json.loads(data)
        if "errno" in reply:
            raise OSError(reply["errno"], os.strerror(reply["errno"]))
        assert "error" not in reply, reply
        return reply["answer"]

    def run(self, snippet, **values):
        self.begin(snippet, **values)
        return self.end()

    def waits(self):
        """Whether it still has not answered after a while."""
        return not select.select([self.control], [], [], A_WHILE_S)[0]

    def become_nobody(self):
        """Give up root, if that is what we are; else all of us are one unprivileged user."""
        if os.geteuid() == 0:
            self.run(BECOME_NOBODY, uid=NOBODY)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.control.close()


class Guest(Process):
    """A process whose RAM is watched by a userfaultfd that the test holds as well."""

    def __init__(
        self, ram, features=NONE, mode=Register.MISSING, *,
        user_mode_only=True, nobody=False, inherited=(),
    ):  # fmt: skip
        super().__init__(ram.fd, *inherited)
        if nobody:
            self.become_nobody()
        self.address = self.run(
            BECOME_A_GUEST,
            ram_fd=ram.fd, size=ram.size, page_size=ram.page_size,
            features=int(features), mode=int(mode), user_mode_only=user_mode_only,
        )  # fmt: skip
        self.uffd = Userfaultfd(self.fds[0])

    def at(self, page):
        return self.address + page * PAGE_SIZE

    def begin_reading(self, page):
        """Have it load the first byte of a page."""
        self.begin("answer = int(ram.pages[page, 0])", page=page)

    def message(self):
        """Return the next message."""
        assert select.select([self.uffd], [], [], DEADLINE_S)[0], "no fault was reported"
        (message,) = self.uffd.read()
        return Message(*message)

    def place(self, page, value):
        return place(self.uffd, self.at(page), value)

    def close(self):
        super().close()
        self.uffd.close()


def filled(*values, page_size=PAGE_SIZE):
    """Pages (n, page_size), each filled with a value."""
    return np.repeat(np.array(values, np.uint8), page_size).reshape(-1, page_size)


def place(uffd, address, *values, page_size=PAGE_SIZE):
    data = filled(*values, page_size=page_size)
    return uffd.copy(address, data.ctypes.data, data.nbytes)


def present_pages(ram):
    return np.flatnonzero(ram.present()).tolist()


def scanned_pages(pid, address, n_pages, category=Category.WRITTEN, **options):
    """The numbers of the pages that PAGEMAP_SCAN finds."""
    with Pagemap(pid) as pagemap:
        regions = pagemap.scan(address, n_pages * PAGE_SIZE, category, **options)
    return [
        (at - address) // PAGE_SIZE
        for start, end, _ in regions.tolist()
        for at in range(start, end, PAGE_SIZE)
    ]


def bare_ioctl(uffd, number, layout, *fields):
    """Issue an ioctl without migkit's retries; return its errno and its last field."""
    argument = (ctypes.c_int64 * len(fields))(*fields)
    code = 0
    if libc.ioctl(uffd.fd, ctypes.c_ulong(number), argument) != 0:
        code = ctypes.get_errno()
    return code, argument[layout]


def bare_copy(uffd, target, data):
    """UFFDIO_COPY as the kernel answers it: errno and the field ``copy``."""
    return bare_ioctl(uffd, 0xC028AA03, 4, target, data.ctypes.data, data.nbytes, 0, 0)


def bare_zeropage(uffd, target, length):
    """UFFDIO_ZEROPAGE as the kernel answers it: errno and the field ``zeropage``."""
    return bare_ioctl(uffd, 0xC020AA04, 3, target, length, 0, 0)


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def make_ram(stack):
    def make(n_pages=16, page_size=PAGE_SIZE):
        ram = RamBlock.create("ram", n_pages * page_size, page_size)
        stack.callback(ram.close)
        return ram

    return make


@pytest.fixture
def ram(make_ram):
    return make_ram()


@pytest.fixture
def watch(stack):
    """Watch RAM of this very process; whoever does must not touch what is missing."""

    def make(ram, mode=Register.MISSING, features=NONE, n_pages=None):
        uffd = Userfaultfd.create(features, user_mode_only=True)
        stack.callback(uffd.close)
        length = ram.size if n_pages is None else n_pages * ram.page_size
        uffd.register(ram.address, length, mode)
        return uffd

    return make


@pytest.fixture
def make_process(stack):
    def make(*inherited):
        process = Process(*inherited)
        stack.callback(process.close)
        return process

    return make


@pytest.fixture
def make_guest(stack):
    def make(ram, *arguments, **options):
        guest = Guest(ram, *arguments, **options)
        stack.callback(guest.close)
        return guest

    return make


@pytest.fixture
def guest(make_guest, ram):
    return make_guest(ram)


@pytest.fixture
def make_patient_guest(make_guest):
    """Make guests whose own system calls may wait for a page, too."""
    try:
        Userfaultfd.create(NONE).close()
    except CapabilityError as error:
        pytest.skip(f"faults within system calls: {error}")

    def make(ram):
        return make_guest(ram, user_mode_only=False)

    return make


@pytest.fixture
def huge_ram(huge_pages, make_ram):
    if huge_pages_free(HUGE) < 4:
        pytest.skip("huge pages: no 4 of 2 MiB are free, and only root can have more")
    return make_ram(4, HUGE)


# Placing.


def test_a_copy_over_a_present_page_is_told_how_far_it_came(ram, watch):
    uffd = watch(ram)
    ram.write(3, filled(9))
    data = filled(*range(1, 7))
    assert bare_copy(uffd, ram.address, data) == (errno.EAGAIN, 3 * PAGE_SIZE)
    assert present_pages(ram) == [0, 1, 2, 3]


def test_copy_keeps_its_progress_and_names_the_page_that_was_taken(ram, watch):
    uffd = watch(ram)
    ram.write(3, filled(9))
    assert place(uffd, ram.address, 1, 2, 3, 4, 5, 6) == 3 * PAGE_SIZE
    assert place(uffd, ram.address + 4 * PAGE_SIZE, 5, 6) == 2 * PAGE_SIZE
    assert ram.pages[:6, 0].tolist() == [1, 2, 3, 9, 5, 6]
    assert present_pages(ram) == [0, 1, 2, 3, 4, 5]


def test_zeropage_keeps_its_progress_and_names_the_page_that_was_taken(ram, watch):
    uffd = watch(ram)
    ram.write(2, filled(9))
    assert uffd.zeropage(ram.address, 6 * PAGE_SIZE) == 2 * PAGE_SIZE
    assert uffd.zeropage(ram.address + 3 * PAGE_SIZE, 3 * PAGE_SIZE) == 3 * PAGE_SIZE
    assert ram.pages[:6, 0].tolist() == [0, 0, 9, 0, 0, 0]


def test_a_copy_of_one_page_that_is_present_places_nothing(ram, watch):
    uffd = watch(ram)
    ram.write(3, filled(9))
    address = ram.address + 3 * PAGE_SIZE
    assert bare_copy(uffd, address, filled(1)) == (errno.EEXIST, -errno.EEXIST)
    assert bare_zeropage(uffd, address, PAGE_SIZE) == (errno.EEXIST, -errno.EEXIST)
    assert place(uffd, address, 1) == 0
    assert uffd.zeropage(address, PAGE_SIZE) == 0
    assert ram.pages[3, 0] == 9


def test_a_copy_past_the_registered_range_places_nothing(ram, watch):
    uffd = watch(ram, n_pages=8)
    for first in (7, 8, 15):  # across its end, behind it, across the end of the mapping
        with pytest.raises(FileNotFoundError):
            place(uffd, ram.address + first * PAGE_SIZE, 1, 2)
    assert present_pages(ram) == []


def test_a_continue_needs_the_page_in_the_page_cache(ram, watch):
    uffd = watch(ram, Register.MINOR, Feature.MINOR_SHMEM)
    with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
        uffd.continue_(ram.address, PAGE_SIZE)
    ram.write(0, filled(5))
    uffd.continue_(ram.address, PAGE_SIZE)
    assert ram.pages[0, 0] == 5


def test_a_copy_can_place_pages_write_protected(ram, watch):
    uffd = watch(ram, Register.MISSING | Register.WP, WP_ASYNC)
    data = filled(1, 2, 3, 4)
    uffd.copy(ram.address, data.ctypes.data, data.nbytes, protect=True)
    assert scanned_pages(os.getpid(), ram.address, 4) == []
    ram.pages[2, 1] = 1
    assert scanned_pages(os.getpid(), ram.address, 4) == [2]


@pytest.mark.parametrize("kind", ["anonymous memory", "a memfd"])
def test_missing_pages_that_are_watched_keep_huge_pages_from_forming(stack, watch, kind):
    size = 2 * HUGE
    reserved = stack.enter_context(mmap.mmap(-1, size + HUGE, mmap.MAP_PRIVATE))
    start = ctypes.addressof(ctypes.c_char.from_buffer(reserved))
    address = -(-start // HUGE) * HUGE
    if kind == "a memfd":
        fd = os.memfd_create("ram")
        stack.callback(os.close, fd)
        os.ftruncate(fd, size)
        fixed = 0x10
        libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | fixed, fd, 0)
    ctypes.memset(address, 1, PAGE_SIZE)
    uffd = stack.enter_context(contextlib.closing(Userfaultfd.create(MISSING, user_mode_only=True)))
    uffd.register(address, HUGE, Register.MISSING)
    assert libc.madvise(address, HUGE, MADV_COLLAPSE) == -1
    assert ctypes.get_errno() == errno.EBUSY


def test_ram_blocks_never_have_transparent_huge_pages(ram):
    assert ram.address
    with open("/proc/self/smaps") as smaps:  # noqa: PTH123 — a stream, not a file
        lines = iter(smaps)
        next(line for line in lines if line.startswith(f"{ram.address:x}-"))
        flags = next(line for line in lines if line.startswith("VmFlags:"))
    assert " nh" in flags


# Faults.


def test_a_guest_that_touches_a_missing_page_waits_until_it_is_placed(guest):
    guest.begin_reading(3)
    message = guest.message()
    assert message.event == EventType.PAGEFAULT
    assert message.address == guest.at(3)
    assert not message.flags & FaultFlag.WRITE
    assert guest.waits()
    assert guest.place(3, 42) == PAGE_SIZE
    assert guest.end() == 42


def test_a_message_tells_writes_from_reads_and_names_the_thread(make_guest, ram):
    guest = make_guest(ram, MISSING | Feature.THREAD_ID)
    guest.begin("ram.pages[5, 100] = 1; answer = int(ram.pages[5, 101])")
    message = guest.message()
    assert message == Message(EventType.PAGEFAULT, FaultFlag.WRITE, guest.at(5), guest.pid)
    guest.place(5, 7)
    assert guest.end() == 7


def test_a_page_can_be_placed_without_waking_who_waits(guest):
    guest.begin_reading(3)
    guest.message()
    data = filled(8)
    assert guest.uffd.copy(guest.at(3), data.ctypes.data, PAGE_SIZE, wake=False) == PAGE_SIZE
    assert guest.waits()
    guest.uffd.wake(guest.at(3), PAGE_SIZE)
    assert guest.end() == 8


def test_a_zero_page_wakes_who_waits_and_reads_as_zeros(guest, ram):
    guest.begin_reading(3)
    guest.message()
    assert guest.uffd.zeropage(guest.at(3), PAGE_SIZE) == PAGE_SIZE
    assert guest.end() == 0
    assert present_pages(ram) == [3]


def test_there_are_no_messages_where_nobody_waits(guest):
    assert guest.uffd.read() == []


def test_signals_during_a_fault_make_several_messages_for_one_page(guest):
    guest.run("signal.signal(signal.SIGUSR1, lambda *_: None)")
    guest.begin_reading(3)
    messages = [guest.message()]
    for _ in range(3):
        os.kill(guest.pid, signal.SIGUSR1)
        messages.append(guest.message())
    assert {message.address for message in messages} == {guest.at(3)}
    assert guest.waits()
    guest.place(3, 7)
    assert guest.end() == 7
    assert guest.uffd.read() == []


def test_a_load_through_an_unregistered_mapping_takes_the_pages_place(ram, guest):
    assert present_pages(ram) == []
    assert ram.pages[3, 0] == 0  # the mistake that this design forbids
    assert present_pages(ram) == [3]
    assert guest.place(3, 42) == 0
    assert guest.run("answer = int(ram.pages[3, 0])") == 0
    assert guest.uffd.read() == []


def test_a_page_placed_for_one_process_is_there_for_the_other_at_once(ram, make_guest):
    one, other = make_guest(ram), make_guest(ram)
    one.begin_reading(3)
    one.message()
    one.place(3, 42)
    assert one.end() == 42
    other.begin_reading(3)
    assert other.end() == 42
    assert other.uffd.read() == []


def test_who_waits_in_another_process_is_woken_through_its_own_userfaultfd(ram, make_guest):
    one, other = make_guest(ram), make_guest(ram)
    for guest in (one, other):
        guest.begin_reading(3)
        guest.message()
    one.place(3, 42)
    assert one.end() == 42
    one.uffd.wake(one.at(3), PAGE_SIZE)
    assert other.waits()
    other.uffd.wake(other.at(3), PAGE_SIZE)
    assert other.end() == 42
    assert other.uffd.read() == []


@pytest.mark.parametrize("way", ["through the mapping", "with pwrite"])
def test_a_write_past_userfaultfd_wakes_nobody(ram, guest, way):
    guest.begin_reading(3)
    guest.message()
    if way == "with pwrite":
        ram.write(3, filled(9))
    else:
        ram.pages[3] = 9
    assert guest.waits()
    guest.uffd.wake(guest.at(3), PAGE_SIZE)
    assert guest.end() == 9


def test_a_remove_that_nobody_has_read_makes_the_memory_busy(ram, make_guest):
    guest = make_guest(ram, MISSING | Feature.EVENT_REMOVE)
    ram.write(0, filled(1, 2))
    guest.begin("libc.madvise(ram.address, 2 * PAGE_SIZE, advice)", advice=MADV_REMOVE)
    assert select.select([guest.uffd], [], [], DEADLINE_S)[0]
    assert bare_copy(guest.uffd, guest.at(5), filled(42)) == (errno.EAGAIN, -errno.EAGAIN)
    with pytest.raises(BlockingIOError):  # not for ever: migkit stops trying after a second
        guest.place(5, 42)
    assert present_pages(ram) == [0, 1]
    assert guest.message() == (EventType.REMOVE, guest.at(0), guest.at(2), 0)
    guest.end()
    assert guest.place(5, 42) == PAGE_SIZE
    assert present_pages(ram) == [5]


def test_copy_waits_while_a_remove_is_under_way(ram, make_guest):
    guest = make_guest(ram, MISSING | Feature.EVENT_REMOVE)
    ram.write(0, filled(1))
    guest.begin("libc.madvise(ram.address, PAGE_SIZE, advice)", advice=MADV_REMOVE)
    assert select.select([guest.uffd], [], [], DEADLINE_S)[0]
    reader = threading.Timer(0.1, guest.message)
    reader.start()
    assert guest.place(5, 42) == PAGE_SIZE
    reader.join()
    guest.end()
    assert present_pages(ram) == [5]


def test_a_page_that_is_unmapped_stays_and_one_that_is_punched_out_faults_again(ram, make_guest):
    guest = make_guest(ram)
    ram.write(3, filled(9))
    assert guest.run("answer = int(ram.pages[3, 0])") == 9
    guest.run(
        "libc.madvise(ram.address + 3 * PAGE_SIZE, PAGE_SIZE, mmap.MADV_DONTNEED)\n"
        "answer = int(ram.pages[3, 0])"
    )
    assert guest.run("answer = int(ram.pages[3, 0])") == 9
    assert present_pages(ram) == [3]
    ram.discard(3 * PAGE_SIZE, PAGE_SIZE)
    assert present_pages(ram) == []
    guest.begin_reading(3)
    assert guest.message().address == guest.at(3)
    guest.place(3, 10)
    assert guest.end() == 10


def test_unregistering_wakes_who_waits_and_gives_it_zeros(guest):
    guest.begin_reading(3)
    guest.message()
    guest.uffd.unregister(guest.address, 16 * PAGE_SIZE)
    assert guest.end() == 0


# The ends of a guest and of its handler.


def test_when_the_last_userfaultfd_closes_the_waiting_read_zeros(guest):
    guest.run("uffd.close()")
    guest.begin_reading(3)
    guest.message()
    assert guest.waits()
    guest.uffd.close()
    assert guest.end() == 0


def test_a_guest_with_a_userfaultfd_of_its_own_waits_when_its_handler_is_gone(guest):
    guest.begin_reading(3)
    guest.message()
    guest.uffd.close()
    assert guest.waits()


def test_placing_for_a_guest_that_was_killed_says_so(guest, ram):
    guest.begin_reading(3)
    guest.message()
    pidfd = os.pidfd_open(guest.pid)
    guest.process.kill()
    assert select.select([pidfd], [], [], DEADLINE_S)[0], "a pidfd tells of the end"
    os.close(pidfd)
    guest.process.wait()
    poller = select.poll()
    poller.register(guest.uffd)
    assert not any(flags & select.POLLHUP for _, flags in poller.poll(0))
    assert bare_copy(guest.uffd, guest.at(3), filled(1)) == (errno.ESRCH, 0)
    with pytest.raises(ProcessLookupError):
        guest.place(3, 42)
    with pytest.raises(ProcessLookupError):
        guest.uffd.zeropage(guest.at(3), PAGE_SIZE)
    assert present_pages(ram) == []


def test_a_forked_child_reads_zeros_and_says_nothing(ram, guest):
    status = guest.run(
        "pid = os.fork()\n"
        "if pid == 0: os._exit(100 + int(ram.pages[3, 0]))\n"
        "answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])"
    )
    assert status == 100
    assert guest.uffd.read() == []
    assert present_pages(ram) == [3], "and with it the page's place is taken"


# Pages that the kernel or another process needs.


def test_a_system_call_that_needs_a_missing_page_waits_for_it(ram, make_patient_guest):
    guest = make_patient_guest(ram)
    guest.begin(
        "r, w = os.pipe(); os.write(w, b'abc')\n"
        "os.readv(r, [memoryview(ram.pages[3])])\n"
        "answer = ram.pages[3, :4].tolist()"
    )
    assert guest.message().address == guest.at(3)
    assert guest.waits()
    guest.place(3, 42)
    assert guest.end() == [*b"abc", 42]


def test_a_system_call_fails_where_only_user_mode_may_wait(ram, guest):
    with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
        guest.run("r, w = os.pipe(); os.write(w, b'abc')\nos.readv(r, [memoryview(ram.pages[3])])")
    assert guest.uffd.read() == []
    assert present_pages(ram) == []


def test_mlock_waits_for_a_missing_page(ram, make_patient_guest):
    guest = make_patient_guest(ram)
    guest.begin("answer = libc.mlock(ram.address + 3 * PAGE_SIZE, PAGE_SIZE)")
    assert guest.message().address == guest.at(3)
    assert guest.waits()
    guest.place(3, 42)
    assert guest.end() == 0


def test_another_process_that_reads_the_memory_waits_as_well(ram, make_patient_guest, make_process):
    guest, other = make_patient_guest(ram), make_process()
    other.begin(READ_OTHER_PROCESS, pid=guest.pid, address=guest.at(3), length=4)
    assert guest.message().address == guest.at(3)
    assert other.waits()
    guest.place(3, 42)
    assert other.end() == [42] * 4
    assert guest.run("answer = int(ram.pages[3, 0])") == 42


@pytest.mark.parametrize("patient", [True, False])
def test_proc_pid_mem_does_not_wait_but_fails(ram, request, make_guest, make_process, patient):
    guest = request.getfixturevalue("make_patient_guest")(ram) if patient else make_guest(ram)
    other = make_process()
    got = other.run(
        "fd = os.open(f'/proc/{pid}/mem', os.O_RDONLY)\n"
        "try: answer = list(os.pread(fd, 8, address))\n"
        "except OSError as error: answer = error.errno\n",
        pid=guest.pid, address=guest.at(3),
    )  # fmt: skip
    assert got == errno.EIO
    assert guest.uffd.read() == []
    assert present_pages(ram) == []


# Which pages were written.


@pytest.mark.parametrize("features", [WP_ASYNC, WP_ASYNC | Feature.WP_UNPOPULATED])
def test_a_range_that_was_never_touched_counts_as_written_until_it_is_protected(
    make_ram, watch, features
):
    n_pages = 4096
    ram = make_ram(n_pages)
    uffd = watch(ram, Register.WP, features)
    assert scanned_pages(os.getpid(), ram.address, n_pages) == list(range(n_pages))
    uffd.write_protect(ram.address, ram.size)
    assert scanned_pages(os.getpid(), ram.address, n_pages) == []
    ram.pages[77, 5] = 1
    assert scanned_pages(os.getpid(), ram.address, n_pages) == [77]
    assert present_pages(ram) == [77], "neither protecting nor scanning allocates"


def test_a_scan_of_another_process_finds_exactly_what_it_wrote(make_ram, make_guest):
    n_pages = 65536
    guest = make_guest(make_ram(n_pages), WP_ASYNC | Feature.WP_UNPOPULATED, Register.WP)
    guest.uffd.write_protect(guest.address, n_pages * PAGE_SIZE)
    for seed in range(4):
        pages = np.random.default_rng(seed).choice(n_pages, 1000, replace=False)
        guest.run("for page in pages: ram.pages[page, 8] += 1", pages=pages.tolist())
        found = scanned_pages(guest.pid, guest.address, n_pages, protect=True)
        assert found == sorted(pages.tolist())
    assert scanned_pages(guest.pid, guest.address, n_pages) == []
    assert guest.uffd.read() == []


def test_a_scan_of_more_regions_than_fit_in_one_call_finds_all(make_ram, watch):
    n_pages = 40000
    ram = make_ram(n_pages)
    uffd = watch(ram, Register.WP, WP_ASYNC)
    uffd.write_protect(ram.address, ram.size)
    ram.pages[::2, 0] = 1
    with Pagemap(os.getpid()) as pagemap:
        found = pagemap.scan(ram.address, ram.size, Category.WRITTEN, protect=True)
        assert len(found) == n_pages // 2
        assert np.array_equal(found["start"], ram.address + np.arange(0, ram.size, 2 * PAGE_SIZE))
        assert not len(pagemap.scan(ram.address, ram.size, Category.WRITTEN))


def test_dirty_bits_belong_to_one_process(ram, watch, make_guest):
    guest = make_guest(ram, WP_ASYNC, Register.WP)
    guest.uffd.write_protect(guest.address, ram.size)
    watch(ram, Register.WP, WP_ASYNC).write_protect(ram.address, ram.size)
    guest.run("ram.pages[3, 0] = 1")
    ram.pages[5, 0] = 1
    assert scanned_pages(guest.pid, guest.address, 16) == [3]
    assert scanned_pages(os.getpid(), ram.address, 16) == [5]


def test_lifting_the_write_protection_marks_pages_as_written(ram, watch):
    uffd = watch(ram, Register.WP, WP_ASYNC)
    ram.pages[:] = 1
    uffd.write_protect(ram.address, ram.size)
    uffd.write_protect(ram.address, 4 * PAGE_SIZE, protect=False)
    assert scanned_pages(os.getpid(), ram.address, 16) == [0, 1, 2, 3]


def test_protecting_by_scan_needs_a_range_that_is_watched_for_writes(ram):
    ram.pages[:] = 1
    with Pagemap(os.getpid()) as pagemap, pytest.raises(PermissionError):
        pagemap.scan(ram.address, ram.size, Category.WRITTEN, protect=True)


def test_a_scan_of_nothing_finds_nothing(ram):
    with Pagemap(os.getpid()) as pagemap:
        assert len(pagemap.scan(ram.address, 0, Category.WRITTEN)) == 0


def test_a_scan_that_begins_within_a_page_is_refused(ram):
    with Pagemap(os.getpid()) as pagemap, pytest.raises(OSError, match="Invalid argument"):
        pagemap.scan(ram.address + 1, PAGE_SIZE, Category.WRITTEN)


def test_the_page_map_of_a_process_that_is_gone_cannot_be_opened(make_process):
    process = make_process()
    process.close()
    with pytest.raises(FileNotFoundError):
        Pagemap(process.pid)


def test_the_page_map_of_another_user_is_refused_with_the_remedy(make_process):
    if os.geteuid() != 0:
        pytest.skip("setuid: only root can have a process of another user")
    process = make_process()
    process.become_nobody()
    refusal = process.run(
        "try: Pagemap(pid)\nexcept Exception as error: answer = [type(error).__name__, str(error)]",
        pid=os.getpid(),
    )
    assert refusal[0] == "CapabilityError"
    assert f"/proc/{os.getpid()}/pagemap" in refusal[1]
    assert "run as the same user or as root" in refusal[1]


def test_without_privilege_a_user_can_place_and_find_written_pages(
    make_ram, make_guest, make_process
):
    ram = make_ram()
    guest = make_guest(ram, WP_ASYNC | MISSING, Register.MISSING | Register.WP, nobody=True)
    scanner = make_process()
    scanner.become_nobody()
    guest.begin_reading(0)
    assert guest.message().address == guest.at(0)
    assert place(guest.uffd, guest.address, *range(1, 9)) == 8 * PAGE_SIZE
    assert guest.end() == 1
    guest.uffd.write_protect(guest.address, ram.size)
    guest.run("ram.pages[2, 1] = 1; ram.pages[5, 1] = 1")
    starts = scanner.run(
        "with Pagemap(pid) as pagemap:\n"
        "    found = pagemap.scan(address, size, Category.WRITTEN, protect=True)\n"
        "    left = pagemap.scan(address, size, Category.WRITTEN)\n"
        "answer = [found['start'].tolist(), len(left)]",
        pid=guest.pid, address=guest.address, size=ram.size,
    )  # fmt: skip
    assert starts == [[guest.at(2), guest.at(5)], 0]
    with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
        guest.run("r, w = os.pipe(); os.write(w, b'x'); os.readv(r, [memoryview(ram.pages[12])])")


# RAM blocks.


def test_a_new_block_has_no_page_and_reads_as_zeros_without_getting_any(ram):
    assert ram.n_pages == 16
    assert ram.read(0, ram.size) == bytes(ram.size)
    assert ram.pages.shape == (16, PAGE_SIZE)  # mapped, not touched
    assert not ram.present().any()
    assert list(ram.data_ranges()) == []


def test_what_is_present_is_known_by_range_and_by_page(ram):
    ram.write(2, filled(1, 2, 3))
    ram.pages[9, 17] = 4
    ram.write(15, filled(5))
    assert present_pages(ram) == [2, 3, 4, 9, 15]
    in_pages = [(start // PAGE_SIZE, end // PAGE_SIZE) for start, end in ram.data_ranges()]
    assert in_pages == [(2, 5), (9, 10), (15, 16)]
    assert ram.read(4 * PAGE_SIZE - 1, 2) == b"\2\3"
    assert ram.read(9 * PAGE_SIZE + 17, 1) == b"\4"


def test_what_is_written_to_the_file_is_seen_in_the_mapping_and_the_other_way_round(ram):
    rows = np.random.default_rng(1).integers(0, 256, (4, PAGE_SIZE), np.uint8)
    ram.write(3, rows)
    assert np.array_equal(ram.pages[3:7], rows)
    ram.pages[3] = 1
    assert ram.read(3 * PAGE_SIZE, PAGE_SIZE) == b"\1" * PAGE_SIZE
    ram.write(8, rows[::2])  # rows that do not lie in a row
    assert np.array_equal(ram.pages[8:10], rows[::2])


def test_pages_past_the_end_of_a_block_cannot_be_written(ram):
    for first in (15, 16, -1):
        with pytest.raises(IndexError, match="which has 16"):
            ram.write(first, filled(1, 2))
    assert os.fstat(ram.fd).st_size == ram.size


def test_a_discard_throws_away_the_range_and_nothing_else(ram):
    ram.write(0, filled(*range(1, 17)))
    ram.discard(4 * PAGE_SIZE, 3 * PAGE_SIZE)
    assert present_pages(ram) == [0, 1, 2, 3, *range(7, 16)]
    assert ram.read(4 * PAGE_SIZE, 3 * PAGE_SIZE) == bytes(3 * PAGE_SIZE)
    assert os.fstat(ram.fd).st_size == ram.size


def test_a_discard_that_the_kernel_refuses_names_the_block_and_the_place(ram):
    with pytest.raises(OSError, match="discard of ram at 0x1000"):
        ram.discard(PAGE_SIZE, 0)


@pytest.mark.parametrize(
    ("size", "page_size", "message"),
    [
        (0, PAGE_SIZE, "4096 or 8192 would be"),
        (-PAGE_SIZE, PAGE_SIZE, "not a multiple"),
        (PAGE_SIZE + 1, PAGE_SIZE, "4096 or 8192 would be"),
        (3 << 20, HUGE, "2097152 or 4194304 would be"),
        (1 << 20, 8192, "8192 is not one of 4096, 2097152, 1073741824"),
        (1 << 20, 0, "page size 0 is not one of"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_sizes_that_would(size, page_size, message):
    with pytest.raises(OptionError, match=message):
        RamBlock.create("ram", size, page_size)
    with pytest.raises(OptionError, match=message):
        check_size(size, page_size)


def test_more_huge_pages_than_there_are_is_an_error_with_the_remedy(huge_pages, stack):
    size = (huge_pages_free(HUGE) + (64 << 10)) * HUGE
    ram = RamBlock.create("ram", size, HUGE)
    stack.callback(ram.close)
    with pytest.raises(CapabilityError, match=r"raise /proc/sys/vm/nr_hugepages"):
        ram.pages  # noqa: B018 — the mapping is made when it is first needed


def test_memory_that_is_available_is_told_in_bytes():
    assert 16 << 20 < memory_available() < 1 << 50


def test_a_block_that_is_closed_twice_is_closed(ram):
    ram.close()
    ram.close()
    assert ram.fd == -1


# Huge pages.


def test_zeropage_is_refused_on_huge_pages_and_a_copied_zero_page_will_do(huge_ram, watch):
    uffd = watch(huge_ram, features=Feature.MISSING_HUGETLBFS)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        uffd.zeropage(huge_ram.address, HUGE)
    assert place(uffd, huge_ram.address, 0, page_size=HUGE) == HUGE
    assert not huge_ram.pages[0].any()


def test_huge_pages_are_placed_and_thrown_away_whole(huge_ram, watch):
    uffd = watch(huge_ram, features=Feature.MISSING_HUGETLBFS)
    assert place(uffd, huge_ram.address, 1, 2, page_size=HUGE) == 2 * HUGE
    assert place(uffd, huge_ram.address + HUGE, 9, page_size=HUGE) == 0
    assert huge_ram.read(HUGE - 1, 2) == b"\1\2"
    assert huge_ram.read(3 * HUGE, 2) == b"\0\0"
    huge_ram.discard(HUGE, HUGE)
    assert place(uffd, huge_ram.address + HUGE, 9, page_size=HUGE) == HUGE
    assert huge_ram.pages[1, -1] == 9


def test_huge_pages_are_written_and_read(huge_ram):
    huge_ram.write(1, filled(3, 4, page_size=HUGE))
    assert huge_ram.pages[:3, -1].tolist() == [0, 3, 4]
    assert huge_ram.read(2 * HUGE - 1, 2) == b"\3\4"


def test_huge_pages_do_not_tell_whether_they_are_present(huge_ram):
    """hugetlbfs has no SEEK_DATA, so all count as present, which is safe where no one waits."""
    assert huge_ram.present().all()


def test_a_scan_finds_written_huge_pages(huge_ram, watch):
    uffd = watch(huge_ram, Register.WP, WP_ASYNC)
    huge_ram.pages[:] = 1
    uffd.write_protect(huge_ram.address, huge_ram.size)
    huge_ram.pages[2, 12345] = 2
    with Pagemap(os.getpid()) as pagemap:
        found = pagemap.scan(huge_ram.address, huge_ram.size, Category.WRITTEN, protect=True)
        assert [(int(r["start"]), int(r["end"])) for r in found] == [
            (huge_ram.address + 2 * HUGE, huge_ram.address + 3 * HUGE)
        ]
        assert not len(pagemap.scan(huge_ram.address, huge_ram.size, Category.WRITTEN))


# What lives no longer than a socket.


@pytest.fixture
def lifeline(stack):
    """Two connected sockets: who holds the second is to die when the first closes."""
    ours, theirs = socket.socketpair()
    stack.callback(ours.close)
    stack.callback(theirs.close)
    return ours, theirs


def tie(process, sock):
    """Have a process die with a socket that it inherited, of which it has the only reference."""
    process.run("lifeline = socket.socket(fileno=fd); die_with(lifeline)", fd=sock.fileno())
    sock.close()


def killed(process):
    return process.process.wait(DEADLINE_S) == -signal.SIGKILL


def test_a_process_that_waits_for_a_page_dies_with_its_lifeline(ram, make_guest, lifeline):
    ours, theirs = lifeline
    guest = make_guest(ram, inherited=[theirs.fileno()])
    tie(guest, theirs)
    guest.begin_reading(3)
    guest.message()
    assert guest.waits()
    ours.close()
    assert killed(guest)


def test_a_process_that_computes_dies_with_its_lifeline(make_process, lifeline):
    ours, theirs = lifeline
    process = make_process(theirs.fileno())
    tie(process, theirs)
    process.begin("while True: pass")
    assert process.waits()
    ours.close()
    assert killed(process)


def test_a_lifeline_that_was_cut_before_it_was_tied_kills_at_once(make_process, lifeline):
    ours, theirs = lifeline
    process = make_process(theirs.fileno())
    ours.close()
    process.begin("lifeline = socket.socket(fileno=fd); die_with(lifeline)", fd=theirs.fileno())
    assert killed(process)


def test_a_lifeline_holds_when_the_thread_that_started_the_process_ends(make_process, lifeline):
    _, theirs = lifeline
    made = []
    thread = threading.Thread(target=lambda: made.append(make_process(theirs.fileno())))
    thread.start()
    thread.join()
    (process,) = made
    tie(process, theirs)
    assert process.run("answer = 6 * 7") == 42


@pytest.fixture
def make_child(stack, tmp_path, monkeypatch):
    """Start children that run a module of our own, found because this process would find it."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(code, *arguments, fds=()):
        (tmp_path / "some_module.py").write_text(code)
        child = Child("some_module", arguments, fds, tmp_path / "log")
        stack.callback(child.kill)
        return child

    return make


def test_a_child_gets_its_arguments_and_descriptors_and_leaves_last_words(make_child, stack):
    r, w = os.pipe()
    stack.callback(os.close, r)
    child = make_child(
        "import os, sys; os.write(int(sys.argv[1]), b'here'); sys.exit('that was all')",
        str(w), fds=[w],
    )  # fmt: skip
    os.close(w)
    assert os.read(r, 16) == b"here"
    assert child.wait(DEADLINE_S)
    assert child.exit_code == 1
    assert child.last_words() == "that was all"


def test_a_child_is_in_a_session_of_its_own_and_can_be_killed_twice(make_child):
    child = make_child("import time; time.sleep(600)")
    assert child.exit_code is None
    assert not child.wait(0)
    assert os.getsid(child.pid) == child.pid
    child.kill()
    child.kill()
    assert child.exit_code == -signal.SIGKILL
    assert child.last_words() == ""


# What this machine can do.


def test_this_machine_can_do_all_that_a_migration_needs():
    checks = {check.name: check for check in kernel_checks()}
    assert all(check.ok for check in checks.values() if check.required), checks
    assert all(check.outcome for check in checks.values())
    assert all(check.remedy for check in checks.values() if not check.ok)
    assert checks["userfaultfd"].outcome.startswith(f"Linux {os.uname().release}")


def test_an_unprivileged_user_can_do_all_that_is_required(make_process):
    process = make_process()
    process.become_nobody()
    checks = process.run(
        "from migkit.kernel.capability import kernel_checks\n"
        "answer = [[c.name, c.ok, c.required, c.remedy] for c in kernel_checks()]"
    )
    assert all(ok for _, ok, required, _ in checks if required), checks
    for name, ok, _, remedy in checks:
        if name == "faults within system calls" and not ok:
            assert "vm.unprivileged_userfaultfd" in remedy


def test_a_check_that_fails_says_what_was_seen_and_what_to_do():
    def works():
        return "seen"

    def lacks():
        raise CapabilityError("it is not there")

    def refuses():
        raise PermissionError(errno.EPERM, "not you")

    checks = run_checks(
        (("one", works, "a", True), ("two", lacks, "b", True), ("three", refuses, "c", False))
    )
    assert list(checks) == [
        Check("one", True, "seen", "", True),
        Check("two", False, "it is not there", "b", True),
        Check("three", False, "[Errno 1] not you", "c", False),
    ]


def test_a_feature_that_no_kernel_has_is_refused_and_leaves_no_descriptor():
    assert supported_features() & WP_ASYNC == WP_ASYNC
    with pytest.raises(CapabilityError, match=r"needs Linux 6\.7"):
        Userfaultfd.create(Feature(1 << 40), user_mode_only=True)


def test_a_userfaultfd_that_is_closed_twice_is_closed():
    uffd = Userfaultfd.create(NONE, user_mode_only=True)
    assert uffd.fileno() == uffd.fd >= 0
    uffd.close()
    uffd.close()
    assert uffd.fd == -1
