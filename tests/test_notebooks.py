"""The notebooks run from top to bottom, say what they are for, and are committed clean."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from migkit.kernel.capability import kernel_checks

FOLDER = Path(__file__).parents[1] / "notebooks"
LESSONS = sorted(FOLDER.glob("*.ipynb"))
SOLUTIONS = sorted(FOLDER.glob("solutions/*.ipynb"))
EXERCISES = sorted(FOLDER.glob("exercises/*.ipynb"))


def each(paths):
    return pytest.mark.parametrize(
        "path", paths, ids=lambda path: str(path.relative_to(FOLDER).with_suffix(""))
    )


def cells_of(path, tag):
    """The cells of an exercise that have a tag: ``answer`` or ``check``."""
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if tag in cell.metadata.get("tags", ())]


@each(LESSONS + SOLUTIONS)
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


@each(LESSONS + EXERCISES + SOLUTIONS)
def test_a_notebook_says_what_it_teaches_what_it_needs_and_how_long_it_takes(path):
    first = nbformat.read(path, as_version=4).cells[0]

    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert "**Teaches:** " in first.source
    assert "**Needs:** " in first.source
    assert re.search(r"\*\*Minutes:\*\* \d+", first.source)


@each(LESSONS + EXERCISES + SOLUTIONS)
def test_a_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]

    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.outputs or cell.execution_count for cell in code)


@each(LESSONS + EXERCISES + SOLUTIONS)
def test_a_notebook_has_prose_and_calls_in_short_cells_and_ends_with_assertions(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]

    assert len(cells) >= 2 * len(code) - 10, "more prose, less code"
    assert max(source.count("\n") for source in code) < 20
    assert "assert " in code[-1]


def test_the_map_leads_to_every_notebook():
    shown = "".join(cell.source for cell in nbformat.read(LESSONS[0], as_version=4).cells)

    for path in [*LESSONS[1:], *EXERCISES]:
        assert f"({path.relative_to(FOLDER)})" in shown, f"00_start_here should list {path.stem}"


@each(EXERCISES)
def test_a_solution_is_its_exercise_but_for_the_answers(path):
    exercise, solution = (
        nbformat.read(one, as_version=4).cells for one in (path, FOLDER / "solutions" / path.name)
    )

    assert exercise[0].source.replace("# Exercise:", "# Solution:") == solution[0].source
    for asked, solved in zip(exercise[1:], solution[1:], strict=True):
        assert asked.metadata == solved.metadata
        is_answer = "answer" in asked.metadata.get("tags", ())
        assert (asked.source != solved.source) == is_answer


@each(EXERCISES)
def test_an_exercise_that_nobody_has_answered_is_not_right(path, tmp_path, monkeypatch):
    """Its cells are executed here, without a kernel: the checks must say no, all else must run."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    names = {"__name__": "__main__"}  # so that a workload of the notebook is sent by value

    for cell in code:
        if "check" in cell.metadata.get("tags", ()):
            with pytest.raises(AssertionError, match=r"^(not answered yet|wrong: )"):
                exec(cell.source, names)  # noqa: S102
        else:
            exec(cell.source, names)  # noqa: S102

    assert len(cells_of(path, "answer")) <= len(cells_of(path, "check"))
