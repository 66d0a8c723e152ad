"""The plots of a recorded migration: they are there, they say what is seen, nothing overlaps."""

from __future__ import annotations

import itertools
import subprocess
import sys

import nbclient
import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

import migkit
from migkit.analysis import Run, schema
from migkit.analysis.rates import KINDS, rates_frame
from migkit.view import PLOTS, blocktime
from migkit.view.style import (
    PHASE_STYLES,
    RESOLUTION_STYLES,
    STAGE_STYLES,
    dress,
    duration,
    new_figure,
)

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def postcopy(tmp_path_factory):
    path = tmp_path_factory.mktemp("view") / "postcopy"
    return migkit.run(
        path=path, memory="16MiB", rate=0, max_postcopy_bandwidth="40MiB", timeout_s=60
    )


@pytest.fixture(scope="module")
def precopy(tmp_path_factory):
    path = tmp_path_factory.mktemp("view") / "precopy"
    return migkit.run(
        path=path, memory="16MiB", rate=5000, postcopy="off", probe="off", timeout_s=60
    )


@pytest.fixture(scope="module")
def empty(postcopy, tmp_path_factory):
    """A run of which only the description is left."""
    path = tmp_path_factory.mktemp("view")
    (path / "meta.json").write_text((postcopy.path / "meta.json").read_text())
    for role in schema.SIDES:
        (path / f"{role}.trace").write_bytes((postcopy.path / f"{role}.trace").read_bytes()[:24])
    return Run.load(path)


@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize("which", ["postcopy", "precopy", "empty"])
def test_every_plot_draws_every_run(request, which, name, tmp_path):
    run = request.getfixturevalue(which)
    figure = getattr(run.plot, name)()
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
    assert figure.get_suptitle()


def test_an_empty_plot_says_why_it_is_empty(empty):
    texts = [text.get_text() for text in empty.plot.fault_latency().findobj(Text)]
    assert "no fault with a known latency" in texts


@pytest.mark.parametrize("name", PLOTS)
def test_axes_carry_units_and_titles(postcopy, name):
    figure = getattr(postcopy.plot, name)()
    for axes in figure.axes:
        assert axes.get_title(loc="left")
    labels = " ".join(a.get_xlabel() + a.get_ylabel() for a in figure.axes)
    assert any(unit in labels for unit in ("(ms)", "(%)", "(µs, ms)"))


@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize("which", ["postcopy", "precopy"])
def test_no_text_lies_on_another_or_outside(request, which, name, monkeypatch):
    run = request.getfixturevalue(which)
    figure = getattr(run.plot, name)()
    canvas, drawn, draw = FigureCanvasAgg(figure), {}, Text.draw

    def note_and_draw(text, *args, **kwargs):
        drawn[id(text)] = text
        draw(text, *args, **kwargs)

    monkeypatch.setattr(Text, "draw", note_and_draw)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [
        (text.get_text(), text.get_window_extent(renderer))
        for text in drawn.values()
        if text.get_visible() and text.get_text().strip()
    ]
    for index, (text, box) in enumerate(boxes):
        assert box.x0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        for other, another in boxes[index + 1 :]:
            overlap = min(box.x1, another.x1) - max(box.x0, another.x0)
            height = min(box.y1, another.y1) - max(box.y0, another.y0)
            assert overlap <= 1 or height <= 1, (text, other)


def test_every_fault_with_a_latency_is_a_point(postcopy):
    axes = postcopy.plot.fault_latency().axes[0]
    points = [c.get_offsets() for c in axes.collections if isinstance(c, PathCollection)]
    drawn = np.sort(np.concatenate(points)[:, 1])
    known = postcopy.faults["latency_us"]
    assert np.allclose(drawn, np.sort(known[known > 0]))


def test_the_bars_of_the_stages_add_up_to_the_latency(postcopy):
    from migkit.analysis.latency import stage_breakdown

    absolute, relative = postcopy.plot.fault_stages().axes
    ends = max(bar.get_x() + bar.get_width() for bar in absolute.patches)
    assert ends == pytest.approx(stage_breakdown(postcopy.faults)["latency_us"].max())
    assert max(bar.get_x() + bar.get_width() for bar in relative.patches) == pytest.approx(100)


def test_the_timeline_marks_the_downtime_in_every_panel(postcopy):
    begin_ms = (postcopy.downtime["start_ns"].iloc[0] - postcopy.origin_ns) / 1e6
    for axes in postcopy.plot.timeline().axes:
        assert any(line.get_xdata()[0] == begin_ms for line in axes.lines if len(line.get_xdata()))


def test_the_timeline_says_how_long_the_downtime_was(postcopy):
    texts = [text.get_text() for text in postcopy.plot.timeline().findobj(Text)]
    total_us = postcopy.downtime["duration_us"].sum()
    assert f"guest runs nowhere: {duration(total_us)}" in texts


def test_the_legend_counts_what_is_too_small_to_see(postcopy):
    figure = postcopy.plot.timeline()
    texts = [text.get_text() for axes in figure.axes if axes.get_legend()
             for text in axes.get_legend().get_texts()]  # fmt: skip
    asked = postcopy.samples["destination_requested_pages"].iloc[-1]
    assert f"post-copy, requested ({asked:,} pages)" in texts
    minor = (postcopy.faults["resolution"] == "minor").sum()
    assert not minor or f"minor: nobody waited ({minor:,})" in texts


@pytest.mark.parametrize("name", ["timeline", "fault_latency"])
def test_the_marks_of_the_legend_are_large_however_many_points_there_are(postcopy, name):
    figure = getattr(postcopy.plot, name)()
    legends = figure.legends + [a.get_legend() for a in figure.axes[3:] if a.get_legend()]
    keys = [key for legend in legends for key in legend.legend_handles]
    assert keys
    assert all(key.get_markersize() >= 6 for key in keys)


def test_no_panel_gives_way_to_the_legend(postcopy):
    figure = postcopy.plot.fault_latency()
    FigureCanvasAgg(figure).draw()
    over_time, shares = (axes.get_position() for axes in figure.axes)
    assert 0 < shares.x0 - over_time.x1 < 0.05


def samples_of(steps, requested=(0, 0, 0, 0)):
    """Samples a second apart; ``steps`` are pairs: source, destination."""
    count = len(steps)
    columns = {f"destination_{kind}_pages": [0] * count for kind in KINDS}
    columns["destination_requested_pages"] = list(requested)
    columns |= {
        "ts_ns": [i * 10**9 for i in range(count)],
        "time_s": [float(i) for i in range(count)],
    }
    columns["source_step"], columns["destination_step"] = zip(*steps, strict=True)
    return pd.DataFrame(columns)


def test_the_destination_is_not_credited_with_the_steps_of_the_source():
    samples = samples_of([(0, 0), (1000, 0), (1500, 1505), (1500, 1600)])
    rates = rates_frame(samples, 4096)
    assert rates["source_steps_s"].iloc[:2].tolist() == [1000, 500]
    assert rates["destination_steps_s"].iloc[1:].tolist() == [5, 95]


def test_requested_pages_count_when_they_came_not_when_the_engine_counted_them():
    samples = samples_of([(0, 0), (10, 0), (10, 11), (10, 12)], requested=(0, 0, 0, 512))
    late = rates_frame(samples, 4096)["requested_mib_s"]
    assert late.tolist() == [0, 0, 2]
    came = pd.Series([1_500_000_000] * 256 + [2_500_000_000] * 256, dtype="Int64")
    assert rates_frame(samples, 4096, came)["requested_mib_s"].tolist() == [0, 1, 1]


def test_what_must_be_told_apart_differs_in_more_than_colour():
    assert set(RESOLUTION_STYLES) == set(schema.RESOLUTIONS)
    assert set(STAGE_STYLES) == set(schema.STAGES[1:])
    markers = [marker for _, marker, _ in RESOLUTION_STYLES.values()]
    assert len(set(markers)) == len(markers)
    looks = [(color, hatch) for color, hatch, _ in STAGE_STYLES.values()]
    assert len(set(looks)) == len(looks)
    for one, other in itertools.combinations(looks, 2):
        assert one[1] != other[1] or abs(lightness(one[0]) - lightness(other[0])) > 0.1
    assert len(set(PHASE_STYLES.values())) == len(PHASE_STYLES)


def lightness(color):
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_durations_get_the_unit_that_suits_them():
    assert [duration(us) for us in (0.4, 850, 3210, 1.5e6, 123e6)] == [
        "under 1 µs", "850 µs", "3.21 ms", "1.5 s", "123 s",
    ]  # fmt: skip


@pytest.mark.parametrize("pyplot", ["", "import matplotlib.pyplot"])
def test_a_notebook_shows_a_plot_once(postcopy, pyplot):
    cells = [pyplot, f"import migkit; migkit.load({str(postcopy.path)!r}).plot.fault_stages()"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbclient.NotebookClient(notebook, timeout=60).execute()
    outputs = notebook.cells[1].outputs
    assert len(outputs) == 1
    assert "image/png" in outputs[0]["data"]
    if not pyplot:
        assert outputs[0]["metadata"]["image/png"]["alt"].startswith("The slowest step")


def test_plotting_leaves_no_figure_with_pyplot_and_analysis_no_matplotlib(postcopy):
    code = (
        "import sys, migkit\n"
        f"run = migkit.load({str(postcopy.path)!r})\n"
        "run.faults; run.summary()\n"
        "assert 'matplotlib' not in sys.modules\n"
        "run.plot.timeline()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("n_buckets", range(1, 21))
def test_buckets_of_slow_faults_have_room_for_their_labels(n_buckets):
    # GIVEN as many buckets of latency, up to seconds, as a busy machine may fill
    buckets = pd.DataFrame({"from_us": [1 << k for k in range(2, 2 + n_buckets)]})
    buckets["faults"], buckets["engine_faults"] = 2999, 2998
    figure = new_figure(10.5, 4.8)
    axes, _ = figure.subplots(1, 2, width_ratios=[1.6, 1.0])
    dress(axes)
    # WHEN they are drawn THEN no label of the axis lies on the next one
    blocktime._draw_buckets(axes, buckets)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [label.get_window_extent(canvas.get_renderer()) for label in axes.get_xticklabels()]
    assert boxes
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
