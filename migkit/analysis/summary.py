"""A run in figures: plain values, for a terminal, for JSON, for a table of many runs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from migkit.analysis import latency
from migkit.analysis.html import table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from migkit.analysis.run import Run

_MIB = 1 << 20


@dataclass(frozen=True)
class Summary:
    """The figures of one run; times in ms or us, None for what is not known.

    ``pages`` and ``bytes`` say how they came, and are empty without samples; ``faults`` counts by
    resolution, ``unknown`` where the trace does not tell it; ``latency_us`` is over the faults
    that waited for the source (requested and in flight). ``memory_bytes`` is of all RAM blocks, a
    QEMU's video memory and firmware included, as in query-migrate; 0 is unknown.
    """

    status: str
    destination_status: str
    workload: str
    memory_bytes: int
    total_ms: float | None
    downtime_ms: float | None
    phases_ms: dict[str, float]
    downtime_us: dict[str, float]
    pages: dict[str, int]
    bytes: dict[str, int]
    throughput_mib_s: float | None
    faults: dict[str, int]
    messages: int
    latency_us: dict[str, float | None]
    dominating_stage: dict[str, str | None]
    records_lost: dict[str, int]
    errors: tuple[str, ...]
    notices: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers, fit for JSON."""
        values = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}

    def __getitem__(self, name: str) -> Any:
        """Return a figure by name, as of a dict."""
        return self.to_dict()[name]

    def __str__(self) -> str:
        """Return a text block for a terminal."""
        return "\n".join(f"{name:<13}{text}" for name, text in self.rows())

    def _repr_html_(self) -> str:
        return table(self.rows())

    @property
    def guest(self) -> str:
        """What was migrated, in words: the workload and its memory."""
        size = f"{self.memory_bytes / _MIB:,.0f} MiB" if self.memory_bytes else "RAM unknown"
        return f"{self.workload}, {size}"

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield the lines of the text block: a name and what is to be said of it."""
        both = (
            "" if self.status == self.destination_status else f", there {self.destination_status}"
        )
        yield "migration", f"{self.status}{both} ({self.guest})"
        if self.total_ms is not None:
            phases = ", ".join(f"{name} {ms:,.1f}" for name, ms in self.phases_ms.items())
            yield "total", f"{self.total_ms:,.1f} ms: {phases}"
        if self.downtime_ms is not None:
            parts = sorted(self.downtime_us.items(), key=lambda part: -part[1])[:3]
            most = ", ".join(f"{name} {us / 1e3:,.2f}" for name, us in parts)
            yield "downtime", f"{self.downtime_ms:,.2f} ms, most of it: {most}"
        if self.pages:
            pages = ", ".join(f"{name} {count:,}" for name, count in self.pages.items())
            yield "pages", f"{pages}"
            speed = self.throughput_mib_s
            rate = f", {speed:,.0f} MiB/s" if speed is not None else ""
            yield "data", f"{sum(self.bytes.values()) / _MIB:,.1f} MiB on the wire{rate}"
        yield from self._fault_rows()
        for name, count in self.records_lost.items():
            if count:
                yield "lost", f"{count:,} records of {name}"
        for kind, texts in (("error", self.errors), ("notice", self.notices)):
            for text in texts:
                yield kind, text

    def _fault_rows(self) -> Iterator[tuple[str, str]]:
        counts = ", ".join(f"{name} {count:,}" for name, count in self.faults.items())
        yield "faults", f"{counts or 'none'}"
        known = {name: us for name, us in self.latency_us.items() if us is not None}
        if known:
            figures = ", ".join(f"{name} {us:,.0f}" for name, us in known.items())
            yield "latency", f"{figures} us (requested and in flight)"
            where = ", ".join(f"{stage} at {at}" for at, stage in self.dominating_stage.items())
            yield "slowest step", f"{where}"


def summarize(run: Run) -> Summary:
    """Return a run's figures."""
    meta, faults = run.meta, run.faults
    counters = _last_counters(run.samples)
    wire = counters and {
        "precopy": counters.get("source_precopy_bytes", 0),
        "postcopy": counters.get("source_postcopy_bytes", 0),
        "preempt": counters.get("source_preempt_bytes", 0),
    }
    mine = run.phases[run.phases["side"] == "source"]
    total_ms = float(mine["duration_ms"].sum()) if len(mine) else None
    remote = latency.waited(faults, ["latency_us"])["latency_us"]
    slowest = dict(zip(run.critical_path["at"], run.critical_path["stage"], strict=True))
    counts = faults["resolution"].value_counts(sort=False, dropna=False)
    counts.index = ["unknown" if pd.isna(name) else str(name) for name in counts.index]
    return Summary(
        status=run.status,
        destination_status=str(meta.get("destination_status", "unknown")),
        workload=str(meta.get("workload", {}).get("name", "unknown")),
        memory_bytes=int(meta.get("memory", meta["options"]["memory"])),
        total_ms=total_ms,
        downtime_ms=run.downtime.attrs["total_ms"],
        phases_ms=_phases_ms(mine),
        downtime_us=_plain(run.downtime.set_index("part")["duration_us"]),
        pages=counters
        and {
            "precopy": counters.get("destination_precopy_pages", 0),
            "background": counters.get("destination_background_pages", 0),
            "requested": counters.get("destination_requested_pages", 0),
            "zero": counters.get("destination_zero_pages", 0),
            "discarded": counters.get("destination_discarded_pages", 0),
        },
        bytes=wire,
        throughput_mib_s=_throughput(sum(wire.values()), mine),
        faults={str(name): int(n) for name, n in counts.items() if n},
        messages=int(faults["messages"].sum()),
        latency_us={
            **{key: _number(float(remote.quantile(q))) for key, q in latency.QUANTILES.items()},
            "max": _number(float(remote.max())),
        },
        dominating_stage={at: slowest.get(at) for at in ("p50", "p99")},
        records_lost=run.records_lost,
        errors=tuple(meta.get("errors", ())),
        notices=run.warnings,
    )


def _last_counters(samples: pd.DataFrame) -> dict[str, int]:
    """Return the counters as they stood at the end."""
    if samples.empty:
        return {}
    return {str(name): int(value) for name, value in samples.iloc[-1].items()}


def _phases_ms(phases: pd.DataFrame) -> dict[str, float]:
    """Return how long each phase took in all, the rounds of pre-copy as one."""
    names = phases["name"].str.replace(r"^precopy round .*", "precopy", regex=True)
    return _plain(phases.groupby(names, sort=False)["duration_ms"].sum())


def _throughput(n_bytes: int, phases: pd.DataFrame) -> float | None:
    """Return MiB a second over the phases in which pages move."""
    moving = phases[~phases["name"].isin(["setup", "paused", "recovery"])]
    seconds = float(moving["duration_ms"].sum()) / 1e3
    return n_bytes / _MIB / seconds if n_bytes and seconds else None


def _plain(series: pd.Series) -> dict[str, float]:
    return {str(name): float(value) for name, value in series.items()}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
