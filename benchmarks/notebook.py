"""How long a class waits for the first figure of the first lesson, from a kernel that is not there.

What counts are the kernel's start and every cell up to and with the first that shows a picture,
executed as they are in the repository. JupyterLab and the browser are not in it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import numpy as np
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from benchmarks.result import Row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.result import Scale

LESSON = Path(__file__).parents[1] / "notebooks" / "01_first_migration.ipynb"
_BOUND_S = 20.0


def measure(scale: Scale) -> Iterator[Row]:
    """Execute the lesson up to its first figure, each time in a kernel of its own."""
    what = f"{LESSON.stem}, to its first figure"
    took = [_first_figure_s() for _ in scale.progress(scale.runs, what)]
    yield Row("fresh kernel to the first figure", "scheduler", float(np.median(took)), _BOUND_S,
              "s", samples={"s": took})  # fmt: skip


def _first_figure_s() -> float:
    notebook = nbformat.read(LESSON, as_version=4)
    with tempfile.TemporaryDirectory(prefix="migkit-bench-") as folder:
        client = NotebookClient(
            notebook,
            km=AsyncKernelManager(kernel_name="python3", transport="ipc"),
            timeout=120,
            resources={"metadata": {"path": folder}},
        )
        begun = time.monotonic()
        with client.setup_kernel():
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
                if any("image/png" in output.get("data", ()) for output in cell.get("outputs", ())):
                    return time.monotonic() - begun
    raise RuntimeError(f"{LESSON.name} shows no figure")
