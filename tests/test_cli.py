"""The command line, as a shell sees it: exit codes, both output streams, files, processes."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from migkit.kernel.capability import kernel_checks

SMALL = ("--memory", "4MiB", "--probe", "off")
PNG = b"\x89PNG\r\n\x1a\n"

can_migrate = pytest.mark.skipif(
    any(check.required and not check.ok for check in kernel_checks()),
    reason="this machine cannot migrate: see migkit doctor",
)


@pytest.fixture
def migkit(tmp_path):
    """Call the command line in an empty folder."""

    def call(*arguments, **options):
        command = [sys.executable, "-m", "migkit", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False,
            **options,
        )  # fmt: skip

    return call


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A recorded run of 4 MiB."""
    folder = tmp_path_factory.mktemp("runs") / "recorded"
    command = [sys.executable, "-m", "migkit", "run", *SMALL, "--path", str(folder)]
    subprocess.run(command, capture_output=True, check=True, timeout=60)
    return folder


def only_a_message(result, code):
    """Whether a call failed with this code and one line of explanation; return that."""
    assert result.returncode == code, result
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("migkit: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


# run


@can_migrate
def test_run_prints_the_figures_and_where_the_run_is(migkit, tmp_path):
    result = migkit("run", *SMALL, "--verify")

    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("migration    completed (random, 4 MiB)\n")
    assert "Verified: " in result.stdout
    folder = next(line for line in result.stdout.splitlines() if line.startswith("run folder"))
    assert (tmp_path / folder.split()[-1] / "meta.json").exists()
    assert result.stderr == ""


@can_migrate
def test_run_with_json_prints_one_document_and_nothing_else(migkit, tmp_path):
    result = migkit("run", *SMALL, "--json", "--verify", "--path", "here")

    document = json.loads(result.stdout)
    assert (result.returncode, result.stderr) == (0, "")
    assert document["status"] == "completed"
    assert document["path"] == "here"
    assert document["memory_bytes"] == 4 << 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here"]


@can_migrate
def test_run_hands_options_and_parameters_on(migkit, tmp_path):
    result = migkit(
        "run", *SMALL, "--workload", "hotset", "--param", "working_set=0.5", "--rate", "3000",
        "--page-size", "4096", "--postcopy-preempt", "off", "--transport", "tcp", "--path", "here",
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
    meta = json.loads((tmp_path / "here" / "meta.json").read_text())
    assert meta["workload"] == {"name": "hotset", "seed": 1, "params": {"working_set": 0.5}}
    assert meta["options"]["rate"] == 3000
    assert meta["options"]["postcopy_preempt"] is False
    assert meta["options"]["transport"] == "tcp"


@can_migrate
def test_run_draws_its_progress_on_the_terminal_and_not_in_the_output(tmp_path):
    terminal, stderr = open_terminal()
    command = [sys.executable, "-m", "migkit", "run", *SMALL, "--max-bandwidth", "8MiB"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, cwd=tmp_path)
    os.close(stderr)

    drawn = b"".join(iter(lambda: read_terminal(terminal), b""))
    output, _ = run.communicate(timeout=60)
    os.close(terminal)

    assert run.returncode == 0
    assert b"active, round 1" in drawn
    assert b"active" not in output
    assert b"\r" not in output


def open_terminal():
    """Return both ends of a terminal of 80 columns: the one to read, the one to write to."""
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    return terminal, stderr


def read_terminal(terminal):
    """Read what a program drew; nothing more comes when it has ended."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workload", "randm"], "no workload 'randm': did you mean 'random'?"),
        (["--workload", "x"], "known are: hotset, memtest, random"),
        (["--memory", "12 apples"], "'12 apples' is not a size: write 256MiB, 4G"),
        (["--memory", "5000"], "not a multiple of the page size 4096; 4096 or 8192 would be"),
        (["--memory", "0"], "memory of 0 bytes"),
        (["--memory", "900TiB"], "this machine has "),
        (["--page-size", "3000"], "page size 3000 is not one of 4096, 2097152, 1073741824"),
        (["--postcopy", "later"], "'N rounds', 'N s', 'manual', 'auto', 'off'"),
        (["--postcopy-preempt", "perhaps"], "postcopy_preempt 'perhaps' is not a bool"),
        (["--transport", "tpc"], "transport 'tpc': did you mean 'tcp'?"),
        (["--rate", "fast"], "rate 'fast' is not a float"),
        (["--rate=-3"], "rate of -3.0 is not a number from 0 on"),
        (["--cpus", "0,9999,0,0"], "cpus '0,9999,0,0': "),
        (["--trace", "no_such_event"], "'no_such_event' matches no trace event"),
        (["--param", "alpha"], "--param 'alpha': write NAME=NUMBER"),
        (["--param", "alpha=2"], "workload random has no parameter 'alpha'"),
        (["--workload", "hotset", "--param", "alhpa=2"], "did you mean 'alpha'"),
    ],
)
def test_run_explains_a_wrong_option_and_starts_nothing(migkit, tmp_path, arguments, said):
    result = migkit("run", *arguments)

    assert said in only_a_message(result, 2)
    assert not list(tmp_path.iterdir())


def test_run_does_not_touch_a_folder_that_is_no_run(migkit, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")

    result = migkit("run", *SMALL, "--path", "thesis")

    assert "thesis is not empty and not a run folder" in only_a_message(result, 2)
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years of work"


@can_migrate
def test_run_that_takes_too_long_is_given_up_and_saved(migkit, tmp_path):
    result = migkit(
        "run", *SMALL, "--max-bandwidth", "64k", "--timeout", "0.5", "--path", "here"
    )  # fmt: skip

    assert "still active after 0.5 s" in only_a_message(result, 1)
    meta = json.loads((tmp_path / "here" / "meta.json").read_text())
    assert meta["status"] == "failed"
    assert "source: the session ended while the migration was under way" in meta["errors"]


@pytest.fixture
def slow_run(tmp_path, monkeypatch):
    """Start a migration of some twelve seconds; return the process and its terminal."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    terminal, stderr = open_terminal()
    command = [sys.executable, "-m", "migkit", "run", *SMALL, "--max-bandwidth", "256k"]
    run = subprocess.Popen(
        [*command, "--path", "here"], stdout=subprocess.PIPE, stderr=stderr, cwd=tmp_path,
        start_new_session=True,
    )  # fmt: skip
    os.close(stderr)
    yield run, terminal
    run.kill()
    run.communicate()
    os.close(terminal)


def press_ctrl_c(run, terminal):
    """Interrupt all processes of the terminal; return what was printed, and drawn, after it."""
    os.killpg(run.pid, signal.SIGINT)
    drawn = b"".join(iter(lambda: read_terminal(terminal), b""))
    output, _ = run.communicate(timeout=30)
    return output, drawn


INTERRUPTED = b"migkit: interrupted; what was recorded is in the run folder\r\n"


@can_migrate
def test_ctrl_c_saves_the_run_and_leaves_nothing_else(migkit, slow_run, tmp_path):
    run, terminal = slow_run
    while b"active, round 1" not in read_terminal(terminal):
        assert run.poll() is None

    output, drawn = press_ctrl_c(run, terminal)

    assert (run.returncode, output) == (130, b"")
    assert drawn.endswith(INTERRUPTED)
    assert json.loads(migkit("show", "here", "--json").stdout)["status"] in ("failed", "cancelled")
    wait_until(lambda: not processes_in(tmp_path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"]


@can_migrate
def test_ctrl_c_while_the_guests_start_leaves_nothing_either(slow_run, tmp_path):
    run, terminal = slow_run
    wait_until((tmp_path / "here" / "destination.log").exists)

    output, drawn = press_ctrl_c(run, terminal)

    assert (run.returncode, output) == (130, b"")
    assert drawn.endswith(INTERRUPTED)
    wait_until(lambda: not processes_in(tmp_path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"]


def processes_in(folder):
    """Return the processes that work in a folder: guests and engines inherit it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found.append(process.name)
        except OSError:
            continue  # it has just ended, or is somebody else's
    return found


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# show


@can_migrate
def test_show_prints_what_run_printed(migkit, recorded):
    result = migkit("show", recorded)

    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("migration    completed (random, 4 MiB)\n")
    assert result.stdout.endswith(f"run folder   {recorded}\n")


@can_migrate
def test_show_with_json_prints_one_document(migkit, recorded):
    result = migkit("show", recorded, "--json")

    document = json.loads(result.stdout)
    assert (result.returncode, result.stderr) == (0, "")
    assert document["status"] == document["destination_status"] == "completed"
    assert document["path"] == str(recorded)


@can_migrate
@pytest.mark.parametrize("plot", ["timeline", "fault_latency", "fault_stages"])
def test_show_draws_a_png(migkit, recorded, tmp_path, plot):
    result = migkit("show", recorded, "--png", "a.figure", "--plot", plot, "--json")

    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["status"] == "completed"
    assert (tmp_path / "a.figure").read_bytes().startswith(PNG)


@can_migrate
def test_show_says_where_it_cannot_draw(migkit, recorded):
    result = migkit("show", recorded, "--png", "no/such/folder/a.png")

    assert "no/such/folder/a.png: No such file or directory" in only_a_message(result, 2)


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_show_says_what_is_not_a_run(migkit, tmp_path, as_json):
    (tmp_path / "empty").mkdir()

    assert "empty is not a run folder: it has no meta.json" in only_a_message(
        migkit("show", "empty", *as_json), 1
    )
    assert "nothing is not a folder" in only_a_message(migkit("show", "nothing", *as_json), 1)


def test_show_says_that_a_run_is_damaged(migkit, tmp_path):
    (tmp_path / "meta.json").write_text('{"format": 1, "status"')

    assert "meta.json is no JSON" in only_a_message(migkit("show", tmp_path), 1)


# doctor


def test_doctor_names_each_probe_and_a_remedy_for_what_is_missing(migkit):
    result = migkit("doctor")

    assert result.returncode == (1 if "migration: NOT READY" in result.stdout else 0)
    assert result.stderr == ""
    assert "userfaultfd: " in result.stdout
    assert "dirty logging (PAGEMAP_SCAN, WP_ASYNC): " in result.stdout
    lines = result.stdout.splitlines()
    lacking = [i for i, line in enumerate(lines) if line.startswith(("  MISS", "  none"))]
    assert all(lines[i + 1].startswith("       remedy: ") for i in lacking)


def test_doctor_with_json_prints_one_document_that_agrees_with_its_text(migkit):
    result = migkit("doctor", "--json")

    document = json.loads(result.stdout)
    assert document["usable"].keys() == document["checks"].keys() == {"migration", "eBPF probe"}
    assert result.returncode == (0 if document["usable"]["migration"] else 1)
    for name, checks in document["checks"].items():
        assert document["usable"][name] == all(c["ok"] or not c["required"] for c in checks)


# All commands


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: COMMAND"),
        (["rnu"], "invalid choice: 'rnu'"),
        (["run", "--memroy", "4MiB"], "unrecognized arguments: --memroy"),
        (["show"], "required: run"),
        (["show", "x", "--plot", "pie"], "invalid choice: 'pie'"),
        (["run", "--timeout", "soon"], "invalid float value: 'soon'"),
    ],
)
def test_a_wrong_call_is_explained_on_stderr(migkit, arguments, said):
    result = migkit(*arguments)

    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_help_names_every_option_with_its_default_and_qemus_name(migkit):
    text = " ".join(migkit("run", "--help").stdout.split())

    assert "--max-postcopy-bandwidth" in text
    assert "[QEMU: postcopy-ram] (default: 1 round)" in text


def test_help_writes_sizes_as_people_do(migkit):
    text = " ".join(migkit("run", "--help").stdout.split())
    assert "--memory SIZE guest RAM" in text
    assert "(default: 256MiB)" in text
    assert "(default: 4KiB)" in text
    assert "268435456" not in text


def test_a_reader_that_stops_reading_is_no_error(migkit, tmp_path):
    command = f"{sys.executable} -m migkit doctor | true"

    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False,
    )  # fmt: skip

    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("heavy", ["pandas", "pyarrow", "matplotlib", "bcc", "IPython"])
def test_importing_migkit_loads_nothing_heavy(heavy):
    code = (
        "import sys, migkit, migkit.cli, migkit.guest.workloads\n"
        f"migkit.Workload\nsys.exit({heavy!r} in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
