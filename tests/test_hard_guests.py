"""Guests that do what programs do: system calls, signals, threads, giving memory back."""

import ctypes
import os
import signal
import threading
import time

import numpy as np
import pytest
from observing import await_, runs_on

from migkit import Workload
from migkit.migration.states import Status

pytestmark = pytest.mark.usefixtures("nothing_left")

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="without root a guest's system calls cannot wait for a page"
)
MADV_REMOVE = 9


class Caller(Workload):
    """Reads into its RAM and writes out of it by system calls alone."""

    def prepare(self, ram, state):  # noqa: ARG002
        ram[:, 0] = np.arange(len(ram)) % 251

    def step(self, ram, state, n):
        fd = os.memfd_create("other")
        for step in range(int(state["step"]), int(state["step"]) + n):
            page = step * 7919 % len(ram)
            os.pwrite(fd, ram[page, :8], 0)  # out of it
            os.pwrite(fd, step.to_bytes(8, "little"), 8)
            os.preadv(fd, [ram[page, 8:24]], 0)  # and into it
        os.close(fd)


class Remover(Workload):
    """Gives pages back now and then; they read as zeros, and are written again."""

    def prepare(self, ram, state):  # noqa: ARG002
        ram[:, :] = 7

    def step(self, ram, state, n):
        libc = ctypes.CDLL(None)
        for step in range(int(state["step"]), int(state["step"]) + n):
            page = step * 7919 % len(ram)
            if step % 4 == 0:
                size = ram.shape[1]
                address = ram.ctypes.data + page * size
                if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_REMOVE):
                    ram[page] = 0  # anonymous memory, the oracle's, cannot be given back
            else:
                ram[page, 1:3] += 1
                ram[page, 3] = ram[(page + 1) % len(ram), 1]


class Threads(Workload):
    """Has two threads touch the same page at once; a foreign function waits without the GIL."""

    def prepare(self, ram, state):  # noqa: ARG002
        ram[:, :] = 3

    def step(self, ram, state, n):
        libc = ctypes.CDLL(None)
        for step in range(int(state["step"]), int(state["step"]) + n):
            page = step * 7919 % len(ram)
            address = ram.ctypes.data + page * ram.shape[1]
            threads = [
                threading.Thread(target=libc.memset, args=(ctypes.c_void_p(address + at), step, 8))
                for at in (64, 128)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()


class Signalled(Workload):
    """Takes a signal whenever one is sent, also in the middle of a fault."""

    def prepare(self, ram, state):  # noqa: ARG002
        ram[:, 0] = np.arange(len(ram)) % 251

    def step(self, ram, state, n):
        if not hasattr(self, "armed"):
            self.armed = signal.signal(signal.SIGUSR1, lambda *_: None)
        for step in range(int(state["step"]), int(state["step"]) + n):
            ram[step * 7919 % len(ram), 1] += 1


def in_postcopy(migration):
    migration.start()
    migration.start_postcopy()
    migration.await_status("postcopy-active")
    return migration


SLOW = {"rate": 2000, "max_postcopy_bandwidth": "16MiB"}


@needs_root
def test_system_calls_of_the_guest_wait_for_missing_pages(session):
    s = in_postcopy(session(Caller, **SLOW))
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()


@pytest.mark.parametrize("options", [{}, {"postcopy_preempt": False}, {"postcopy": "off"}])
def test_memory_that_the_guest_gives_back_reads_as_zeros(session, options):
    s = session(Remover, **{**SLOW, **options})
    if options.get("postcopy") == "off":
        s.start()
    else:
        in_postcopy(s)
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()


def test_memory_is_given_back_by_a_guest_that_no_engine_listens_to(session):
    s = session(Remover, **SLOW, max_bandwidth="2MiB")
    s.start()
    s.await_status("active")
    os.kill(s._engines["source"].child.pid, signal.SIGKILL)
    assert s.await_end(20) == Status.FAILED
    assert runs_on(s)
    time.sleep(0.2)
    assert runs_on(s)
    assert s.verify()


def test_two_threads_wait_for_one_page(session):
    s = in_postcopy(session(Threads, **{**SLOW, "rate": 500}))
    run = s.wait(60)
    assert s.verify()
    several = run.faults.groupby("page")["tid"].nunique()
    assert several.max() == 2


@pytest.mark.parametrize("sent", [signal.SIGUSR1, (signal.SIGSTOP, signal.SIGCONT)])
def test_signals_during_a_fault_change_nothing(session, sent):
    s = in_postcopy(session(Signalled, memory="32MiB", **{**SLOW, "rate": 0}))
    pid = s._guests["destination"].pid
    await_(lambda: runs_on(s, "destination"))  # it has a handler by now
    while s.status == Status.POSTCOPY_ACTIVE:
        for one in sent if isinstance(sent, tuple) else (sent,):
            os.kill(pid, one)
            time.sleep(0.0003)
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()
