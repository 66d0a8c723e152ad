"""The Explorer without a browser: slider, brush, table and path of recorded runs."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import migkit
from migkit.analysis.pages import PageChanges, page_changes
from migkit.migration.pagemap import PageState
from migkit.view.style import STAGE_STYLES
from migkit.widgets import faultpath
from migkit.widgets.pagemap import count_states, pack

pytestmark = pytest.mark.filterwarnings("ignore::migkit.errors.TraceWarning")


@pytest.fixture(scope="module")
def explorer():
    return migkit.Explorer(migkit.sample("slow-link"))


def test_it_begins_at_the_switchover():
    one = migkit.Explorer(migkit.sample("slow-link"))
    begin_ms = (one.run.downtime["start_ns"].iloc[0] - one.run.origin_ns) / 1e6
    assert one._timeline.cursor_ms == pytest.approx(begin_ms, abs=5)
    assert 0 < one._slider.value < one._slider.max


def test_sliding_shows_the_states_of_that_moment(explorer):
    seen = []
    for step in (0, 200, 300, 400):
        explorer._slider.value = step
        seen.append(explorer._map.cells)
        ms = explorer._timeline.cursor_ms
        states = explorer._changes.at(explorer.run.origin_ns + round(ms * 1e6))
        assert seen[-1] == pack(states, 1)
        assert f"{ms:,.2f} ms" in explorer._time.value
    assert len(set(seen)) == 4
    assert "the source is completed" in explorer._diagram.value
    explorer._slider.value = 0
    assert "the source is completed" not in explorer._diagram.value


def test_a_click_in_the_timeline_moves_the_slider(explorer):
    explorer._slider.value = 0
    begin, end = explorer._timeline.span_ms
    explorer._timeline.cursor_ms = (begin + end) / 2
    assert explorer._slider.value == 200
    assert explorer._timeline.cursor_ms == (begin + end) / 2


def test_brushing_lists_the_faults_of_the_span_the_longest_first(explorer):
    faults = explorer.run.faults
    middle = float(faults["time_s"].median() * 1e3)
    explorer.brush(0, middle)
    inside = faults[faults["time_s"] * 1e3 <= middle]
    assert set(explorer.faults.index) == set(inside.index)
    assert explorer.faults["latency_us"].fillna(0).is_monotonic_decreasing
    assert len(explorer._table.options) == len(inside)
    explorer._timeline.brush_ms = []
    longest = faults["latency_us"].fillna(0).nlargest(200)  # more are not listed
    assert explorer.faults["latency_us"].fillna(0).tolist() == longest.tolist()


def test_choosing_a_fault_marks_it_draws_its_path_and_goes_to_its_moment(explorer):
    explorer._timeline.brush_ms = []
    place = explorer._table.options[1][1]
    explorer._table.value = place
    fault = explorer.run.faults.iloc[place]
    assert explorer._map.mark == fault["page"]
    assert explorer._timeline.chosen[0] == pytest.approx(fault["time_s"] * 1e3)
    assert f"Page {fault['page']:,}" in explorer._path.value
    assert explorer._timeline.cursor_ms == pytest.approx(fault["time_s"] * 1e3)


def test_hovering_tells_a_pages_history(explorer):
    page = int(explorer.run.faults.query("resolution == 'requested'")["page"].iloc[0])
    text = explorer._describe(page)
    assert text.startswith(f"page {page:,}: only at the source → sent")
    assert "requested" in text
    assert "placed by request" in text


def test_without_widgets_there_is_a_text_and_a_picture(explorer):
    bundle = explorer._without_widgets()
    assert f"{len(explorer.run.faults):,} page faults" in bundle["text/plain"]
    assert 'src="data:image/png;base64,' in bundle["text/html"]


@pytest.mark.parametrize(
    "name", ["postcopy", "precopy", "recovered", "rp-error", "qemu-11.1-plain", "qemu-7.2-precopy"]
)
def test_any_run_can_be_explored(name):
    run = migkit.sample(name)
    one = migkit.Explorer(run)
    one._slider.value = 100
    assert run.status in one._about()
    if name.startswith("qemu"):
        assert "not" in one._about()


def test_the_end_of_a_run_is_what_its_counters_say():
    run = migkit.sample("recovered")
    changes = page_changes(run)
    last = count_states(changes.at(int(changes.ts_ns[-1])))
    answered = run.faults["resolution"].isin(["requested", "in_flight"])
    assert last[PageState.ANSWERED] == run.faults.loc[answered, "page"].nunique()
    assert sum(last.values()) == changes.n_pages
    assert set(last) <= {PageState.SENT, PageState.BACKGROUND, PageState.ANSWERED}


def test_qemus_pages_are_placed_as_its_trace_says():
    run = migkit.sample("qemu-11.1-plain")
    changes = page_changes(run)
    last = count_states(changes.at(int(changes.ts_ns[-1])))
    placed = len(run.traces["destination"]["postcopy_place_page"]) + len(
        run.traces["destination"]["postcopy_place_page_zero"]
    )
    in_block = last[PageState.BACKGROUND] + last[PageState.ANSWERED]
    assert 0.98 * placed <= in_block <= placed


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(-2, 9), st.integers(0, 6)), max_size=60),
    st.integers(-1, 55),
)
def test_the_states_at_a_time_are_those_of_the_last_changes_until_then(changes, when):
    rows = np.array(changes, np.int64).reshape(-1, 3)
    columns = rows[:, 0], rows[:, 1], rows[:, 2].astype(np.uint8)
    fast = PageChanges(8, *columns, between=7)
    slow = np.zeros(8, np.uint8)
    for ts, page, state in sorted(changes, key=lambda change: change[0]):
        if ts <= when and 0 <= page < 8:
            slow[page] = state
    assert fast.at(when).tolist() == slow.tolist()


def test_a_path_has_a_step_for_every_stage_that_is_known(explorer):
    faults = explorer.run.faults
    fault = faults[faults["resolution"] == "requested"].iloc[0]
    html = faultpath.draw(fault)
    svg = html[html.index("<svg") : html.index("</svg>") + 6]
    root = ET.fromstring(svg)  # noqa: S314
    titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    known = [s for s in STAGE_STYLES if not pd.isna(fault[f"{s}_ns"])]
    assert titles == [STAGE_STYLES[s][2] for s in known]
    assert html.count("<li>") == len(known)
    assert html.count("<li><b>") == 1


def test_a_fault_of_which_little_is_known_is_said_to_be_so(explorer):
    fault = explorer.run.faults.iloc[0].copy()
    for stage in ("fault", *STAGE_STYLES):
        fault[f"{stage}_ns"] = pd.NA
    assert "no path" in faultpath.draw(fault)
