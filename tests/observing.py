"""What tests look at in a migration that they steer."""

import itertools
import time

from migkit.migration.states import DESTINATION, SOURCE, Status
from migkit.trace.simpletrace import read

TABLES = {"source": SOURCE, "destination": DESTINATION}


def await_(happened, timeout_s=20.0):
    """Wait until something is true, else fail."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def walk(session, role):
    """The states that a side has gone through, in order."""
    return [status for _, who, status in session.statuses if who == role]


def is_legal(session):
    """Fail unless both sides kept to the tables of states."""
    for role, table in TABLES.items():
        states = [Status.NONE, *map(Status, walk(session, role))]
        assert all(b in table[a] for a, b in itertools.pairwise(states)), states


def runs_on(session, role="source"):
    """Whether a guest makes progress."""
    before = session.query()[role]["step"]
    time.sleep(0.1)
    return session.query()[role]["step"] > before


def events_of(session, role):
    """The names of a side's events in the order of their times; ends the engines."""
    trace = read(session.record().trace(role))
    times = [(ts, name) for name, rows in trace.events.items() for ts in rows["ts_ns"].tolist()]
    return [name for _, name in sorted(times)]


def in_order(names, *wanted):
    """Whether the wanted names come in this order, others between them."""
    left = iter(names)
    return all(name in left for name in wanted)
