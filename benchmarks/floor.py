"""The C floor: compiled when the benchmarks start, driven over pipes."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from benchmarks.placement import Placement

BUILD = Path("build")
_SOURCE = Path(__file__).with_name("floor.c")


@functools.cache
def program() -> str:
    """Compile the floor; return the path of the program."""
    BUILD.mkdir(exist_ok=True)
    target = (BUILD / "floor").resolve()
    subprocess.run(["cc", "-O2", "-Wall", "-o", target, _SOURCE], check=True)
    return str(target)


class FaultFloor:
    """A floor that touches as many pages as it is told, each time."""

    def __init__(self, pages: int, placement: Placement) -> None:
        command = [program(), "fault", str(pages), *placement.arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def touch(self, count: int) -> np.ndarray:
        """Touch pages; return their latencies in us."""
        self._process.stdin.write(f"{count}\n".encode())
        self._process.stdin.flush()
        return _microseconds(self._process.stdout.read(8 * count), count)


def background(pages: int, placement: Placement) -> np.ndarray:
    """Touch every page while all are sent; return the latencies in us."""
    return _microseconds(_run("background", pages, placement), pages)


def bulk(pages: int, placement: Placement) -> float:
    """Send all pages without a fault; return the seconds it took."""
    return float(_microseconds(_run("bulk", pages, placement), 1)[0]) / 1e6


def _run(mode: str, pages: int, placement: Placement) -> bytes:
    command = [program(), mode, str(pages), *placement.arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120).stdout


def _microseconds(data: bytes, count: int) -> np.ndarray:
    if len(data) != 8 * count:
        raise RuntimeError(f"the floor wrote {len(data)} bytes, expected {8 * count}")
    return np.frombuffer(data, np.uint64) / 1e3
