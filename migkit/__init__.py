"""Run a real post-copy live migration and see where every page, fault and microsecond went.

``migkit.run()`` runs one and returns a :class:`Run`; ``migkit.Migration`` is steered by hand;
``migkit.load(path)`` opens a recorded run, ``migkit.load_qemu()`` what a QEMU recorded,
``migkit.sample(name)`` one that comes with the source, ``migkit.stream(path)`` a stream.
Everything is imported when it is first used: the processes of a migration import this package
too and must stay small.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from migkit.analysis.compare import compare
    from migkit.analysis.qemu import load_qemu
    from migkit.analysis.run import Run
    from migkit.analysis.samples import sample
    from migkit.analysis.stream import stream
    from migkit.api import Migration, load, run
    from migkit.guest.workloads import Workload
    from migkit.widgets.console import Console
    from migkit.widgets.explorer import Explorer

__version__ = "0.1.0"
__all__ = [
    "Console",
    "Explorer",
    "Migration",
    "Run",
    "Workload",
    "compare",
    "load",
    "load_qemu",
    "run",
    "sample",
    "stream",
]

_HOMES = {
    "Console": "migkit.widgets.console",
    "Explorer": "migkit.widgets.explorer",
    "Migration": "migkit.api",
    "Run": "migkit.analysis.run",
    "Workload": "migkit.guest.workloads",
    "compare": "migkit.analysis.compare",
    "load": "migkit.api",
    "load_qemu": "migkit.analysis.qemu",
    "run": "migkit.api",
    "sample": "migkit.analysis.samples",
    "stream": "migkit.analysis.stream",
}


def load_ipython_extension(shell: Any) -> None:
    """Add the magics ``%migrate``, ``%%migrate`` and ``%trace``: ``%load_ext migkit``."""
    from migkit.magic import MigkitMagics  # noqa: PLC0415 — IPython only in IPython

    shell.register_magics(MigkitMagics)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'migkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
