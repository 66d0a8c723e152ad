"""A real JupyterLab on loopback and Debian's chromium in it; screenshots go to build/browser/."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pictures
import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_START_S = 60

# What JupyterLab itself writes to the browser's console as errors, and nothing else.
KNOWN_NOISE = (
    "favicon",
    "/api/kernels/",  # asked for once more after the kernel was shut down at a page's end
    "/lsp/status",  # no language server is installed
    "Could not restore the debugger state",  # the kernel was restarted while it was asked
)


def pytest_addoption(parser):
    parser.addoption(
        "--renew-pictures", action="store_true",
        help="keep what the pages look like now as the references, and as the README's pictures",
    )  # fmt: skip


@pytest.fixture(scope="session")
def album(pytestconfig):
    return pictures.Album(ROOT, renew=pytestconfig.getoption("renew_pictures"))


class Lab:
    """A running JupyterLab: notebooks put into ``root`` can be opened at :meth:`url`."""

    def __init__(self, root):
        self.root = root
        self.token = secrets.token_hex(16)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        home = root.parent / "home"
        settings = home / "config" / "labconfig"
        settings.mkdir(parents=True)
        asks = "@jupyterlab/apputils-extension:announcements"
        (settings / "page_config.json").write_text(json.dumps({"disabledExtensions": {asks: True}}))
        themes = {"@jupyterlab/apputils-extension:themes": {"adaptive-theme": True}}
        (settings / "default_setting_overrides.json").write_text(json.dumps(themes))
        self.log = (home / "lab.log").open("wb")
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
                "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={self.port}",
                "--ServerApp.port_retries=0", f"--IdentityProvider.token={self.token}",
                f"--ServerApp.root_dir={root}",
            ],
            env={
                **os.environ, "HOME": str(home), "JUPYTER_CONFIG_DIR": str(home / "config"),
                "JUPYTER_DATA_DIR": str(home / "data"), "JUPYTER_RUNTIME_DIR": str(home / "run"),
                "IPYTHONDIR": str(home / "ipython"),
                "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
                "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
            },
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )  # fmt: skip
        self._await()

    def _await(self):
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("api/status")
            except OSError:
                time.sleep(0.2)
            else:
                return
        pytest.fail(f"JupyterLab did not start: {Path(self.log.name).read_text()[-2000:]}")

    def get(self, path):
        """Return what the server's API answers."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}", headers={"Authorization": f"token {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
            return json.load(answer)

    def post(self, path, method="POST"):
        """Have the server's API do something."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}", method=method,
            headers={"Authorization": f"token {self.token}"},
        )  # fmt: skip
        urllib.request.urlopen(request, timeout=20).close()  # noqa: S310

    def put(self, name, *sources):
        """Write a notebook of code cells."""
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, self.root / name)

    def url(self, name):
        return f"http://127.0.0.1:{self.port}/lab/tree/{name}?token={self.token}&reset"

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)
        self.log.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab") / "notebooks"
    root.mkdir()
    lab = Lab(root)
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def browser():
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        pytest.fail("no chromium: sudo apt-get install --no-install-recommends chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        yield browser
        browser.close()


def lab_processes(notebook):
    """Return the command lines of migkit's processes that this JupyterLab's kernels started."""
    mark, found = f"HOME={notebook.lab.root.parent / 'home'}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if mark in environment.split(b"\0") and b"migkit." in command:
            found.append(command.replace(b"\0", b" ").decode())
    return found


class Notebook:
    """One notebook open in a page."""

    def __init__(self, lab, page, name, album):
        self.lab = lab
        self.page = page
        self.name = name
        self.album = album
        self.errors = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))

    def _heard(self, message):
        text = f"{message.text} ({message.location.get('url', '')})"
        if message.type == "error" and not any(noise in text for noise in KNOWN_NOISE):
            self.errors.append(text)

    def cell(self, index):
        return self.page.locator(".jp-Notebook .jp-CodeCell").nth(index)

    def start_cell(self, index):
        """Ask for a code cell to be executed."""
        self.cell(index).locator(".cm-content").click()
        self.page.keyboard.press("Control+Enter")

    def run_cell(self, index, before=""):
        """Run a code cell and wait until it is done: its number is not what it was before."""
        cell = self.cell(index)
        prompt = cell.locator(".jp-InputPrompt")
        for tenth in range(600):
            text = prompt.inner_text().strip("[]: \u200b")
            if text.isdigit() and text != before:
                return cell
            if text == before and tenth % 30 == 0:  # a kernel that just listens may lose a request
                self.start_cell(index)
            self.page.wait_for_timeout(100)
        raise AssertionError(f"cell {index} did not end: {text!r}, {self.errors}")

    def run_again(self, index):
        """Run a code cell that was run before, in this kernel or an earlier one."""
        prompt = self.cell(index).locator(".jp-InputPrompt")
        return self.run_cell(index, prompt.inner_text().strip("[]: \u200b"))

    def _kernel(self, what):
        [session] = [s for s in self.lab.get("api/sessions") if s["path"] == self.name]
        self.lab.post(f"api/kernels/{session['kernel']['id']}/{what}")

    def restart_kernel(self):
        """Restart the kernel as the toolbar's button does, and say yes."""
        self.page.locator('[data-command="kernelmenu:restart"] jp-button, '
                          '[data-jp-item-name="restart"] jp-button').first.click()  # fmt: skip
        self.page.locator(".jp-Dialog .jp-mod-accept").click()
        self.page.wait_for_timeout(2000)

    def run_all(self):
        """Restart the kernel and run all cells, as the toolbar's button does; return the cells."""
        self.page.locator('[data-jp-item-name="restart-and-run"] jp-button').click()
        self.page.locator(".jp-Dialog .jp-mod-accept").click()
        for _ in range(100):
            self.page.wait_for_timeout(1000)
            self.page.keyboard.press("Control+s")
            try:
                saved = nbformat.read(self.lab.root / self.name, as_version=4)
            except nbformat.reader.NotJSONError:
                continue  # it is being written
            cells = [cell for cell in saved.cells if cell.cell_type == "code"]
            failed = [one for cell in cells for one in cell.outputs if one.output_type == "error"]
            if failed or all(cell.execution_count for cell in cells):
                return cells
        raise AssertionError("the notebook did not come to its end")

    def interrupt_kernel(self):
        self._kernel("interrupt")

    def open(self):
        """Open the notebook and wait until its kernel listens."""
        page, lab = self.page, self.lab
        page.goto(lab.url(self.name))
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
        while not any(session["kernel"]["connections"] for session in lab.get("api/sessions")):
            page.wait_for_timeout(100)  # before, a request would ask which kernel to take
        page.wait_for_timeout(500)

    def reopen(self):
        """Save, leave the page, wait a little, and come back."""
        self.page.keyboard.press("Control+s")
        self.page.wait_for_timeout(1000)
        self.page.goto("about:blank")
        self.page.wait_for_timeout(1000)
        self.open()

    def picture(self, what, locator):
        """Keep a picture of a part of the page, and compare it with its reference."""
        self._told(self.album.compare(what, locator.screenshot(scale="css")))

    def picture_for_readme(self, what, cell, last):
        """Keep a picture of what a cell shows, down to an element of it, in all its pixels."""
        box = cell.locator(".jp-OutputArea-output").first.bounding_box()
        end = last.bounding_box()
        clip = {**box, "height": end["y"] + end["height"] - box["y"] + 6}
        png = self.page.screenshot(clip=clip, scale="device")
        self._told(self.album.compare_for_readme(what, png, self.page.evaluate("devicePixelRatio")))

    def _told(self, difference):
        if difference:
            self.errors.append(difference)


@pytest.fixture
def notebook(lab, browser, album):
    """Open a notebook, of some cells or of ours; nothing may be wrong with what was seen."""
    opened = []

    def open_(name, *sources, **context):
        if sources:
            lab.put(name, *sources)
        else:  # one of ours
            shutil.copy(ROOT / "notebooks" / name, lab.root)
        page = browser.new_page(viewport={"width": 1400, "height": 2100}, **context)
        page.set_default_timeout(30_000)
        one = Notebook(lab, page, name, album)
        opened.append(one)
        one.open()
        return one

    yield open_
    errors = [error for one in opened for error in one.errors]
    for one in opened:
        album.keep(f"{Path(one.name).stem}-last", one.page.screenshot(scale="css"))
        one.page.close()
    for session in lab.get("api/sessions"):
        lab.post(f"api/sessions/{session['id']}", "DELETE")
    assert not errors, "\n".join(errors)
