"""The way in for people: run a migration, or steer one by hand, and get a Run to look at."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from migkit.analysis.html import table
from migkit.analysis.run import Run
from migkit.errors import MigkitError, MigrationError, OptionError
from migkit.guest.workloads import Workload
from migkit.migration.monitor import ROLES
from migkit.migration.session import Session
from migkit.migration.states import COMMANDS, Status

_CANCEL_TIMEOUT_S = 5.0

Progress = Callable[[dict[str, Any]], None]


class Migration(Session):
    """A migration steered by hand.

    ``with Migration(workload="hotset", memory="1GiB") as m: m.start(); m.start_postcopy();
    run = m.wait()``. Takes what :class:`~migkit.migration.session.Session` takes. When the block
    ends every process is ended, also the guest; the run folder stays.
    """

    def _repr_html_(self) -> str:
        now = self.query()
        rows = [
            (f"{role}: {name.replace('_', ' ')}", f"{value:,}" if isinstance(value, int) else value)
            for role in ROLES
            for name, value in now.get(role, {}).items()
        ]
        return table([("status", now["status"]), *rows], f"Migration in {self.folder.path}")

    def wait(
        self, timeout_s: float = 600.0, *, progress: Progress | None = None, check: bool = True
    ) -> Run:
        """Wait for the end, save everything, return the run.

        Ctrl-C cancels the migration where that is still possible, and saves what there is. In
        post-copy, where it would cost the guest its memory, only the waiting ends: the migration
        goes on, and may be waited for again.

        Raises :class:`MigrationError` when it failed, unless ``check`` is false, and
        :class:`TimeoutError` when it took longer; what was recorded is saved in both cases.
        When post-copy was paused, by hand or by a break, :class:`MigrationError` says so and
        nothing is ended: :meth:`recover`, then wait again.
        """
        try:
            status = self.await_end(timeout_s, progress)
        except KeyboardInterrupt:
            if self.status in COMMANDS["cancel"]:
                # If it came too late the migration goes on: to record it would end its engines.
                with contextlib.suppress(MigkitError, TimeoutError):
                    self.cancel()
                    self.await_end(_CANCEL_TIMEOUT_S)
                    self.record()
            raise
        except BaseException:
            self.record()
            raise
        if status == Status.POSTCOPY_PAUSED:
            breaks = [text for text in self.notices if ": paused: " in text]
            raise MigrationError(
                f"{'; '.join(breaks[-2:])}. Both sides keep what they have: recover() goes on"
            )
        folder = self.record()
        run = Run.load(folder.path)
        run.write_tables()
        if check and status not in (Status.COMPLETED, Status.CANCELLED):
            reasons = "; ".join(self.errors) or "no reason was given"
            raise MigrationError(f"{status}: {reasons}. What was recorded is in {folder.path}")
        return run


def run(
    workload: str | type[Workload] = "random",
    memory: str | int = "256MiB",
    *,
    path: str | os.PathLike[str] | None = None,
    params: Mapping[str, float] | None = None,
    verify: bool = False,
    progress: Progress | None = None,
    timeout_s: float = 600.0,
    **options: Any,
) -> Run:
    """Run one migration from beginning to end and return it.

    Post-copy starts after one round of pre-copy unless ``postcopy`` says otherwise; all other
    options are those of :class:`~migkit.migration.options.Options`. ``verify`` compares the
    migrated guest, bit for bit, with one that was never migrated.

    Raises :class:`MigrationError` when the migration or the comparison failed.
    """
    options.setdefault("postcopy", "1 round")
    if options.get("pause_before_switchover") not in (None, False, "off", "false"):
        raise OptionError("pause_before_switchover waits for a hand: use migkit.Migration")
    with Migration(workload, memory, path=path, params=params, **options) as migration:
        migration.start()
        result = migration.wait(timeout_s, progress=progress)
        if verify and not (verdict := migration.verify()):
            raise MigrationError(f"the migrated guest is not what it was: {verdict}")
    return result


load = Run.load
