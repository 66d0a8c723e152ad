"""The notebook around a widget: which cell is executed, and what is shown where no widgets are."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from IPython import get_ipython
from IPython.display import publish_display_data

if TYPE_CHECKING:
    import ipywidgets as ipw

    from migkit.view.style import RunFigure


def current_cell() -> tuple[str, str]:
    """Return the id of the cell being executed and that of the execution; empty if unknown."""
    shell = get_ipython()
    if shell is None or not hasattr(shell, "get_parent"):
        return "", ""
    request = shell.get_parent() or {}
    cell = str(request.get("metadata", {}).get("cellId") or "")
    return cell, str(request.get("header", {}).get("msg_id", ""))


def show(panel: ipw.Widget, fallback: dict[str, str]) -> None:
    """Display a panel, and what stands for it where there are no widgets.

    These are two outputs: given one with both, nbconvert takes the panel, of which nothing is seen
    unless the page fetches a widget manager. Where the panel lives its style sheet hides the other.
    """
    view = "application/vnd.jupyter.widget-view+json"
    publish_display_data({view: panel._repr_mimebundle_()[view]})  # type: ignore[no-untyped-call]
    publish_display_data(fallback)  # type: ignore[no-untyped-call]


def without_widgets(text: str, svg: str, figure: RunFigure | None) -> dict[str, str]:
    """Return a text and pictures as a MIME bundle."""
    html = f'<div class="migkit-fallback"><p>{escape(text)}</p>{svg}'
    if figure is not None:
        html += figure._repr_mimebundle_()[0]["text/html"]
    return {"text/plain": text, "text/html": html + "</div>"}
