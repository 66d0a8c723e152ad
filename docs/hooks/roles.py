"""Docstrings of this project as Markdown: Sphinx's roles become links, ``::`` code blocks."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([\w.]+)`")
_DOCUMENTED_AS = {"migkit.migration.session.Session": "migkit.api.Migration"}
_LITERAL = re.compile(r"^(.*?)::[ ]*$", re.MULTILINE)


class Roles(griffe.Extension):
    """Rewrite every docstring that is collected."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring:
            home = obj if obj.is_class or obj.parent is None else obj.parent
            text = _ROLE.sub(lambda match: _link(match, home.path), obj.docstring.value)
            obj.docstring.value = _LITERAL.sub(_introduction, text)


def _link(match: re.Match[str], home: str) -> str:
    """Return a link to what the reference has, plain code to what it does not.

    A name without its module is that of an error, or of a neighbour.
    """
    short, name = match[1], match[2]
    text = name.rpartition(".")[2] if short else name
    if not name.startswith("migkit."):
        name = f"{'migkit.errors' if name.endswith('Error') else home}.{name}"
    name = _DOCUMENTED_AS.get(name, name)
    return f'<autoref identifier="{name}" optional><code>{text}</code></autoref>'


def _introduction(match: re.Match[str]) -> str:
    return f"{match[1]}:" if match[1] else ""
