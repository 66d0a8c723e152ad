"""The Console as a class sees it: buttons, page map, states, a broken link, in a real browser."""

import re

MIGKIT = "import migkit"
CONSOLE = "console = migkit.Console(memory='64MiB', link='200Mbit/s, 500us', probe='off')\nconsole"


def counts(root):
    return [int(part) for part in (root.get_attribute("data-counts") or "").split(",") if part]


def await_state(page, state):
    page.locator(f'svg.migkit-fsm[aria-label*="source is {state}"]').first.wait_for()


def press(page, name):
    button = page.locator(f"button.migkit-{name}")
    page.wait_for_function("b => !b.disabled", arg=button.element_handle())
    button.click()


def await_change(page, root, before):
    page.wait_for_function("([el, was]) => el.dataset.counts !== was", arg=[root, before])


def test_a_migration_is_started_moved_broken_recovered_and_completed(notebook):
    one = notebook("console.ipynb", MIGKIT, CONSOLE)
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

    await_state(page, "completed")
    cell.get_by_text("Completed: console.run is the Run").wait_for()
    page.mouse.move(5, 5)
    one.picture("console-completed", cell)
    at_source, sent, dirty, discarded, background, answered, requested = counts(root)
    assert at_source == dirty == discarded == requested == 0
    assert sent + background + answered == 16_384
    assert background
