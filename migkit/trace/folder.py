"""The run folder: what a run leaves on disk, readable without migkit.

``meta.json`` says what ran where; ``source.trace`` and ``destination.trace`` are QEMU's
simpletrace v4; ``samples.npy`` and ``probe.npy`` are plain numpy. The Parquet tables derived from
them are written beside them. All times are CLOCK_MONOTONIC in ns.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from migkit.errors import OptionError, TraceFormatError
from migkit.trace import simpletrace
from migkit.trace.registry import Registry
from migkit.trace.simpletrace import Trace

META = "meta.json"
FORMAT = 1
ROLES = ("source", "destination")
_OURS = (
    META, "*.log", "source.trace", "destination.trace", "samples.npy", "probe.npy",
    "events.parquet", "faults.parquet", "samples.parquet",
)  # fmt: skip

_COUNTERS = (
    "precopy_bytes", "postcopy_bytes", "preempt_bytes", "precopy_pages", "background_pages",
    "requested_pages", "zero_pages", "discarded_pages", "remaining_pages", "round", "dirty_pages",
    "bandwidth", "faults", "local_faults", "outstanding", "unsent_requests",
)  # fmt: skip

SAMPLES_DTYPE = np.dtype(
    [("ts_ns", "i8"), ("source_step", "i8"), ("destination_step", "i8")]
    + [(f"{role}_{name}", "i8") for role in ROLES for name in _COUNTERS]
)
"""One row a sample: the guests' progress and both engines' counters (see migration.stats)."""


class RunFolder:
    """A folder that is a run, or is becoming one."""

    def __init__(self, path: Path) -> None:
        """Name a folder; :meth:`open` and :meth:`create` check it."""
        self.path = path

    @classmethod
    def create(cls, path: str | os.PathLike[str] | None, name: str) -> Self:
        """Make a new folder: at ``path``, or in ``runs/`` with the time in its name.

        Raises :class:`OptionError` when there is something else at ``path``.
        """
        if path is None:
            stamp = time.strftime("%Y%m%d-%H%M%S")
            folder = Path("runs") / f"{stamp}-{name}"
            number = 1
            while folder.exists():
                number += 1
                folder = Path("runs") / f"{stamp}-{name}-{number}"
        else:
            folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"run folder {folder}: {error.strerror}") from error
        left = [entry.name for entry in folder.iterdir()]
        if left and META not in left:
            raise OptionError(
                f"{folder} is not empty and not a run folder (no {META}): name another folder"
            )
        # An earlier run gives way; what somebody else put beside it stays.
        for pattern in _OURS:
            for entry in folder.glob(pattern):
                entry.unlink()
        return cls(folder)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open an existing run; raises :class:`TraceFormatError` when it is none."""
        folder = Path(path)
        if not folder.is_dir():
            raise TraceFormatError(f"{folder} is not a folder; a run is a folder with {META}")
        if not (folder / META).is_file():
            raise TraceFormatError(
                f"{folder} is not a run folder: it has no {META}. "
                "'migkit run' writes one; a run that was killed early may lack it"
            )
        return cls(folder)

    def log(self, name: str) -> Path:
        """Return where a process's stderr goes."""
        return self.path / f"{name}.log"

    def trace(self, role: str) -> Path:
        """Return where the trace of a side is."""
        return self.path / f"{role}.trace"

    def read_trace(self, role: str) -> Trace:
        """Read the trace of a side; without a file it is empty, and says so."""
        file = self.trace(role)
        if not file.exists():
            return Trace(Registry.load(), warnings=(f"there is no {file.name}: it is empty here",))
        return simpletrace.read(file)

    def save_meta(self, meta: Mapping[str, Any]) -> None:
        """Write meta.json, last and at once: a folder with it is complete."""
        text = json.dumps({"format": FORMAT, **meta}, indent=1, default=str)
        temporary = self.path / f".{META}"
        temporary.write_text(text + "\n")
        temporary.replace(self.path / META)
        for entry in self.path.glob("*.log"):
            if entry.stat().st_size == 0:
                entry.unlink()

    def load_meta(self) -> dict[str, Any]:
        """Read meta.json; raises :class:`TraceFormatError` if it is broken or from the future."""
        file = self.path / META
        try:
            meta = json.loads(file.read_text())
        except (ValueError, RecursionError) as error:
            raise TraceFormatError(f"{file} is no JSON: {error}") from error
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            found = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
            raise TraceFormatError(f"{file}: format {found!r}, this migkit reads {FORMAT}")
        return meta

    def save_samples(self, rows: npt.NDArray[np.void]) -> None:
        """Write the samples, :data:`SAMPLES_DTYPE`."""
        np.save(self.path / "samples.npy", rows)

    def load_samples(self) -> npt.NDArray[np.void]:
        """Read the samples; empty when there are none."""
        return self._load("samples.npy", SAMPLES_DTYPE)

    def save_probe(self, rows: npt.NDArray[np.void]) -> None:
        """Write the probe's records."""
        np.save(self.path / "probe.npy", rows)

    def load_probe(self, dtype: np.dtype[np.void]) -> npt.NDArray[np.void]:
        """Read the probe's records; empty when there was no probe."""
        return self._load("probe.npy", dtype)

    def _load(self, name: str, dtype: np.dtype[np.void]) -> npt.NDArray[np.void]:
        file = self.path / name
        if not file.exists():
            return np.empty(0, dtype)
        with file.open("rb") as opened:
            try:
                shape, _, found = _npy_header(opened)
            except Exception as error:  # numpy's raises whatever Python's own parser does
                raise TraceFormatError(f"{file} is cut off or no numpy file: {error}") from error
            if found != dtype or len(shape) != 1:
                raise TraceFormatError(f"{file} holds {found} {shape}, expected {dtype} (n,)")
            # np.load would take the memory that the header claims before it looks for the data.
            n_bytes = shape[0] * dtype.itemsize
            left = os.fstat(opened.fileno()).st_size - opened.tell()
            if not 0 <= n_bytes <= left:
                raise TraceFormatError(f"{file} is cut off: {left} bytes of data of {n_bytes}")
            return np.fromfile(opened, dtype, shape[0])


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the head of a numpy file: the array's shape, its order, its dtype."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"numpy's format {version}, we read (1, 0) and (2, 0)")


def host_facts() -> dict[str, Any]:
    """Return what a reader must know of the machine: kernel, Python, CPUs, clocks."""
    return {
        "host": {
            "kernel": platform.release(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "cpus": os.cpu_count(),
        },
        "clock": {
            "name": "CLOCK_MONOTONIC",
            "monotonic_ns": time.monotonic_ns(),
            "realtime_ns": time.time_ns(),
        },
    }
