"""The magics of ``%load_ext migkit``: the command line's ``run`` and ``show``, in a notebook.

``%migrate`` takes the options of ``migkit run``, ``%trace`` those of ``migkit show``; both put the
run into a variable, ``run`` unless ``-o NAME`` says otherwise. ``%%migrate`` migrates a guest that
does what the workload class in its cell says.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import shlex
from typing import TYPE_CHECKING

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class
from IPython.display import display

from migkit import cli, cli_runs
from migkit.errors import MigkitError
from migkit.guest.workloads import Workload

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from migkit.analysis.run import Run


@magics_class
class MigkitMagics(Magics):
    """``%migrate``, ``%%migrate`` and ``%trace``."""

    shell: InteractiveShell

    @line_cell_magic
    def migrate(self, line: str, cell: str | None = None) -> Run | None:
        """Migrate a guest and record it: ``%migrate --memory 64MiB -o name``.

        The options are those of ``migkit run`` (``%migrate --help``), and ``-o NAME`` for the
        variable that the run is put into. As ``%%migrate`` the last subclass of
        ``migkit.Workload`` that the cell defines is the guest.
        """
        name, options = _parse("run", line)
        if options is None:
            return None
        try:
            run = cli.migrate(options, None if cell is None else self._workload(cell))
        except (MigkitError, TimeoutError) as error:
            raise UsageError(str(error)) from error
        self.shell.user_ns[name] = run
        return run

    @line_magic
    def trace(self, line: str) -> Run | None:
        """Open a recorded run and draw it: ``%trace RUN -o name``.

        The options are those of ``migkit show`` (``%trace --help``), and ``-o NAME`` for the
        variable that the run is put into.
        """
        name, options = _parse("show", line)
        if options is None:
            return None
        try:
            run = cli_runs.open_run(options.run)
            self.shell.user_ns[name] = run
            if options.png or options.log or options.frame or options.json:
                options.command(options)
                return None
            display(  # type: ignore[no-untyped-call]
                getattr(run.plot, options.plot)()
            )
        except MigkitError as error:
            raise UsageError(str(error)) from error
        return run

    def _workload(self, cell: str) -> type[Workload]:
        """Execute the cell; return the last workload among the classes that it defines."""
        result = self.shell.run_cell(cell)  # type: ignore[no-untyped-call]
        if not result.success:
            raise UsageError("the cell failed: no guest was made")
        defined = [node.name for node in ast.parse(cell).body if isinstance(node, ast.ClassDef)]
        classes = [self.shell.user_ns.get(name) for name in defined]
        for one in reversed(classes):
            if inspect.isclass(one) and issubclass(one, Workload):
                return one
        raise UsageError("the cell defines no subclass of migkit.Workload to migrate")


def _parse(command: str, line: str) -> tuple[str, argparse.Namespace | None]:
    """Return the variable's name and the options; None if help was asked for, and shown."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("-o", default="run")
    try:
        mine, rest = own.parse_known_args(shlex.split(line))
        if not mine.o.isidentifier():
            raise UsageError(f"-o {mine.o!r} is no name for a variable")
        return mine.o, cli.parse([command, *rest])
    except SystemExit as end:  # argparse has said why
        if end.code:
            raise UsageError(f"these are not options of migkit {command}") from None
        return "", None
    except ValueError as error:
        raise UsageError(f"{line!r}: {error}") from error
