"""Guests: what they compute, how they are steered, how they live and die."""

# ruff: noqa: ARG002 — a workload takes what a workload is given

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migkit.errors import CapabilityError, MigkitError, MigrationError, OptionError
from migkit.guest.config import (
    GuestConfig,
    GuestReady,
    receive_config,
    receive_ready,
    send_config,
    send_ready,
)
from migkit.guest.handle import GuestProcess
from migkit.guest.oracle import verify
from migkit.guest.spec import WorkloadSpec
from migkit.guest.vcpu import ERROR_BYTES, STATE_BYTES, VCpu, Word
from migkit.guest.workloads import WORKLOADS, Hotset, Memtest, Workload, find_workload, hash_steps
from migkit.kernel.memory import PAGE_SIZE, huge_pages_free
from migkit.kernel.userfaultfd import Register

pytestmark = pytest.mark.usefixtures("nothing_left")

MIB = 1 << 20
HUGE = 2 << 20
DEADLINE_S = 30.0
A_WHILE_S = 0.1  # how long we watch that something does not happen
SMALL_PAGE = 64  # workloads take any page size that holds whole words

# A busy machine is no reason to fail.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

MULTIPLIER = 31


def mixed(value):
    return value * MULTIPLIER + 7


class Journal(Workload):
    """A workload of one's own: it uses what stands around it in this module."""

    state_dtype = np.dtype([("sum", "<u8"), ("last", "<u4")])
    params = {"start": 5.0}  # noqa: RUF012 — as a user would write it

    def prepare(self, ram, state):
        ram[:, 0] = 1
        state["sum"] = self.start

    def step(self, ram, state, n):
        for step in range(int(state["step"]), int(state["step"]) + n):
            page = mixed(step) % len(ram)
            ram[page, 8:9] += 1  # wraps
            state["sum"] += np.uint64(ram[page, 8])
            state["last"] = page


class Cursed(Workload):
    """Fails in the middle of its work."""

    def step(self, ram, state, n):
        if state["step"] + n > 100:
            raise RuntimeError("page 7 is cursed")
        ram[3, 0] = 1


class Stillborn(Workload):
    """Fails before its first step."""

    def prepare(self, ram, state):
        raise ValueError("there is no beginning")

    def step(self, ram, state, n):
        ram[0, 0] = 1


class Touch(Workload):
    """Writes the same page for ever."""

    def step(self, ram, state, n):
        ram[3, :1] += np.uint8(n % 256)  # wraps


class Burdened(Workload):
    """Has more CPU state than a vCPU page can hold."""

    state_dtype = np.dtype([("registers", "<u8", 400)])

    def step(self, ram, state, n):
        ram[0, 0] = 1


def config_of(workload, memory=4 * MIB, page_size=PAGE_SIZE, *, seed=1, params=None, **options):
    spec = WorkloadSpec.of(workload, seed, params)
    return GuestConfig(spec, memory, page_size, **options)


@pytest.fixture
def begin_guest(tmp_path):
    """Start guests that are closed whatever happens."""
    made = []

    def begin(workload="random", *arguments, **options):
        config = config_of(workload, *arguments, **options)
        made.append(GuestProcess(config, tmp_path / f"guest{len(made)}.log"))
        return made[-1]

    yield begin
    for guest in made:
        guest.close()


@pytest.fixture
def make_guest(begin_guest):
    """Make guests that stand ready, stopped before their first step."""

    def make(*arguments, **options):
        guest = begin_guest(*arguments, **options)
        guest.ready()
        return guest

    return make


def eventually(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def steps_of(guest):
    return guest.vcpu.words[Word.STEP]


def run_a_little(guest, steps=1000):
    """Let a stopped guest execute at least so many steps more, then stop it."""
    enough = int.from_bytes(guest.vcpu.load_state(8), "little") + steps
    guest.vcpu.start()
    eventually(lambda: steps_of(guest) >= enough)
    guest.vcpu.stop()


def watch(guest):
    """Watch all missing pages of a guest, as a destination does when it listens."""
    uffd = guest.uffd
    uffd.register(guest.info.address, guest.ram.size, Register.MISSING)
    return uffd


def await_fault(guest):
    assert select.select([guest.uffd.fd], [], [], DEADLINE_S)[0], "no fault was reported"


def is_gone(pidfd):
    return bool(select.select([pidfd], [], [], DEADLINE_S)[0])


# What workloads compute.


def born(workload, n_pages):
    ram = np.zeros((n_pages, SMALL_PAGE), np.uint8)
    states = np.zeros(1, workload.full_dtype())
    workload.prepare(ram, states[0])
    return ram, states


def advance(workload, ram, states, cuts):
    for n in cuts:
        workload.step(ram, states[0], n)
        states["step"] += np.uint64(n)


@pytest.mark.parametrize("kind", [*WORKLOADS.values(), Journal], ids=lambda kind: kind.label())
@patient
@given(
    n_pages=st.integers(1, 40),
    seed=st.integers(0, 1 << 64),
    cuts=st.lists(st.integers(1, 90), min_size=1, max_size=6),
)
def test_steps_leave_the_same_however_they_are_cut(kind, n_pages, seed, cuts):
    results = []
    for way in (cuts, [sum(cuts)], [1] * sum(cuts)):
        workload = kind(seed)
        ram, states = born(workload, n_pages)
        advance(workload, ram, states, way)
        results.append((ram.tobytes(), states.tobytes()))
    assert results[0] == results[1] == results[2]


@patient
@given(n_pages=st.integers(1, 50), steps=st.integers(0, 1000))
def test_memtest_leaves_one_edge_where_the_value_drops_by_one(n_pages, steps):
    workload = Memtest()
    ram, states = born(workload, n_pages)
    advance(workload, ram, states, [steps])
    laps, edge = divmod(steps, n_pages)
    expected = np.full(n_pages, laps % 256, np.uint8)
    expected[:edge] += np.uint8(1)
    assert np.array_equal(ram[:, 0], expected)
    assert ram[:, 1].all()


def test_a_guest_that_has_booted_has_marked_all_pages_but_the_last_sixteenth():
    ram, _ = born(find_workload("random")(), 64)
    assert ram.any(axis=1).tolist() == [True] * 60 + [False] * 4


def test_random_depends_on_its_seed():
    rams = []
    for seed in (1, 2):
        workload = find_workload("random")(seed)
        ram, states = born(workload, 16)
        advance(workload, ram, states, [50])
        rams.append(ram.tobytes())
    assert rams[0] != rams[1]


def touched(workload, n_pages, steps):
    """The pages that differ from a guest that has just been born."""
    ram, states = born(workload, n_pages)
    before = ram.copy()
    advance(workload, ram, states, [steps])
    return np.flatnonzero((ram != before).any(axis=1)), states


def test_hotset_stays_within_its_working_set():
    pages, _ = touched(Hotset(working_set=0.25, write_share=1.0, alpha=0.0), 400, 5000)
    assert len(pages) == 100
    assert np.ptp(pages) > 200, "and is spread over all of RAM"


def test_hotset_prefers_few_pages():
    def hits(alpha):
        return len(touched(Hotset(working_set=1.0, write_share=1.0, alpha=alpha), 400, 400)[0])

    assert hits(3.0) < hits(1.1) < hits(0.0)


def test_hotset_writes_only_as_often_as_it_is_told():
    pages, states = touched(Hotset(write_share=0.0), 64, 500)
    assert len(pages) == 0
    assert states["checksum"][0] != 0
    pages, states = touched(Hotset(write_share=1.0), 64, 500)
    assert len(pages) > 0
    assert states["checksum"][0] == 0


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("share", ["working_set", "write_share"])
def test_hotset_refuses_a_share_that_is_none(share, wrong):
    with pytest.raises(OptionError, match=f"{share} of .* is not a share from 0 to 1"):
        Hotset(**{share: wrong})


def test_a_checksum_notices_a_page_that_was_only_read():
    sums = []
    for wrong in (0, 1):
        workload = Hotset(write_share=0.0, working_set=1.0, alpha=0.0)
        ram, states = born(workload, 16)
        ram[4, 0] ^= wrong
        advance(workload, ram, states, [500])
        sums.append(int(states["checksum"][0]))
    assert sums[0] != sums[1]


def test_the_randomness_is_splitmix64():
    reference = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert hash_steps(0, 0, 3).tolist() == reference


@patient
@given(
    seed=st.integers(0, 1 << 70), first=st.integers(0, 1 << 64),
    n=st.integers(0, 50), more=st.integers(0, 50),
)  # fmt: skip
def test_the_randomness_of_a_step_depends_on_nothing_before_it(seed, first, n, more):
    both = np.concatenate((hash_steps(seed, first, n), hash_steps(seed, first + n, more)))
    assert np.array_equal(both, hash_steps(seed, first, n + more))


# What a workload is called and what it takes.


def test_parameters_become_attributes_and_have_defaults():
    workload = Hotset(seed=9, alpha=2.0)
    assert (workload.seed, workload.alpha, workload.write_share) == (9, 2.0, 0.5)


def test_an_unknown_parameter_is_refused_with_the_closest_ones():
    with pytest.raises(OptionError, match=r"hotset has no parameter 'workingset'.*'working_set'"):
        Hotset(workingset=0.5)
    with pytest.raises(OptionError, match="memtest has no parameter 'x': it takes none"):
        WorkloadSpec.of("memtest", params={"x": 1})


def test_an_unknown_name_is_refused_with_the_closest_ones():
    with pytest.raises(OptionError, match=r"no workload 'hotsets': did you mean 'hotset'\?"):
        WorkloadSpec.of("hotsets")
    with pytest.raises(OptionError, match="known are: hotset, memtest, random"):
        find_workload("zzz")


class Idle(Workload):
    """Does not say what it does."""


@pytest.mark.parametrize("wrong", [42, None, int, Hotset(), "", Idle, Workload])
def test_what_is_no_workload_is_refused(wrong):
    with pytest.raises(OptionError, match="workload"):
        WorkloadSpec.of(wrong)


def test_the_cpu_state_is_a_packed_record_that_begins_with_the_step():
    assert Memtest.full_dtype().descr == [("step", "<u8")]
    assert Journal.full_dtype().descr == [("step", "<u8"), ("sum", "<u8"), ("last", "<u4")]
    assert Journal.full_dtype().itemsize == 20


def test_a_workload_of_ours_travels_by_name_and_one_of_yours_by_value():
    assert WorkloadSpec.of("hotset").code == b""
    assert WorkloadSpec.of(Hotset).code == b""
    spec = WorkloadSpec.of(Journal, seed=3, params={"start": 8})
    assert spec.name == "Journal"
    assert b"MULTIPLIER" in spec.code, "and with all that it needs of its module"
    loaded = spec.load()
    assert (loaded.seed, loaded.start) == (3, 8)


def test_the_identity_is_that_of_all_on_which_the_future_depends():
    class Twin(Workload):
        def step(self, ram, state, n):
            ram[0, 0] += 1

    one = Twin

    class Twin(Workload):
        def step(self, ram, state, n):
            ram[0, 0] += 2

    specs = [
        WorkloadSpec.of("random"),
        WorkloadSpec.of("random", 2),
        WorkloadSpec.of("memtest"),
        WorkloadSpec.of("hotset"),
        WorkloadSpec.of("hotset", params={"alpha": 2.0}),
        WorkloadSpec.of("hotset", params={"write_share": 0.2}),
        WorkloadSpec.of(Journal),
        WorkloadSpec.of(one),
        WorkloadSpec.of(Twin),
    ]
    assert len({spec.identity for spec in specs}) == len(specs)
    assert WorkloadSpec.of("random").identity == specs[0].identity
    assert all(len(spec.identity) < 256 for spec in specs)


def test_the_identity_does_not_depend_on_the_order_of_parameters():
    one = WorkloadSpec.of("hotset", params={"alpha": 2.0, "write_share": 0.2})
    other = WorkloadSpec.of("hotset", params={"write_share": 0.2, "alpha": 2.0})
    assert one.identity == other.identity


# What a guest is told and what it hands over.


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(DEADLINE_S)
        theirs.settimeout(DEADLINE_S)
        yield ours, theirs


def test_a_configuration_arrives_as_it_was_sent(pair):
    ours, theirs = pair
    config = config_of(Journal, 8 * MIB, seed=7, params={"start": 2}, rate=0.5, cpu=1, block="x")
    sender = threading.Thread(target=send_config, args=(ours, config))
    sender.start()
    received = receive_config(theirs)
    sender.join()
    assert received == config
    assert received.spec.identity == config.spec.identity


def test_a_configuration_that_ends_early_is_an_error(pair):
    ours, theirs = pair
    ours.sendall(struct.pack("=II", 100, 0) + b"{")
    ours.close()
    with pytest.raises(MigrationError, match="closed its end before the guest was configured"):
        receive_config(theirs)


def test_a_configuration_of_absurd_size_is_refused_before_it_is_read(pair):
    ours, theirs = pair
    ours.sendall(struct.pack("=II", 1 << 31, 0))
    with pytest.raises(MigrationError, match="2147483648 bytes exceeds the limit"):
        receive_config(theirs)


def test_what_a_guest_hands_over_arrives_with_its_descriptors(pair):
    ours, theirs = pair
    ready = GuestReady(pid=3, address=1 << 40, user_mode_only=True, state_size=20)
    send_ready(ours, ready, [0, 1])
    received, fds = receive_ready(theirs)
    for fd in fds:
        os.close(fd)
    assert received == ready
    assert len(fds) == 2
    ours.close()
    with pytest.raises(MigrationError, match="ended before it was ready"):
        receive_ready(theirs)


# The vCPU page.


@pytest.fixture
def vcpu():
    vcpu = VCpu.create()
    yield vcpu
    vcpu.close()


def test_every_change_of_mind_adds_one_and_asking_again_adds_nothing(vcpu):
    assert [vcpu.ask(run=run) for run in (False, True, True, False, True)] == [0, 1, 1, 2, 3]
    assert vcpu.running
    assert vcpu.ask(run=False) == 4
    assert not vcpu.running


def test_waiting_for_a_guest_that_does_not_act_is_an_error_that_says_what_was_asked(vcpu):
    with pytest.raises(MigrationError, match=r"did not start within 0\.05 s: it may wait"):
        vcpu.start(0.05)
    with pytest.raises(MigrationError, match=r"did not stop within 0\.05 s: it may wait"):
        vcpu.stop(0.05)
    vcpu.fail("page 7 is cursed")
    with pytest.raises(MigrationError, match=r"did not start.*page 7 is cursed"):
        vcpu.start(0.05)


def test_a_request_that_was_overtaken_is_done_when_a_later_one_is(vcpu):
    first = vcpu.ask(run=True)
    vcpu.ask(run=False)
    vcpu.acknowledge(vcpu.ask(run=True))
    vcpu.wait(first, 0.0)


def test_who_waits_is_woken_by_the_acknowledgement(vcpu):
    seq = vcpu.ask(run=True)
    guest = threading.Timer(0.05, vcpu.acknowledge, [seq])
    guest.start()
    vcpu.wait(seq, DEADLINE_S)
    guest.join()


def test_a_sleeping_guest_is_woken_by_a_request_and_does_not_sleep_through_an_earlier_one(vcpu):
    vcpu.sleep(0, 0.01)  # nothing comes
    waker = threading.Timer(0.05, vcpu.ask, kwargs={"run": True})
    waker.start()
    vcpu.sleep(0, DEADLINE_S)
    waker.join()
    assert vcpu.words[Word.RUN_SEQ] == 1
    vcpu.sleep(0, None)  # the request is there already


def test_a_cpu_state_is_kept_as_it_is_and_one_too_large_is_refused(vcpu):
    state = bytes(range(256)) * (STATE_BYTES // 256)
    vcpu.store_state(state)
    assert vcpu.load_state(len(state)) == state
    with pytest.raises(MigrationError, match=f"{STATE_BYTES + 1} bytes exceeds {STATE_BYTES}"):
        vcpu.store_state(bytes(STATE_BYTES + 1))


def test_of_a_long_message_the_end_is_kept(vcpu):
    vcpu.store_state(b"state")
    assert vcpu.error() == ""
    vcpu.fail("é" * 1000 + "x, the end")
    assert vcpu.error().endswith("éx, the end")
    assert len(vcpu.error().encode()) < ERROR_BYTES + 4
    assert vcpu.load_state(5) == b"state"


def test_two_mappings_of_a_page_are_one_page(vcpu):
    other = VCpu(*(os.dup(fd) for fd in (vcpu.page_fd, vcpu.kick_fd, vcpu.ack_fd)))
    other.acknowledge(vcpu.ask(run=True))
    vcpu.wait(1, 0.0)
    other.close()


# The life of a guest.


def test_a_guest_is_born_stopped_with_its_ram_filled(make_guest):
    guest = make_guest("memtest")
    time.sleep(A_WHILE_S)
    assert steps_of(guest) == 0
    assert not guest.vcpu.running
    assert guest.ram.present().all()
    assert guest.info.pid == guest.pid
    assert guest.info.state_size == 8
    assert verify(guest)


def test_a_guest_that_is_to_receive_its_ram_has_none(make_guest):
    guest = make_guest(populate=False)
    assert not guest.ram.present().any()


def test_a_guest_runs_when_it_is_started_and_stands_still_when_it_is_stopped(make_guest):
    guest = make_guest()
    run_a_little(guest)
    words = guest.vcpu.words
    steps, state = steps_of(guest), guest.vcpu.load_state(8)
    assert int.from_bytes(state, "little") == steps >= 1000
    time.sleep(A_WHILE_S)
    assert steps_of(guest) == steps
    assert words[Word.STARTED_NS] <= words[Word.FIRST_STEP_NS] <= words[Word.STOPPED_NS]
    assert words[Word.STOPPED_NS] < time.monotonic_ns()
    assert words[Word.BUSY_NS] > 0
    run_a_little(guest)
    assert steps_of(guest) > steps
    assert verify(guest)


def test_a_guest_stops_soon(make_guest):
    guest = make_guest()
    took = []
    for _ in range(20):
        run_a_little(guest, 1)
        guest.vcpu.start()
        asked = time.monotonic_ns()
        guest.vcpu.stop()
        took.append(guest.vcpu.words[Word.STOPPED_NS] - asked)
    assert np.median(took) < 100e6  # some tens of microseconds on an idle core


def test_the_last_of_many_quick_requests_is_the_one_that_is_obeyed(make_guest):
    guest = make_guest()
    vcpu = guest.vcpu
    rng = np.random.default_rng(1)
    for _ in range(30):
        for run in rng.integers(0, 2, rng.integers(1, 20)).tolist():
            vcpu.ask(run=bool(run))
        seq = vcpu.ask(run=bool(rng.integers(0, 2)))
        vcpu.wait(seq, DEADLINE_S)
        assert vcpu.words[Word.ACK_SEQ] == seq
        steps = steps_of(guest)
        if vcpu.running:
            eventually(lambda steps=steps: steps_of(guest) > steps)
        else:
            assert int.from_bytes(vcpu.load_state(8), "little") == steps
    assert verify(guest)


@pytest.mark.parametrize("workload", [*WORKLOADS, Journal])
def test_a_guest_goes_on_exactly_where_another_one_stopped(make_guest, workload):
    old = make_guest(workload, MIB, seed=4)
    for _ in range(2):
        run_a_little(old)
        new = make_guest(workload, MIB, seed=4, populate=False)
        for start, end in old.ram.data_ranges():
            rows = np.frombuffer(old.ram.read(start, end - start), np.uint8)
            new.ram.write(start // PAGE_SIZE, rows.reshape(-1, PAGE_SIZE))
        new.vcpu.store_state(old.vcpu.load_state(old.info.state_size))
        before = steps_of(old)
        run_a_little(new)
        assert steps_of(new) > before + 1
        verdict = verify(new)
        assert verdict, str(verdict)
        assert verdict.steps == steps_of(new)
        old = new


def test_the_cpu_state_with_which_a_guest_was_born_can_be_read_at_once(make_guest):
    guest = make_guest(Journal, MIB, params={"start": 77.0})
    state = np.frombuffer(guest.vcpu.load_state(guest.info.state_size), Journal.full_dtype())
    assert state["sum"][0] == 77


def test_a_guest_keeps_its_rate(make_guest):
    rate = 20_000
    guest = make_guest("memtest", rate=rate)
    words = guest.vcpu.words

    def measured():
        """Steps a second over a second; a guest that the machine held up does not catch up."""
        guest.vcpu.start()
        steps, begun = words[Word.STEP], time.monotonic()
        time.sleep(1.0)
        guest.vcpu.stop()
        return (words[Word.STEP] - steps) / (time.monotonic() - begun)

    rates = []
    while len(rates) < 5 and not any(0.9 * rate < r < 1.1 * rate for r in rates):
        rates.append(measured())
    assert 0.9 * rate < rates[-1] < 1.1 * rate, rates
    assert verify(guest)


def test_a_slow_guest_takes_its_first_step_at_once_and_stops_between_two(make_guest):
    guest = make_guest("memtest", rate=0.01)
    guest.vcpu.start()
    eventually(lambda: steps_of(guest) == 1)
    guest.vcpu.stop()
    assert steps_of(guest) == 1


def test_a_guest_stays_on_its_cpu(make_guest):
    cpu = max(os.sched_getaffinity(0))
    guest = make_guest(cpu=cpu)
    assert os.sched_getaffinity(guest.pid) == {cpu}


def test_a_guest_of_huge_pages_computes_the_same(make_guest, huge_pages):
    if huge_pages_free(HUGE) < 4:
        pytest.skip("huge pages: no 4 of 2 MiB are free, and only root can have more")
    guest = make_guest("random", 4 * HUGE, HUGE)
    run_a_little(guest)
    assert verify(guest)


def test_a_guest_that_waits_for_a_page_cannot_stop_until_it_has_it(make_guest):
    guest = make_guest(Touch, MIB)
    guest.ram.discard(3 * PAGE_SIZE, PAGE_SIZE)
    uffd = watch(guest)
    guest.vcpu.start()
    await_fault(guest)
    with pytest.raises(MigrationError, match=r"did not stop.*it may wait for a page"):
        guest.vcpu.stop(A_WHILE_S)
    uffd.zeropage(guest.info.address + 3 * PAGE_SIZE, PAGE_SIZE)
    guest.vcpu.stop()
    assert guest.ram.read(3 * PAGE_SIZE + 8, 1) == b"\0"


# What the oracle sees.


def test_the_oracle_notices_one_flipped_bit(make_guest):
    guest = make_guest("hotset")
    run_a_little(guest)
    assert str(verify(guest)).startswith("RAM and CPU state are those of an unmigrated guest")
    row = np.frombuffer(guest.ram.read(700 * PAGE_SIZE, PAGE_SIZE), np.uint8).copy()
    row[4095] ^= 0x10
    guest.ram.write(700, row.reshape(1, -1))
    verdict = verify(guest)
    assert not verdict
    assert verdict.wrong_pages == (700,)
    assert verdict.state_ok
    assert "1 of 1024 pages differ (pages 700)" in str(verdict)


def test_the_oracle_notices_a_wrong_cpu_state(make_guest):
    guest = make_guest("hotset")
    run_a_little(guest)
    state = bytearray(guest.vcpu.load_state(16))
    state[15] ^= 1
    guest.vcpu.store_state(bytes(state))
    verdict = verify(guest)
    assert not verdict
    assert verdict.wrong_pages == ()
    assert str(verdict).endswith("0 of 1024 pages differ; the CPU state differs")


def test_the_oracle_sees_a_missing_page_as_zeros_and_does_not_fill_it(make_guest):
    guest = make_guest("memtest")
    guest.ram.discard(5 * PAGE_SIZE, PAGE_SIZE)
    assert verify(guest).wrong_pages == (5,)
    assert not guest.ram.present()[5]


def test_the_oracle_names_the_first_of_many_wrong_pages(make_guest):
    guest = make_guest("memtest")
    guest.ram.discard(0, guest.ram.size)
    assert len(verify(guest).wrong_pages) == 1024
    assert "(pages 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)" in str(verify(guest))


# How a guest can fail to live.


def test_a_workload_that_fails_says_why_on_its_vcpu_page(make_guest):
    guest = make_guest(Cursed, MIB)
    guest.vcpu.ask(run=True)
    assert guest.child.wait(DEADLINE_S)
    assert guest.child.exit_code == 1
    assert "RuntimeError: page 7 is cursed" in guest.vcpu.error()
    with pytest.raises(MigrationError, match="page 7 is cursed"):
        guest.vcpu.stop(0.1)


@pytest.mark.parametrize(
    ("workload", "memory", "page_size", "reason"),
    [
        ("random", MIB + 1, PAGE_SIZE, "OptionError: memory of 1048577 bytes is not a multiple"),
        ("random", MIB, 12345, "OptionError: page size 12345 is not one of"),
        ("random", 1 << 50, HUGE, "CapabilityError: .* huge pages of 2 MiB"),
        (Stillborn, MIB, PAGE_SIZE, "ValueError: there is no beginning"),
        (Burdened, MIB, PAGE_SIZE, "MigrationError: a CPU state of 3208 bytes exceeds 3072"),
    ],
)
def test_a_guest_that_cannot_be_made_says_why(begin_guest, workload, memory, page_size, reason):
    guest = begin_guest(workload, memory, page_size)
    with pytest.raises(CapabilityError, match=f"the guest could not be made: {reason}"):
        guest.ready()
    assert guest.child.wait(DEADLINE_S)


def test_a_guest_that_is_killed_before_it_is_ready_is_an_error(begin_guest):
    guest = begin_guest("random", 64 * MIB)
    os.kill(guest.pid, signal.SIGKILL)
    with pytest.raises((MigkitError, ConnectionError)):
        guest.ready()


def test_a_guest_that_was_killed_does_not_stop_but_can_be_read_and_closed(make_guest):
    guest = make_guest("memtest", MIB)
    run_a_little(guest)
    guest.vcpu.start()
    os.kill(guest.pid, signal.SIGKILL)
    assert guest.child.wait(DEADLINE_S)
    with pytest.raises(MigrationError, match=r"did not stop within 0\.1 s"):
        guest.vcpu.stop(0.1)
    assert guest.ram.read(1, 1) == b"\1"


@pytest.mark.parametrize("when", ["at birth", "ready", "running", "waiting for a page"])
def test_a_guest_can_be_closed_at_any_time_and_twice(begin_guest, when):
    guest = begin_guest(Touch, MIB)
    if when != "at birth":
        guest.ready()
    if when == "waiting for a page":
        guest.ram.discard(3 * PAGE_SIZE, PAGE_SIZE)
        watch(guest)
    if when in ("running", "waiting for a page"):
        guest.vcpu.start()
    if when == "waiting for a page":
        await_fault(guest)
    pidfd = os.pidfd_open(guest.pid)
    guest.close()
    gone = is_gone(pidfd)
    os.close(pidfd)
    assert gone
    guest.close()


# A session that is a process of its own, with its workload in __main__.
SESSION = """
import pathlib, select, sys
import numpy as np
from migkit.guest.config import GuestConfig
from migkit.guest.handle import GuestProcess
from migkit.guest.oracle import verify
from migkit.guest.spec import WorkloadSpec
from migkit.guest.workloads import Workload
from migkit.kernel.userfaultfd import Register, Userfaultfd

PAGE = 3

class Mine(Workload):
    def step(self, ram, state, n):
        ram[PAGE, :1] += np.uint8(n % 256)

guest = GuestProcess(GuestConfig(WorkloadSpec.of(Mine), 1 << 20, 4096), pathlib.Path(sys.argv[1]))
try:
    guest.ready()
    if sys.argv[2] == "waiting for a page":
        guest.ram.discard(PAGE * 4096, 4096)
        guest.uffd.register(guest.info.address, 1 << 20, Register.MISSING)
    if sys.argv[2] != "stopped":
        guest.vcpu.start()
    if sys.argv[2] == "waiting for a page":
        assert select.select([guest.uffd.fd], [], [], 30)[0]
    print(guest.pid, flush=True)
    sys.stdin.readline()
    verdict = verify(guest)
    print(bool(verdict), verdict, flush=True)
finally:
    guest.close()
"""


@pytest.fixture
def begin_session(tmp_path):
    """Start a session; return its process and a pidfd of its guest."""
    begun = []

    def begin(guest_is):
        script = tmp_path / "session.py"
        script.write_text(SESSION)
        session = subprocess.Popen(
            [sys.executable, script, tmp_path / "log", guest_is],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        begun.append([session])
        pidfd = os.pidfd_open(int(session.stdout.readline()))
        begun[-1].append(pidfd)
        return session, pidfd

    yield begin
    for session, *pidfds in begun:
        session.kill()
        session.communicate()
        for pidfd in pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


def test_a_class_of_the_main_module_runs_as_a_guest(begin_session):
    session, pidfd = begin_session("running")
    output, _ = session.communicate("go on\n", timeout=DEADLINE_S)
    assert output.startswith("True RAM and CPU state are those of an unmigrated guest")
    assert session.returncode == 0
    assert is_gone(pidfd)


@pytest.mark.parametrize("guest_is", ["stopped", "running", "waiting for a page"])
def test_a_guest_dies_when_its_session_is_killed(begin_session, guest_is):
    session, pidfd = begin_session(guest_is)
    assert not select.select([pidfd], [], [], A_WHILE_S)[0]
    session.kill()
    assert is_gone(pidfd)


def test_a_class_within_a_function_runs_as_a_guest(make_guest):
    step_width = 3

    class Local(Workload):
        def step(self, ram, state, n):
            for step in range(int(state["step"]), int(state["step"]) + n):
                ram[step * step_width % len(ram), 1] += 1

    guest = make_guest(Local, MIB)
    run_a_little(guest, 50)
    assert verify(guest)
