"""Migrate again and again, each time otherwise, and check the guest each time.

``python -m benchmarks.soak [COUNT] [SEED]``, 1,000 by default: random workload, seed, memory, huge
pages or not, and moment of switchover, all from one session process. Every migrated guest must be
bit for bit an unmigrated one, and this process must not grow: no process, no descriptor, no shared
memory is left, and its own memory stays what it was when a tenth was done.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from migkit.kernel.memory import huge_pages_free
from migkit.migration.session import Session
from migkit.migration.states import Status

HUGE = 2 << 20
_MOST_MEMORY = 64 << 20
_MOST_GROWTH = 8 << 20  # bytes of anonymous memory, from a tenth of the way to the end


def draw_options(draw: random.Random, most: int = 128 << 20) -> dict[str, Any]:
    """Draw the options of one migration, with at most ``most`` bytes of memory."""
    sizes = [n << 20 for n in (4, 16, 64, 128, 256, 512, 1024) if n << 20 <= most]
    options: dict[str, Any] = {
        "workload": draw.choice(["memtest", "random", "hotset"]),
        "memory": draw.choice(sizes),
        "seed": draw.randrange(1 << 16),
        "rate": draw.choice([0, 0, 500, 20_000, 200_000]),
        "postcopy": draw.choice(["manual", "1 round", "2 rounds", "auto", "30 ms", "off"]),
        "postcopy_preempt": draw.random() < 0.7,
        "transport": draw.choice(["unix", "tcp"]),
        "return_path": draw.random() < 0.7,
        "probe": "off",
    }
    if draw.random() < 0.3 and huge_pages_free(HUGE) * HUGE >= 2 * options["memory"]:
        options["page_size"] = HUGE
    if options["postcopy"] == "off":  # what no link follows never ends
        most = 100 if "page_size" in options else 5000
        options["rate"] = min(options["rate"] or most, most)
    return options


def migrate_once(
    make: Callable[..., Session], draw: random.Random, options: dict[str, Any]
) -> None:
    """Migrate once and check the guest; raises AssertionError with all that is known."""
    session = make(**options)
    session.start()
    if options["postcopy"] == "manual":
        time.sleep(draw.random() * 0.1)
        session.start_postcopy()
    try:
        status = session.await_end(120)
    except TimeoutError as error:
        raise AssertionError((options, session.query())) from error
    assert status == Status.COMPLETED, (options, session.query())
    verdict = session.verify()
    assert verdict, (options, str(verdict), session.query())
    session.close()


def main() -> None:
    """Migrate COUNT times."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 16)
    print(f"seed {seed}", flush=True)
    draw = random.Random(seed)
    tqdm.monitor_interval = 0  # its thread would be counted
    begun, warm = footprint(), None
    with tempfile.TemporaryDirectory() as folder:
        for number in tqdm(range(count)):
            path = Path(folder) / str(number)
            migrate_once(
                lambda path=path, **options: Session(path=path, **options),
                draw,
                draw_options(draw, _MOST_MEMORY),
            )
            shutil.rmtree(path)
            if number == count // 10:
                warm = footprint()
    end = footprint()
    for name, value in end.items():
        print(f"{name:<18}{begun[name]:>14,}{(warm or end)[name]:>14,}{value:>14,}")
        if name != "memory":
            assert value <= begun[name], f"{name} grew from {begun[name]} to {value}"
    assert not warm or end["memory"] - warm["memory"] <= _MOST_GROWTH, "memory grew"
    print(f"{count} migrations, every guest bit for bit as if it had never moved; nothing left")


def footprint() -> dict[str, int]:
    """Return what this process holds: descriptors, children, shared files, bytes of memory."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "children": len(children),
        "shared files": len(os.listdir("/dev/shm")),
        "memory": int(anonymous.split()[1]) << 10,
    }


if __name__ == "__main__":
    main()
