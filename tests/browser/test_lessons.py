"""The first notebook, run as a class runs it."""


def test_the_map_of_the_course_runs_from_top_to_bottom(notebook):
    one = notebook("00_start_here.ipynb")
    cells = one.run_all()
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    one.picture("start-here", one.page.locator(".jp-NotebookPanel"))
