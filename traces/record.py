"""Record migkit's own samples anew: ``python traces/record.py [NAME...]``, then the manifest.

Needs userfaultfd (root). What real QEMUs recorded stays as it is; ``python traces/record.py
--manifest`` only takes their files' digests.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import migkit
from migkit.analysis.samples import TRACES, manifest, sha256
from migkit.errors import MigrationError
from migkit.trace.folder import host_facts

_MEMORY = "8MiB"


def precopy(path: Path) -> None:
    """Let pre-copy converge: the guest writes little."""
    migkit.run("hotset", _MEMORY, path=path, rate=2000, postcopy="off")


def postcopy(path: Path) -> None:
    """Go on to post-copy after one round; every event is recorded."""
    migkit.run(
        "random", _MEMORY, path=path, rate=20000, trace="all", max_postcopy_bandwidth="16MiB"
    )


def recovered(path: Path) -> None:
    """Break post-copy, wait a while, recover it."""
    with migkit.Migration(
        "random", _MEMORY, path=path, rate=2000, postcopy="manual", max_postcopy_bandwidth="16MiB"
    ) as migration:
        migration.start()
        migration.start_postcopy()
        migration.await_status("postcopy-active")
        time.sleep(0.1)
        migration.pause()
        migration.await_end(20)
        time.sleep(0.2)
        migration.recover()
        migration.wait(60)


def rp_error(path: Path) -> None:
    """Kill the destination's guest during pre-copy: its SHUT carries an error."""
    with migkit.Migration(
        "random", _MEMORY, path=path, rate=2000, postcopy="off", max_bandwidth="2MiB"
    ) as migration:
        migration.start()
        migration.await_status("active")
        time.sleep(0.2)
        os.kill(migration._guests["destination"].pid, signal.SIGKILL)
        try:
            migration.wait(30)
        except MigrationError as error:
            print(f"as it should: {error}", file=sys.stderr)


def first_postcopy(path: Path) -> None:
    """Migrate by post-copy after one round over a link of 500 Mbit/s, with the eBPF probe."""
    migkit.run("random", "32MiB", path=path, rate=20000, link="500Mbit/s, 100us", probe="on")


def slow_link(path: Path) -> None:
    """Migrate over a link of 200 Mbit/s and 1 ms each way."""
    migkit.run("random", "16MiB", path=path, rate=20000, link="200Mbit/s, 1ms")


_OURS = {
    "precopy": precopy, "postcopy": postcopy, "recovered": recovered, "rp-error": rp_error,
    "slow-link": slow_link, "first-postcopy": first_postcopy,
}  # fmt: skip


def record(name: str) -> dict[str, Any]:
    """Record one sample and return its entry."""
    folder = TRACES / name
    shutil.rmtree(folder, ignore_errors=True)
    _OURS[name](folder)
    for table in folder.glob("*.parquet"):
        table.unlink()  # they follow from the rest
    host = host_facts()["host"]
    return {
        "engine": "migkit",
        "what": (_OURS[name].__doc__ or "").splitlines()[0],
        "how": f"traces/record.py {name}",
        "machine": f"{host['cpus']} CPUs, {host['machine']}, Linux {host['kernel']}",
        "versions": {"migkit": migkit.__version__, "python": host["python"]},
    }


def main() -> None:
    """Record what was asked for, and write the manifest."""
    arguments = sys.argv[1:]
    entries = manifest()
    for name in [] if arguments == ["--manifest"] else arguments or _OURS:
        entries[name] = record(name)
    for name, entry in entries.items():
        files = sorted(file for file in (TRACES / name).iterdir() if file.suffix != ".parquet")
        entry["files"] = {file.name: sha256(file) for file in files}
    (TRACES / "manifest.json").write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
