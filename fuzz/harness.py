"""``python -m fuzz.harness DECODER [OPTION...]``: fuzz one decoder, guided by its coverage.

Options are libFuzzer's: -runs=N, -max_total_time=S, a corpus folder, or a file that crashed.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import atheris

_SPARE = 512 << 20


def main(name: str, options: list[str]) -> None:
    """Fuzz until a crash or the number of runs; the process ends here."""
    with atheris.instrument_imports(include=["migkit"]):
        from fuzz.targets import TARGETS  # noqa: PLC0415 — after the instrumentation is on
    target = TARGETS[name]
    # More than this at once is a MemoryError, so a crash, whether the memory is touched or not.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _SPARE, used + _SPARE))
    atheris.Setup([sys.argv[0], f"-max_len={target.longest}", *options], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
