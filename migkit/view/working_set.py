"""The guest's working set over time: what it wrote in pre-copy, what it missed in post-copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migkit.view.style import BLUE, VERMILION, dress, headline, new_figure, note

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from migkit.analysis.run import Run

_MIB = 1 << 20


def plot_working_set(run: Run) -> Figure:
    """Return what scans found written, and what the destination guest touched, over time."""
    frame = run.working_set
    figure = new_figure(10.5, 4.4)
    written, touched = figure.subplots(1, 2)
    panels = (
        (written, "written", "bytes", "Written since the scan before", "RAM found dirty (MiB)"),
        (touched, "touched", "total", "Touched by the destination guest, so far",
         "RAM it faulted on (MiB)"),
    )  # fmt: skip
    size = int(run.meta["options"]["page_size"])
    frame = frame.assign(total=frame["total_pages"] * size)
    reached = frame["total"].dropna()
    mib = float(reached.iloc[-1]) / _MIB if len(reached) else 0.0
    figure.suptitle(
        f"The guest faulted on {mib:,.1f} MiB of its RAM at the destination",
        x=0.01, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    for axes, kind, column, title, label in panels:
        dress(axes)
        headline(axes, title)
        mine = frame[frame["kind"] == kind]
        if mine.empty:
            axes.set(xticks=[], yticks=[])
            note(axes, "no scan but the first" if kind == "written" else "no faults")
            continue
        color, marker, line = (BLUE, "o", "-") if kind == "written" else (VERMILION, "", "-")
        axes.plot(
            mine["time_s"] * 1e3, mine[column].astype(float) / _MIB, color=color, marker=marker,
            linestyle=line, linewidth=1.6, drawstyle="default" if marker else "steps-post",
        )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
        axes.set_xlabel("time since the run's first event (ms)")
    return figure
