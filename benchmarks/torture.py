"""Migrate while everything goes wrong that can, drawn at random from a printed seed.

``python -m benchmarks.torture [--minutes 10] [--seed N] [--count 300 --only cut]``: each
migration has options and up to three disasters drawn for it: an engine, a guest or the probe
killed, stopped for a while or interrupted; the channels paused or the link cut after some bytes
or stalled; a cancel; a stranger who connects. What is paused is recovered, over and over. Of each
migration is demanded that it ends; that at no moment two guests run; that the guest that is left
is bit for bit one that never moved, or that its memory went with a guest that was killed, and
that this is said.

Ends with a table of what was tried, how often, and what came of it. Exit code 1 when anything
was lost that need not be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.soak import draw_options
from migkit import Migration
from migkit.errors import MigkitError
from migkit.migration.states import ENDED, Status

_MOST_MEMORY = 64 << 20
LINKS = ["unlimited", "200Mbit/s", "200Mbit/s, 1ms", "1Gbit/s, 100us"]

_END_S = 60.0
_LOST = "lost for good"
_SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "interrupted": signal.SIGINT}


@dataclass
class Trial:
    """One migration and what was done to it."""

    number: int
    options: dict[str, Any]
    disasters: list[tuple[float, str]]
    """When, in s after the start, and what: ``"killed source guest"``, ``"cut main"``."""
    done: list[str] = field(default_factory=list)
    """What was done, with the state that it met: ``"killed source in active"``."""
    outcome: str = ""
    wrong: str = ""


def draw_trial(number: int, draw: random.Random, only: str = "") -> Trial:
    """Draw a migration and its disasters; ``only`` those whose name begins so, one of them."""
    options = draw_options(draw, _MOST_MEMORY)
    options["probe"] = "auto" if draw.random() < 0.15 else "off"
    options["switchover_ack"] = options["return_path"] and draw.random() < 0.2
    options["mem_lock"] = draw.random() < 0.1
    if only or draw.random() < 0.5:
        options["link"] = draw.choice(
            ["unlimited", "200Mbit/s", "200Mbit/s, 1ms", "1Gbit/s, 100us"]
        )
        most = 5000
        if options["postcopy"] == "off":  # what a link cannot follow never ends
            most = 5 if "page_size" in options else 500
        options["rate"] = min(options["rate"] or most, most)
    else:
        options["max_postcopy_bandwidth"] = draw.choice([0, 16 << 20, 64 << 20])
    kinds = [f"{how} {whom}" for how in _SIGNALS for whom in _victims(options)]
    kinds += ["pause", "pause", "cancel", "stranger"]
    if "link" in options:
        kinds += ["cut main", "cut preempt", "cut both", "stall"] * 3
    count = 1 if only else draw.choice([0, 1, 1, 2, 3])
    kinds = [kind for kind in kinds if kind.startswith(only)]
    span = draw.choice([0.02, 0.2, 1.0])
    disasters = sorted((draw.random() * span, draw.choice(kinds)) for _ in range(count))
    return Trial(number, options, disasters)


def _victims(options: dict[str, Any]) -> list[str]:
    guests = ["source guest", "destination guest"]
    probe = ["probe"] if options["probe"] == "auto" else []
    return ["source", "destination"] * 2 + guests + probe


class Torturer:
    """Carries one trial out."""

    def __init__(self, trial: Trial, path: Path, draw: random.Random) -> None:
        """Take the trial; ``path`` is the run folder."""
        self.trial = trial
        self.draw = draw
        self.migration = Migration(path=path, **trial.options)
        self.killed: set[str] = set()
        self._timers: list[threading.Timer] = []
        self._over = threading.Event()

    def run(self) -> None:
        """Migrate, with everything that is to happen meanwhile; note the outcome."""
        trial = self.trial
        watcher = threading.Thread(target=self._watch_guests)
        villain = threading.Thread(target=self._do_all)
        with self.migration as migration:
            migration.start()
            watcher.start()
            villain.start()
            try:
                self._to_the_end()
                villain.join(_END_S)
                self._to_the_end()
                self._judge()
            except (AssertionError, TimeoutError, MigkitError) as error:
                trial.wrong = trial.wrong or f"{type(error).__name__}: {error}"
            finally:
                self._over.set()
                for thread in (villain, watcher, *self._timers):
                    thread.join(_END_S)
            trial.outcome = trial.outcome or "?"
            if trial.wrong:
                trial.wrong += f" | {json.dumps(migration.query(), default=str)}"
                trial.wrong += f" | {migration.statuses} | {migration.errors} | {migration.notices}"

    # What goes wrong.

    def _do_all(self) -> None:
        begun = time.monotonic()
        migration, options = self.migration, self.trial.options
        if options["postcopy"] == "manual":
            with contextlib.suppress(MigkitError):
                migration.start_postcopy()
        for at, what in self.trial.disasters:
            if self._over.wait(max(0.0, begun + at - time.monotonic())):
                return
            state = migration.status.value
            with contextlib.suppress(MigkitError, ProcessLookupError, OSError):
                self._do(what)
                self.trial.done.append(f"{what} in {state}")

    def _do(self, what: str) -> None:
        how, _, whom = what.partition(" ")
        migration = self.migration
        if how in _SIGNALS:
            pid = migration.pids[whom]
            if how == "killed":
                self.killed.add(whom)
            os.kill(pid, _SIGNALS[how])
            if how == "stopped":
                self._later(lambda: os.kill(pid, signal.SIGCONT))
        elif how == "cut":
            after = self.draw.choice([0, 1, 100, 5000, self.draw.randrange(1 << 22)])
            migration.link.cut(after, None if whom == "both" else whom)
        elif how == "stall":
            migration.link.stall()
            self._later(migration.link.resume)
        elif how == "pause":
            migration.pause()
        elif how == "cancel":
            migration.cancel()
        elif how == "stranger":
            self._intrude()

    def _later(self, undo: Callable[[], object]) -> None:
        def quietly() -> None:
            with contextlib.suppress(MigkitError, OSError):
                undo()

        timer = threading.Timer(self.draw.random() * 0.5, quietly)
        timer.start()
        self._timers.append(timer)

    def _intrude(self) -> None:
        """Connect to whatever listens, say something, and stay."""
        for path in self.migration._sockets.iterdir():  # noqa: SLF001
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.settimeout(1.0)
                stranger.connect(str(path))
                stranger.send(b"QEVM")
                with contextlib.suppress(TimeoutError):
                    stranger.recv(1)

    # What must be true.

    def _watch_guests(self) -> None:
        while not self._over.wait(0.001):
            running = self.migration.running_guests
            if len(running) > 1:
                self.trial.wrong = f"two guests ran at once: {running}"
                return

    def _to_the_end(self) -> None:
        """Wait for the end, and recover as often as it takes."""
        deadline = time.monotonic() + _END_S
        while self.migration.await_end(_END_S) not in ENDED:
            assert time.monotonic() < deadline, "it does not end, however often it is recovered"
            try:
                self.migration.recover()
            except MigkitError as error:
                if _LOST in str(error):
                    return
                time.sleep(0.05)

    def _judge(self) -> None:
        trial, migration = self.trial, self.migration
        lost = _LOST in "".join(migration.errors) or migration.status not in ENDED
        survivor = "destination" if migration.destination_status == Status.COMPLETED else "source"
        trial.outcome = migration.status.value
        if "destination guest" in self.killed and (lost or survivor == "destination"):
            trial.outcome = "guest killed"
            return
        if "source guest" in self.killed and survivor == "source":
            trial.outcome = "guest killed"
            return
        assert not lost, "memory is lost though no guest was killed"
        for timer in self._timers:
            timer.join()
        verdict = migration.verify()
        assert verdict, str(verdict)


def torture(minutes: float, seed: int, count: int, only: str) -> list[Trial]:
    """Try for some minutes, at most ``count`` times; return all trials."""
    draw = random.Random(seed)
    end = time.monotonic() + minutes * 60
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as folder, _nothing_left():
        while time.monotonic() < end and len(trials) < count:
            trial = draw_trial(len(trials), draw, only)
            trials.append(trial)
            Torturer(trial, Path(folder) / "run", random.Random(draw.random())).run()
            _remove(Path(folder) / "run")
            if trial.wrong:
                print(f"trial {trial.number}: {trial}", flush=True)
            elif len(trials) % 50 == 0:
                print(f"{len(trials)} migrations, {(end - time.monotonic()) / 60:.1f} min left",
                      flush=True)  # fmt: skip
    return trials


@contextlib.contextmanager
def _nothing_left() -> Iterator[None]:
    fds = len(os.listdir("/proc/self/fd"))
    yield
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not children, f"children left: {children}"
    assert len(os.listdir("/proc/self/fd")) <= fds + 1, "descriptors left"


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def print_table(trials: list[Trial]) -> None:
    """Print what was tried, in which state it met the migration, and what came of it."""
    rows: Counter[tuple[str, str]] = Counter()
    for trial in trials:
        for done in trial.done or ["nothing"]:
            rows[done, "WRONG" if trial.wrong else trial.outcome] += 1
    outcomes = sorted({outcome for _, outcome in rows})
    names = sorted({name for name, _ in rows})
    width = max(map(len, names), default=10)
    print(f"{'what, and in which state':<{width}}" + "".join(f"{o:>17}" for o in outcomes))
    for name in names:
        print(f"{name:<{width}}" + "".join(f"{rows[name, o] or '':>17}" for o in outcomes))
    wrong = sum(bool(trial.wrong) for trial in trials)
    print(f"{len(trials)} migrations, {sum(len(t.done) for t in trials)} disasters, {wrong} wrong")


def main() -> int:
    """Torture; return 1 when anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 16))
    parser.add_argument("--count", type=int, default=1 << 30, help="migrations, at most")
    parser.add_argument("--only", default="", help="one disaster each, that begins so: cut, killed")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    trials = torture(arguments.minutes, arguments.seed, arguments.count, arguments.only)
    print_table(trials)
    return 1 if any(trial.wrong for trial in trials) else 0


if __name__ == "__main__":
    sys.exit(main())
