"""The Console: a panel in a notebook that drives a real migration and shows it page by page.

Three kinds of thread touch it: the notebook's (clicks), one a command that is carried out, and
one that follows the migration from its start to its end. None of them waits for another while a
migration runs, so the panel lives on while a cell is busy, and a click answers while a recovery
takes its time.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw

from migkit.api import Migration
from migkit.errors import MigkitError, MigrationError
from migkit.migration.states import AT_REST, COMMANDS, ENDED, SOURCE, Status
from migkit.widgets import cards, statemachine
from migkit.widgets.form import Form
from migkit.widgets.live import Live
from migkit.widgets.notebook import Writer, current_cell, show, without_widgets
from migkit.widgets.pagemap import PageMapView, draw, in_words

if TYPE_CHECKING:
    from migkit.analysis.run import Run
    from migkit.guest.workloads import Workload

log = logging.getLogger(__name__)

PRESETS = {
    "memory": "256MiB", "rate": 20_000, "link": "400Mbit/s, 500us", "postcopy": "manual",
}  # fmt: skip
"""What a new Console shows: a guest and a link at a pace that a class can follow."""

_PERIOD_S = 0.08
_SAVE_S = 60.0
_CLOSE_S = 20.0
_BUTTONS = {
    "start": ("Start", "play", "primary", "start the guest and begin with pre-copy"),
    "start_postcopy": ("Start post-copy", "forward", "primary", "move the guest now"),
    "continue_": ("Continue", "step-forward", "", "go on from pre-switchover"),
    "pause": ("Pause", "pause", "", "break post-copy off; both sides keep what they have"),
    "cut": ("Cut the link", "scissors", "warning", "close the link's connections, as a break does"),
    "recover": ("Recover", "medkit", "success", "go on over new connections"),
    "cancel": ("Cancel", "stop", "danger", "give up; the guest goes on at the source"),
}
_ALLOWED = {
    **COMMANDS,
    "start": COMMANDS["start"] | ENDED,  # another one, when this one has ended
    "cut": frozenset(SOURCE) - AT_REST - {Status.NONE},
}

_WORDS = {
    Status.NONE: "Starting the guest …",
    Status.SETUP: "The two sides agree on what will be moved.",
    Status.ACTIVE: "Pre-copy: the guest runs at the source while its memory is sent.",
    Status.PRE_SWITCHOVER: "The guest stands still before the switchover: press Continue.",
    Status.DEVICE: "Switchover: the guest stands still.",
    Status.POSTCOPY_DEVICE: "Switchover: the CPU state is on its way to the destination.",
    Status.POSTCOPY_ACTIVE: "Post-copy: the guest runs at the destination; a page that it touches "
    "and that is not there is requested.",
    Status.POSTCOPY_PAUSED: "Paused: both sides keep what they have. Press Recover to go on.",
    Status.POSTCOPY_RECOVER_SETUP: "Recovery: new connections are made.",
    Status.POSTCOPY_RECOVER: "Recovery: the destination says which pages it has.",
    Status.CANCELLING: "The migration is given up; the guest goes on at the source.",
    Status.FAILING: "The migration has failed.",
}
"""What a class is told in each state."""

_open: weakref.WeakSet[Console] = weakref.WeakSet()
_of_cell: dict[str, tuple[str, weakref.ref[Console]]] = {}


class Console:
    """A panel that drives one migration after another.

    ``console = migkit.Console(memory="1GiB")``, shown by its cell. The arguments are those of
    :class:`~migkit.Migration`; they preset the form. ``console.run`` is the last migration's
    :class:`~migkit.Run`, None before its end; ``console.wait()`` waits for it.

    A Console whose cell is run again makes way for the new one: its migration is cancelled, or
    ended where that is too late, and the old panel says so.
    """

    def __init__(
        self,
        workload: str | type[Workload] = "random",
        *,
        path: str | os.PathLike[str] | None = None,
        params: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        """Check the presets and show the form; nothing is started."""
        self.run: Run | None = None
        self.error = ""
        """What went wrong last, in words; empty while all is well."""
        self.updates = 0
        """How often the panel was brought up to date, over all its migrations."""
        self._path, self._params = path, params
        self._migration: Migration | None = None
        self._live: Live | None = None
        self._last_status = Status.NONE
        self._drawn: tuple[object, ...] = ()
        self._busy: set[str] = set()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._form = Form(workload, {**PRESETS, **options})
        self._buttons = {
            name: ipw.Button(
                description=text, icon=icon, button_style=style, tooltip=tooltip,
                layout={"width": "auto", "height": "36px"},
            )
            for name, (text, icon, style, tooltip) in _BUTTONS.items()
        }  # fmt: skip
        for name, button in self._buttons.items():
            button.add_class(f"migkit-{name}")
            button.on_click(self._clicked(name))
        self._says = ipw.HTML()
        self._diagram, self._cards, self._events = ipw.HTML(), ipw.HTML(), ipw.HTML()
        self._map = PageMapView(self._describe)
        self._options = ipw.Accordion([self._form.box], titles=["Options"], selected_index=0)
        events = ipw.Accordion([self._events], titles=["Last trace events"], selected_index=0)
        self.panel = ipw.VBox(
            [
                ipw.Box(list(self._buttons.values()), layout={"flex_flow": "row wrap"}),
                self._says, self._options, self._map, self._cards, self._diagram, events,
            ],
            layout={"grid_gap": "6px", "padding": "4px"},
        )  # fmt: skip
        self.panel.add_class("migkit-panel")
        self._on_panel = Writer(self._written)
        self._tell("Ready: set the options and press Start.")
        self._show_status()
        self._make_way()
        _open.add(self)

    # For programs.

    @property
    def status(self) -> Status:
        """The source's state; after the end the one in which it ended."""
        migration = self._migration
        return migration.status if migration else self._last_status

    @property
    def migration(self) -> Migration | None:
        """The migration that is under way, if one is."""
        return self._migration

    def press(self, name: str) -> None:
        """Press a button: start, start_postcopy, continue_, pause, cut, recover or cancel.

        Raises :class:`MigrationError` when it cannot be pressed now.
        """
        self._show_status()  # the buttons may be those of the state before
        if self._buttons[name].disabled:
            raise MigrationError(f"{name} cannot be pressed while the migration is {self.status}")
        self._buttons[name].click()

    def wait(self, timeout_s: float = 600.0) -> Run:
        """Wait for the end of the migration that was started; return its run.

        An interrupt ends the waiting, not the migration. Raises :class:`MigrationError` when
        there is no run, and :class:`TimeoutError`.
        """
        if self._thread:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TimeoutError(f"the migration is still {self.status} after {timeout_s} s")
        if self.run is None:
            closed = "the Console was closed before its migration had ended"
            none = closed if self._thread else "nothing was started: press Start"
            raise MigrationError(self.error or none)
        return self.run

    def close(self, why: str = "the Console was closed") -> None:
        """Cancel or end what is under way, save what was recorded, let no button be pressed."""
        self._closing.set()
        thread = self._thread
        if thread and thread is not threading.current_thread():
            thread.join(_CLOSE_S)
        for button in self._buttons.values():
            button.disabled = True
        self._form.enable(enabled=False)
        self._tell(f"Closed: {why}. The last state was {self._last_status}.")

    def _ipython_display_(self) -> None:
        show(self.panel, self._without_widgets())

    def _without_widgets(self) -> dict[str, str]:
        live = self._live
        text = f"migkit Console: the migration is {self.status}"
        picture = statemachine.draw(self.status)
        figure = None
        if live:
            text += f"; {in_words(live.history.states)}"
            figure = draw(live.history.states, f"Page map: {self.status}")
        return without_widgets(text, picture, figure)

    # Commands.

    def _clicked(self, name: str) -> Callable[[ipw.Button], None]:
        def begin(_: ipw.Button) -> None:
            if name == "start":
                self._begin()
            else:
                self._busy.add(name)
                self._show_status()
                threading.Thread(
                    target=self._command, args=(name,), name=f"migkit-{name}", daemon=True
                ).start()

        return begin

    def _command(self, name: str) -> None:
        """Carry a command out; what goes wrong is told in the panel."""
        migration = self._migration
        self.error = ""
        try:
            if migration is None:
                self._fail(f"{name}: the migration has ended")
            elif name == "cut":
                migration.link.cut()
            else:
                getattr(migration, name)()
        except (MigkitError, TimeoutError) as error:
            self._fail(str(error))
        except Exception as error:
            log.exception("the command %s failed", name)
            self._fail(f"{name}: {type(error).__name__}: {error}")
        finally:
            self._busy.discard(name)
            self._show_status()

    def _begin(self) -> None:
        if self._closing.is_set() or self._busy or self._migration:
            return
        self.run, self.error, self._live = None, "", None
        self._on_panel = Writer(self._written)
        self._last_status = Status.NONE
        self._busy.add("start")
        self._form.enable(enabled=False)
        self._show_status()
        self._tell(_WORDS[Status.NONE])
        self._thread = threading.Thread(target=self._migrate, name="migkit-console", daemon=True)
        self._thread.start()

    # The thread that follows a migration.

    def _migrate(self) -> None:
        try:
            values = self._form.values()
            with Migration(path=self._path, params=self._params, **values) as migration:
                migration.start()
                self._follow(migration)
        except (MigkitError, TimeoutError, OSError) as error:
            self._last_status = self.status
            self._on_panel(self._fail, str(error))
        except Exception as error:
            log.exception("the Console's migration failed")
            self._last_status = self.status
            self._on_panel(self._fail, f"{type(error).__name__}: {error}")
        finally:
            self._migration = None
            self._busy.clear()
            self._on_panel(self._rest)

    def _follow(self, migration: Migration) -> None:
        """Show a migration until it has ended, or the Console is closed."""
        live = Live(migration)
        self._live, self._migration = live, migration
        self._on_panel(self._unfold)
        self._busy.discard("start")
        self._show_until(lambda: migration.status in ENDED, live, self._closing)
        if self._closing.is_set() and migration.status in COMMANDS["cancel"]:
            migration.cancel()
        elif self._closing.is_set() and migration.status not in ENDED:
            self._last_status = migration.status
            return  # too late to cancel: whoever made the migration closes it now
        run = migration.wait(_SAVE_S, check=False)
        self._last_status = migration.status
        self._update(live)
        self.run = run
        if migration.status == Status.FAILED:
            self._on_panel(self._fail, "; ".join(migration.errors) or "the migration failed")
        else:
            ended = f"{migration.status.capitalize()}: console.run is the Run, in {run.path}."
            self._on_panel(self._tell, ended)

    def _show_until(self, ended: Callable[[], bool], live: Live, stop: threading.Event) -> None:
        """Bring the panel up to date every period, until the end or a stop."""
        due = time.monotonic()
        while not ended() and not stop.is_set():
            self._update(live)
            due = max(due + _PERIOD_S, time.monotonic())
            stop.wait(due - time.monotonic())

    def _update(self, live: Live) -> None:
        try:
            live.look()
        except Exception as error:  # what is shown must not end what is done
            log.exception("the Console could not look at the migration")
            self._on_panel(self._fail, f"what is shown may be old: {type(error).__name__}: {error}")
        self._on_panel(self._show, live)
        self.updates += 1

    # What is shown.

    @property
    def _written(self) -> list[ipw.Widget]:
        """The widgets that are written to while a migration runs."""
        return [
            self._says, self._map, self._cards, self._diagram, self._events, self._options,
            *self._buttons.values(), *self._form.controls.values(),
        ]  # fmt: skip

    def _unfold(self) -> None:
        """Make room for a migration that has begun."""
        if self._live and self._migration:
            states = self._live.history.states
            self._map.resize(len(states), self._migration.options.page_size)
        self._options.selected_index = None

    def _rest(self) -> None:
        """Let the options be changed, now that no migration runs."""
        self._form.enable(enabled=not self._closing.is_set())
        self._show_status()

    def _show(self, live: Live) -> None:
        self._map.show(live.history.states)
        self._cards.value = cards.cards(live)
        self._events.value = cards.events(list(live.events))
        self._show_status()

    def _show_status(self) -> None:
        """Light the state, and let be pressed what makes sense in it."""
        migration, status = self._migration, self.status
        for name, button in self._buttons.items():
            allowed = status in _ALLOWED[name] and name not in self._busy
            if name == "start":
                allowed = allowed and migration is None and not self._busy
            else:
                allowed = allowed and migration is not None
            if name == "cut":
                allowed = allowed and bool(migration and migration.options.link)
            if name == "start_postcopy":
                allowed = allowed and bool(migration and migration.options.postcopy_ram)
            button.disabled = self._closing.is_set() or not allowed
        passed = {s for _, who, s in migration.statuses if who == "source"} if migration else set()
        there = migration.destination_status if migration else ""
        if not migration and self._drawn and status == self._drawn[0]:
            return  # it stands as it ended
        if migration and not self.error and status in _WORDS and status not in self._drawn[:1]:
            self._tell(_WORDS[status])
        if (what := (status, there, frozenset(passed))) != self._drawn:
            self._drawn = what
            self._diagram.value = statemachine.draw(status, passed, there)

    def _tell(self, text: str) -> None:
        self.error = ""
        self._says.value = _line(text, "status")

    def _fail(self, text: str) -> None:
        self.error = text
        self._says.value = _line(f"✖ {text}", "alert")

    def _describe(self, page: int) -> str:
        return self._live.history.describe(page) if self._live else f"page {page:,}"

    def _make_way(self) -> None:
        """Close the Console that an earlier run of this cell has made."""
        cell, execution = current_cell()
        if not cell:
            return
        before, console = _of_cell.get(cell, ("", lambda: None))
        if before != execution and (earlier := console()):
            earlier.close("its cell was run again")
        _of_cell[cell] = execution, weakref.ref(self)


def _line(text: str, role: str) -> str:
    border = "#B84300" if role == "alert" else "#0072B2"
    return (
        f'<div role="{role}" style="font-size:16px;line-height:1.4;padding:3px 10px;'
        f'border-left:6px solid {border};color:var(--jp-ui-font-color1,inherit)">'
        f"{escape(text)}</div>"
    )


@atexit.register
def _close_all() -> None:
    for console in list(_open):
        if console.migration:
            console.close("the kernel ends")
