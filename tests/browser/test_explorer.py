"""The Explorer in a real browser: the slider, the brush, a fault's path."""

import pytest


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_time_is_slid_a_span_is_brushed_a_fault_is_chosen(notebook, scheme):
    one = notebook(
        f"explorer-{scheme}.ipynb",
        "import migkit; run = migkit.sample('slow-link')",
        "explorer = migkit.Explorer(run)\nexplorer",
        color_scheme=scheme,
        device_scale_factor=2,
    )
    one.run_cell(0)
    cell = one.run_cell(1)
    page = one.page
    root = cell.locator(".migkit-pagemap")
    page.wait_for_function("el => el.dataset.counts", arg=root.element_handle())
    at_first = root.get_attribute("data-counts")
    one.picture(f"explorer-{scheme}-switchover", cell)

    handle = cell.locator(".widget-hslider .noUi-handle").first
    box = handle.bounding_box()
    track = cell.locator(".widget-hslider .noUi-base").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    for share in (0.9, 0.75, 0.6):
        page.mouse.move(track["x"] + share * track["width"], box["y"] + 5)
    page.mouse.up()
    page.wait_for_function(
        "([el, was]) => el.dataset.counts !== was", arg=[root.element_handle(), at_first]
    )

    timeline = cell.locator(".migkit-timeline > canvas")
    timeline.scroll_into_view_if_needed()
    area = timeline.bounding_box()
    y = area["y"] + area["height"] * 0.5
    page.mouse.move(area["x"] + 0.5 * area["width"], y)
    page.mouse.down()
    page.mouse.move(area["x"] + 0.8 * area["width"], y, steps=5)
    page.mouse.up()
    cell.get_by_text("ms.").first.wait_for()
    cell.locator("b", has_text="faults from").wait_for()
    table = cell.locator(".migkit-faults select")
    table.select_option(index=2)
    cell.locator(".migkit-panel .migkit-path svg").wait_for()
    page.wait_for_timeout(500)
    one.picture(f"explorer-{scheme}-brushed", cell)
    if scheme == "light":
        one.picture_for_readme("explorer", cell, cell.locator(".migkit-panel .migkit-path"))
