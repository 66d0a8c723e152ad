"""What a notebook shows of results that are no figures: small tables, with text for everybody."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def table(rows: Iterable[tuple[str, str]], caption: str = "") -> str:
    """Return a table of names and what is to be said of each, as HTML."""
    body = "".join(
        f'<tr><th scope="row" style="text-align:left;vertical-align:top">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(text)}</td></tr>'
        for name, text in rows
    )
    head = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{head}<tbody>{body}</tbody></table>"
