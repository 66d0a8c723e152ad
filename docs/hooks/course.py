"""The tutorial: the notebooks as pages, as they are in the repository, without running them."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

_INTRODUCTION = """\
# The course

These lessons are notebooks. `make lab` opens them in JupyterLab, where every cell can be changed
and run again: that is how they are meant to be read. Here they are without their results.

| lesson | what it teaches | minutes |
|---|---|---|
"""
_NOTE = """\
!!! note "This page is a notebook"
    Run it: `make lab`, then `{name}`. The figures and tables come when it runs.
"""


@functools.cache
def notebooks(root: Path) -> list[Path]:
    """Return the notebooks in the order of their numbers."""
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def pages(root: Path) -> dict[str, str]:
    """Return the pages by the place where they go: the list of lessons, then each."""
    texts = {path: _page(path) for path in notebooks(root)}
    rows = "".join(_row(path) for path in texts)
    return {
        "tutorial/index.md": _INTRODUCTION + rows,
        **{f"tutorial/{path.stem}.md": text for path, text in texts.items()},
    }


def _page(path: Path) -> str:
    """Return a notebook as Markdown; links to other notebooks lead to their pages."""
    text, _ = MarkdownExporter().from_filename(str(path))
    text = re.sub(r"\]\((?:\./)?(\w+)\.ipynb", r"](\1.md", text)
    # Exercises have no page: they are of use only where they run.
    text = re.sub(r"\[([^]]+)\]\((?:exercises|solutions)[^)]*\)", r"\1", text)
    heading, _, rest = text.strip().partition("\n")
    return f"{heading}\n\n{_NOTE.format(name=path.name)}\n{rest}\n"


def _row(path: Path) -> str:
    """Return a lesson's row: what its first cell says of it."""
    first = nbformat.read(path, as_version=4).cells[0].source
    title = first.partition("\n")[0].removeprefix("# ")
    teaches = re.search(r"\*\*Teaches:\*\* (.+)", first)
    minutes = re.search(r"\*\*Minutes:\*\* (\d+)", first)
    if not (teaches and minutes):
        raise ValueError(f"{path}: the first cell wants **Teaches:** and **Minutes:**")
    return f"| [{title}]({path.stem}.md) | {teaches[1].strip()} | {minutes[1]} |\n"
