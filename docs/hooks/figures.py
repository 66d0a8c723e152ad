"""Figures of recorded samples, drawn when the site is built; their text is that of the plot itself.

A page asks for one by a line ``!figure SAMPLE PLOT``; it is drawn for either theme.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.style

import migkit

_PAPER = "#1e2129"  # the theme's own, dark
_THEMES = {
    "light": {},
    "dark": {
        **{key: value for key, value in mpl.style.library["dark_background"].items()
           if key.endswith("color")},
        "figure.facecolor": _PAPER, "axes.facecolor": _PAPER, "savefig.facecolor": _PAPER,
    },
}  # fmt: skip

_WANTED = re.compile(r"^!figure (\S+) (\w+)$", re.MULTILINE)
_texts: dict[tuple[str, str], str] = {}


def files(docs: Path) -> dict[str, bytes]:
    """Draw what the pages ask for; return the images by the place where they go."""
    wanted = {
        match for page in docs.rglob("*.md") for match in _WANTED.findall(page.read_text("utf-8"))
    }
    return {
        f"figures/{sample}-{plot}-{theme}.png": _draw(sample, plot, theme)
        for sample, plot in sorted(wanted)
        for theme in _THEMES
    }


def placed(markdown: str, depth: int) -> str:
    """Return a page's text with its figures; ``depth`` is how many folders it lies in."""

    def place(match: re.Match[str]) -> str:
        sample, plot = match.groups()
        up = "../" * depth
        return "\n".join(
            f"![{_texts[sample, plot]}]({up}figures/{sample}-{plot}-{theme}.png#only-{theme})"
            for theme in _THEMES
        )

    return _WANTED.sub(place, markdown)


def _draw(sample: str, plot: str, theme: str) -> bytes:
    data = io.BytesIO()
    with mpl.rc_context(_THEMES[theme]):
        figure = getattr(migkit.sample(sample).plot, plot)()
        figure.savefig(data, format="png", bbox_inches="tight", dpi=110)
    _texts[sample, plot] = figure.alt_text.replace("[", "(").replace("]", ")")
    return data.getvalue()
