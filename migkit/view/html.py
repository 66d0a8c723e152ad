"""HTML that needs nothing else: a page with its style, and frames as tables."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_MOST_ROWS = 60

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  margin: 0 auto; max-width: 76rem; padding: 1rem 1.5rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-top: 1px solid #767676; padding-top: .75rem; }
a { color: #00508f; }
pre { background: #f4f4f4; padding: .75rem 1rem; white-space: pre-wrap; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
figcaption { color: #404040; }
summary { cursor: pointer; padding: .3rem 0; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { border: 1px solid #767676; padding: .2rem .5rem; text-align: right; vertical-align: top; }
th { background: #ececec; }
.text { text-align: left; }
:focus-visible { outline: 3px solid #00508f; outline-offset: 2px; }
@media print { figure { break-inside: avoid; } }
"""


def page(*, title: str, heading: str, parts: Iterable[str]) -> str:
    """Return a document; ``title`` and ``heading`` are text, ``parts`` HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(heading)}</h1>\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )


def table(frame: pd.DataFrame, caption: str, docs: Mapping[str, str] | None = None) -> str:
    """Return a frame as a table; of a long one the first rows, and how many there are.

    An index with a name becomes the head of each row. ``docs`` explain the columns.
    """
    shown = frame.head(_MOST_ROWS)
    if len(shown) < len(frame):
        caption += f" (the first {len(shown):,} of {len(frame):,} rows)"
    named = frame.index.name
    head = [f'<th scope="col" class="text">{escape(str(named))}</th>'] if named else []
    texts = {name for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name])}
    for name in frame.columns:
        note = f' title="{escape(docs[name])}"' if docs and name in docs else ""
        head.append(f'<th scope="col"{_class(name in texts)}{note}>{escape(str(name))}</th>')
    rows = []
    for label, values in zip(shown.index, shown.itertuples(index=False, name=None), strict=True):
        cells = [f'<th scope="row" class="text">{escape(str(label))}</th>'] if named else []
        cells += [
            f"<td{_class(name in texts)}>{escape(_cell(name, value))}</td>"
            for name, value in zip(frame.columns, values, strict=True)
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    label = escape(caption)
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{label}"><table>'
        f"<caption>{label}</caption><thead><tr>{''.join(head)}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _class(is_text: bool) -> str:
    return ' class="text"' if is_text else ""


def _cell(column: str, value: object) -> str:
    """Return a value as text; absolute times as they are, other numbers with groups of three."""
    if value is None or value is pd.NA or value != value:  # noqa: PLR0124 — NaN is not itself
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.1f}"
    if isinstance(value, int):
        return str(value) if column.endswith("_ns") else f"{value:,}"
    return str(value)
