"""The magics take the command line's options and leave the run in a variable."""

import numpy as np
import pytest
from IPython.core.error import UsageError
from IPython.testing.globalipapp import start_ipython

import migkit

QUICK = "--memory 8MiB --rate 20000 --probe off"
CELL = """
class Counter(migkit.Workload):
    params = {"stride": 1.0}

    def step(self, ram, state, n):
        ram[int(state["step"]) % len(ram), 0] += 1
"""


@pytest.fixture(scope="module")
def shell():
    shell = start_ipython()
    shell.run_line_magic("load_ext", "migkit")
    shell.user_ns["migkit"] = migkit
    return shell


def test_migrate_leaves_the_run_in_the_named_variable(shell, tmp_path):
    path = tmp_path / "run"
    returned = shell.run_line_magic("migrate", f"{QUICK} --path {path} --verify -o mine")
    assert returned is shell.user_ns["mine"]
    assert returned.status == "completed"
    assert returned.path == path
    assert "<table" in returned._repr_html_()
    assert "completed" in returned._repr_html_()


def test_a_cells_workload_is_the_guest(shell, tmp_path):
    run = shell.run_cell_magic("migrate", f"{QUICK} --path {tmp_path / 'run'}", CELL)
    assert shell.user_ns["run"] is run
    assert run.meta["workload"]["name"] == "Counter"
    assert np.isfinite(run.summary().total_ms)


def test_trace_opens_draws_and_names_a_run(shell, capsys):
    run = shell.run_line_magic("trace", "postcopy --plot fault_stages -o old")
    assert shell.user_ns["old"] is run
    assert "Figure" in capsys.readouterr().out
    assert shell.run_line_magic("trace", "postcopy --json") is None
    assert '"status": "completed"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("magic", "line", "message"),
    [
        ("migrate", "--memoryy 8MiB", "not options of migkit run"),
        ("migrate", "--memory much", "not a size"),
        ("migrate", "--workload nothing", "no workload"),
        ("migrate", "-o 1x", "no name"),
        ("migrate", "'", "quotation"),
        ("trace", "nowhere", "nowhere"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(shell, magic, line, message):
    with pytest.raises(UsageError, match=message):
        shell.run_line_magic(magic, line)


@pytest.mark.parametrize(
    ("cell", "message"), [("x = 1", "no subclass"), ("raise ValueError", "the cell failed")]
)
def test_a_cell_without_a_workload_is_refused(shell, cell, message):
    with pytest.raises(UsageError, match=message):
        shell.run_cell_magic("migrate", QUICK, cell)


def test_help_shows_the_command_lines(shell, capsys):
    assert shell.run_line_magic("migrate", "--help") is None
    shown = capsys.readouterr().out
    assert "--postcopy-preempt" in shown
    assert "256MiB" in shown
    assert "268435456" not in shown


def test_a_migration_shows_its_state_and_counters(session):
    one = session(rate=1000)
    assert "none" in one._repr_html_()
    one.start()
    one.start_postcopy()
    one.await_end(30)
    assert "completed" in one._repr_html_()
    assert "precopy pages" in one._repr_html_()
