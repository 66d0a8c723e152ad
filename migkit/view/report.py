"""The report of a run: one HTML file with its text, figures and tables, readable offline.

Plain semantic HTML without scripts. Every figure's alternative text says what the figure says,
and the table behind it is below it, so nothing depends on seeing, nor on seeing colours.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from migkit.analysis import schema
from migkit.analysis.check import RULES
from migkit.analysis.latency import latency_quantiles, stage_breakdown, waited
from migkit.analysis.transfer import totals
from migkit.errors import MissingEventError, OptionError
from migkit.view.html import page, table
from migkit.view.plots import Plots

if TYPE_CHECKING:
    import os

    from matplotlib.figure import Figure

    from migkit.analysis.run import Run

_WORST = 20


@dataclass(frozen=True)
class Section:
    """A part of the report: a heading, a figure if there is one, and the tables behind it."""

    title: str
    text: str
    plot: str
    tables: tuple[tuple[str, Callable[[Run], pd.DataFrame]], ...]


def write_report(run: Run, path: str | os.PathLike[str]) -> None:
    """Write a run's report; OptionError if the file cannot be written."""
    try:
        with Path(path).open("w", encoding="utf-8") as file:  # first: a report takes seconds
            file.write(report(run))
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror}") from error


def report(run: Run) -> str:
    """Return a run's report as an HTML document."""
    figures = run.summary()
    name = f"{figures.guest}: {figures.status}"
    parts = [_summary(run), _checks(run)]
    parts += [_section(run, section) for section in _SECTIONS]
    return page(title=f"Migration report: {name}", heading=f"Migration of {name}", parts=parts)


def _summary(run: Run) -> str:
    """Return the run's figures as text."""
    notices = "".join(f"<li>{escape(text)}</li>" for text in run.warnings)
    heard = f"<p>What is missing or in doubt:</p><ul>{notices}</ul>" if notices else ""
    text = escape(str(run.summary()))
    return (
        f'<section aria-labelledby="summary"><h2 id="summary">Summary</h2>'
        f'<div role="region" tabindex="0" aria-label="Figures of the run"><pre>{text}</pre></div>'
        f"<p>Recorded in {escape(str(run.path))}.</p>{heard}</section>"
    )


def _checks(run: Run) -> str:
    """Return what the rules found."""
    found = run.check()
    kept, unknown = found.attrs["kept"], found.attrs["not_checked"]
    docs = {rule.name: rule.doc for rule in RULES}
    if len(found):
        verdict = f"<p><strong>{len(found)} violations were found.</strong></p>"
        verdict += table(found[["rule", "side", "time_s", "count", "message"]], "Violations")
    else:
        verdict = f"<p>No violation: {len(kept)} of {len(docs)} rules are kept.</p>"
    lines = [f"<li>kept: {escape(docs[name])}</li>" for name in kept]
    lines += [
        f"<li>not checked: {escape(docs[name])} ({escape(why)})</li>"
        for name, why in unknown.items()
    ]
    return (
        f'<section aria-labelledby="checks"><h2 id="checks">Checks</h2>{verdict}'
        f"<details><summary>All rules</summary><ul>{''.join(lines)}</ul></details></section>"
    )


def _section(run: Run, section: Section) -> str:
    """Return a section; what its run has no events for says so instead."""
    name = section.plot.replace("_", "-")
    try:
        shown = _figure(getattr(Plots(run), section.plot)())
    except MissingEventError as error:
        shown = f"<p>No figure: {escape(str(error))}</p>"
    tables = "".join(_table(run, title, make) for title, make in section.tables)
    return (
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(section.title)}</h2>'
        f"<p>{escape(section.text)}</p>{shown}"
        f"<details><summary>Tables: {escape(section.title.lower())}</summary>{tables}</details>"
        f"</section>"
    )


def _figure(figure: Figure) -> str:
    """Return a figure as an image within the document."""
    data = io.BytesIO()
    figure.savefig(data, format="png", bbox_inches="tight", dpi=110)
    text = getattr(figure, "alt_text", figure.get_suptitle())
    encoded = base64.b64encode(data.getvalue()).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{encoded}" alt="{escape(text)}">'
        f"<figcaption>{escape(figure.get_suptitle())}.</figcaption></figure>"
    )


def _table(run: Run, title: str, make: Callable[[Run], pd.DataFrame]) -> str:
    try:
        frame = make(run)
    except MissingEventError as error:
        return f"<p>{escape(title)}: {escape(str(error))}</p>"
    if frame.empty:
        return f"<p>{escape(title)}: none.</p>"
    return table(frame, title, _docs(frame))


def _docs(frame: pd.DataFrame) -> dict[str, str]:
    """Return what the columns mean, of a frame that is one of the schema's."""
    for known in schema.TABLES.values():
        if list(known.columns) == list(frame.columns):
            return {name: column.doc for name, column in known.columns.items()}
    return {}


def _slowest(run: Run) -> pd.DataFrame:
    """Return the faults that waited longest, with the stages that took time."""
    worst = waited(run.faults).tail(_WORST).iloc[::-1]
    columns = ["time_s", "page", "tid", "resolution", "channel", "latency_us", "outage_us"]
    stages = [f"{stage}_us" for stage in schema.STAGES[1:]]
    shown = worst[[*columns, *(name for name in stages if worst[name].notna().any())]]
    return shown.reset_index(drop=True)


def _used(distribution: pd.DataFrame) -> pd.DataFrame:
    """Return the buckets that have faults."""
    some = (distribution["faults"] > 0) | (distribution["engine_faults"] > 0)
    return distribution[some]


def _request_figures(run: Run) -> pd.DataFrame:
    """Return how many requests there were, and what became of them."""
    requests = run.requests
    rows = {
        "all": len(requests),
        "wasted: the page was under way": int(requests["wasted"].sum()),
        "stalled: held up by the rate limiter": int(requests["stalled"].sum()),
        "over an outage": int((requests["outage_us"] > 0).sum()),
        "never answered": int((~requests["answered"]).sum()),
    }
    return pd.DataFrame({"requests": rows}).rename_axis("kind")


_SECTIONS = (
    Section(
        "The whole migration",
        "From above: the phases of the source, the progress of both guests, the pages that came, "
        "and each fault at its place in RAM.",
        "timeline",
        (("Phases of both sides", lambda run: run.phases),
         ("Rounds of pre-copy", lambda run: run.rounds),
         ("States that each side went through", lambda run: run.states)),
    ),
    Section(
        "Downtime", "What was done while the guest ran nowhere.", "downtime",
        (("Parts of the downtime", lambda run: run.downtime),),
    ),
    Section(
        "Latency of page faults", "How long the guest's threads waited for a page.",
        "fault_latency",
        (("Latency by how a fault was resolved", lambda run: latency_quantiles(run.faults)),
         (f"The {_WORST} slowest faults that the source answered", _slowest)),
    ),
    Section(
        "Where the time of a fault goes",
        "Which step takes most, at the median and in the tail.", "fault_stages",
        (("The slowest step at each place of the distribution", lambda run: run.critical_path),
         ("All steps", lambda run: stage_breakdown(run.faults))),
    ),
    Section(
        "Standing still", "How long the guest stood still on faults, as QEMU's postcopy-blocktime.",
        "blocktime",
        (("Time stood still, by thread and all at once", lambda run: run.blocktime),
         ("Faults in QEMU's buckets of latency", lambda run: _used(run.latency_distribution))),
    ),
    Section(
        "Transfer", "How the pages came, and when.", "transfer",
        (("Pages by how they came", lambda run: totals(run.transfer)),),
    ),
    Section(
        "Requests", "Which requests were for nothing, and which the rate limiter held up.",
        "requests",
        (("What became of the requests", _request_figures),),
    ),
    Section(
        "Working set", "What the guest wrote between scans, and what it missed in post-copy.",
        "working_set",
        (("The working set over time", lambda run: run.working_set),),
    ),
)  # fmt: skip
