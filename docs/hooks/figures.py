"""Figures of recorded samples, drawn when the site is built; their text is that of the plot itself.

A page asks for one by a line ``!figure SAMPLE PLOT``.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import migkit

_WANTED = re.compile(r"^!figure (\S+) (\w+)$", re.MULTILINE)
_texts: dict[tuple[str, str], str] = {}


def files(docs: Path) -> dict[str, bytes]:
    """Draw what the pages ask for; return the images by the place where they go."""
    wanted = {
        match for page in docs.rglob("*.md") for match in _WANTED.findall(page.read_text("utf-8"))
    }
    return {f"figures/{sample}-{plot}.png": _draw(sample, plot) for sample, plot in sorted(wanted)}


def placed(markdown: str, depth: int) -> str:
    """Return a page's text with its figures; ``depth`` is how many folders it lies in."""

    def place(match: re.Match[str]) -> str:
        sample, plot = match.groups()
        up = "../" * depth
        return f"![{_texts[sample, plot]}]({up}figures/{sample}-{plot}.png)"

    return _WANTED.sub(place, markdown)


def _draw(sample: str, plot: str) -> bytes:
    figure = getattr(migkit.sample(sample).plot, plot)()
    _texts[sample, plot] = figure.alt_text.replace("[", "(").replace("]", ")")
    data = io.BytesIO()
    figure.savefig(data, format="png", bbox_inches="tight", dpi=110)
    return data.getvalue()
