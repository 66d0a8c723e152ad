"""A real kernel, and what is left of a migration when it is interrupted, restarted or killed."""

import ast
import os
import time
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

SETUP = """
import migkit
slow = dict(workload="random", memory="16MiB", rate=1000, probe="off", path="run")
"""
RUN = """
told = []
def tell(figures):
    if figures["status"] == "active" and not told:
        told.append(print("now", flush=True))
migkit.run(**slow, postcopy="off", max_bandwidth="1MiB", progress=tell)
"""


class Kernel:
    def __init__(self, folder):
        self.folder = folder
        self.manager, self.client = start_new_kernel(
            cwd=str(folder), env={**os.environ, "MIGKIT_TEST_KERNEL": str(folder)}
        )

    def execute(self, code, timeout_s=30):
        """Run code to its end; return what it printed, or the error's name and text."""
        told = []

        def take(message):
            content = message["content"]
            told.append(content.get("text", "") or content.get("ename", ""))

        self.client.execute_interactive(code, timeout=timeout_s, output_hook=take)
        return "".join(told)

    def begin(self, code):
        """Have code executed, and go on when it prints ``now``."""
        self.client.execute(code, stop_on_error=False)  # or what is executed next is dropped
        while self.client.get_iopub_msg(timeout=30)["content"].get("text", "").strip() != "now":
            pass

    def end_of_cell(self, timeout_s=30):
        """Return the reply to what was begun."""
        return self.client.get_shell_msg(timeout=timeout_s)["content"]

    def processes(self):
        """Return the command lines of migkit's processes of this kernel, dead ones left out."""
        mark, found = f"MIGKIT_TEST_KERNEL={self.folder}".encode(), []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().split(b"\0")
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if mark in environment and b"migkit." in command:
                found.append(command.replace(b"\0", b" ").decode())
        return found

    def await_no_process(self, timeout_s=20):
        deadline = time.monotonic() + timeout_s
        while found := self.processes():
            assert time.monotonic() < deadline, found
            time.sleep(0.05)

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tmp_path):
    one = Kernel(tmp_path)
    one.execute(SETUP)
    yield one
    one.close()
    one.await_no_process()


def test_an_interrupt_of_a_run_cancels_it_saves_it_and_the_kernel_goes_on(kernel):
    kernel.begin(RUN)
    assert len(kernel.processes()) >= 4
    kernel.manager.interrupt_kernel()
    assert kernel.end_of_cell()["ename"] == "KeyboardInterrupt"
    assert not kernel.processes()
    assert kernel.execute("print(migkit.load('run').status)").strip() == "cancelled"
    again = "print(migkit.run('random', '8MiB', probe='off', path='again').status)"
    assert kernel.execute(again).strip() == "completed"


def test_a_block_that_an_interrupt_leaves_in_postcopy_ends_its_migration_and_says_so(kernel):
    kernel.begin(
        "with migkit.Migration(**slow, postcopy='manual', max_postcopy_bandwidth='2MiB') as one:\n"
        "    one.start(); one.start_postcopy(); one.await_status('postcopy-active')\n"
        "    print('now', flush=True); one.wait()"
    )
    time.sleep(0.2)
    kernel.manager.interrupt_kernel()
    assert kernel.end_of_cell()["ename"] == "KeyboardInterrupt"
    assert not kernel.processes()
    told = kernel.execute("print(one.status, *one.errors)")
    assert told.startswith("failed")
    assert "the session ended while the migration was under way" in told


def test_an_interrupt_in_postcopy_ends_only_the_waiting(kernel):
    kernel.begin(
        "one = migkit.Migration(**slow, postcopy='manual', max_postcopy_bandwidth='8MiB')\n"
        "one.start(); one.start_postcopy(); one.await_status('postcopy-active')\n"
        "print('now', flush=True); one.wait()"
    )
    time.sleep(0.2)
    kernel.manager.interrupt_kernel()
    assert kernel.end_of_cell()["ename"] == "KeyboardInterrupt"
    assert kernel.execute("print(one.wait().status); one.close()").strip() == "completed"


def test_a_migration_whose_cell_is_run_again_is_ended(kernel):
    cell = (
        "one = migkit.Migration('random', '16MiB', probe='off', postcopy='off')\n"
        "one.start(); print(one.pids)"
    )
    first = kernel.execute(cell)
    assert first.startswith("{")
    kernel.execute(cell)
    left = [f"/proc/{pid}" for pid in ast.literal_eval(first).values()]
    assert not [path for path in left if Path(path).exists()]
    assert len(kernel.processes()) == len(left)
    kernel.execute("one.close()")


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_a_kernel_that_ends_takes_its_migration_along(kernel, how):
    kernel.begin(RUN)
    assert len(kernel.processes()) >= 4
    if how == "restart":
        kernel.manager.restart_kernel(now=False)
    else:
        kernel.manager.shutdown_kernel(now=True)
    kernel.await_no_process()
    if how == "restart":
        kernel.client.wait_for_ready(timeout=30)
        assert kernel.execute("print('alive')").strip() == "alive"
