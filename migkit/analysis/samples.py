"""The recorded migrations that come with migkit's source: ``migkit.sample("qemu-11.1-plain")``.

``traces/manifest.json`` says of each how it was recorded, with what, and the SHA-256 of its files.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from migkit.analysis.qemu import load_qemu
from migkit.analysis.run import Run
from migkit.errors import OptionError, TraceFormatError, close_matches

TRACES = Path(__file__).resolve().parents[2] / "traces"
_MANIFEST = "manifest.json"


def sample(name: str) -> Run:
    """Open a sample as a run; its entry in the manifest is ``run.meta["sample"]``.

    Where the stream was kept, ``run.meta["stream"]`` is its file, for :func:`migkit.stream`.
    Raises OptionError for an unknown name, TraceFormatError if a file is not the one recorded.
    """
    known = manifest()
    if name not in known:
        raise OptionError(f"no sample {name!r}; {close_matches(name, known)}")
    entry = known[name]
    folder = TRACES / name
    for file, digest in entry["files"].items():
        if sha256(folder / file) != digest:
            raise TraceFormatError(f"{folder / file} is not what was recorded: check it out anew")
    if entry["engine"] == "migkit":
        run = Run.load(folder)
    else:
        names = ("source.log.xz", "destination.log.xz", "query-migrate.json")
        source, destination, query = (
            folder / file if file in entry["files"] else None for file in names
        )
        run = load_qemu(source, destination, query_migrate=query)
    run.meta["sample"] = {"name": name, **entry}
    if "stream.xz" in entry["files"]:
        run.meta["stream"] = str(folder / "stream.xz")
    return run


def manifest() -> dict[str, Any]:
    """Return the manifest, by sample; raises OptionError where the samples are not at hand."""
    try:
        entries: dict[str, Any] = json.loads((TRACES / _MANIFEST).read_text())
    except OSError as error:
        raise OptionError(
            f"no {TRACES / _MANIFEST}: the samples are in migkit's repository, not in its package"
        ) from error
    return entries


def sha256(file: Path) -> str:
    """Return a file's digest, empty if it is not there."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
