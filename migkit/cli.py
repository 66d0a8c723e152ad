"""The command line: ``migkit run``, ``stream``, ``doctor``, and those of :mod:`migkit.cli_runs`.

Only here and there is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from migkit import cli_runs
from migkit.errors import MigkitError, OptionError
from migkit.guest.workloads import WORKLOADS, Workload
from migkit.migration.options import SIZES, Options, default_text

if TYPE_CHECKING:
    from migkit.analysis.run import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 when something failed, 2 when the call was wrong."""
    options = parse(arguments)
    warnings.formatwarning = _format_warning
    try:
        code: int = options.command(options)
    except OptionError as error:
        print(f"migkit: {error}", file=sys.stderr)
        return 2
    except (MigkitError, TimeoutError) as error:
        print(f"migkit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("migkit: interrupted; what was recorded is in the run folder", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    return code


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line, as ``migkit`` or a magic has it; argparse exits if it is wrong."""
    return _parser().parse_args(arguments)


def _format_warning(message: Warning | str, *_: object, **__: object) -> str:
    """Return a warning as the errors are printed: for who calls, without a line of our code."""
    return f"migkit: {message}\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="migkit",
        description="Runs a real post-copy live migration and shows where every page, every "
        "fault and every microsecond went.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="migrate a guest and record it")
    run.add_argument("--workload", default="random", help="one of " + ", ".join(WORKLOADS))
    run.add_argument(
        "--param", action="append", default=[], metavar="NAME=NUMBER", help="for the workload"
    )
    run.add_argument("--path", help="the run folder; default: a new one in runs/")
    run.add_argument(
        "--verify", action="store_true", help="compare the guest with one never migrated"
    )
    run.add_argument("--timeout", type=float, default=600.0, metavar="S", help="give up after S")
    for field in dataclasses.fields(Options):
        _add_option(run, field)
    run.set_defaults(command=_run)

    recorded = cli_runs.add_commands(commands)

    stream = commands.add_parser("stream", help="decode a migration stream, ours or QEMU's")
    stream.add_argument("file", help="what was sent, as 'migrate exec:cat' writes it; also .xz")
    stream.add_argument("--rows", action="store_true", help="print every piece, as CSV")
    stream.set_defaults(command=_stream)

    doctor = commands.add_parser("doctor", help="try out what this machine can do")
    doctor.set_defaults(command=_doctor)
    for command in (run, *recorded, stream, doctor):
        command.add_argument("--json", action="store_true", help="print JSON, nothing else")
    return parser


def _add_option(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    text = field.metadata["help"]
    if field.metadata["qemu"]:
        text += f" [QEMU: {field.metadata['qemu']}]"
    parser.add_argument(
        "--" + field.name.replace("_", "-"),
        default=None,
        metavar=_metavar(field),
        help=f"{text} (default: {default_text(field) or 'none'})".replace("%", "%%"),
    )


def _metavar(field: dataclasses.Field[Any]) -> str:
    """Return what stands for an option's value: its choices, else what kind of thing it is."""
    if isinstance(field.default, bool):
        return "on|off"
    if field.name in SIZES:
        return "SIZE"
    if isinstance(field.default, int | float):
        return "NUMBER"
    return "|".join(field.metadata["choices"]) or field.name.upper()


def _run(options: argparse.Namespace) -> int:
    run = migrate(options)
    cli_runs.print_figures(run, as_json=options.json)
    if options.verify and not options.json:
        print("Verified: RAM and CPU state are, bit for bit, those of an unmigrated guest.")
    return 0


def migrate(options: argparse.Namespace, workload: type[Workload] | None = None) -> Run:
    """Carry out a parsed ``run``, with a class as its workload where one is given."""
    from migkit import api  # noqa: PLC0415 — pandas takes half a second, doctor needs none

    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(Options)}
    given = {name: value for name, value in values.items() if value is not None}
    with _ProgressBar(quiet=options.json) as bar:
        return api.run(
            workload or options.workload,
            path=options.path,
            params=_params(options.param),
            verify=options.verify,
            progress=bar.update,
            timeout_s=options.timeout,
            **given,
        )


def _stream(options: argparse.Namespace) -> int:
    from migkit.analysis.stream import stream  # noqa: PLC0415

    decoded = stream(options.file)
    if options.rows:
        as_json = decoded.frame.to_json(orient="records")
        print(as_json if options.json else decoded.frame.to_csv(index=False), end="")
        return 0
    summary = decoded.summary()
    print(json.dumps(summary.to_dict()) if options.json else summary)
    return 0 if summary.ended else 1


def _doctor(options: argparse.Namespace) -> int:
    from migkit.kernel.capability import kernel_checks  # noqa: PLC0415
    from migkit.probe.capability import available  # noqa: PLC0415

    groups = {"migration": kernel_checks(), "eBPF probe": available().checks}
    usable = {name: all(c.ok or not c.required for c in checks) for name, checks in groups.items()}
    if options.json:
        checks = {name: [dataclasses.asdict(c) for c in found] for name, found in groups.items()}
        print(json.dumps({"usable": usable, "checks": checks}))
    else:
        for name, found in groups.items():
            print(f"{name}: {'ready' if usable[name] else 'NOT READY'}")
            for check in found:
                mark = "ok  " if check.ok else ("MISS" if check.required else "none")
                print(f"  {mark} {check.name}: {check.outcome}")
                if not check.ok:
                    print(f"       remedy: {check.remedy}")
        if not usable["eBPF probe"]:
            print("Without the probe migrations run; the kernel's stages of faults are missing.")
    return 0 if usable["migration"] else 1


def _params(pairs: Sequence[str]) -> dict[str, float]:
    params: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            params[name] = float(value)
        except ValueError:
            raise OptionError(f"--param {pair!r}: write NAME=NUMBER") from None
    return params


class _ProgressBar:
    """Pages that have arrived, the state and the faults, on stderr while a migration runs."""

    def __init__(self, *, quiet: bool) -> None:
        from tqdm import tqdm  # noqa: PLC0415

        self._bar = tqdm(
            unit="page", unit_scale=True, disable=quiet or None, leave=False, dynamic_ncols=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, now: dict[str, Any]) -> None:
        source, destination = now["source"], now["destination"]
        sent = sum(source[k] for k in ("precopy_pages", "background_pages", "requested_pages"))
        self._bar.total = sent + source["remaining_pages"]
        self._bar.n = sent
        self._bar.set_description(
            f"{now['status']}, round {source['round']}, {destination['faults']} faults"
        )
        self._bar.refresh()


if __name__ == "__main__":
    sys.exit(main())
