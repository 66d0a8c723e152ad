"""Console, page map and state machine, driven as a notebook would, without a browser."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET

import nbclient
import nbformat
import numpy as np
import pytest
from nbconvert import HTMLExporter

import migkit
from migkit.errors import MigrationError, OptionError, TraceFormatError
from migkit.guest.workloads import Workload
from migkit.migration.options import Options
from migkit.migration.pagemap import PageMap, PageState, Row, page_states
from migkit.migration.states import COMMANDS, ENDED, SOURCE, Status
from migkit.trace.follow import Follower
from migkit.trace.layout import RECORD, RECORD_HEADER, header, mapping_record
from migkit.trace.registry import Registry
from migkit.trace.simpletrace import read
from migkit.widgets import statemachine
from migkit.widgets.history import PageHistory
from migkit.widgets.live import Latencies
from migkit.widgets.look import LOOKS
from migkit.widgets.pagemap import MOST_CELLS, count_states, draw, in_words, pack

PAGES = 4096


def until(happened, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def console(tmp_path, nothing_left):
    """Make Consoles that are closed whatever happens."""
    made = []

    def make(workload="random", **options):
        options = {"memory": "16MiB", "probe": "off", "rate": 20_000, **options}
        made.append(migkit.Console(workload, path=tmp_path / f"run{len(made)}", **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module", autouse=True)
def fonts():
    """Have matplotlib open its fonts, which it keeps, before descriptors are counted."""
    draw(np.zeros(4, np.uint8), "warm-up")._repr_png_()


def enabled(console):
    return {name for name, button in console._buttons.items() if not button.disabled}


# The Console.


def test_a_migration_is_driven_from_start_to_its_run(console):
    one = console(link="100Mbit/s, 200us")
    assert enabled(one) == {"start"}

    one.press("start")
    until(lambda: one.status == "active")
    until(lambda: enabled(one) == {"start_postcopy", "cut", "cancel"})
    until(lambda: one.updates > 3)
    shown = one._map.cells
    one.press("start_postcopy")
    until(lambda: one.status == "postcopy-active")
    until(lambda: enabled(one) == {"pause", "cut"})
    run = one.wait(30)

    assert run is one.run
    assert run.status == one.status == "completed"
    assert not one.error
    assert enabled(one) == {"start"}
    assert one._map.cells != shown
    final = count_states(one._live.history.states)
    assert set(final) <= {PageState.SENT, PageState.BACKGROUND, PageState.ANSWERED}
    requested = run.samples["destination_requested_pages"].iloc[-1]
    assert final.get(PageState.ANSWERED, 0) == requested
    assert len(one._live.latencies) == requested
    assert "completed" in one._diagram.value
    assert "migrate_set_state" in one._events.value
    assert "without the kernel's part" in one._cards.value


def test_a_cut_link_pauses_and_is_recovered_without_a_page_changing_its_look(console):
    one = console(link="100Mbit/s, 200us")
    one.press("start")
    until(lambda: one.status == "active")
    one.press("start_postcopy")
    until(lambda: one.status == "postcopy-active")
    until(lambda: PageState.BACKGROUND in one._live.history.states)
    one.press("cut")
    until(lambda: enabled(one) == {"recover"})
    before = one._live.history.states.copy()
    one.press("recover")
    run = one.wait(30)

    assert run.status == "completed"
    background = before == PageState.BACKGROUND
    assert (one._live.history.states[background] == PageState.BACKGROUND).all()


def test_a_thread_that_cannot_write_to_the_browser_does_not_end_the_migration(console, monkeypatch):
    one = console(link="100Mbit/s, 200us")
    shown, sent = one._map.show, []

    def show(states):  # as when ipykernel has closed the thread's socket
        if threading.current_thread().name == "migkit-console":
            raise OSError("Socket operation on non-socket")
        shown(states)

    monkeypatch.setattr(one._map, "show", show)

    def send_state(**_):
        sent.append(one._says.value)

    monkeypatch.setattr(one._says, "send_state", send_state)
    one.press("start")
    until(lambda: one.updates > 3)
    assert count_states(one._live.history.states) != {PageState.AT_SOURCE: PAGES}
    assert one._map.cells != bytes(PAGES // 2)
    one.press("cancel")
    assert one.wait(30).status == "cancelled"
    assert "Cancelled: console.run" in sent[-1]


def test_cancel_leaves_the_guest_at_the_source_and_the_console_starts_again(console):
    one = console(link="100Mbit/s")
    one.press("start")
    until(lambda: "cancel" in enabled(one))
    one.press("cancel")
    assert one.wait(30).status == "cancelled"
    one._path = one._path.with_name("another")
    one.press("start")
    assert one.run is None
    until(lambda: "cancel" in enabled(one))
    one.press("cancel")
    assert one.wait(30).path.name == "another"


def test_a_failure_is_told_in_the_panel(console):
    one = console(link="100Mbit/s")
    one._form.controls["memory"].value = "many"
    one.press("start")
    with pytest.raises(MigrationError, match="not a size"):
        one.wait(30)
    assert 'role="alert"' in one._says.value
    assert "many" in one._says.value
    assert enabled(one) == {"start"}


def test_a_link_cut_in_precopy_fails_the_migration_and_says_so(console):
    one = console(link="100Mbit/s")
    one.press("start")
    until(lambda: "cut" in enabled(one))
    one.press("cut")
    assert one.wait(30).status == "failed"
    assert one.error
    assert 'role="alert"' in one._says.value


def test_pre_switchover_waits_for_continue(console):
    one = console(pause_before_switchover=True, rate=1000)
    one.press("start")
    until(lambda: "start_postcopy" in enabled(one) or "continue_" in enabled(one))
    if "start_postcopy" in enabled(one):
        one.press("start_postcopy")
    until(lambda: "continue_" in enabled(one))
    one.press("continue_")
    assert one.wait(30).status == "completed"


def test_closing_in_postcopy_ends_every_process_and_says_where_it_was(console):
    one = console(link="20Mbit/s")
    one.press("start")
    until(lambda: one.status == "active")
    one._buttons["start_postcopy"].disabled = True  # as it was drawn before the state changed
    one.press("start_postcopy")
    until(lambda: one.status == "postcopy-active")
    pids = one.migration.pids
    one.close("the test is over")
    assert "postcopy-active" in one._says.value
    assert not any(_alive(pid) for pid in pids.values())
    assert enabled(one) == set()
    with pytest.raises(MigrationError, match="closed before its migration had ended"):
        one.wait()


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_two_consoles_at_once(console):
    ones = [console(link="50Mbit/s"), console("memtest", link="50Mbit/s")]
    for one in ones:
        one.press("start")
    for one in ones:
        until(lambda one=one: "start_postcopy" in enabled(one))
        one.press("start_postcopy")
    assert {one.wait(40).meta["workload"]["name"] for one in ones} == {"random", "memtest"}


def test_a_cell_that_is_run_again_replaces_its_console(console, monkeypatch):
    from migkit.widgets import console as module

    monkeypatch.setattr(module, "current_cell", lambda: ("cell", "first"))
    old = console(link="100Mbit/s")
    other = console(link="100Mbit/s")  # of the same execution: both stay
    old.press("start")
    until(lambda: "cancel" in enabled(old))
    assert enabled(other) == {"start"}
    monkeypatch.setattr(module, "current_cell", lambda: ("cell", "second"))
    old_first = old
    module._of_cell["cell"] = ("first", module.weakref.ref(old_first))
    console()
    assert old.run.status == "cancelled"
    assert "run again" in old._says.value
    assert enabled(old) == set()


def test_the_form_has_every_option_with_its_help(console):
    one = console(memory="32MiB")
    assert set(one._form.controls) == set(Options.__dataclass_fields__)
    for name, field in Options.__dataclass_fields__.items():
        assert field.metadata["help"] in one._form.controls[name].tooltip
    values = one._form.values()
    workload = values.pop("workload")
    assert workload == "random"
    assert Options.make(**values).memory == 32 << 20


def test_a_preset_that_cannot_be_is_refused_before_anything_is_shown(console):
    with pytest.raises(OptionError, match="did you mean"):
        console(memoryy="16MiB")
    with pytest.raises(OptionError, match="not a size"):
        console(memory="much")


class Still(Workload):
    name = "still"

    def step(self, ram, state, n):
        pass


def test_a_workload_of_ones_own_is_what_is_migrated(console):
    one = console(Still, link="100Mbit/s", postcopy="off")
    one.press("start")
    assert one.wait(30).meta["workload"]["name"] == "still"


def test_without_widgets_there_is_a_text_and_a_picture(console):
    one = console(postcopy="1 round")
    bundle = one._without_widgets()
    assert "the migration is none" in bundle["text/plain"]
    assert "<svg" in bundle["text/html"]
    one.press("start")
    one.wait(30)
    bundle = one._without_widgets()
    assert "the migration is completed; 4,096 pages" in bundle["text/plain"]
    assert 'src="data:image/png;base64,' in bundle["text/html"]


# The page map.


def test_the_state_of_a_page_follows_from_both_sides():
    source, destination = np.zeros((2, len(Row), 8), bool)
    assert (page_states(source, destination) == PageState.AT_SOURCE).all()
    source[Row.DIRTY, :4] = True
    source[Row.SENT, [1, 4, 5]] = True
    source[Row.DISCARDED, [2, 3]] = True
    destination[Row.RECEIVED, [1, 4, 5, 6, 7]] = True
    destination[Row.ANSWERED, 7] = True
    destination[Row.REQUESTED, 3] = True
    assert page_states(source, destination).tolist() == [
        PageState.AT_SOURCE, PageState.DIRTY_AGAIN, PageState.DISCARDED, PageState.REQUESTED,
        PageState.SENT, PageState.SENT, PageState.BACKGROUND, PageState.ANSWERED,
    ]  # fmt: skip


@pytest.mark.usefixtures("nothing_left")
def test_a_session_has_a_page_map_while_it_lives(session):
    one = session(postcopy="off", rate=100)
    with pytest.raises(MigrationError, match="not been started"):
        one.page_map()
    one.start()
    one.await_end(30)
    assert (one.page_map() == PageState.SENT).all()


def test_what_was_discarded_is_told_from_what_was_never_sent(session):
    one = session(memory="16MiB", rate=0, link="200Mbit/s")
    one.start()
    until(lambda: one.query()["source"]["round"] > 1)
    one.start_postcopy()
    one.await_status("postcopy-active")
    seen = count_states(one.page_map())
    assert seen[PageState.DISCARDED] > PAGES // 4
    assert PageState.DIRTY_AGAIN not in seen


def test_history_names_what_a_page_went_through():
    history = PageHistory(4)
    for time_s, states in enumerate(([0, 0, 0, 0], [1, 1, 0, 0], [2, 1, 0, 0], [1, 1, 6, 0])):
        history.update(np.array(states, np.uint8), float(time_s))
    assert history.describe(0) == (
        "page 0: only at the source → sent at 1.00 s, last at 3.00 s → dirty again at 2.00 s"
    )
    assert history.describe(3) == "page 3: only at the source"
    assert history.describe(9) == "there is no page 9"


def test_a_page_map_shared_with_an_engine_is_as_large_as_its_rows():
    pages = PageMap.create(100)
    try:
        assert pages.snapshot().shape == (len(Row), 100)
    finally:
        pages.close()


def test_two_cells_travel_in_a_byte_and_a_cell_shows_the_greatest_state():
    assert pack(np.array([1, 2, 3], np.uint8), 1) == bytes([0x21, 0x03])
    assert pack(np.array([1, 6, 3, 0, 5], np.uint8), 2) == bytes([0x36, 0x05])
    assert len(pack(np.zeros(MOST_CELLS, np.uint8), 1)) == MOST_CELLS // 2


def test_the_states_differ_in_lightness_shape_and_words():
    def lightness(color):
        red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    levels = sorted(lightness(look.fill) for look in LOOKS.values())
    assert min(np.diff(levels)) > 0.08
    assert len({look.label for look in LOOKS.values()}) == len(LOOKS) == len(PageState)
    assert len({(look.shape, look.fill) for look in LOOKS.values()}) == len(LOOKS)


def test_the_static_map_says_what_it_shows():
    states = np.arange(700, dtype=np.uint16) % 7
    figure = draw(states.astype(np.uint8), "a title")
    assert "100 dirty again" in in_words(states.astype(np.uint8))
    assert "100 dirty again" in figure.alt_text
    assert figure.axes[0].get_xlabel()
    assert figure.axes[0].get_ylabel()


# The state machine.


@pytest.mark.parametrize("status", list(Status))
def test_the_diagram_is_the_table_with_the_current_state_lit(status):
    root = ET.fromstring(statemachine.draw(status, {"setup"}, "active"))  # noqa: S314
    svg = "{http://www.w3.org/2000/svg}"
    arrows = {title.text for title in root.iter(f"{svg}title")}
    assert arrows == {f"{old} to {new}" for old, ends in SOURCE.items() for new in ends}
    words = [text.text for text in root.iter(f"{svg}text")]
    assert [w for w in words if w.startswith("▶")] == [f"▶ {status.partition('-')[0]}"]
    assert f"the source is {status}" in root.get("aria-label")


def test_commands_are_allowed_where_the_table_leads_somewhere():
    assert not any(COMMANDS["cancel"] & {state} for state in ENDED)
    for state in COMMANDS["cancel"]:
        assert Status.CANCELLING in SOURCE[state]
    for state in COMMANDS["pause"]:
        assert Status.POSTCOPY_PAUSED in SOURCE[state]
    for state in COMMANDS["recover"]:
        assert Status.POSTCOPY_RECOVER_SETUP in SOURCE[state]


# What is read while it is written.


def test_a_follower_reads_the_same_records_as_one_reading_of_the_whole_file(session, tmp_path):
    one = session(rate=0, postcopy="1 round")
    one.start()
    one.await_end(30)
    data = one.record().trace("destination").read_bytes()
    whole = read(data)
    path, seen = tmp_path / "growing", {}
    follower = Follower(path, Registry.load(), most=10_000)
    assert not follower.read().events
    for end in range(0, len(data) + 777, 777):
        path.write_bytes(data[:end])
        for name, rows in follower.read().events.items():
            seen[name] = seen.get(name, 0) + len(rows)
    while rest := follower.read().events:
        for name, rows in rest.items():
            seen[name] = seen.get(name, 0) + len(rows)
    assert seen == {name: len(rows) for name, rows in whole.events.items()}


def test_a_follower_does_not_wait_for_ever_for_a_record_that_it_cannot_hold(tmp_path):
    path = tmp_path / "trace"
    record = RECORD_HEADER.pack(RECORD, 7, 1, 1 << 30, 1)
    path.write_bytes(header() + mapping_record(7, "migrate_set_state") + record + bytes(20_000))
    follower = Follower(path, Registry.load(), most=10_000)
    assert not follower.read().events
    with pytest.raises(TraceFormatError, match="offset 61: expected a record, got more than 10000"):
        follower.read()


def test_quantiles_of_the_histogram_are_close():
    rng = np.random.default_rng(1)
    us = rng.lognormal(5, 1, 10_000)
    waits = Latencies()
    for part in np.split(us, 10):
        waits.add(part)
    assert waits.quantile_us(0.5) == pytest.approx(np.quantile(us, 0.5), rel=0.03)
    assert waits.quantile_us(0.99) == pytest.approx(np.quantile(us, 0.99), rel=0.03)
    assert waits.greatest_us == us.max()
    assert Latencies().quantile_us(0.5) == 0


def test_importing_migkit_loads_no_widgets():
    code = (
        "import sys, migkit, migkit.cli\n"
        "heavy = {'ipywidgets', 'anywidget', 'IPython', 'matplotlib', 'pandas', 'bcc'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("stored", [True, False], ids=["with widgets' state", "without"])
def test_nbconvert_shows_the_text_and_the_picture(tmp_path, stored):
    code = "import migkit\nmigkit.Console(memory='16MiB', probe='off')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client = nbclient.NotebookClient(
        notebook, timeout=60, store_widget_state=stored,
        resources={"metadata": {"path": str(tmp_path)}},
    )  # fmt: skip
    client.execute()
    page, _ = HTMLExporter().from_notebook_node(notebook)
    assert "<p>migkit Console: the migration is none</p>" in page
    assert "State machine of the migration: the source is none" in page
