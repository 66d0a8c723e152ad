"""The notebooks run from top to bottom, say what they are for, and are committed clean."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from migkit.kernel.capability import kernel_checks

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_a_notebook_runs_and_leaves_nothing_beside_itself(path, tmp_path, monkeypatch):
    if missing := [check.name for check in kernel_checks() if check.required and not check.ok]:
        pytest.skip(f"no migration on this machine: {', '.join(missing)}")
    notebook = nbformat.read(path, as_version=4)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "cwd").mkdir()

    NotebookClient(
        notebook,
        timeout=100,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path / "cwd")}},
    ).execute()

    assert not list((tmp_path / "cwd").iterdir())
    assert not list((tmp_path / "tmp").glob("migkit-*"))


def test_a_notebook_says_what_it_teaches_what_it_needs_and_how_long_it_takes(path):
    first = nbformat.read(path, as_version=4).cells[0]

    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert "**Teaches:** " in first.source
    assert "**Needs:** " in first.source
    assert re.search(r"\*\*Minutes:\*\* \d+", first.source)


def test_a_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]

    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_a_notebook_has_prose_and_calls_in_short_cells_and_ends_with_assertions(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]

    assert len(cells) >= 2 * len(code) - 10, "more prose, less code"
    assert max(source.count("\n") for source in code) < 20
    assert "assert " in code[-1]
