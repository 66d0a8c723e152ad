"""The notebook around a widget: which cell is executed, and what is shown where no widgets are."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING, Any

from IPython import get_ipython

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


def with_fallback(
    panel: ipw.Widget, text: str, svg: str, figure: RunFigure | None
) -> dict[str, Any]:
    """Return a panel's MIME bundle, with a text and pictures for where there are no widgets."""
    html = f"<p>{escape(text)}</p>{svg}"
    if figure is not None:
        png, about = figure._repr_png_()
        data = base64.b64encode(png).decode()
        html += f'<img alt="{escape(about["alt"])}" src="data:image/png;base64,{data}">'
    bundle: dict[str, Any] = panel._repr_mimebundle_()
    return {**bundle, "text/plain": text, "text/html": html}
