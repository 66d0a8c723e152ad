"""What the documentation shows as code is run as it stands, with smaller guests."""

import io
import lzma
import re
import shlex
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from migkit import cli
from migkit.migration.session import Session

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if BLOCK.search(path.read_text())
]


def smaller(code):
    """The same code with guests of 16 MiB, and post-copies that take long enough to be paused."""
    code = re.sub(r'"(?:256|64)MiB"|(?<=--memory )256MiB', '"16MiB"', code)
    return code.replace('max_postcopy_bandwidth="16MiB"', 'max_postcopy_bandwidth="32MiB"')


def run_commands(code):
    """Run each line as a call of migkit; a comment may tell the exit code that it has."""
    for line in code.splitlines():
        command, *arguments = shlex.split(line, comments=True)
        expected = re.search(r"# exit code (\d)", line)
        assert command == "migkit"
        assert cli.main(arguments) == int(expected[1] if expected else 0), line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the pages speak of: a QEMU's logs and a stream."""
    for name in ("source.log", "destination.log"):
        packed = ROOT / "traces" / "qemu-11.1-plain" / f"{name}.xz"
        (tmp_path / name).write_bytes(lzma.decompress(packed.read_bytes()))
    (tmp_path / "stream.xz").symlink_to(ROOT / "traces" / "qemu-7.2-relayed" / "stream.xz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def fonts():
    """Matplotlib keeps the fonts open that it has once drawn with."""
    figure = Figure()
    figure.text(0, 0, "plain $x$")
    figure.text(0, 0, "bold", weight="bold")
    figure.savefig(io.BytesIO())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.usefixtures("fonts", "nothing_left", "folder")
def test_the_code_of_a_page_runs(page, monkeypatch):
    monkeypatch.setattr(Session, "_start_probe", lambda _: None)  # it takes seconds to attach
    names = {"__name__": "page"}
    with mpl.rc_context({"backend": "agg"}):
        for language, code in BLOCK.findall(page.read_text()):
            if language == "sh":
                run_commands(smaller(code))
            else:
                exec(compile(smaller(code), page.name, "exec"), names)  # noqa: S102
