"""The plots of a run, behind ``run.plot``.

Each returns a matplotlib Figure, shows nothing and keeps nothing: a notebook displays what its
cell returns, a script calls ``savefig``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from migkit.view.blocktime import plot_blocktime
from migkit.view.downtime import plot_downtime
from migkit.view.latency import plot_fault_latency, plot_fault_stages
from migkit.view.requests import plot_requests
from migkit.view.timeline import plot_timeline
from migkit.view.transfer import plot_transfer
from migkit.view.working_set import plot_working_set

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from migkit.analysis.run import Run


class Plots:
    """A run's plots as methods."""

    def __init__(self, run: Run) -> None:
        """Take the run."""
        self._run = run

    def timeline(self) -> Figure:
        """Draw phases, both guests' progress, transfer and faults over time."""
        return plot_timeline(self._run)

    def fault_latency(self) -> Figure:
        """Draw how long the guest waited at each fault, and the distribution."""
        return plot_fault_latency(self._run)

    def fault_stages(self) -> Figure:
        """Draw which step of a fault takes how long, at the median and in the tail."""
        return plot_fault_stages(self._run)

    def blocktime(self) -> Figure:
        """Draw how long the guest stood still on faults, in QEMU's buckets and over time."""
        return plot_blocktime(self._run)

    def requests(self) -> Figure:
        """Draw how long each request waited, and when the source was limited."""
        return plot_requests(self._run)

    def transfer(self) -> Figure:
        """Draw what was sent over time, and how the pages came."""
        return plot_transfer(self._run)

    def working_set(self) -> Figure:
        """Draw what the guest wrote between scans, and what it missed in post-copy."""
        return plot_working_set(self._run)

    def downtime(self) -> Figure:
        """Draw the parts of the downtime."""
        return plot_downtime(self._run)
