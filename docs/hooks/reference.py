"""The reference that is made from the code: commands, options, tables, events, states, rules."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from html import escape

import statediagram

from migkit import cli
from migkit.analysis import schema
from migkit.analysis.check import RULES
from migkit.migration import states
from migkit.migration.options import Options, default_text
from migkit.trace.registry import DEFAULT_PATTERNS, Event, Registry


def pages() -> dict[str, str]:
    """Return the pages by the place where they go."""
    made = {
        "command-line": _commands(),
        "options": _options(),
        "tables": _tables(),
        "events": _events(),
        "states": _states(),
        "rules": _rules(),
    }
    return {f"reference/{name}.md": text for name, text in made.items()}


# The command line.


def _commands() -> str:
    parser = cli._parser()
    parts = [
        "# Command line",
        (
            "Every command takes `--json`. The exit code is 0, 1 when something failed "
            "(a migration, a rule), 2 when the call was wrong, and 130 after Ctrl-C."
        ),
    ]
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, command in action.choices.items():
            parts += [f"## migkit {name}", _sentence(helps[name])]
            parts += [_fence(command.format_usage().removeprefix("usage: ")), _arguments(command)]
    return "\n\n".join(parts) + "\n"


def _arguments(command: argparse.ArgumentParser) -> str:
    rows = []
    for action in command._actions:
        names = " ".join(_code(name) for name in action.option_strings)
        value = "|".join(action.choices) if action.choices else action.metavar
        if not names:
            names, value = _code(str(action.metavar or action.dest)), ""
        elif action.nargs == 0:
            value = ""
        elif not value:
            value = action.dest.upper()
        text = (action.help or "").replace("%%", "%")
        rows.append((names, _code(str(value)) if value else "", text))
    return _table(("argument", "value", "meaning"), rows)


# The options of a migration.


def _options() -> str:
    rows = []
    for field in dataclasses.fields(Options):
        default = default_text(field)
        text = _sentence(field.metadata["help"])
        if choices := field.metadata["choices"]:
            text += " One of " + ", ".join(_code(choice) for choice in choices) + "."
        qemu = field.metadata["qemu"]
        rows.append(
            (_code(field.name), _code(default) if default else "none",
             _code(qemu) if qemu else "", text)
        )  # fmt: skip
    return "\n\n".join((
        "# Options of a migration {#migkit.migration.options.Options}",
        ("`migkit.run` and `migkit.Migration` take them as keywords, `migkit run` as `--name` with "
        "hyphens. Sizes are numbers of bytes or texts as `256MiB`. `migkit.Migration` begins "
        "post-copy by hand: there `postcopy` is `manual` unless you say otherwise."),
        _table(("option", "default", "QEMU's name", "meaning"), rows),
    )) + "\n"  # fmt: skip


# The tables of a run.


def _tables() -> str:
    parts = [
        "# Tables",
        (
            "What each table's rows and columns are. This page and the check that every table "
            "passes are made from the same list; in Python "
            "`migkit.analysis.schema.describe(name)` prints it. All times are `CLOCK_MONOTONIC` "
            "in ns, and a column's name ends in its unit."
        ),
    ]
    for name, table in schema.TABLES.items():
        rows = []
        for column, what in table.columns.items():
            text = escape(what.doc, quote=False)
            if missing := [choice for choice in what.choices if choice not in what.doc]:
                text += ". Values: " + ", ".join(missing)
            rows.append((_code(column), _code(what.dtype), text))
        parts += [f"## {name}", _sentence(table.row), _table(("column", "dtype", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


# The trace events.


def _events() -> str:
    registry = Registry.load()
    groups = sorted(registry.groups, key=lambda group: (group not in DEFAULT_PATTERNS, group))
    parts = [
        "# Trace events",
        (
            f"migkit's registry has {len(registry)} events. Their names and arguments are QEMU's "
            "where QEMU has the event. The option `trace` chooses by name, by glob or by group; on "
            f"unless you say otherwise: {', '.join(_code(group) for group in DEFAULT_PATTERNS)}. "
            "`migkit events PATTERN` lists them in a shell. "
            "How to record and read them: [Trace events](../how-to/trace.md)."
        ),
    ]
    for group in groups:
        events = [event for event in registry if event.group == group]
        on = "on by default" if group in DEFAULT_PATTERNS else "off by default"
        parts += [f"## {group}", f"{len(events)} events, {on}.", _event_table(events)]
    if rest := [event for event in registry if not event.group]:
        parts += ["## In no group", _event_table(rest)]
    return "\n\n".join(parts) + "\n"


def _event_table(events: Iterable[Event]) -> str:
    rows = []
    for event in events:
        arguments = [_code(f"{arg.ctype} {arg.name}".replace("* ", "*")) for arg in event.args]
        cell = "<br>".join([f"**{_code(event.name)}**", ", ".join(arguments)])
        rows.append((cell, escape(event.doc, quote=False)))
    return _table(("event and arguments", "when"), rows)


# The states.


def _states() -> str:
    parts = [
        "# States of a migration",
        (
            "The states are those of QEMU 10.2 without `wait-unplug`. A step is a compare-and-set: "
            "it succeeds only from the state that it expects, and only then is it traced "
            "(`migrate_set_state`) and announced. Both figures and tables are made from "
            "`migkit.migration.states`; a step that is not there is a bug and raises."
        ),
    ]
    for title, table, diagram in (
        ("The source", states.SOURCE, statediagram.SOURCE),
        ("The destination", states.DESTINATION, statediagram.DESTINATION),
    ):
        rows = [
            (_code(old), ", ".join(_code(new) for new in sorted(after)) or "none: it has ended")
            for old, after in table.items()
        ]
        parts += [
            f"## {title}",
            statediagram.draw(title, table, diagram),
            _table(("from", "to"), rows),
        ]
    return "\n\n".join(parts) + "\n"


# The rules.


def _rules() -> str:
    rows = [(_code(rule.name), _sentence(rule.doc)) for rule in RULES]
    return "\n\n".join((
        "# Rules of a good migration",
        (f"`run.check()`, `migkit check` and `assert_no_violations` judge a run by these "
        f"{len(rows)} rules. A rule that cannot be judged, because its events were not recorded, "
        "is named as such and counts neither as kept nor as broken."),
        _table(("rule", "what it demands"), rows),
    )) + "\n"  # fmt: skip


# Markdown.


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
                     for row in lines)  # fmt: skip


def _code(text: str) -> str:
    return f"`{text}`"


def _fence(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


def _sentence(text: str) -> str:
    return escape(text[:1].upper() + text[1:], quote=False).rstrip(".") + "."
