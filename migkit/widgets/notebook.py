"""The notebook around a widget: its cell, how to write to it, and what is there without widgets."""

from __future__ import annotations

import logging
import threading
from html import escape
from typing import TYPE_CHECKING

from IPython import get_ipython
from IPython.display import publish_display_data

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import ipywidgets as ipw

    from migkit.view.style import RunFigure

log = logging.getLogger(__name__)

_WRITE_S = 5.0


def current_cell() -> tuple[str, str]:
    """Return the id of the cell being executed and that of the execution; empty if unknown."""
    shell = get_ipython()
    if shell is None or not hasattr(shell, "get_parent"):
        return "", ""
    request = shell.get_parent() or {}
    cell = str(request.get("metadata", {}).get("cellId") or "")
    return cell, str(request.get("header", {}).get("msg_id", ""))


class Writer:
    """Writes to widgets; that they cannot be written to must not end what is done meanwhile.

    ipykernel keeps a socket for each thread that writes to the browser, and an interrupt may close
    it. A new thread has a new one; what the old one could not say is then said again.
    """

    def __init__(self, widgets: Sequence[ipw.Widget]) -> None:
        """Take all widgets that will be written to."""
        self._widgets = widgets
        self._cut_off = False

    def __call__(self, write: Callable[..., None], *values: object) -> None:
        """Have something written, in this thread or in another one."""
        if not self._cut_off:
            try:
                return write(*values)
            except Exception:
                log.info("the browser is written to from other threads", exc_info=True)
                self._cut_off = True
        thread = threading.Thread(
            target=self._write_all, args=(write, *values), name="migkit-write", daemon=True
        )
        thread.start()
        return thread.join(_WRITE_S)

    def _write_all(self, write: Callable[..., None], *values: object) -> None:
        try:
            write(*values)
            for widget in self._widgets:
                widget.send_state()
        except Exception:
            log.exception("the widgets cannot be written to")


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
