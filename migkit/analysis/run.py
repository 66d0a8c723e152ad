"""A recorded run, opened: its frames, its figures, its plots.

::

    run = Run.load("runs/20260101-120000-random")
    run.faults.groupby("resolution")["latency_us"].describe()
    print(run.summary())
    run.plot.timeline()
"""

from __future__ import annotations

import warnings as python_warnings
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import pandas as pd

from migkit.analysis import events, schema, translate
from migkit.analysis.analyses import Analyses
from migkit.analysis.downtime import downtime_frame
from migkit.analysis.faults import STAGE_EVENTS, Guest, faults_frame
from migkit.analysis.html import table
from migkit.analysis.phases import phases_frame
from migkit.analysis.summary import Summary, summarize
from migkit.errors import MissingEventError, OptionError, TraceWarning, close_matches
from migkit.probe.records import FAULT_DTYPE
from migkit.trace.folder import ROLES, RunFolder

if TYPE_CHECKING:
    import os

    import numpy as np
    import numpy.typing as npt

    from migkit.trace.simpletrace import Trace
    from migkit.view.export import Exports
    from migkit.view.plots import Plots

_KERNEL_STAGES = "fault, blocked, woken and running"


class Recording(Protocol):
    """What a run is made of: a run folder of ours, or what a QEMU recorded."""

    @property
    def path(self) -> Path:
        """Where it is."""

    def load_meta(self) -> dict[str, Any]:
        """Return what meta.json says."""

    def read_trace(self, role: str) -> Trace:
        """Return one side's trace."""

    def load_samples(self) -> npt.NDArray[np.void]:
        """Return the samples."""

    def load_probe(self, dtype: np.dtype[np.void]) -> npt.NDArray[np.void]:
        """Return the probe's records."""


class Run(Analyses):
    """One migration as its folder has it; frames are built when they are first asked for.

    ``events``, ``faults``, ``samples``, ``phases``, ``downtime`` and those of
    :class:`~migkit.analysis.analyses.Analyses` are described, column by column, by
    :func:`migkit.analysis.schema.describe`.
    """

    def __init__(self, folder: Recording) -> None:
        """Take what was recorded; :meth:`load` opens a run folder by its path."""
        self._folder = folder
        self.meta: dict[str, Any] = folder.load_meta()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Open a run folder; raises :class:`TraceFormatError` for anything else."""
        return cls(RunFolder.open(path))

    def __repr__(self) -> str:
        """Name the folder and how the migration ended."""
        return f"<Run {self.path}: {self.status}>"

    def _repr_html_(self) -> str:
        return table([*self.summary().rows(), ("run folder", str(self.path))])

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._folder.path

    @property
    def status(self) -> str:
        """The source's last state, as ``query-migrate`` has it: completed, failed, ..."""
        return str(self.meta["status"])

    # Frames.

    @cached_property
    def events(self) -> pd.DataFrame:
        """All trace events of both sides, by time."""
        return events.events_frame(self.traces)

    def event(self, name: str) -> pd.DataFrame:
        """Return one event: ts_ns, process, tid and a column per argument, by time.

        Integers are int64, strings ``category``. The frame is empty when the event was recorded
        but did not occur; MissingEventError when it was not recorded.
        """
        self.need(name)
        return events.event_frame(self.traces, name)

    def need(self, *names: str) -> None:
        """Raise MissingEventError, with the remedy, unless these events were recorded."""
        for name in names:
            if name not in self.recorded:
                raise MissingEventError(self._why_missing(name, self.recorded))

    @cached_property
    def faults(self) -> pd.DataFrame:
        """One row a page fault of the destination guest, with all its stages.

        ``attrs["warnings"]`` says which columns are empty, and why.
        """
        records = self._folder.load_probe(FAULT_DTYPE)
        source, destination = self.traces["source"], self.traces["destination"]
        blocks = self._faulting_blocks
        if len(blocks) < 2:
            guest = blocks[0] if blocks else self._guest
            frame = faults_frame(source, destination, records, guest)
        else:
            frame = schema.concat(
                "faults",
                [
                    faults_frame(*translate.of_block(source, destination, guest), records, guest)
                    for guest in blocks
                ],
            )
        frame.attrs["warnings"] = list(self._fault_warnings())
        return frame

    @cached_property
    def samples(self) -> pd.DataFrame:
        """The progress of both guests and the engines' counters, every 20 ms."""
        rows = self._folder.load_samples()
        data: dict[str, object] = {name: rows[name] for name in rows.dtype.names or ()}
        data["time_s"] = (rows["ts_ns"] - self.origin_ns) / 1e9
        return schema.frame("samples", data)

    @cached_property
    def phases(self) -> pd.DataFrame:
        """The phases of both sides, each without a gap."""
        return phases_frame(
            self.traces["source"], self.traces["destination"], self._guest.page_size
        )

    @cached_property
    def downtime(self) -> pd.DataFrame:
        """The parts of the downtime; ``attrs["total_ms"]`` is their sum."""
        return downtime_frame(self.traces["source"], self.traces["destination"])

    @cached_property
    def traces(self) -> dict[str, Trace]:
        """Both raw traces, as :func:`migkit.trace.read` gives them; warns if one is cut off."""
        return {role: self._read_trace(role) for role in ROLES}

    # Figures and plots.

    def summary(self) -> Summary:
        """Return the run's figures: ``print(run.summary())``, or its ``to_dict()``."""
        return self._summary

    @cached_property
    def _summary(self) -> Summary:
        return summarize(self)

    @property
    def plot(self) -> Plots:
        """The plots, by the names in :data:`migkit.view.PLOTS`: ``run.plot.timeline()``, ..."""
        from migkit.view.plots import Plots  # noqa: PLC0415 — matplotlib only for who plots

        return Plots(self)

    @property
    def export(self) -> Exports:
        """What it can be written as: ``run.export.perfetto(path)``, ``.html``, ``.csv``, ..."""
        from migkit.view.export import Exports  # noqa: PLC0415 — as with the plots

        return Exports(self)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is missing or in doubt, in sentences."""
        texts = list(self.meta.get("notices", ()))
        for role, trace in self.traces.items():
            texts += [f"{role}: {text}" for text in trace.warnings]
        for text in self._fault_warnings():
            if text not in texts:
                texts.append(text)
        if self.meta.get("engine") == "qemu":
            texts.append("phases: pages and bytes are not known: QEMU has no event for them")
        elif not {"ram_save_range", "ram_load_range"} <= self._recorded:
            texts.append(
                "phases: pages and bytes are not known: the group 'transfer' was not recorded"
            )
        elif not {STAGE_EVENTS["sent"], STAGE_EVENTS["placed"]} <= self._recorded:
            texts.append(
                "phases: requested pages are not counted: the group 'faults' was not recorded"
            )
        return tuple(texts)

    @property
    def records_lost(self) -> dict[str, int]:
        """How many records are missing, by where: source, destination, probe."""
        lost = {role: trace.dropped for role, trace in self.traces.items()}
        return lost | {"probe": int(self._probe.get("lost", 0))}

    @cached_property
    def origin_ns(self) -> int:
        """When the run's first event occurred: the zero of every ``time_s``."""
        firsts = [trace.span_ns[0] for trace in self.traces.values()]
        return min((first for first in firsts if first), default=0)

    def write_tables(self, path: str | os.PathLike[str] | None = None) -> None:
        """Write events, faults and samples as Parquet into a folder, by default the run's."""
        folder = self.path if path is None else Path(path)
        if not folder.is_dir():
            raise OptionError(f"{folder} is not a folder: name one to write the tables into")
        for name in ("events", "faults", "samples"):
            frame: pd.DataFrame = getattr(self, name)
            frame.to_parquet(folder / f"{name}.parquet", index=False)

    # What the frames need.

    @cached_property
    def recorded(self) -> frozenset[str]:
        """The names of the events that were recorded, whether they occurred or not."""
        return self._recorded.union(*(trace.events for trace in self.traces.values()))

    @property
    def _recorded(self) -> frozenset[str]:
        return frozenset(self.meta.get("events", ()))

    @property
    def _probe(self) -> dict[str, Any]:
        return dict(self.meta.get("probe", {}))

    @cached_property
    def _guest(self) -> Guest:
        options = self.meta["options"]
        guest = self.meta.get("guests", {}).get("destination", {})
        return Guest(
            block=str(self.meta.get("block", "")),
            address=int(guest.get("address", 0)),
            n_bytes=int(options["memory"]),
            page_size=int(options["page_size"]),
            origin_ns=self.origin_ns,
            preempt=bool(options["postcopy_preempt"]),
            recorded=self._recorded,
        )

    @property
    def _faulting_blocks(self) -> list[Guest]:
        """The RAM blocks that had faults, where the run names its blocks: a QEMU's does."""
        blocks = self.meta.get("blocks", ())
        if not blocks:
            return []
        (names,) = self.traces["destination"].columns(STAGE_EVENTS["read"], "ramblock")
        faulted = set(names.tolist())
        return [
            replace(
                self._guest, block=block["name"], address=block["address"], n_bytes=block["size"]
            )
            for block in blocks
            if block["name"] in faulted
        ]

    def _read_trace(self, role: str) -> Trace:
        trace = self._folder.read_trace(role)
        for text in trace.warnings:
            where = self.meta.get("files", {role: self.path / f"{role}.trace"}).get(role, self.path)
            python_warnings.warn(f"{where}: {text}", TraceWarning, stacklevel=2)
        return trace

    def _why_missing(self, name: str, recorded: frozenset[str]) -> str:
        registry = next(iter(self.traces.values())).registry
        if name not in registry:
            return f"no trace event {name!r}; {close_matches(name, recorded)}"
        if self.meta.get("engine") == "qemu":
            where = " and ".join(self.meta["files"].values())
            traced = translate.DERIVED_FROM.get(name, name)
            of = "" if traced == name else f" (of which {name} is made)"
            return (
                f"{traced}{of} is not in {where}: it did not occur, or QEMU was not told to "
                f"record it, -trace {traced}; of those recorded, {close_matches(traced, recorded)}"
            )
        group = registry[name].group
        chosen = ",".join([*self.meta["options"]["trace"], name])
        return (
            f"the event {name!r} was not recorded in {self.path}. Record it with "
            f"trace={chosen!r}, or its group {group!r}; of those recorded, "
            f"{close_matches(name, recorded)}"
        )

    def _fault_warnings(self) -> list[str]:
        """Say which stages of the fault table are empty, and why."""
        if self.meta.get("engine") == "qemu":
            return list(translate.fault_warnings(self._recorded, self.traces))
        texts = []
        off = {stage: name for stage, name in STAGE_EVENTS.items() if name not in self._recorded}
        if off:
            texts.append(
                f"faults: {', '.join(off)} cannot be known: {', '.join(off.values())} were not "
                "recorded; the group 'faults' has them"
            )
        if not self._probe.get("attached"):
            texts.append(
                f"faults: {_KERNEL_STAGES} are empty: "
                + ("the probe was off" if self._probe_off else "there was no eBPF probe")
            )
        if lost := int(self._probe.get("lost", 0)):
            texts.append(f"faults: {lost} of the probe's records were lost")
        return texts

    @property
    def _probe_off(self) -> bool:
        return bool(self.meta["options"].get("probe") == "off")
