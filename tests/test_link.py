"""The link between the two sides: its timing, its one FIFO a direction, cuts and stalls."""

import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from observing import await_, is_legal

import migkit
from migkit.errors import MigrationError, OptionError
from migkit.migration import channel
from migkit.migration.link import Clock, Fifo, Link
from migkit.migration.options import Options
from migkit.migration.relay_process import RelayProcess
from migkit.migration.session import Session
from migkit.migration.states import Status

pytestmark = pytest.mark.usefixtures("nothing_left")


# What a link is.


@pytest.mark.parametrize(
    ("text", "bytes_per_s", "latency_s"),
    [
        ("200Mbit/s, 1ms", 25e6, 1e-3),
        ("200 mbit/s,1 ms", 25e6, 1e-3),
        ("25MB/s", 25e6, 0.0),
        ("1.5Gbit/s, 0.5s", 187.5e6, 0.5),
        ("unlimited", math.inf, 0.0),
        ("Unlimited, 500us", math.inf, 500e-6),
    ],
)
def test_a_link_is_parsed(text, bytes_per_s, latency_s):
    link = Link.parse(text)
    assert link.bytes_per_s == pytest.approx(bytes_per_s)
    assert link.latency_s == pytest.approx(latency_s)


@pytest.mark.parametrize(
    "text",
    ["fast", "200", "200Mbit", "1ms", "200Mbit/s,", "200Mbit/s, 1", "200Mbit/s, 1ms, 3", "-1Mbit/s",
     "0Mbit/s", "1bit/s", "unlimited, 11s", "nanMbit/s", ", 1ms", " "],
)  # fmt: skip
def test_what_is_no_link_is_refused_with_an_example(text):
    with pytest.raises(OptionError, match=r"link .*(200Mbit/s, 1ms|at most 10 s)"):
        Options.make(link=text)


def test_without_a_link_there_is_none_to_steer(tmp_path):
    session = Session(memory="8MiB", path=tmp_path / "run", probe="off")
    with pytest.raises(OptionError, match="give the option link"):
        _ = session.link
    session = Session(memory="8MiB", path=tmp_path / "run2", probe="off", link="unlimited")
    with pytest.raises(MigrationError, match="not been started"):
        _ = session.link


# The FIFO, without a socket.


@given(
    sizes=st.lists(st.integers(0, 100_000), min_size=1, max_size=50),
    gaps_us=st.lists(st.integers(0, 5000), min_size=50, max_size=50),
    latency_us=st.sampled_from([0, 1000]),
)
def test_what_enters_a_link_arrives_in_order_and_never_faster_than_it_carries(
    sizes, gaps_us, latency_us
):
    link = Link(25e6, latency_us * 1e-6)
    fifo = Fifo(link)
    now, carried = 0.0, 0.0
    for number, (size, gap) in enumerate(zip(sizes, gaps_us, strict=False)):
        now += gap * 1e-6
        fifo.push(now, size, number)
        carried = max(carried, now) + size / link.bytes_per_s  # when it has been carried
    last, order = 0.0, []
    while fifo.held_bytes or fifo.arrival < math.inf:
        last = fifo.arrival
        assert fifo.pop(last - 1e-9) is None
        order.append(fifo.pop(last))
    assert order == list(range(len(sizes)))
    assert last == pytest.approx(carried + link.latency_s)


def test_a_full_link_takes_no_more_until_something_has_departed():
    fifo = Fifo(Link(25e6, 1.0))
    n = 0
    while fifo.has_room(0.0):
        fifo.push(0.0, 1000, n)
        n += 1
    assert fifo.queued_bytes(0.0) == fifo.peak_queue_bytes == n * 1000
    assert fifo.queue_limit < n * 1000 <= fifo.queue_limit + 1000
    assert fifo.has_room(fifo.refill_at)
    assert fifo.queued_bytes(fifo.refill_at) == pytest.approx(fifo.queue_limit / 2, abs=1)
    assert fifo.pop(0.5) is None  # what has departed is in flight for a second


def test_a_link_without_a_limit_still_holds_a_bounded_amount():
    fifo = Fifo(Link(latency_s=1.0))
    n = 0
    while fifo.has_room(0.0):
        fifo.push(0.0, 1 << 20, n)
        n += 1
    assert fifo.held_bytes == n << 20 <= 66 << 20
    fifo.pop(1.5)
    assert fifo.has_room(1.5)
    fifo.push(1.6, 1000, n, waited=True)  # nothing entered before 1.5, so it cannot arrive by 2.4
    assert [fifo.pop(2.4) for _ in range(n)] == [*range(1, n), None]


def test_what_waited_for_the_link_is_carried_without_a_gap():
    fifo = Fifo(Link(1e6))
    fifo.push(0.0, 1000, "first")
    fifo.push(0.005, 1000, "waited", waited=True)
    fifo.push(0.005, 1000, "came now")
    assert [fifo.arrival, fifo.pop(1.0)] == [pytest.approx(0.001), "first"]
    assert [fifo.arrival, fifo.pop(1.0)] == [pytest.approx(0.002), "waited"]
    assert [fifo.arrival, fifo.pop(1.0)] == [pytest.approx(0.006), "came now"]


def test_the_time_of_a_stalled_link_stands_still():
    clock = Clock()
    clock.stop()
    stood = clock.now()
    time.sleep(0.02)
    clock.stop()
    assert clock.now() == stood
    clock.go_on()
    assert 0 <= clock.now() - stood < 0.02


# The process, with sockets of our own at its ends.


class Ends:
    """A relay between this process and itself."""

    def __init__(self, folder, link, transport="unix"):
        self.folder, self.transport = folder, transport
        self.relay = RelayProcess(link, folder / "log")
        self._stop = threading.Event()
        self._reading = threading.Thread(target=self._read)
        self._reading.start()
        self.relay.ensure_ready()
        self.open = contextlib.ExitStack()
        self._n = 0
        self.listen()

    def listen(self, peer=None):
        self.listener, to = channel.listen(self.uri())
        self.open.callback(self.listener.close)
        self.listener.settimeout(10)
        self.at = self.relay.listen(self.uri(), to, peer or os.getpid())

    def uri(self):
        self._n += 1
        return f"unix:{self.folder}/{self._n}" if self.transport == "unix" else "tcp:127.0.0.1:0"

    def connect(self):
        """Both ends of one more channel, blocking."""
        near = channel.connect(self.at)
        far, _ = self.listener.accept()
        for sock in (near, far):
            self.open.callback(sock.close)
            sock.settimeout(20)
        return near, far

    def close(self):
        self.open.close()
        self._stop.set()
        self._reading.join()
        self.relay.close()

    def _read(self):
        while not self._stop.is_set():
            if self.relay.gone:
                time.sleep(0.005)
            elif select.select([self.relay.control], [], [], 0.02)[0]:
                self.relay.read()


@pytest.fixture
def ends(tmp_path):
    """Make relays with their ends."""
    made = []

    def make(link="unlimited", transport="unix"):
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Ends(folder, link, transport))
        return made[-1]

    yield make
    for one in made:
        one.close()


def receive(sock, n_bytes):
    """Read so many bytes, or fewer when the channel ends or breaks first."""
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        while len(data) < n_bytes and (more := sock.recv(min(n_bytes - len(data), 1 << 16))):
            data += more
    return bytes(data)


@contextlib.contextmanager
def sending(sock, data):
    """Send meanwhile, as far as the channel goes."""

    def send():
        with contextlib.suppress(OSError):
            sock.sendall(data)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    sock.shutdown(socket.SHUT_RDWR) if thread.is_alive() else None
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_link_carries_both_ways_in_order_and_no_faster_than_it_may(ends, transport):
    one = ends("200Mbit/s, 1ms", transport)
    near, far = one.connect()
    data = os.urandom(2_500_000)  # 100 ms
    for sender, receiver in ((near, far), (far, near)):
        begin = time.monotonic()
        with sending(sender, data):
            assert receive(receiver, len(data)) == data
        assert time.monotonic() - begin > 0.9 * 0.1
    query = one.relay.query()
    assert query["delivered"]["main"] == {"to_destination": len(data), "to_source": len(data)}
    assert query["delivered"]["preempt"] == {"to_destination": 0, "to_source": 0}


def test_a_small_message_waits_for_the_big_one_before_it_on_another_channel(ends):
    """The big one needs 400 ms; without a shared FIFO the small one needs microseconds."""
    one = ends("160kbit/s")
    near, far = one.connect()
    near2, far2 = one.connect()
    near.sendall(bytes(8000))

    def entered():
        query = one.relay.query()
        return query["in_transit"]["to_destination"] + query["delivered"]["main"]["to_destination"]

    await_(lambda: entered() == 8000)
    near2.sendall(b"small")
    assert receive(far2, 5) == b"small"
    far.setblocking(False)
    assert receive(far, 8000) == bytes(8000)  # all of it is here, or BlockingIOError
    assert one.relay.query()["peak_queue"]["to_source"] == 0


def test_a_full_link_is_felt_by_the_sender_and_its_queue_is_bounded(ends):
    one = ends("8Mbit/s")
    near, _ = one.connect()
    near.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 32 << 20:
            sent += near.send(bytes(1 << 16))
    assert sent < 32 << 20
    await_(lambda: one.relay.query()["peak_queue"]["to_destination"] > 8 << 10)
    query = one.relay.query()
    assert query["peak_queue"]["to_destination"] <= (8 << 10) + (2 << 10)
    assert query["in_transit"]["to_destination"] <= 3 * (8 << 10)


def test_a_receiver_that_does_not_read_holds_up_no_other_channel(ends):
    one = ends()
    near, _ = one.connect()
    near2, far2 = one.connect()
    near.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            near.send(bytes(1 << 16))
    near2.sendall(b"x" * 10_000)
    assert receive(far2, 10_000) == b"x" * 10_000


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("name", ["main", "preempt"])
def test_a_cut_leaves_exactly_so_many_bytes_of_its_channel(ends, transport, name):
    one = ends("80Mbit/s, 1ms", transport)
    channels = dict(zip(("main", "preempt"), (one.connect(), one.connect()), strict=True))
    near, far = channels.pop(name)
    (other_near, other_far) = channels.popitem()[1]
    data = os.urandom(300_000)
    one.relay.cut(123_457, name)
    with sending(near, data):
        assert receive(far, len(data)) == data[:123_457]
        await_(lambda: name not in one.relay.query()["open"])
    assert one.relay.query()["delivered"][name]["to_destination"] == 123_457
    assert one.relay.query()["cut_in_bytes"] is None
    other_near.sendall(b"still here")
    assert receive(other_far, 10) == b"still here"


def test_a_cut_counts_all_channels_when_none_is_named_and_waits_for_the_next_ones(ends):
    one = ends()
    one.relay.cut(1000, direction="to_source")
    near, far = one.connect()
    near2, far2 = one.connect()
    far.sendall(bytes(600))
    assert receive(near, 600) == bytes(600)
    assert one.relay.query()["cut_in_bytes"] == 400
    near.sendall(bytes(5000))  # the other direction does not count
    assert receive(far, 5000) == bytes(5000)
    far2.sendall(b"z" * 600)
    assert receive(near2, 600) == b"z" * 400
    assert receive(near, 1) == receive(far, 1) == receive(far2, 1) == b""
    with pytest.raises(MigrationError, match="no channel that could be cut"):
        one.relay.cut()


@pytest.mark.parametrize("wrong", [{"channel": "mian"}, {"direction": "up"}, {"after_bytes": -1}])
def test_a_cut_that_cannot_be_is_refused(ends, wrong):
    with pytest.raises(OptionError):
        ends().relay.cut(**wrong)


def test_a_stalled_link_delivers_nothing_and_closes_nothing(ends):
    one = ends("80Mbit/s, 1ms")
    near, far = one.connect()
    far.setblocking(False)
    data = os.urandom(200_000)
    one.relay.stall()
    with sending(near, data):
        time.sleep(0.1)
        with pytest.raises(BlockingIOError):
            far.recv(1)
        assert one.relay.query()["stalled"]
        one.relay.resume()
        far.settimeout(10)
        assert receive(far, len(data)) == data
    assert not one.relay.query()["stalled"]


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_an_end_comes_after_the_data_and_leaves_the_other_way_open(ends, transport):
    one = ends("8Mbit/s, 10ms", transport)
    near, far = one.connect()
    near.sendall(bytes(30_000))
    near.shutdown(socket.SHUT_WR)
    assert receive(far, 30_001) == bytes(30_000)
    far.sendall(b"answer")
    far.close()
    assert receive(near, 7) == b"answer"
    await_(lambda: not one.relay.query()["open"])


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_who_closes_after_a_last_word_does_not_lose_it(ends, transport):
    one = ends("8Mbit/s, 10ms", transport)
    near, far = one.connect()
    far.sendall(b"last")
    far.close()
    with contextlib.suppress(ConnectionError):
        near.sendall(bytes(1000))  # into the closed socket
    assert receive(near, 5) == b"last"
    near.close()
    await_(lambda: not one.relay.query()["open"])


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_stranger_is_turned_away_by_the_link(ends, transport):
    one = ends(transport=transport)
    one.listen(peer=1)  # only init may connect
    near = channel.connect(one.at)
    with contextlib.closing(near):
        near.settimeout(10)
        assert receive(near, 1) == b""
    assert one.relay.query()["open"] == []
    one.listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        one.listener.accept()


def test_a_peer_that_closes_other_files_meanwhile_is_still_trusted():
    stop = threading.Event()

    def open_and_close():
        while not stop.is_set():
            for fd in [os.dup(2) for _ in range(10)]:
                os.close(fd)

    busy = threading.Thread(target=open_and_close)
    listener, at = channel.listen("tcp:127.0.0.1:0")
    with contextlib.closing(listener), contextlib.closing(channel.connect(at)):
        listener.setblocking(True)
        near, _ = listener.accept()
        with contextlib.closing(near):
            busy.start()
            trusted = [channel.is_trusted(near, os.getpid()) for _ in range(200)]
            stop.set()
            busy.join()
    assert all(trusted)


def test_a_channel_that_leads_nowhere_is_closed(ends):
    one = ends()
    one.at = one.relay.listen(one.uri(), f"unix:{one.folder}/nobody", os.getpid())
    near = channel.connect(one.at)
    with contextlib.closing(near):
        near.settimeout(10)
        assert receive(near, 1) == b""


def test_new_channels_take_the_place_of_old_ones(ends):
    one = ends("8Mbit/s")
    near, far = one.connect()
    near.sendall(bytes(20_000))
    one.listen()
    assert len(receive(far, 20_000)) < 20_000
    near, far = one.connect()
    near.sendall(b"new")
    assert receive(far, 4 - 1) == b"new"


def test_a_relay_that_died_is_started_anew(ends):
    one = ends()
    os.kill(one.relay.child.pid, signal.SIGKILL)
    await_(lambda: one.relay.gone)
    with pytest.raises(MigrationError, match="link process"):
        one.relay.query()
    one.relay.ensure_ready()
    one.listen()
    near, far = one.connect()
    near.sendall(b"again")
    assert receive(far, 5) == b"again"


_SESSION = """
import select, sys, time
from pathlib import Path
from migkit.migration.relay_process import RelayProcess
relay = RelayProcess("unlimited", Path(sys.argv[1]))
select.select([relay.control], [], [], 20)
relay.read()
relay.await_ready()
print(relay.child.pid, flush=True)
time.sleep(60)
"""


def test_the_relay_ignores_interrupts_and_is_gone_when_its_session_dies(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", _SESSION, str(tmp_path / "log")], stdout=subprocess.PIPE
    ) as session:
        relay = int(session.stdout.readline())
        pidfd = os.pidfd_open(relay)
        try:
            os.kill(relay, signal.SIGINT)
            assert not select.select([pidfd], [], [], 0.2)[0]
            session.kill()
            assert select.select([pidfd], [], [], 5)[0]
        finally:
            os.close(pidfd)


# Migrations over it.


@pytest.fixture
def over(tmp_path):
    """Make sessions in post-copy over a link."""
    made = []

    def make(link="200Mbit/s, 1ms", memory="16MiB", **options):
        options = {"probe": "off", "rate": 3000, **options}
        s = Session("random", memory, path=tmp_path / f"run{len(made)}", link=link, **options)
        made.append(s)
        s.start()
        s.start_postcopy()
        s.await_status(Status.POSTCOPY_ACTIVE, 30)
        return s

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("link", ["200Mbit/s, 1ms", "unlimited"])
def test_a_guest_migrated_over_a_link_is_the_same(over, link, transport):
    s = over(link, transport=transport)
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()
    assert s.errors == []
    carried = s.link.query()["delivered"]
    sent = s.query()["source"]
    assert sum(way["to_destination"] for way in carried.values()) >= 4096 * sent["requested_pages"]
    meta = json.loads((s.record().path / "meta.json").read_text())
    assert meta["options"]["link"] == link


@pytest.mark.parametrize("name", ["main", "preempt", None])
def test_a_link_cut_in_post_copy_is_recovered_over_it(over, name):
    s = over(memory="32MiB")
    s.link.cut(5_000, name)
    assert s.await_end(20) == Status.POSTCOPY_PAUSED
    s.link.cut(100, direction="to_source")  # again, in the middle of the received bitmap
    with pytest.raises(MigrationError, match="recovery failed"):
        s.recover()
    s.recover()
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()
    is_legal(s)


def test_a_link_stalled_in_post_copy_only_takes_longer(over):
    s = over(memory="32MiB")
    s.link.stall()
    time.sleep(0.1)
    before = s.link.query()["delivered"]
    time.sleep(0.3)
    assert s.status == Status.POSTCOPY_ACTIVE
    assert s.link.query()["delivered"] == before
    s.link.resume()
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()
    assert s.errors == []


def test_a_relay_that_dies_in_post_copy_is_replaced_by_recovery(over):
    s = over(memory="32MiB")
    os.kill(s.link.child.pid, signal.SIGKILL)
    assert s.await_end(20) == Status.POSTCOPY_PAUSED
    s.recover()
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()


def test_the_way_in_for_people_takes_a_link(tmp_path):
    run = migkit.run("random", "8MiB", path=tmp_path / "run", link="1Gbit/s, 200us", probe="off",
                     verify=True)  # fmt: skip
    assert run.status == "completed"
