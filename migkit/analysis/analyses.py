"""The analyses of a run as properties: what a Run offers beyond what was recorded.

Each is a pure function of its own module; here they get what they need, and an analysis whose
events were not recorded raises MissingEventError instead of showing nothing.
"""

from __future__ import annotations

import abc
from functools import cached_property
from typing import TYPE_CHECKING, Any

from migkit.analysis import blocktime, latency, page, requests, rounds, states, transfer
from migkit.analysis.check import check_frame
from migkit.analysis.rates import rates_frame
from migkit.analysis.working_set import working_set_frame

if TYPE_CHECKING:
    import pandas as pd

    from migkit.analysis.faults import Guest
    from migkit.trace.simpletrace import Trace


class Analyses(abc.ABC):
    """What can be computed of a run; each frame is built when it is first asked for."""

    meta: dict[str, Any]

    @property
    @abc.abstractmethod
    def status(self) -> str:
        """The source's last state."""

    @property
    @abc.abstractmethod
    def records_lost(self) -> dict[str, int]:
        """How many records are missing, by where."""

    @property
    @abc.abstractmethod
    def recorded(self) -> frozenset[str]:
        """The names of the events that were recorded."""

    @property
    @abc.abstractmethod
    def traces(self) -> dict[str, Trace]:
        """Both raw traces."""

    @property
    @abc.abstractmethod
    def faults(self) -> pd.DataFrame:
        """The fault table."""

    @property
    @abc.abstractmethod
    def samples(self) -> pd.DataFrame:
        """The samples."""

    @property
    @abc.abstractmethod
    def phases(self) -> pd.DataFrame:
        """The phases of both sides."""

    @property
    @abc.abstractmethod
    def origin_ns(self) -> int:
        """When the run's first event occurred."""

    @property
    @abc.abstractmethod
    def _guest(self) -> Guest: ...

    @abc.abstractmethod
    def need(self, *names: str) -> None:
        """Raise MissingEventError, with the remedy, unless these events were recorded."""

    @property
    def page_size(self) -> int:
        """The host page size, bytes."""
        return self._guest.page_size

    @property
    def n_pages(self) -> int:
        """How many host pages the guest's RAM has."""
        return self._guest.n_bytes // self.page_size

    @cached_property
    def end_ns(self) -> int:
        """When the run's last event occurred."""
        return max((trace.span_ns[1] for trace in self.traces.values()), default=0)

    @cached_property
    def states(self) -> pd.DataFrame:
        """The states that each side went through, and whether each step was legal."""
        self.need("migrate_set_state")
        return states.states_frame(self.traces, self.origin_ns)

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """The rounds of pre-copy: how much each sent, and how much it left dirty."""
        return rounds.rounds_frame(self.phases)

    @cached_property
    def rates(self) -> pd.DataFrame:
        """How fast both guests went on and pages came, between one sample and the next."""
        faults = self.faults
        answered = faults.loc[faults["resolution"].isin(["requested", "in_flight"]), "placed_ns"]
        return rates_frame(self.samples, self.page_size, answered.dropna())

    @cached_property
    def transfer(self) -> pd.DataFrame:
        """Every run of pages that was sent, and how it came to be."""
        guest = self._guest
        destination = self.traces["destination"]
        if self.meta.get("engine") == "qemu":
            self.need("postcopy_place_page")
            return transfer.placed_frame(
                destination, guest.page_size, self.origin_ns, self.meta["blocks"]
            )
        self.need("ram_save_range")
        return transfer.transfer_frame(self.traces["source"], guest.page_size, self.origin_ns)

    @cached_property
    def requests(self) -> pd.DataFrame:
        """The requests for missing pages: wasted ones, and those that the limiter held up."""
        self.need("postcopy_ram_fault_thread_request", "postcopy_page_req_add")
        return requests.requests_frame(self.faults, self.traces["source"])

    @cached_property
    def working_set(self) -> pd.DataFrame:
        """How many pages the guest wrote between scans, and first touched in post-copy."""
        self.need("migration_bitmap_sync_end")
        return working_set_frame(self.traces["source"], self.faults, self.page_size, self.origin_ns)

    @cached_property
    def critical_path(self) -> pd.DataFrame:
        """Which stage of a fault takes most of its latency, at the median and in the tail."""
        return latency.critical_path(self.faults)

    @cached_property
    def blocktime(self) -> pd.DataFrame:
        """How long each thread stood still on faults, and all at once."""
        self.need("postcopy_ram_fault_thread_request")
        return blocktime.blocktime_frame(self.faults, self.end_ns, self.vcpus)

    @cached_property
    def latency_distribution(self) -> pd.DataFrame:
        """The latencies of faults in the 24 buckets of QEMU's postcopy-latency-dist."""
        self.need("postcopy_ram_fault_thread_request")
        return blocktime.distribution_frame(self.faults)

    def query_blocktime(self) -> dict[str, Any]:
        """Return blocktime and latencies in the names and units of QEMU's query-migrate."""
        return blocktime.query_migrate(self.faults, self.end_ns, self.vcpus)

    @property
    def vcpus(self) -> list[int] | None:
        """The threads that are vCPUs, where QEMU tells; None for all that faulted."""
        known = self.traces["destination"].events.get("postcopy_blocktime_tid_cpu_map")
        if known is None:
            return None
        [name] = (known.dtype.names or ())[4:]  # after ts_ns, tid, seq and cpu
        return [int(tid) for tid in known[name].tolist()]

    def page(self, number: int) -> pd.DataFrame:
        """Return everything that happened to a host page: a part of the frame ``events``."""
        return page.page_frame(self.traces, number, self._guest)

    def check(self) -> pd.DataFrame:
        """Return the rules that this run breaks, none when all is well.

        The rules are :data:`migkit.analysis.check.RULES`; ``attrs`` says which the run keeps, and
        which cannot be judged, and why. :mod:`migkit.testing` has them as assertions.
        """
        return check_frame(self)
