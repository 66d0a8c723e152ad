"""``python -m benchmarks [--quick] [SUBJECT...]``: a table here, every sample in build/bench.json.

The exit code says whether the benchmarks could be run, not whether the bounds were met: a
machine that others use at the same time is no failure of ours.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from benchmarks import (
    analysing,
    background,
    breaks,
    bulk,
    completeness,
    emitting,
    faults,
    links,
    migrations,
    notebook,
    overhead,
    placement,
    reading,
    widgets,
)
from benchmarks.floor import BUILD, program
from benchmarks.result import Row, Scale
from migkit.trace.folder import host_facts

SUBJECTS = {
    "faults": faults, "background": background, "bulk": bulk, "migrations": migrations,
    "overhead": overhead, "emitting": emitting, "completeness": completeness,
    "links": links, "breaks": breaks, "reading": reading, "analysing": analysing,
    "widgets": widgets, "notebook": notebook,
}  # fmt: skip

_COLUMNS = "{:<35} {:<10} {:>10} {:>10} {:>9} {:>15} {:>8}  {}"


def main() -> int:
    """Measure what was asked for."""
    arguments = _parse()
    scale = Scale.QUICK if arguments.quick else Scale.FULL
    program()
    print(placement.WHAT)
    print(_COLUMNS.format(
        "figure", "placement", "ours", "floor", "value", "95 %", "bound", "met"
    ))  # fmt: skip
    rows: list[Row] = []
    for name in tqdm(arguments.subjects or SUBJECTS, file=sys.stderr, unit="subject"):
        for row in SUBJECTS[name].measure(scale):
            rows.append(row)
            tqdm.write(_line(row), file=sys.stdout)
            sys.stdout.flush()
    _save(arguments.output, rows, scale)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    parser.add_argument("--quick", action="store_true", help="fewer pairs, wider intervals")
    parser.add_argument("--output", type=Path, default=BUILD / "bench.json", metavar="FILE")
    arguments = parser.parse_args()
    for name in arguments.subjects:
        if name not in SUBJECTS:
            parser.error(f"no subject {name!r}; there are {', '.join(SUBJECTS)}")
    return arguments


def _line(row: Row) -> str:
    interval = "{:.3g}-{:.3g}".format(*row.interval) if row.interval else ""
    sign, met = (">=" if row.at_least else "<="), ("yes" if row.met else "NO")
    if row.bound == float("inf"):
        sign, met = "", ""
    bound = f"{sign} {row.bound:g}" if sign else "none"
    value = f"{row.value:.4g} {row.unit}".strip()
    if math.isnan(row.value):
        value, met = "", "not measured"
    return _COLUMNS.format(
        row.figure, row.placement, row.ours, row.floor, value, interval, bound, met
    ).rstrip()


def _save(path: Path, rows: list[Row], scale: Scale) -> None:
    """Write every sample, and where it was taken."""
    host = {**host_facts(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    data = {"host": host, "placement": placement.WHAT, "scale": scale.name.lower()}
    data["rows"] = [{**asdict(row), "met": row.met} for row in rows]
    for row in data["rows"]:
        row.update({key: None for key in ("value", "bound") if not math.isfinite(row[key])})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data) + "\n")
    print(f"every sample: {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
