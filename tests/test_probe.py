"""The fault probe against a real kernel: real faults, a real handler, real collectors."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from migkit.errors import CapabilityError, MigkitError, OptionError
from migkit.probe import FAULT_DTYPE, ErrorCode, FaultFlag, Probe, Watch, available
from migkit.probe import capability as capability_module
from migkit.probe import headers as headers_module
from migkit.probe.collector import MAX_RANGES
from migkit.probe.records import last_versions

PAGE = 4096
UFFDIO_WAKE = 0x8010AA02
UFFDIO_COPY = 0xC028AA03

# Runs the snippets it is sent; the RAM is registered with a userfaultfd that the test gets.
GUEST = """
import ctypes, fcntl, json, mmap, os, random, signal, socket, struct, sys, threading, time
PAGE, n_pages, kind = 4096, int(sys.argv[2]), sys.argv[3]
control = socket.socket(fileno=int(sys.argv[1]))
libc = ctypes.CDLL(None, use_errno=True)
if kind == "memfd":
    fd = os.memfd_create("ram")
    os.ftruncate(fd, n_pages * PAGE)
    ram = mmap.mmap(fd, n_pages * PAGE)
else:
    ram = mmap.mmap(-1, n_pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ram.madvise(mmap.MADV_NOHUGEPAGE)
start = ctypes.addressof(ctypes.c_char.from_buffer(ram))
uffd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK)
assert uffd >= 0, os.strerror(ctypes.get_errno())
fcntl.ioctl(uffd, 0xc018aa3f, struct.pack("QQQ", 0xaa, 0, 0))
fcntl.ioctl(uffd, 0xc020aa00, struct.pack("QQQQ", start, n_pages * PAGE, 1, 0))
socket.send_fds(control, [json.dumps({"start": start}).encode()], [uffd])
names = dict(globals())
while True:
    snippet = control.recv(65536)
    if not snippet:
        break
    names["answer"] = None
    exec(snippet, names)
    control.send(json.dumps(names["answer"]).encode())
"""


class Guest:
    """A process with missing pages, and a thread here that places them."""

    def __init__(self, n_pages: int, kind: str = "memfd"):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(60)
        self.n_pages = n_pages
        self.control = ours
        self.process = subprocess.Popen(
            [sys.executable, "-c", GUEST, str(theirs.fileno()), str(n_pages), kind],
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        message, fds, _, _ = socket.recv_fds(ours, 4096, 1)
        self.start = json.loads(message)["start"]
        self.uffd = fds[0]
        self.messages: list[int] = []  # page of each page fault message
        self.placing = threading.Event()
        self.placing.set()
        self.placed_ns: dict[int, int] = {}  # when the placing of a page began
        self._source = ctypes.create_string_buffer(b"x" * PAGE)
        self._stopping = False
        self._thread = threading.Thread(target=self._handle, daemon=True)
        self._thread.start()

    @property
    def pid(self):
        return self.process.pid

    def watch(self):
        return Watch(self.pid, self.start, self.n_pages * PAGE)

    def address(self, page):
        return self.start + page * PAGE

    def send(self, snippet):
        self.control.send(snippet.encode())

    def answer(self):
        return json.loads(self.control.recv(65536))

    def run(self, snippet):
        self.send(snippet)
        return self.answer()

    def _handle(self):
        poller = select.poll()
        poller.register(self.uffd, select.POLLIN)
        unplaced: list[int] = []
        while not self._stopping:
            with contextlib.suppress(BlockingIOError):  # a signal withdraws an unread message
                poller.poll(5)
                address = struct.unpack("<16xQ8x", os.read(self.uffd, 32))[0]
                page = (address - self.start) // PAGE
                self.messages.append(page)
                unplaced.append(page)
            if self.placing.is_set():
                for page in unplaced:
                    self.place(page)
                unplaced.clear()

    def place(self, page):
        self.placed_ns.setdefault(page, time.monotonic_ns())
        request = struct.pack(
            "<QQQQq", self.address(page), ctypes.addressof(self._source), PAGE, 0, 0
        )
        try:
            fcntl.ioctl(self.uffd, UFFDIO_COPY, request)
        except FileExistsError:
            self.wake(page)
        except ProcessLookupError:
            pass

    def wake(self, page):
        fcntl.ioctl(self.uffd, UFFDIO_WAKE, struct.pack("<QQ", self.address(page), PAGE))

    def close(self):
        self.control.close()
        self.process.kill()
        self.process.wait()
        self._stopping = True
        self._thread.join()
        os.close(self.uffd)


@pytest.fixture(scope="module")
def probe_works():
    capability = available()
    if not capability.ok:
        pytest.skip(f"the fault probe cannot run here: {capability}")


@pytest.fixture
def guest_factory(probe_works):
    with contextlib.ExitStack() as stack:

        def make(n_pages=64, kind="memfd"):
            guest = Guest(n_pages, kind)
            stack.callback(guest.close)
            return guest

        yield make


@pytest.fixture
def guest(guest_factory):
    return guest_factory()


def eventually(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def pages_of(records, guest):
    return ((records["address"] - np.uint64(guest.start)) // PAGE).tolist()


def assert_complete(records, share=1.0):
    slept = records[records["blocked_ns"] > 0]
    complete = (
        (slept["fault_ns"] < slept["blocked_ns"])
        & (slept["blocked_ns"] <= slept["woken_ns"])
        & (slept["woken_ns"] < slept["running_ns"])
    )
    assert complete.sum() >= share * len(slept), slept[~complete][:5]
    unslept = records[records["blocked_ns"] == 0]
    for stage in ("woken_ns", "running_ns"):
        assert not unslept[stage].any()


@pytest.mark.parametrize("kind", ["memfd", "anonymous"])
def test_every_fault_that_userfaultfd_reports_is_one_complete_record(guest_factory, kind):
    guest = guest_factory(5000, kind)
    before_ns = time.monotonic_ns()
    with Probe([guest.watch()]) as probe:
        guest.run(
            "order = random.Random(1).sample(range(n_pages), n_pages)\n"
            "for page in order: ram[page * PAGE + 8] = 1\n"
            "answer = threading.get_native_id()"
        )
        result = probe.stop()
    records = result.records
    assert result.lost == 0
    assert result.status.complete
    assert sorted(pages_of(records, guest)) == sorted(guest.messages) == list(range(5000))
    assert_complete(records, 0.995)
    assert np.mean(records["blocked_ns"] > 0) > 0.9
    assert np.all(records["address"] % PAGE == 8)
    assert np.all(records["pid"] == guest.pid)
    assert np.all(records["error_code"] & ErrorCode.WRITE)
    assert not np.any(records["flags"] & FaultFlag.KERNEL_MODE)
    assert before_ns < records["fault_ns"].min()
    assert records["running_ns"].max() < time.monotonic_ns()
    assert np.all(np.diff(records["fault_ns"].astype(np.int64)) > 0)
    for record, page in zip(records[:50], pages_of(records, guest)[:50], strict=True):
        assert record["fault_ns"] < guest.placed_ns[page]
        assert guest.placed_ns[page] < record["running_ns"]


def test_reads_and_writes_are_told_apart(guest):
    with Probe([guest.watch()]) as probe:
        guest.run("ram[0]; ram[PAGE] = 1")
        records = probe.stop().records
    assert [bool(code & ErrorCode.WRITE) for code in records["error_code"]] == [False, True]


def test_ordinary_sleeps_after_a_fault_leave_its_record_alone(guest):
    with Probe([guest.watch()]) as probe:
        guest.run("ram[0]")
        after_fault = probe.records()
        guest.run("for _ in range(20): time.sleep(0.01)")
        assert len(after_fault) == 1
        assert_complete(after_fault)
        assert np.array_equal(probe.stop().records, after_fault)


def test_a_wait_of_get_user_pages_is_not_taken_for_the_last_fault(guest):
    """Mlock waits in handle_userfault too, but without an exception and so without a record."""
    with Probe([guest.watch()]) as probe:
        guest.run("ram[0]")
        after_fault = probe.records()
        assert (
            guest.run("answer = libc.mlock(ctypes.c_void_p(start + PAGE), ctypes.c_size_t(PAGE))")
            == 0
        )
        assert guest.messages == [0, 1]
        assert np.array_equal(probe.stop().records, after_fault)


def test_a_fault_outside_the_watched_range_does_not_touch_the_last_record(guest):
    with Probe([Watch(guest.pid, guest.start, PAGE)]) as probe:
        guest.run("ram[0]")
        after_fault = probe.records()
        guest.run("ram[PAGE]; ram[2 * PAGE]")
        assert guest.messages == [0, 1, 2]
        assert pages_of(after_fault, guest) == [0]
        assert np.array_equal(probe.stop().records, after_fault)


def test_a_system_calls_fault_is_recorded_as_the_kernels(guest):
    with Probe([guest.watch()]) as probe:
        n_bytes = guest.run(
            "pipe = os.pipe(); os.write(pipe[1], b'y' * 100)\n"
            "answer = os.readv(pipe[0], [memoryview(ram)[PAGE:PAGE + 100]])"
        )
        records = probe.stop().records
    assert n_bytes == 100
    assert pages_of(records, guest) == guest.messages == [1]
    assert records["flags"][0] & FaultFlag.KERNEL_MODE
    assert records["error_code"][0] & ErrorCode.WRITE
    assert_complete(records)


def test_each_wake_up_before_the_page_makes_a_message_but_no_record(guest):
    guest.placing.clear()
    with Probe([guest.watch()]) as probe:
        guest.send("ram[0]")
        for n_messages in (1, 2, 3):
            eventually(lambda n=n_messages: len(guest.messages) == n)
            time.sleep(0.01)  # let it fall asleep
            guest.wake(0)
        eventually(lambda: len(guest.messages) == 4)
        guest.placing.set()
        guest.answer()
        records = probe.stop().records
    assert guest.messages == [0, 0, 0, 0]
    assert len(records) == 1
    assert_complete(records)
    assert records["blocked_ns"][0] < records["fault_ns"][0] + 10_000_000
    assert records["woken_ns"][0] > guest.placed_ns[0]


def test_a_signal_during_a_fault_makes_a_second_record(guest):
    guest.run("signal.signal(signal.SIGUSR1, lambda *_: None)")
    guest.placing.clear()
    with Probe([guest.watch()]) as probe:
        guest.send("ram[0]")
        for n_messages in (1, 2, 3):
            eventually(lambda n=n_messages: len(guest.messages) == n)
            time.sleep(0.01)
            os.kill(guest.pid, signal.SIGUSR1)
        eventually(lambda: len(guest.messages) == 4)
        guest.placing.set()
        guest.answer()
        records = probe.stop().records
    assert pages_of(records, guest) == guest.messages == [0, 0, 0, 0]
    assert_complete(records)
    assert records["woken_ns"][2] < guest.placed_ns[0] < records["woken_ns"][3]


def test_a_signal_during_a_system_calls_fault_stays_in_one_record(guest):
    guest.run(
        "signal.signal(signal.SIGUSR1, lambda *_: None)\n"
        "pipe = os.pipe(); os.write(pipe[1], b'y' * 100)"
    )
    guest.placing.clear()
    with Probe([guest.watch()]) as probe:
        guest.send("answer = os.readv(pipe[0], [memoryview(ram)[PAGE:PAGE + 100]])")
        eventually(lambda: guest.messages)
        time.sleep(0.01)
        os.kill(guest.pid, signal.SIGUSR1)
        time.sleep(0.01)
        guest.placing.set()
        assert guest.answer() == 100
        records = probe.stop().records
    assert pages_of(records, guest) == [1]
    assert_complete(records)


def test_threads_have_their_own_records(guest_factory):
    guest = guest_factory(2000)
    with Probe([guest.watch()]) as probe:
        tids = guest.run(
            "def touch(pages):\n"
            "    tids.append(threading.get_native_id())\n"
            "    for page in pages: ram[page * PAGE]\n"
            "tids = []\n"
            "halves = [range(0, n_pages, 2), range(1, n_pages, 2)]\n"
            "threads = [threading.Thread(target=touch, args=(half,)) for half in halves]\n"
            "for thread in threads: thread.start()\n"
            "for thread in threads: thread.join()\n"
            "answer = tids"
        )
        result = probe.stop()
    records = result.records
    assert result.lost == 0
    assert sorted(pages_of(records, guest)) == list(range(2000))
    assert set(records["tid"].tolist()) == set(tids)
    for tid in tids:
        pages = pages_of(records[records["tid"] == tid], guest)
        assert len(pages) == 1000
        assert len({page % 2 for page in pages}) == 1
    assert_complete(records, 0.995)


def test_other_processes_and_ranges_are_not_reported(guest_factory):
    watched, other = guest_factory(), guest_factory()
    with Probe() as probe:
        probe.watch(watched.pid, watched.start, 8 * PAGE)
        probe.watch(watched.pid, watched.start + 32 * PAGE, 8 * PAGE)
        for guest in (watched, other):
            guest.run("for page in range(n_pages): ram[page * PAGE]")
        records = probe.stop().records
    assert pages_of(records, watched) == [*range(8), *range(32, 40)]
    assert set(records["pid"].tolist()) == {watched.pid}


def test_watches_come_and_go_while_the_probe_runs(guest):
    with Probe() as probe:
        guest.run("ram[0]")
        probe.watch(guest.pid, guest.start, guest.n_pages * PAGE)
        guest.run("ram[PAGE]")
        probe.unwatch(guest.pid)
        guest.run("ram[2 * PAGE]")
        probe.watch(guest.pid, guest.start, guest.n_pages * PAGE)
        guest.run("ram[3 * PAGE]")
        assert pages_of(probe.stop().records, guest) == [1, 3]


def test_a_fault_read_while_pending_is_delivered_once(guest):
    guest.placing.clear()
    with Probe([guest.watch()]) as probe:
        guest.send("ram[0]")
        eventually(lambda: guest.messages)
        time.sleep(0.4)  # the collector takes a snapshot of its own
        in_flight = probe.records()
        guest.placing.set()
        guest.answer()
        landed = probe.records()
        guest.run("ram[PAGE]")
        final = probe.stop().records
    assert len(in_flight) == len(landed) == 1
    assert in_flight["blocked_ns"][0] > 0
    assert in_flight["running_ns"][0] == 0
    assert_complete(landed)
    assert np.array_equal(final[:1], landed)
    assert pages_of(final, guest) == [0, 1]


def test_a_dead_threads_last_fault_is_delivered(guest):
    with Probe([guest.watch()]) as probe:
        guest.run(
            "for page in range(20):\n"
            "    thread = threading.Thread(target=lambda: ram[page * PAGE])\n"
            "    thread.start(); thread.join()"
        )
        records = probe.stop().records
    assert pages_of(records, guest) == list(range(20))
    assert_complete(records)


def test_the_records_survive_the_collector(guest):
    probe = Probe([guest.watch()])
    probe.start()
    guest.run("for page in range(10): ram[page * PAGE]")
    time.sleep(0.6)
    os.kill(probe._running.process.pid, signal.SIGKILL)
    guest.run("for page in range(10, 20): ram[page * PAGE]")
    assert pages_of(probe.records(), guest) == list(range(10))
    with pytest.raises(MigkitError, match="collector died"):
        probe.watch(guest.pid, guest.start, PAGE)
    result = probe.stop()
    assert pages_of(result.records, guest) == list(range(10))
    assert_complete(result.records)
    assert not result.status.complete
    assert "status -9" in result.status.notices[0]


def test_the_watched_process_may_die_in_a_fault(guest):
    guest.run("ram[0]")
    guest.placing.clear()
    with Probe([guest.watch()]) as probe:
        guest.send("ram[PAGE]")
        eventually(lambda: guest.messages == [0, 1])
        guest.process.kill()
        guest.process.wait()
        with pytest.raises(OptionError, match=f"process {guest.pid}"):
            probe.watch(guest.pid, guest.start, PAGE)
        result = probe.stop()
    assert result.status.complete
    assert pages_of(result.records, guest) == [1]


@pytest.mark.usefixtures("probe_works")
@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), 9)", "os._exit(fork())"])
def test_the_collector_ends_with_its_parent(end):
    script = (
        "import os, sys, time\n"
        "from migkit.probe import Probe\n"
        "def fork():\n"  # a copy of the control socket lives on
        "    if os.fork() == 0:\n"
        "        sys.stdin.read()\n"
        "    return 0\n"
        "probe = Probe(); probe.start()\n"
        "print(probe._running.process.pid, flush=True)\n"
        "sys.stdin.readline()\n"
        f"{end}"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    ) as parent:
        collector = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.stdin.write("\n")
            parent.stdin.flush()
            assert select.select([collector], [], [], 10)[0], "the collector lives on"
        finally:
            os.close(collector)


@pytest.mark.usefixtures("probe_works")
def test_start_and_stop_leave_nothing_behind():
    def open_files():
        return len(list(Path("/proc/self/fd").iterdir()))

    Probe().start()  # first-use caches, and a probe that nobody stops
    before = None
    for _ in range(5):
        probe = Probe()
        probe.start()
        process = probe._running.process
        assert os.getsid(process.pid) == process.pid  # Ctrl-C does not reach it
        result = probe.stop()
        assert result is probe.stop()
        assert process.returncode == 0
        before = before or open_files()
        assert open_files() == before


def test_limits_are_refused_by_name(guest):
    with Probe() as probe:
        for index in range(MAX_RANGES):
            probe.watch(guest.pid, guest.start + index * PAGE, PAGE)
        with pytest.raises(OptionError, match=f"more than {MAX_RANGES} ranges"):
            probe.watch(guest.pid, guest.start + MAX_RANGES * PAGE, PAGE)
        with pytest.raises(OptionError, match="length 0"):
            probe.watch(guest.pid, guest.start, 0)
        guest.run(f"ram[{MAX_RANGES - 1} * PAGE]; ram[{MAX_RANGES} * PAGE]")
        assert pages_of(probe.stop().records, guest) == [MAX_RANGES - 1]
    with pytest.raises(OptionError, match="call start"):
        Probe().records()


def test_a_missing_bcc_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(capability_module, "interpreters", lambda: ["/nowhere/python3"])
    with pytest.raises(CapabilityError, match=r"/nowhere/python3.*apt install python3-bpfcc"):
        Probe().start()
    assert "bcc" in [check.name for check in available().missing]


@pytest.mark.usefixtures("probe_works")
def test_a_program_that_does_not_attach_is_a_capability_error(monkeypatch, tmp_path):
    monkeypatch.setattr(headers_module, "kernel_headers", lambda: tmp_path)
    monkeypatch.setattr(capability_module, "kernel_headers", lambda: tmp_path)
    with pytest.raises(CapabilityError, match="cannot attach the fault probe"):
        Probe().start()


def test_split_header_trees_are_merged_in_our_cache(monkeypatch, tmp_path):
    # GIVEN Debian's two halves of an older tree and of a newer one
    for version in ("6.1.0-9", "6.1.0-10"):
        common = tmp_path / f"linux-headers-{version}-common"
        flavour = tmp_path / f"linux-headers-{version}-amd64"
        for file in ("include/linux/kconfig.h", "include/only/a.h", "arch/x86/include/b.h"):
            (common / file).parent.mkdir(parents=True, exist_ok=True)
            (common / file).touch()
        for file in ("include/generated/autoconf.h", "arch/x86/include/generated/c.h"):
            (flavour / file).parent.mkdir(parents=True, exist_ok=True)
            (flavour / file).touch()
        (flavour / "Makefile").write_text(f"include {common}/Makefile\n")
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, path in (("MODULES", "none"), ("IKHEADERS", "none"), ("SOURCES", ".")):
        monkeypatch.setattr(headers_module, name, tmp_path / path)

    # WHEN a tree is asked for, twice, and once more after a broken cache
    first = headers_module.kernel_headers()
    second = headers_module.kernel_headers()
    (first / "include/linux").unlink()
    repaired = headers_module.kernel_headers()

    # THEN it is the newer one's, whole, and nothing else lies about
    assert first == second == repaired
    assert first.name == "linux-headers-6.1.0-10-amd64"
    for file in ("include/linux/kconfig.h", "include/generated/autoconf.h", "include/only/a.h"):
        assert (first / file).exists()
    for file in ("arch/x86/include/b.h", "arch/x86/include/generated/c.h"):
        assert (first / file).exists()
    assert list(first.parent.iterdir()) == [first]


def test_no_headers_at_all_is_a_capability_error(monkeypatch, tmp_path):
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)
    for name in ("MODULES", "IKHEADERS", "SOURCES"):
        monkeypatch.setattr(headers_module, name, tmp_path / "none")
    with pytest.raises(CapabilityError, match="no kernel headers"):
        headers_module.kernel_headers()


def test_the_last_version_of_a_fault_counts():
    rows = np.zeros(4, FAULT_DTYPE)
    rows["fault_ns"] = [20, 10, 20, 20]
    rows["tid"] = [1, 1, 2, 1]
    rows["running_ns"] = [0, 11, 22, 21]
    assert last_versions(rows)["running_ns"].tolist() == [11, 21, 22]
    assert len(last_versions(rows[:0])) == 0
