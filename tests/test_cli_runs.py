"""The commands on recorded runs: what they print, what they write, and how they end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest

from migkit.cli import main
from migkit.errors import TraceWarning
from migkit.trace.registry import Registry
from migkit.view.export import FRAMES

TRACES = Path(__file__).parents[1] / "traces"


@pytest.fixture
def migkit(capsys, tmp_path, monkeypatch):
    """Call the command line in an empty folder; return its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_check_of_a_good_run_succeeds_and_says_what_was_judged(migkit, plain_run):
    code, out, err = migkit("check", plain_run.path)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "0 violations, 13 rules kept, 1 not to be judged"


def test_check_of_a_run_that_breaks_a_rule_fails(migkit):
    code, out, _ = migkit("check", "qemu-11.1-rate-limited")
    assert code == 1
    assert "VIOLATED  limiter-starves-nobody (source): 77 requests waited" in out
    code, out, _ = migkit("check", "qemu-11.1-rate-limited", "--json")
    assert code == 1
    document = json.loads(out)
    assert [row["rule"] for row in document["violations"]][:2] == [
        "limiter-waits", "limiter-starves-nobody",
    ]  # fmt: skip
    assert set(document["not_checked"]) == {"placed-was-sent"}


def test_check_can_leave_rules_out(migkit):
    code, out, _ = migkit("check", "qemu-11.1-plain", "--ignore", "blocktime-adds-up")
    assert code == 0
    assert out.splitlines()[-1].startswith("0 violations")
    code, _, err = migkit("check", "qemu-11.1-plain", "--ignore", "blocktime")
    assert code == 2
    assert "did you mean 'blocktime-adds-up'" in err


def in_a_shell(folder, *arguments):
    command = [sys.executable, "-m", "migkit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60,
                          check=False)  # fmt: skip


def test_a_shell_sees_the_exit_code_and_warnings_in_a_line(tmp_path):
    result = in_a_shell(tmp_path, "check", "qemu-11.1-destination-killed")
    assert result.returncode == 1
    assert result.stdout.startswith("VIOLATED  limiter-waits (source): the rate limiter spun")
    assert result.stderr.startswith("migkit: ")
    assert result.stderr.endswith("source.log.xz: there is no trace of the destination\n")
    assert result.stderr.count("\n") == 1


def test_a_folder_of_qemus_logs_is_a_run(migkit, tmp_path):
    shutil.copytree(TRACES / "qemu-7.2-preempt", tmp_path / "logs")
    code, out, _ = migkit("check", "logs")
    assert code == 0
    assert "kept" in out
    (tmp_path / "logs" / "destination.log.xz").unlink()
    with pytest.warns(TraceWarning, match="no trace of the destination"):
        code, _, _ = migkit("show", "logs")
    assert code == 0


def test_report_is_one_file(migkit, cancelled_run, tmp_path):
    code, out, _ = migkit("report", cancelled_run.path)
    assert (code, out) == (0, "written      report.html\n")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    code, _, err = migkit("report", cancelled_run.path, "-o", "no/such/report.html")
    assert code == 2
    assert "No such file" in err


def test_compare_prints_a_table_and_draws(migkit, plain_run, recovered_run, tmp_path):
    code, out, _ = migkit(
        "compare", plain_run.path, recovered_run.path, "--names", "a,b", "--png", "a.png"
    )
    assert code == 0
    assert out.splitlines()[0].split() == ["a", "b"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    repeated = f"{plain_run.path},{plain_run.path}"
    code, out, _ = migkit("compare", repeated, recovered_run.path, "--json")
    rows = json.loads(out)
    assert {row["runs"] for row in rows} == {1, 2}
    code, _, err = migkit("compare", plain_run.path)
    assert code == 2
    assert "two runs at least" in err


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["run.pftrace"], ["run.pftrace"]),
        (["faults.parquet", "--frame", "faults"], ["faults.parquet"]),
        (["phases.csv", "--frame", "phases"], ["phases.csv"]),
        (["all", "--to", "parquet"], [f"all/{name}.parquet" for name in FRAMES]),
        (["some", "--to", "parquet", "--frame", "faults", "--frame", "states"],
         ["some/faults.parquet", "some/states.parquet"]),
    ],
)  # fmt: skip
def test_convert_writes_what_is_asked_for(migkit, plain_run, tmp_path, arguments, files):
    code, out, err = migkit("convert", plain_run.path, *arguments, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["written"] == files
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == set(files)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run.txt"], "name a format with --to, or a file that ends in .pftrace"),
        (["run.csv"], "choose its table with --frame"),
        (["run.pftrace", "--frame", "faults"], "--frame is for csv and parquet"),
        (["no/x.csv", "--frame", "faults"], "no/x.csv"),
        (["no/page.html"], "no/page.html: No such file"),
    ],
)
def test_convert_explains_a_wrong_call(migkit, plain_run, arguments, said):
    code, out, err = migkit("convert", plain_run.path, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_convert_takes_one_trace_file(migkit, plain_run, tmp_path):
    code, out, err = migkit("convert", plain_run.path / "source.trace", "source.parquet")
    assert (code, out, err) == (0, "written      source.parquet\n", "")
    events = pd.read_parquet(tmp_path / "source.parquet")
    assert len(events) == plain_run.traces["source"].n_records
    assert set(events["process"]) == {"source"}
    code, _, err = migkit("convert", plain_run.path / "source.trace", "source.pftrace")
    assert code == 2
    assert "its events can be written as Parquet" in err
    code, _, err = migkit("convert", plain_run.path / "meta.json", "x.parquet")
    assert code == 1
    assert "offset 0" in err


def test_show_prints_any_table(migkit, plain_run):
    code, out, _ = migkit("show", plain_run.path, "--frame", "faults", "--json")
    assert code == 0
    assert len(json.loads(out)) == len(plain_run.faults)
    code, out, _ = migkit("show", plain_run.path, "--frame", "rounds")
    assert out.splitlines()[0].startswith("round,start_ns,")


def test_show_prints_a_trace_as_qemu_logs_it(migkit, plain_run):
    code, out, _ = migkit("show", plain_run.path, "--log", "source")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == plain_run.traces["source"].n_records
    assert any(line.endswith(":migrate_set_state new state completed") for line in lines)


def test_events_lists_the_registry_with_descriptions(migkit):
    code, out, _ = migkit("events", "--json")
    assert code == 0
    events = {event["name"]: event for event in json.loads(out)}
    assert set(events) == {event.name for event in Registry.load()}
    assert all(event["doc"] for event in events.values())
    assert events["migration_thread_low_pending"]["args"] == {"pending": "uint64_t"}
    code, out, _ = migkit("events", "migration_thread_low*")
    assert out == (
        "migration_thread_low_pending(uint64_t pending)\n"
        "    What is pending is small enough to end the migration. [migration]\n"
    )
    code, _, err = migkit("events", "migraton")
    assert code == 2
    assert "did you mean 'migration'" in err


def test_events_reads_a_registry_of_qemus(migkit, tmp_path):
    file = tmp_path / "trace-events"
    file.write_text('# A thing happened.\nthing(int x) "%d"\n')
    code, out, _ = migkit("events", "--registry", file)
    assert (code, out) == (0, "thing(int x)\n    A thing happened.\n")
    code, _, err = migkit("events", "--registry", tmp_path / "none")
    assert code == 1
    assert "No such file" in err


@pytest.mark.parametrize("command", ["show", "check", "report"])
def test_what_is_no_run_is_named(migkit, command):
    code, out, err = migkit(command, "nothing")
    assert (code, out) == (1, "")
    assert err == "migkit: nothing is not a folder; a run is a folder with meta.json\n"


def test_converted_tables_open_without_migkit(migkit, plain_run, tmp_path):
    migkit("convert", plain_run.path, "faults.parquet", "--frame", "faults")
    faults = pd.read_parquet(tmp_path / "faults.parquet")
    assert faults["latency_us"].count() == plain_run.faults["latency_us"].count()
