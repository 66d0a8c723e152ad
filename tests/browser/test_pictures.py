"""What the comparison of pictures lets pass, and what it does not."""

import io
from pathlib import Path

import pytest
from pictures import difference, likeness, sketch
from PIL import Image

PAGE = Path(__file__).parents[2] / "build" / "docs" / "tutorial" / "index.html"
REFERENCES = Path(__file__).parent / "references"
UNSTYLED = "document.querySelectorAll('link[rel=stylesheet], style').forEach(one => one.remove())"


@pytest.fixture(scope="module")
def shown(browser):
    """Return a function that shows a page, changes it, and returns its sketch."""

    def show(css="", script="0", scheme="light"):
        page = browser.new_page(viewport={"width": 1056, "height": 1000}, color_scheme=scheme)
        page.goto(PAGE.as_uri())
        page.evaluate(script)
        page.add_style_tag(content=css or "/**/")
        picture = Image.open(io.BytesIO(page.screenshot()))
        page.close()
        return sketch(picture)

    return show


@pytest.fixture(scope="module")
def as_it_is(shown):
    return shown()


def test_the_same_page_passes(shown, as_it_is):
    assert not difference(shown(), as_it_is)


@pytest.mark.parametrize(
    "changes",
    [{"css": "* { font-family: 'DejaVu Serif', serif !important }"}, {"scheme": "dark"}],
    ids=["another font", "another theme"],
)
def test_what_does_not_matter_passes(shown, as_it_is, changes):
    changed = shown(**changes)
    assert changed.tobytes() != as_it_is.tobytes()
    assert not difference(changed, as_it_is)


@pytest.mark.parametrize(
    ("css", "script"),
    [
        ("body { visibility: hidden }", "0"),
        ("body { clip-path: inset(0 0 calc(100% - 400px) 0) }", "0"),
        ("body { clip-path: inset(0 0 0 60%) }", "0"),
        ("body { transform: translate(0, 40px) }", "0"),
        ("body { transform: translate(80px, 0) }", "0"),
        ("", UNSTYLED),
    ],
    ids=["blank", "upper half", "right part", "too low", "too far right", "unstyled"],
)
def test_what_is_not_right_is_found(shown, as_it_is, css, script):
    assert "likeness" in difference(shown(css, script), as_it_is)


def test_a_page_that_is_much_longer_is_found(as_it_is):
    longer = Image.new("L", (as_it_is.width, as_it_is.height * 5 // 4))
    longer.paste(as_it_is)
    assert "cells" in difference(longer, as_it_is)


@pytest.mark.parametrize("path", sorted(REFERENCES.glob("*.png")), ids=lambda path: path.stem)
def test_no_reference_passes_for_empty_or_shifted(path):
    reference = Image.open(path).convert("L")
    assert likeness(Image.new("L", reference.size), reference) == 0
    for shift in ((0, 3), (3, 0)):
        moved = Image.new("L", reference.size)
        moved.paste(reference, shift)
        assert "likeness" in difference(moved, reference)


def test_the_references_are_small():
    assert sum(path.stat().st_size for path in REFERENCES.glob("*.png")) < 100_000
