"""What is under way in pre-copy: bounded while it lasts, nothing when a round is over."""

import time

import numpy as np
import pytest

import migkit
from migkit.migration import wire
from migkit.migration.states import Status
from migkit.trace.simpletrace import read

pytestmark = pytest.mark.usefixtures("nothing_left")


def traces(session):
    folder = session.record()
    return tuple(read(folder.trace(role)) for role in ("source", "destination"))


def under_way(source, destination, ts):
    """How many bytes of pages the source has sent and the destination has not read, at a time."""
    sent, came = (
        trace[f"ram_{what}_range"] for trace, what in ((source, "save"), (destination, "load"))
    )
    return sum(
        sign * int(rows["len"][(rows["ts_ns"] <= ts) & (rows["kind"] == 0)].sum())
        for rows, sign in ((sent, 1), (came, -1))
    )


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_round_ends_when_the_destination_has_all_of_it(session, transport):
    """So what is pending when the guest is stopped is all that the guest waits for."""
    s = session(
        memory="8MiB", rate=3000, postcopy="off", link="200Mbit/s", transport=transport,
        downtime_limit=0.1,
    )  # fmt: skip
    s.start()
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()
    source, destination = traces(s)
    ends = source["migration_bitmap_sync_start"]["ts_ns"]
    rounds = source["ram_save_round"]
    assert len(ends) == len(rounds) + 1  # the last is after the stop
    assert [under_way(source, destination, ts) for ts in ends] == [0] * len(ends)
    assert under_way(source, destination, rounds["ts_ns"][0] + 100_000_000) > 0


def test_what_is_under_way_when_post_copy_is_asked_for_is_bounded(session):
    """Not by the sockets, which would take megabytes: by a fifth of a second of such a link."""
    s = session(memory="64MiB", rate=3000, postcopy="manual", link="20Mbit/s")
    s.start()
    s.await_status("active")
    while s.query()["source"]["precopy_bytes"] < 1 << 20:
        time.sleep(0.01)
    s.start_postcopy()
    s.await_status(Status.POSTCOPY_ACTIVE)
    s.close()
    source, destination = traces(s)
    asked = source["migration_bitmap_sync_start"]["ts_ns"][0]
    assert 0 <= under_way(source, destination, asked) < 1 << 19


def test_without_a_return_path_nothing_is_pinged(session):
    s = session(memory="8MiB", rate=1000, postcopy="off", return_path=False, link="200Mbit/s")
    s.start()
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()
    assert len(traces(s)[0]["savevm_send_ping"]) == 0


def test_pre_copy_over_a_link_that_stalls_only_takes_longer(session):
    s = session(memory="8MiB", rate=1000, postcopy="off", link="100Mbit/s")
    s.start()
    s.await_status("active")
    s.link.stall()
    time.sleep(0.3)
    assert s.status == Status.ACTIVE
    s.link.resume()
    assert s.await_end(60) == Status.COMPLETED
    assert s.verify()


def test_the_end_of_a_round_is_not_taken_for_discarding(session):
    s = session(memory="8MiB", rate=3000, postcopy="1 round", link="200Mbit/s")
    s.start()
    assert s.await_end(60) == Status.COMPLETED
    source, _ = traces(s)
    pings = source["savevm_send_ping"]
    ended = pings["ts_ns"][pings["val"] >= wire.PING_WINDOW]
    run = migkit.load(s.record().path)
    names = run.phases.query("side == 'source'").set_index("name")
    assert names.index.tolist()[:4] == ["setup", "precopy round 1", "discard", "switchover"]
    begun = names.loc["discard", "start_ns"]
    assert np.count_nonzero(ended < begun) > 0
    assert pings["ts_ns"][pings["val"] == wire.PING_AHEAD].item() > begun


def test_a_migration_on_a_link_that_stands_still_is_cancelled_at_once(session):
    """Before the wait for the link, 30 s, has ended in a failure."""
    s = session(memory="16MiB", rate=1000, postcopy="manual", link="20Mbit/s")
    s.start()
    s.await_status("active")
    s.link.stall()
    time.sleep(0.3)
    s.cancel()
    s.await_status(Status.CANCELLED, 10)
    assert s.running_guests == ["source"]
    assert s.verify()
