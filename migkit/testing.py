"""Assertions about runs, for test suites: ``from migkit.testing import assert_no_violations``.

::

    def test_my_engine(tmp_path):
        run = migkit.load(tmp_path / "run")          # or migkit.run(...), or load_qemu(...)
        assert_no_violations(run)
        assert_order(run, ["postcopy_start", "migrate_set_state postcopy-active"], side="source")
        assert_fault_latency(run, p99_us=2000)

Each raises AssertionError with what was expected, what is there, and the events next to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from migkit.analysis.latency import DURATIONS, waited
from migkit.errors import OptionError, close_matches

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from migkit.analysis.run import Run

__all__ = [
    "assert_downtime", "assert_fault_latency", "assert_no_violations", "assert_order",
    "assert_states",
]  # fmt: skip

_NEAR = 4  # events shown before and after the place
_WORST = 3


def assert_no_violations(run: Run, *, ignore: Collection[str] = ()) -> None:
    """Fail if a run breaks a rule of :data:`migkit.analysis.check.RULES`; ``ignore`` names some.

    Rules that cannot be judged for lack of events do not fail; ``run.check()`` names them.
    """
    __tracebackhide__ = True
    from migkit.analysis.check import RULES  # noqa: PLC0415 — the names are needed here only

    names = {rule.name for rule in RULES}
    for name in ignore:
        if name not in names:
            raise OptionError(f"no rule {name!r}; {close_matches(name, names)}")
    found = run.check()
    found = found[~found["rule"].isin(list(ignore))]
    if len(found):
        lines = [f"{run!r} breaks {len(found)} rules:"]
        for _, row in found.iterrows():
            lines.append(f"  {row['rule']} ({row['side']}, {row['count']} times): {row['message']}")
            if pd.notna(row["ts_ns"]):
                lines += _near(run.events, int(row["ts_ns"]), run.origin_ns)
        raise AssertionError("\n".join(lines))


def assert_order(run: Run, events: Sequence[str], *, side: str | None = None) -> None:
    """Fail unless these events occurred one after the other, others between them allowed.

    An item is an event's name, alone or with a part of its arguments as QEMU's log prints them:
    ``"migrate_set_state completed"``. ``side`` looks at one process only.
    """
    __tracebackhide__ = True
    frame = run.events if side is None else run.events[run.events["process"] == side]
    frame = frame.reset_index(drop=True)
    begin, done = 0, "the beginning"
    for number, item in enumerate(events, 1):
        name, _, part = item.partition(" ")
        run.need(name)
        mine = frame["event"] == name
        if part:
            mine &= frame["args"].str.contains(part, regex=False)
        places = frame.index[mine]
        after = places[places >= begin]
        if not len(after):
            _fail_order(run, frame, item, number, len(events), begin, done, list(places))
        begin, done = int(after[0]) + 1, f"{item} at {_s(frame, int(after[0]), run.origin_ns)}"


def _fail_order(
    run: Run, frame: pd.DataFrame, item: str, number: int, count: int, begin: int, done: str,
    places: list[int],
) -> None:  # fmt: skip
    """Say which event did not come, where it did occur, and what is next to the place."""
    __tracebackhide__ = True
    text = f"{item} ({number} of {count}) did not occur after {done}"
    if places:
        shown = ", ".join(_s(frame, place, run.origin_ns) for place in places[:_NEAR])
        text += f"; it occurred {len(places)} times before that, at {shown}"
    else:
        text += "; it did not occur at all"
    place = min(begin, len(frame)) - 1
    near = frame.iloc[max(place - _NEAR, 0) : place + _NEAR + 1]
    lines = _lines(near, run.origin_ns, place)
    raise AssertionError("\n".join([text, *lines]))


def assert_states(run: Run, states: Sequence[str], *, side: str = "source") -> None:
    """Fail unless a side went through exactly these states, in this order."""
    __tracebackhide__ = True
    walk = run.states[run.states["side"] == side]
    found = walk["new_state"].tolist()
    if found == list(states):
        return
    agree = 0
    while agree < min(len(found), len(states)) and found[agree] == states[agree]:
        agree += 1
    wanted = states[agree] if agree < len(states) else "the end"
    got = found[agree] if agree < len(found) else "the end"
    lines = [f"the {side} went to {got}, expected {wanted}, after {found[:agree]}",
             f"  all states: {found}"]  # fmt: skip
    if len(walk):
        place = min(agree, len(walk) - 1)
        lines += _near(run.events, int(walk["ts_ns"].iloc[place]), run.origin_ns)
    raise AssertionError("\n".join(lines))


def assert_fault_latency(
    run: Run,
    *,
    mean_us: float | None = None,
    p50_us: float | None = None,
    p90_us: float | None = None,
    p99_us: float | None = None,
    p999_us: float | None = None,
    max_us: float | None = None,
    at_least: int = 1,
) -> None:
    """Fail if the faults that the source answered waited longer than these limits, us.

    ``at_least`` is how many such faults there must be: without any, no limit means anything.
    """
    __tracebackhide__ = True
    faults = waited(run.faults)
    if len(faults) < at_least:
        raise AssertionError(
            f"{run!r} has {len(faults):,} faults that waited for the source, expected {at_least:,}"
        )
    latency = faults["latency_us"]
    limits = {
        "mean": (mean_us, latency.mean()), "p50": (p50_us, latency.quantile(0.5)),
        "p90": (p90_us, latency.quantile(0.9)), "p99": (p99_us, latency.quantile(0.99)),
        "p99.9": (p999_us, latency.quantile(0.999)), "max": (max_us, latency.max()),
    }  # fmt: skip
    over = [
        f"{name} is {value:,.1f} us, allowed are {limit:,.1f}"
        for name, (limit, value) in limits.items()
        if limit is not None and not value <= limit
    ]
    if over:
        worst = faults.tail(_WORST).iloc[::-1]
        text = f"latency of {len(faults):,} faults: {'; '.join(over)}. The slowest:"
        raise AssertionError("\n".join([text, *(_fault(row) for _, row in worst.iterrows())]))


def assert_downtime(run: Run, *, max_ms: float) -> None:
    """Fail if the guest ran nowhere for longer than this, or was not handed over at all."""
    __tracebackhide__ = True
    parts = run.downtime
    total = parts.attrs["total_ms"]
    if total is None:
        raise AssertionError(f"there was no downtime: {parts.attrs['reason']}")
    if total > max_ms:
        each = [
            f"  {us / 1e3:10,.3f} ms  {part} ({side})"
            for us, part, side in zip(
                parts["duration_us"], parts["part"], parts["side"], strict=True
            )
        ]
        text = f"the guest ran nowhere for {total:,.3f} ms, allowed are {max_ms:,.3f}:"
        raise AssertionError("\n".join([text, *each]))


def _fault(row: pd.Series) -> str:
    """Return a fault and its three slowest stages on one line."""
    steps = row[list(DURATIONS)].dropna().astype(float).nlargest(3)
    parts = ", ".join(f"{str(k).removesuffix('_us')} {us:,.0f}" for k, us in steps.items())
    text = f"  {row['latency_us']:10,.1f} us  page {row['page']}, {row['resolution']}: {parts}"
    return text + (f", in an outage {row['outage_us']:,.0f}" if row["outage_us"] else "")


def _near(events: pd.DataFrame, ts_ns: int, origin_ns: int) -> list[str]:
    """Return the events next to a time, one a line."""
    place = int(events["ts_ns"].searchsorted(ts_ns))
    near = events.iloc[max(place - _NEAR, 0) : place + _NEAR + 1]
    return _lines(near, origin_ns, place)


def _lines(events: pd.DataFrame, origin_ns: int, place: int) -> list[str]:
    """Return events as lines, with a mark at one of them."""
    lines = []
    for index, ts, process, event, args in zip(
        events.index, events["ts_ns"], events["process"], events["event"], events["args"],
        strict=True,
    ):  # fmt: skip
        mark = ">" if index == place else " "
        lines.append(f"  {mark} {(ts - origin_ns) / 1e9:.6f} s {process} {event} {args}".rstrip())
    return lines


def _s(events: pd.DataFrame, place: int, origin_ns: int) -> str:
    return f"{(int(events['ts_ns'].iloc[place]) - origin_ns) / 1e9:.6f} s"
