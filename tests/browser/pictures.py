"""Pictures of pages, compared loosely with references of an earlier day.

A reference is a sketch: how much ink lies in each cell of 16 pixels. Letters, figures and colours
are lost in it, and which guest pages are where; panels, buttons and lines are not. A picture that
is empty, half drawn, shifted by a line or without its styles is told from it.

``make test-browser BROWSER_ARGS=--renew-pictures`` takes the sketches in ``references/`` anew, and
with them ``docs/console.png`` and ``docs/explorer.png``, the README's. Look at the pictures in
``build/browser/`` before you commit them: what they show is from then on what is right.
"""

import io

import numpy as np
from PIL import Image, ImageFilter

CELL = 16
MOST_INK = 32
"""The standard deviation of grey in a cell from which on there is no more ink."""

ALIKE = 0.8
"""Measured: the same page at other moments 0.87 and more, half of it, or shifted by 40 pixels, 0.75
and less."""

_TALLER = 0.1


def sketch(picture, cell=CELL):
    """Return how much ink is in each cell, as a grey picture of a pixel a cell."""
    grey = np.asarray(picture.convert("L"), float)
    rows, columns = (length // cell for length in grey.shape)
    cells = grey[: rows * cell, : columns * cell].reshape(rows, cell, columns, cell)
    ink = np.minimum(cells.std(axis=(1, 3)) / MOST_INK, 1)
    return Image.fromarray((ink * 255).astype(np.uint8))


def likeness(one, other):
    """Return the correlation of two sketches, from -1 to 1; 0 where one of them is empty."""
    size = tuple(map(min, one.size, other.size))
    a, b = (
        np.asarray(part.crop((0, 0, *size)).filter(ImageFilter.GaussianBlur(0.7)), float)
        for part in (one, other)
    )
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale else 0.0


def difference(one, other):
    """Return in words what tells two sketches apart; nothing if they are alike."""
    widths, heights = zip(one.size, other.size, strict=True)
    if widths[0] != widths[1] or abs(heights[0] - heights[1]) > _TALLER * heights[1]:
        return f"it has {one.size} cells of {CELL} pixels, not {other.size}"
    if (found := likeness(one, other)) < ALIKE:
        return f"its likeness is {found:.2f}, less than {ALIKE}"
    return ""


class Album:
    """The pictures of this session, in build/browser/, and the references."""

    def __init__(self, root, *, renew):
        self._folder = root / "build" / "browser"
        self._references = root / "tests" / "browser" / "references"
        self._docs = root / "docs"
        self._renew = renew
        self._folder.mkdir(parents=True, exist_ok=True)

    def keep(self, what, png):
        """Keep a picture without comparing it."""
        (self._folder / f"{what}.png").write_bytes(png)

    def compare(self, what, png):
        """Keep a picture; return in words what tells it from its reference."""
        self.keep(what, png)
        new, path = sketch(Image.open(io.BytesIO(png))), self._references / f"{what}.png"
        if self._renew:
            new.save(path, optimize=True)
        return _told(what, new, sketch_of(path, 1), path)

    def compare_for_readme(self, what, png, scale):
        """Do the same with a picture of the README, of so many pixels to one of the page."""
        self.keep(f"readme-{what}", png)
        new, path = Image.open(io.BytesIO(png)).convert("RGB"), self._docs / f"{what}.png"
        if self._renew:
            few = new.quantize(method=Image.Quantize.FASTOCTREE)  # it keeps rare colours
            few.save(path, optimize=True)
        return _told(what, sketch(new, CELL * scale), sketch_of(path, CELL * scale), path)


def sketch_of(path, cell):
    """Return the sketch of a file; one that is a sketch itself has cells of 1 pixel."""
    if not path.exists():
        raise AssertionError(f"no {path}: make test-browser BROWSER_ARGS=--renew-pictures")
    picture = Image.open(path)
    return picture.convert("L") if cell == 1 else sketch(picture.convert("RGB"), cell)


def _told(what, new, reference, path):
    found = difference(new, reference)
    return found and f"{what} does not look like {path}: {found} (see build/browser/)"
