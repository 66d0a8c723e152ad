"""The report as a browser, a screen reader and somebody without a network meet it."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from itertools import pairwise

import pandas as pd
import pytest

from migkit.analysis import Run
from migkit.view import PLOTS
from migkit.view.html import table
from migkit.view.report import report

VOID = {"meta", "img", "br", "hr", "input", "link"}
RUNS = ("plain_run", "cancelled_run")


class Page(HTMLParser):
    """Collects what is asserted: tags with attributes and what they are in, texts by tag."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, "tags are left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.append((self.open[-1], data))

    def all(self, name):
        return [attrs for tag, attrs, _ in self.tags if tag == name]


@pytest.fixture(scope="session")
def pages(request):
    return {name: Page(report(request.getfixturevalue(name))) for name in RUNS}


@pytest.fixture(params=RUNS)
def page(request, pages):
    return pages[request.param]


def test_it_is_a_document_with_a_language_a_title_and_one_main_part(page):
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("title")) == len(page.all("main")) == len(page.all("h1")) == 1
    assert any(tag == "title" and "Migration report: random" in text for tag, text in page.texts)
    assert {"charset": "utf-8"} in page.all("meta")


def test_headings_do_not_skip_a_level_and_sections_are_named_by_theirs(page):
    levels = [int(tag[1]) for tag, _, _ in page.tags if tag in {"h1", "h2", "h3", "h4"}]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = [attrs["id"] for _, attrs, _ in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert [attrs["aria-labelledby"] for attrs in page.all("section")] == ids


def test_every_figure_is_in_the_file_and_says_in_words_what_it_shows(page):
    images = page.all("img")
    assert len(images) == len(PLOTS) == len(page.all("figcaption"))
    for image in images:
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
        assert len(image["alt"]) > 40


def test_nothing_is_fetched_and_nothing_is_executed(page):
    assert not page.all("script")
    assert not page.all("link")
    for _, attrs, _ in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        assert not attrs.get("href", "#").startswith("http")
    assert "url(" not in "".join(text for tag, text in page.texts if tag == "style")


def test_tables_have_captions_and_every_head_a_scope(page):
    tables = page.all("table")
    assert len(tables) == len(page.all("caption")) >= 5
    assert {attrs["scope"] for attrs in page.all("th")} <= {"col", "row"}
    regions = [attrs for attrs in page.all("div") if attrs.get("class") == "table"]
    assert all(a["role"] == "region" and a["tabindex"] == "0" and a["aria-label"] for a in regions)
    within = [parents for tag, _, parents in page.tags if tag == "th"]
    assert all("table" in parents and "tr" in parents for parents in within)


def test_the_summary_and_the_verdict_are_text(plain_run, pages):
    text = " ".join(text for _, text in pages["plain_run"].texts)
    assert str(plain_run.summary()).splitlines()[0] in text
    assert "No violation: " in text
    assert "not checked: QEMU's figures of blocktime fit each other" in text


def test_violations_are_in_the_report_and_what_strangers_wrote_stays_text(cancelled_run):
    run = Run.load(cancelled_run.path)
    run.meta["workload"] = {"name": "<script>alert(1)</script>"}
    run.meta["notices"] = ['<img src="https://example.org/x">']
    run.meta["errors"] = ["</pre><b>"]
    run.meta["query_migrate"] = {"dst": {"postcopy-blocktime": 9, "postcopy-vcpu-blocktime": [1]}}
    text = report(run)
    page = Page(text)
    assert not page.all("script")
    assert len(page.all("img")) == len(PLOTS)
    assert not page.all("b")
    assert "<strong>1 violations were found.</strong>" in text
    assert "all vCPUs were blocked at once for 9 ms" in text


def test_a_run_without_events_has_a_report_that_says_so(plain_run):
    run = Run.load(plain_run.path)
    run.meta["events"] = []
    traces = {side: trace.__class__(trace.registry) for side, trace in run.traces.items()}
    run.__dict__["traces"] = traces
    page = Page(report(run))
    text = " ".join(text for _, text in page.texts)
    assert "No figure: the event 'ram_save_range' was not recorded" in text


def test_a_long_table_is_cut_and_says_so():
    frame = pd.DataFrame({"n": range(1000), "ts_ns": range(10**12, 10**12 + 1000)})
    text = table(frame, "Numbers")
    assert "(the first 60 of 1,000 rows)" in text
    assert text.count("<tr>") == 61
    assert "1000000000059" in text


def test_cells_are_written_for_people():
    frame = pd.DataFrame(
        {"a": [1234.5678, float("nan")], "b": [True, False], "c": ["<b>", None]},
        index=pd.Index(["x", "y"], name="row"),
    )
    text = table(frame, "T")
    assert '<th scope="row" class="text">x</th>' in text
    for cell in ("1,234.6", "\N{EN DASH}", "yes", "no", "&lt;b&gt;"):
        assert f">{cell}<" in text
