"""``python -m fuzz [--runs N] [DECODER...]``: fuzz the decoders, guided by coverage; print a table.

The inputs are shared out evenly. What was found to reach new code is kept in build/fuzz and is
where the next run begins. The exit code is 1 if any input crashed a decoder, hung it, or made it
ask for more than 512 MiB at once, or if a kept one takes more memory than its length allows.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fuzz.targets import TARGETS

_FOLDER = Path("build/fuzz")
_HANG_S = 10
_ROUND = 250_000  # inputs a process: atheris itself keeps some 2 KiB of each
_ROW = "{:<13} {:>9} {:>8} {:>8} {:>9} {:>8} {:>12}"


@dataclass(frozen=True)
class Outcome:
    """What became of one decoder.

    ``peak_kib`` is what that input of the kept ones took that took most, by tracemalloc;
    ``artifact`` is the input that it failed on.
    """

    inputs: int
    seconds: float
    coverage: int
    peak_kib: int
    artifact: Path | None


def fuzz(name: str, runs: int) -> Outcome:
    """Fuzz one decoder in processes of its own, from its seeds and what earlier runs kept."""
    folder = _FOLDER / name
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    begin, inputs, found, text = time.monotonic(), 0, None, ""
    for done in range(0, runs, _ROUND):
        text = _round(name, min(runs - done, _ROUND), folder)
        inputs += _last(r"stat::number_of_executed_units: (\d+)", text)
        found = re.search(r"Test unit written to (\S+)", text)
        if found:
            break
    seconds = time.monotonic() - begin
    peak, greedy = (0, None) if found else _weigh(name, corpus)
    return Outcome(
        inputs=inputs,
        seconds=seconds,
        coverage=_last(r" cov: (\d+)", text),
        peak_kib=peak >> 10,
        artifact=Path(found[1]) if found else greedy,
    )


def _round(name: str, runs: int, folder: Path) -> str:
    """Run the fuzzer once; return what it wrote."""
    options = [
        f"-runs={runs}", f"-timeout={_HANG_S}", "-print_final_stats=1",
        f"-artifact_prefix={folder}/", str(folder / "corpus"),
    ]  # fmt: skip
    command = [sys.executable, "-m", "fuzz.harness", name, *options]
    with (folder / "log").open("w+", errors="replace") as log:
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        log.seek(0)
        text = log.read()
    if code and "Test unit written to" not in text:
        sys.exit(f"{name}: the fuzzer ended with code {code}, see {folder}/log")
    return text


def _weigh(name: str, corpus: Path) -> tuple[int, Path | None]:
    """Return the most that one of the kept inputs takes, and one that takes more than it may."""
    target, most, greedy = TARGETS[name], 0, None
    for file in corpus.iterdir():
        data = file.read_bytes()
        peak = target.peak(data)
        most = max(most, peak)
        if peak > target.most(data):
            greedy = file
    return most, greedy


def _last(pattern: str, text: str) -> int:
    return int((re.findall(pattern, text) or ["0"])[-1])


def main() -> None:
    """Fuzz what is asked for, and say what came of it."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--runs", type=int, default=2_000_000, help="inputs over all decoders")
    parser.add_argument("decoders", nargs="*", metavar="DECODER", help=", ".join(TARGETS))
    arguments = parser.parse_args()
    names = arguments.decoders or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"no decoder {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    outcomes = {}
    print(
        _ROW.format("decoder", "inputs", "time", "inputs/s", "coverage", "failures", "most memory")
    )
    for name in names:
        outcomes[name] = it = fuzz(name, -(-arguments.runs // len(names)))
        rate = f"{it.inputs / it.seconds:.0f}"
        values = (it.inputs, f"{it.seconds:.1f} s", rate, it.coverage, int(it.artifact is not None))
        print(_ROW.format(name, *values, f"{it.peak_kib} KiB"), flush=True)
    crashes = {name: it.artifact for name, it in outcomes.items() if it.artifact}
    total, seconds = (sum(getattr(o, f) for o in outcomes.values()) for f in ("inputs", "seconds"))
    print(_ROW.format("total", total, f"{seconds:.1f} s", "", "", len(crashes), ""))
    for name, artifact in crashes.items():
        again = f"python -m fuzz.harness {name} {artifact}"
        print(f"{name} failed, see {_FOLDER / name}/log; again: {again}")
    sys.exit(1 if crashes else 0)


if __name__ == "__main__":
    main()
