"""What observing costs the observed: trace events and the probe, in fault latency."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import placement
from benchmarks.faults import PAGES, TOUCHES, interleave
from benchmarks.guest import IDLE, Ours
from benchmarks.result import Pairs, not_measured
from migkit.probe import Probe, Watch, available

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.result import Row, Scale


def measure(scale: Scale) -> Iterator[Row]:
    """Compare all events on with all off, and the probe attached with none."""
    for where in (placement.ONE, placement.TWO):
        with (
            Ours(PAGES, where, trace="all", **IDLE) as on,
            Ours(PAGES, where, trace="none", **IDLE) as off,
        ):
            pairs = interleave(on.hold().touch, off.hold().touch, where, scale.chunks)
        yield pairs.row("all events on / off", where.name, 50, 1.15)
    probe = available()
    if probe.ok:
        yield from _probe(scale)
    else:
        yield not_measured("probe on / off p50", f"no probe: {probe}", 1.1, "x")


def _probe(scale: Scale) -> Iterator[Row]:
    """Attach and detach for every pair: a tracepoint with a program slows everybody down."""
    where, pairs = placement.TWO, Pairs()
    with Ours(PAGES, where, **IDLE) as ours, placement.aside(where):
        guest = ours.hold().guest
        ours.touch(TOUCHES)
        for _ in scale.progress(scale.runs, "probe on / off"):
            with Probe([Watch(guest.pid, guest.info.address, guest.ram.size)]):
                ours.touch(TOUCHES // 5)
                pairs.ours.append(ours.touch(TOUCHES))
            ours.touch(TOUCHES // 5)
            pairs.floor.append(ours.touch(TOUCHES))
    yield pairs.row("probe on / off", where.name, 50, 1.1)
