"""The Console as a class sees it: buttons, page map, states, a broken link, in a real browser."""

import re
import time

import playwright.sync_api as playwright
import pytest
from conftest import lab_processes

MIGKIT = "import migkit"
CONSOLE = "console = migkit.Console(memory='64MiB', link='200Mbit/s, 500us', probe='off')\nconsole"


def counts(root):
    return [int(part) for part in (root.get_attribute("data-counts") or "").split(",") if part]


def await_state(page, state):
    page.locator(f'svg.migkit-fsm[aria-label*="source is {state}"]').first.wait_for()


def press(where, name):
    where.locator(f"button.migkit-{name}:not([disabled])").click()


def await_no_process(one, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while left := lab_processes(one):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def await_change(page, root, before):
    page.wait_for_function("([el, was]) => el.dataset.counts !== was", arg=[root, before])


def test_a_migration_is_started_moved_broken_recovered_and_completed(notebook):
    one = notebook("console.ipynb", MIGKIT, CONSOLE, device_scale_factor=2)
    one.run_cell(0)
    cell = one.run_cell(1)
    page = one.page
    page.locator("button.migkit-start").wait_for()
    one.picture("console-ready", cell)

    press(page, "start")
    await_state(page, "active")
    root = cell.locator(".migkit-pagemap")
    handle = root.element_handle()
    page.wait_for_function("el => Number(el.dataset.counts?.split(',')[1]) > 1000", arg=handle)
    seen = int(root.get_attribute("data-frames"))
    page.wait_for_function("([el, n]) => Number(el.dataset.frames) > n + 8", arg=[handle, seen])
    one.picture("console-precopy", cell)

    press(page, "start_postcopy")
    await_state(page, "postcopy-active")
    before = root.get_attribute("data-counts")
    await_change(page, handle, before)
    press(page, "cut")
    await_state(page, "postcopy-paused")
    one.picture("console-paused", cell)
    assert page.locator("button.migkit-cancel").is_disabled()

    press(page, "recover")
    await_state(page, "postcopy-active")
    page.wait_for_function("el => Number(el.dataset.counts.split(',')[4]) > 2000", arg=handle)
    box = root.locator(".migkit-pagemap-cells").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.5)
    line = root.locator(".migkit-pagemap-line")
    page.wait_for_function("el => el.textContent.includes('→')", arg=line.element_handle())
    assert re.match(r"page [\d,]+: only at the source → ", line.inner_text())
    one.picture("console-postcopy", cell)
    cards = cell.locator(".widget-html", has=page.locator(".migkit-cards"))
    one.picture_for_readme("console", cell, cards)

    await_state(page, "completed")
    cell.get_by_text("Completed: console.run is the Run").wait_for()
    page.mouse.move(5, 5)
    one.picture("console-completed", cell)
    at_source, sent, dirty, discarded, background, answered, requested = counts(root)
    assert at_source == dirty == discarded == requested == 0
    assert sent + background + answered == 16_384
    assert background


def test_two_consoles_run_at_once_and_a_cell_run_again_replaces_its_own(notebook):
    link = "link='50Mbit/s'"
    one = notebook(
        "two.ipynb",
        MIGKIT,
        f"a = migkit.Console(memory='16MiB', {link}, probe='off')\na",
        f"b = migkit.Console('memtest', memory='16MiB', {link}, probe='off')\nb",
        "print(a.status, b.wait(60).status)",
    )
    one.run_cell(0)
    cells = [one.run_cell(1), one.run_cell(2)]
    for cell in cells:
        press(cell, "start")
    for cell in cells:
        await_state(cell, "active")
    press(cells[1], "start_postcopy")
    first = one.run_again(1)
    first.get_by_text("Ready: set the options").wait_for()
    assert first.locator("button.migkit-start").is_enabled()
    await_state(cells[1], "completed")
    printed = one.run_cell(3).locator(".jp-OutputArea-output")
    assert printed.inner_text().strip() == "none completed"
    await_no_process(one)


def test_a_kernel_that_is_restarted_takes_its_migration_along(notebook):
    one = notebook("restart.ipynb", MIGKIT, CONSOLE)
    one.run_cell(0)
    cell = one.run_cell(1)
    press(cell, "start")
    await_state(cell, "active")
    assert len(lab_processes(one)) >= 4
    one.restart_kernel()
    await_no_process(one)
    panel = cell.locator(".migkit-panel.jupyter-widgets-disconnected")
    panel.wait_for()
    said = panel.evaluate("el => getComputedStyle(el, '::before').content")
    assert "kernel of this panel has ended" in said
    with pytest.raises(playwright.Error, match="Timeout"):
        panel.locator("button.migkit-cancel").click(timeout=500)
    one.picture("console-kernel-ended", cell)
    one.run_again(0)
    cell = one.run_again(1)
    press(cell, "start")
    await_state(cell, "active")


def test_an_interrupt_ends_the_waiting_not_the_migration(notebook):
    one = notebook("interrupt.ipynb", MIGKIT, CONSOLE, "console.wait()", "print(console.run)")
    one.run_cell(0)
    cell = one.run_cell(1)
    press(cell, "start")
    await_state(cell, "active")
    one.start_cell(2)
    one.page.wait_for_timeout(1000)
    seen = int(cell.locator(".migkit-pagemap").get_attribute("data-frames"))
    root = cell.locator(".migkit-pagemap").element_handle()
    one.page.wait_for_function(
        "([el, n]) => Number(el.dataset.frames) > n + 4", arg=[root, seen]
    )  # it goes on while the cell is busy
    one.interrupt_kernel()
    one.page.get_by_text("KeyboardInterrupt").first.wait_for()
    press(cell, "cancel")
    cell.get_by_text("Cancelled: console.run is the Run").wait_for()
    await_no_process(one)


def test_a_tab_that_is_closed_leaves_the_migration_to_end_by_itself(notebook):
    one = notebook("closed.ipynb", MIGKIT, CONSOLE, "print(console.wait(60).status)")
    one.run_cell(0)
    cell = one.run_cell(1)
    press(cell, "start")
    await_state(cell, "active")
    press(cell, "start_postcopy")
    one.reopen()
    assert one.run_again(2).locator(".jp-OutputArea-output").inner_text().strip() == "completed"
    cell = one.page.locator(".jp-Notebook .jp-CodeCell").nth(1)
    await_state(cell, "completed")
    one.picture("console-reopened", cell)
