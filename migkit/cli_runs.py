"""The commands on what was recorded: show, check, report, compare, convert, events.

Each takes a run folder, a sample's name, or a folder with a QEMU's ``source.log`` and
``destination.log`` (``.xz`` as they are; a ``query-migrate.json`` beside them is read too).
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migkit.errors import OptionError, TraceFormatError, close_matches
from migkit.view import PLOTS
from migkit.view.export import FRAMES

if TYPE_CHECKING:
    import argparse

    import pandas as pd

    from migkit.analysis.run import Run

_SIDES = ("source", "destination")
_SUFFIXES = {".pftrace": "perfetto", ".perfetto-trace": "perfetto", ".html": "html",
             ".csv": "csv", ".parquet": "parquet"}  # fmt: skip


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the commands to the command line's parser; return theirs."""
    show = commands.add_parser("show", help="summarise a recorded run, or draw it")
    show.add_argument("--png", type=Path, metavar="FILE", help="write a plot to FILE")
    show.add_argument("--plot", choices=PLOTS, default=PLOTS[0])
    show.add_argument("--log", choices=_SIDES, help="print a side's trace as QEMU logs it")
    show.add_argument("--frame", choices=FRAMES, help="print a table, as CSV or JSON")
    show.set_defaults(command=_show)

    check = commands.add_parser("check", help="check a run against the rules of a good migration")
    check.add_argument("--ignore", action="append", default=[], metavar="RULE")
    check.set_defaults(command=_check)

    report = commands.add_parser("report", help="write a report: one HTML file, readable offline")
    report.add_argument("--output", "-o", default="report.html", metavar="FILE")
    report.set_defaults(command=_report)

    convert = commands.add_parser("convert", help="write a run in another format")
    convert.add_argument("--to", choices=("perfetto", "html", "csv", "parquet"),
                         help="default: what the output's suffix says")  # fmt: skip
    convert.add_argument("--frame", action="append", choices=FRAMES,
                         help="for csv and parquet: write only this table")  # fmt: skip
    convert.add_argument("--registry", metavar="FILE",
                         help="for a trace file: QEMU's trace-events file")  # fmt: skip
    convert.set_defaults(command=_convert)

    compare = commands.add_parser("compare", help="line runs up: figures, ratios, intervals")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="the first is what others are "
                         "measured by; repetitions of one are joined by commas")  # fmt: skip
    compare.add_argument("--names", metavar="A,B,...", help="what to call them")
    compare.add_argument("--png", type=Path, metavar="FILE", help="write the figure to FILE")
    compare.set_defaults(command=_compare)

    events = commands.add_parser("events", help="list the trace events, with what each means")
    events.add_argument("pattern", nargs="?", default="all", help="a name, a glob or a group")
    events.add_argument("--registry", metavar="FILE", help="a trace-events file of QEMU's")
    events.set_defaults(command=_events)

    for command in (show, check, report, convert):
        text = "a run folder, a sample, or a folder with QEMU's logs"
        if command is convert:
            text += "; or one simpletrace file, of any size, to Parquet"
        command.add_argument("run", help=text)
    convert.add_argument("output", help="a file, or for csv and parquet a folder")
    return [show, check, report, convert, compare, events]


def print_figures(run: Run, *, as_json: bool) -> None:
    """Print the figures of a run, and where it is."""
    summary = run.summary()
    if as_json:
        print(json.dumps({"path": str(run.path), **summary.to_dict()}))
    else:
        print(f"{summary}\n{'run folder':<13}{run.path}")


def open_run(name: str) -> Run:
    """Open a run by its folder, a sample by its name, or a folder of QEMU's logs."""
    from migkit.analysis import samples  # noqa: PLC0415 — pandas takes half a second
    from migkit.analysis.run import Run  # noqa: PLC0415

    folder = Path(name)
    if not folder.exists() and name in _sample_names():
        return samples.sample(name)
    if folder.is_dir() and not (folder / "meta.json").exists():
        logs = {side: _log_of(folder, side) for side in _SIDES}
        if any(logs.values()):
            return _open_qemu(folder, logs)
        raise TraceFormatError(
            f"{folder} is not a run folder: it has no meta.json, which 'migkit run' writes, nor a "
            "QEMU's source.log or destination.log (or .trace, .xz, .gz)"
        )
    return Run.load(folder)


def _sample_names() -> list[str]:
    from migkit.analysis import samples  # noqa: PLC0415

    try:
        return sorted(samples.manifest())
    except OptionError:
        return []


def _log_of(folder: Path, side: str) -> Path | None:
    """Return a side's trace in a folder, None if there is none."""
    found = sorted(folder.glob(f"{side}.log*")) + sorted(folder.glob(f"{side}.trace*"))
    return found[0] if found else None


def _open_qemu(folder: Path, logs: dict[str, Path | None]) -> Run:
    """Open a QEMU's run; a bar on the terminal shows how much has been read."""
    from tqdm import tqdm  # noqa: PLC0415

    from migkit.analysis.qemu import load_qemu  # noqa: PLC0415

    query = folder / "query-migrate.json"
    # The logs may be packed, so how much there is in all is not known.
    with closing(tqdm(unit="B", unit_scale=True, disable=None, leave=False)) as bar:
        return load_qemu(
            **logs, query_migrate=query if query.exists() else None, progress=bar.update
        )


def _show(options: argparse.Namespace) -> int:
    run = open_run(options.run)
    if options.png:
        _save(getattr(run.plot, options.plot)(), options.png)
    if options.log:
        _print_log(run, options.log, as_json=options.json)
    elif options.frame:
        _print_frame(getattr(run, options.frame), as_json=options.json)
    else:
        print_figures(run, as_json=options.json)
    return 0


def _print_log(run: Run, side: str, *, as_json: bool) -> None:
    """Print a side's trace events, one a line, in order of time."""
    events = run.events[run.events["process"] == side]
    if as_json:
        print(events.to_json(orient="records"))
        return
    for ts, tid, name, args in zip(
        events["ts_ns"].tolist(), events["tid"].tolist(), events["event"], events["args"],
        strict=True,
    ):  # fmt: skip
        print(f"{tid}@{ts // 10**9}.{ts % 10**9 // 1000:06d}:{name} {args}")


def _print_frame(frame: pd.DataFrame, *, as_json: bool) -> None:
    print(frame.to_json(orient="records") if as_json else frame.to_csv(index=False), end="")


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise OptionError(f"--png {path}: {error.strerror}") from error


def _check(options: argparse.Namespace) -> int:
    """Print what a run breaks; fail if there is anything."""
    from migkit.analysis.check import RULES  # noqa: PLC0415

    names = [rule.name for rule in RULES]
    for name in options.ignore:
        if name not in names:
            raise OptionError(f"--ignore: no rule {name!r}; {close_matches(name, names)}")
    run = open_run(options.run)
    found = run.check()
    kept, unknown = found.attrs["kept"], found.attrs["not_checked"]
    found = found[~found["rule"].isin(options.ignore)]
    if options.json:
        violations = json.loads(found.to_json(orient="records"))
        print(json.dumps({"path": str(run.path), "violations": violations, "kept": kept,
                          "not_checked": unknown}))  # fmt: skip
        return 1 if len(found) else 0
    for _, row in found.iterrows():
        print(f"VIOLATED  {row['rule']} ({row['side']}): {row['message']}")
    for name, why in unknown.items():
        print(f"unknown   {name}: {why}")
    print(f"{len(found)} violations, {len(kept)} rules kept, {len(unknown)} not to be judged")
    return 1 if len(found) else 0


def _report(options: argparse.Namespace) -> int:
    return _written(open_run(options.run).export.html(options.output), as_json=options.json)


def _convert(options: argparse.Namespace) -> int:
    output = Path(options.output)
    kind = options.to or _SUFFIXES.get(output.suffix)
    if kind is None:
        known = ", ".join(_SUFFIXES)
        raise OptionError(f"{output}: name a format with --to, or a file that ends in {known}")
    if Path(options.run).is_file():
        return _convert_trace(Path(options.run), output, kind, options)
    tables = kind in ("csv", "parquet")
    if options.frame and not tables:
        raise OptionError(f"--frame is for csv and parquet; {kind} has all of the run")
    if tables and not options.to and len(options.frame or ()) != 1:
        raise OptionError(
            f"{output} is one file: choose its table with --frame, or write all into a folder "
            f"with --to {kind}"
        )
    export = open_run(options.run).export
    if not tables:
        return _written(getattr(export, kind)(output), as_json=options.json)
    if not options.to:
        return _written(export.table(options.frame[0], output), as_json=options.json)
    written = getattr(export, kind)(output, options.frame or FRAMES)
    return _written(*written.values(), as_json=options.json)


def _convert_trace(trace: Path, output: Path, kind: str, options: argparse.Namespace) -> int:
    """Write the events of one simpletrace file, of any size, as Parquet."""
    from tqdm import tqdm  # noqa: PLC0415

    from migkit.analysis.parquet import write_events  # noqa: PLC0415
    from migkit.trace.registry import Registry  # noqa: PLC0415

    if kind != "parquet" or options.frame not in (None, ["events"]):
        raise OptionError(
            f"{trace} is one trace file: its events can be written as Parquet; other tables and "
            "formats take a whole run, its folder"
        )
    side = "destination" if "dest" in trace.name or "dst" in trace.name else "source"
    registry = Registry.load(options.registry) if options.registry else None
    with closing(tqdm(unit="event", unit_scale=True, disable=None, leave=False)) as bar:
        try:
            write_events({side: trace}, output, registry, progress=bar.update)
        except OSError as error:
            raise OptionError(f"{output}: {error.strerror or error}") from error
    return _written(output, as_json=options.json)


def _written(*paths: Path, as_json: bool) -> int:
    """Say what was written."""
    if as_json:
        print(json.dumps({"written": [str(path) for path in paths]}))
    else:
        for path in paths:
            print(f"written      {path}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from tqdm import tqdm  # noqa: PLC0415

    from migkit.analysis.compare import compare  # noqa: PLC0415

    bar = tqdm(options.runs, unit="run", disable=None, leave=False, file=sys.stderr)
    groups = [[open_run(name) for name in text.split(",") if name] for text in bar]
    comparison = compare(*groups, names=options.names.split(",") if options.names else None)
    if options.png:
        _save(comparison.plot(), options.png)
    print(comparison.frame.to_json(orient="records") if options.json else comparison)
    return 0


def _events(options: argparse.Namespace) -> int:
    """Print the events that a pattern chooses."""
    from migkit.trace.registry import Registry  # noqa: PLC0415

    try:
        registry = Registry.load(options.registry)
    except OSError as error:
        raise TraceFormatError(f"{options.registry}: {error.strerror}") from error
    chosen = registry.select([options.pattern])
    events = [event for event in registry if event.name in chosen]
    if options.json:
        print(json.dumps([
            {"name": e.name, "group": e.group, "doc": e.doc, "format": e.format,
             "args": {a.name: a.ctype for a in e.args}}
            for e in events
        ]))  # fmt: skip
        return 0
    for event in events:
        args = ", ".join(f"{a.ctype} {a.name}" for a in event.args)
        print(f"{event.name}({args})")
        if event.doc:
            print(f"    {event.doc}" + (f" [{event.group}]" if event.group else ""))
    return 0
