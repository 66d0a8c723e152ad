"""What a run can be written as, behind ``run.export``: Perfetto, HTML, CSV, Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from migkit.errors import MissingEventError, OptionError, close_matches

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    import pandas as pd

    from migkit.analysis.run import Run

FRAMES = (
    "events", "faults", "samples", "phases", "downtime", "states", "rounds", "rates", "transfer",
    "requests", "working_set", "critical_path", "blocktime", "latency_distribution",
)  # fmt: skip
"""The frames that are written, each as a file of its name."""


class Exports:
    """A run's exports as methods; each returns the paths it has written."""

    def __init__(self, run: Run) -> None:
        """Take the run."""
        self._run = run

    def perfetto(self, path: str | os.PathLike[str]) -> Path:
        """Write a trace for Perfetto's UI."""
        from migkit.view.perfetto import write_perfetto  # noqa: PLC0415 — protobuf on demand

        write_perfetto(self._run, path)
        return Path(path)

    def html(self, path: str | os.PathLike[str]) -> Path:
        """Write the report: one file with figures, tables and text, readable offline."""
        from migkit.view.report import write_report  # noqa: PLC0415 — matplotlib on demand

        write_report(self._run, path)
        return Path(path)

    def csv(
        self, folder: str | os.PathLike[str], frames: Iterable[str] = FRAMES
    ) -> dict[str, Path]:
        """Write frames as CSV files into a folder, which is made if need be."""
        return self._tables(folder, frames, "csv")

    def parquet(
        self, folder: str | os.PathLike[str], frames: Iterable[str] = FRAMES
    ) -> dict[str, Path]:
        """Write frames as Parquet files into a folder, which is made if need be."""
        return self._tables(folder, frames, "parquet")

    def table(self, name: str, path: str | os.PathLike[str]) -> Path:
        """Write one frame as a file, CSV or Parquet by its suffix."""
        target = Path(path)
        kind = target.suffix.removeprefix(".")
        if kind not in ("csv", "parquet"):
            raise OptionError(f"{target}: a table is written as .csv or .parquet")
        _check_name(name)
        try:
            _write(getattr(self._run, name), target, kind)
        except OSError as error:
            raise OptionError(f"{path}: {error.strerror or error}") from error
        return target

    def _tables(
        self, folder: str | os.PathLike[str], names: Iterable[str], kind: str
    ) -> dict[str, Path]:
        """Write frames; of all frames those whose events were not recorded are left out.

        Raises MissingEventError for such a frame that was asked for by name.
        """
        chosen = tuple(names)
        for name in chosen:
            _check_name(name)
        target, written = Path(folder), {}
        try:
            target.mkdir(parents=True, exist_ok=True)
            for name in chosen:
                try:
                    frame: pd.DataFrame = getattr(self._run, name)
                except MissingEventError:
                    if chosen == FRAMES:
                        continue
                    raise
                written[name] = target / f"{name}.{kind}"
                _write(frame, written[name], kind)
        except OSError as error:
            raise OptionError(f"{folder}: {error.strerror or error}") from error
        return written


def _check_name(name: str) -> None:
    if name not in FRAMES:
        raise OptionError(f"no frame {name!r}; {close_matches(name, FRAMES)}")


def _write(frame: pd.DataFrame, path: Path, kind: str) -> None:
    if kind == "csv":
        frame.to_csv(path, index=False)
        return
    plain = frame.copy(deep=False)
    plain.attrs = {}  # Parquet takes notes only if they are JSON
    plain.to_parquet(path, index=False)
