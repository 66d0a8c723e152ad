"""The documentation's pages and a run's report have no serious finding of axe-core."""

from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe

import migkit

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "docs"
PAGES = (
    "index", "tutorial/index", "tutorial/01_first_migration", "how-to/install", "how-to/run",
    "how-to/qemu", "reference/migkit", "reference/command-line", "reference/events",
    "reference/states", "explanation/post-copy",
)  # fmt: skip
SERIOUS = {"serious", "critical"}


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    return migkit.sample("qemu-11.1-rate-limited").export.html(path)


def serious_findings(browser, path, scheme):
    """What axe-core finds on a page, one a line: the rule, what it says, where."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    results = Axe().run(page).response
    page.close()
    assert results["passes"], "axe-core has checked nothing"
    assert not [url for url in requests if not url.startswith(("file:", "data:", "blob:"))]
    return [
        f"{found['id']} ({found['impact']}): {found['help']}: {node['html'][:200]}"
        for found in results["violations"]
        if found["impact"] in SERIOUS
        for node in found["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_the_documentation_is_accessible(browser, name, scheme):
    path = SITE / f"{name}.html"
    assert path.exists(), "build the documentation first: make docs"
    found = serious_findings(browser, path, scheme)
    assert not found, "\n".join(found)


def test_a_report_is_accessible(browser, report):
    found = serious_findings(browser, report, "light")
    assert not found, "\n".join(found)
