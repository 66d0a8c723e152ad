"""A migration session: it starts guests, engines and probe, steers them and records what happens.

The session never carries pages and never maps guest RAM. What happens it learns from its
:class:`~migkit.migration.monitor.Monitor`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from migkit.errors import CapabilityError, MigrationError, OptionError
from migkit.guest.config import GuestConfig
from migkit.guest.handle import GuestProcess
from migkit.guest.oracle import Verdict, verify
from migkit.guest.spec import WorkloadSpec
from migkit.guest.vcpu import Word
from migkit.guest.workloads import Workload
from migkit.migration.monitor import DESTINATION, ROLES, SOURCE, Monitor
from migkit.migration.options import Options
from migkit.migration.pagemap import page_states
from migkit.migration.relay_process import RelayProcess
from migkit.migration.remote import EngineProcess
from migkit.migration.states import Status
from migkit.migration.stats import Counter
from migkit.probe.probe import Probe, ProbeResult, Watch
from migkit.trace.folder import SAMPLES_DTYPE, RunFolder, host_facts
from migkit.trace.registry import Registry

log = logging.getLogger(__name__)

_WARM_UP_S = 0.05  # the guest runs a little before it is moved
_LOST = "the guest's memory is lost for good: the destination guest died in post-copy"
_GUEST_OPTIONS = {"memory", "page_size", "seed", "rate", "mem_lock"}
_NOT_RECOVERED = {Status.POSTCOPY_PAUSED, Status.FAILED, Status.POSTCOPY_RECOVER_SETUP}


class Session:
    """One migration, steered by hand, recorded in a run folder.

    Use it as a context manager: whatever happens, no process outlives the block.
    """

    def __init__(
        self,
        workload: str | type[Workload] = "random",
        memory: str | int = "256MiB",
        *,
        path: str | os.PathLike[str] | None = None,
        params: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        """Check everything that can be checked before anything is started.

        ``path`` is the run folder, by default a new one in ``runs/``; ``params`` go to the
        workload; ``options`` are those of :class:`~migkit.migration.options.Options`.
        """
        options.setdefault("postcopy", "manual")
        self._workload = workload
        self.options = Options.make(memory=memory, **options)
        self.spec = WorkloadSpec.of(workload, self.options.seed, params)
        self.events = Registry.load().select(self.options.trace)
        self.folder = RunFolder.create(path, self.spec.name)
        self._sockets: Path | None = None
        self._n_uris = 0
        self._open = contextlib.ExitStack()
        self._guests: dict[str, GuestProcess] = {}
        self._engines: dict[str, EngineProcess] = {}
        self._monitor = Monitor(self._guests, self._engines)
        self._link: RelayProcess | None = None
        self._probe: Probe | None = None
        self._probe_result: ProbeResult | None = None
        self._recorded = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        """End what nobody can steer any more: a notebook's cell may have been run again."""
        if not getattr(self, "_guests", None) or sys.is_finalizing():
            return
        if threading.current_thread() is threading.main_thread():
            self.close()
        else:  # garbage is collected in any thread, also in our monitor's: close() waits for that
            threading.Thread(target=self.close, name="migkit-close").start()
        warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)

    # Steering.

    def start(self) -> None:
        """Start the guest at the source and begin to migrate it; return once it is under way.

        Raises :class:`CapabilityError` when the machine lacks something.
        """
        if self._monitor.started:
            raise MigrationError("this migration was started before; make a new one")
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        self._sockets = Path(tempfile.mkdtemp(prefix="migkit-"))
        cpus = self.options.cpu_list()
        for role, populate, cpu in ((SOURCE, True, cpus[0]), (DESTINATION, False, cpus[3])):
            if role in self._guests:  # it has migrated before
                continue
            config = GuestConfig(
                self.spec, self.options.memory, self.options.page_size, self.options.rate,
                populate=populate, cpu=cpu, lock=self.options.mem_lock,
            )  # fmt: skip
            self._guests[role] = GuestProcess(config, self.folder.log(f"guest-{role}"))
        n_pages = self.options.memory // self.options.page_size
        for role in ROLES:
            log = self.folder.log(role)
            self._engines[role] = EngineProcess(role, n_pages, log, self._monitor.hear)
        for guest in self._guests.values():
            if not guest.is_ready:
                guest.ready()
        if self._guests[DESTINATION].info.user_mode_only:
            self._monitor.notices.append(
                "without root a guest's own system calls cannot wait for a page (EFAULT)"
            )
        if self.options.link:
            self._link = RelayProcess(self.options.link, self.folder.log("link"))
        self._monitor.start(*filter(None, [self._link]))
        identity = self.spec.identity
        for role, engine in self._engines.items():
            file: BinaryIO = self._open.enter_context(self.folder.trace(role).open("wb"))
            engine.attach(self._guests[role], identity, self.options, self.events, file)
        self._start_probe()
        uri = self._have_it_listen("migrate-incoming")
        self._guests[SOURCE].vcpu.start()
        time.sleep(_WARM_UP_S)
        self._engines[SOURCE].execute("migrate", uri=uri)

    def start_postcopy(self) -> None:
        """Switch to post-copy now (``migrate-start-postcopy``)."""
        self._engine(SOURCE).execute("migrate-start-postcopy")

    def continue_(self) -> None:
        """Go on from ``pre-switchover``, where the guest stands still (``migrate-continue``)."""
        self._engine(SOURCE).execute("migrate-continue")

    def pause(self) -> None:
        """Break post-copy off (``migrate-pause``): both sides keep what they have."""
        self._engine(SOURCE).execute("migrate-pause")

    def recover(self, timeout_s: float = 30.0) -> None:
        """Go on with a paused migration over new channels (``migrate-recover``).

        An engine that has died is replaced. Returns once post-copy runs again. Raises
        :class:`MigrationError` when that failed: the migration is paused as before and can be
        recovered again.
        """
        source, monitor = self._engine(SOURCE), self._monitor
        if not monitor.wait_for(monitor.at_rest, timeout_s) or (
            self.status != Status.POSTCOPY_PAUSED
        ):
            raise MigrationError(f"there is nothing to recover: the migration is {self.status}")
        self._replace_the_dead()
        uri = self._have_it_listen("migrate-recover")
        tried = len(self.statuses)
        source.execute("migrate", uri=uri, resume=True)

        def decided() -> bool:
            outcomes = ("postcopy-active", "postcopy-paused", "failed")
            return any(monitor.reached(SOURCE, status, tried) for status in outcomes)

        if not monitor.wait_for(decided, timeout_s) or self.status in _NOT_RECOVERED:
            if self._guests[DESTINATION].child.wait(1.0):  # its end takes a moment to be seen
                raise MigrationError(_LOST)
            raise MigrationError(f"the recovery failed, {self.status}: {self.notices[-1]}")

    def _replace_the_dead(self) -> None:
        guest = self._guests[DESTINATION]
        if not guest.is_alive:
            raise MigrationError(_LOST)
        for role, engine in self._engines.items():
            if engine.gone:
                try:
                    engine.restart(self._monitor.since_ns(role))
                except MigrationError as error:
                    if guest.child.wait(1.0):  # its end takes a moment to be seen
                        raise MigrationError(_LOST) from error
                    raise

    def _have_it_listen(self, command: str) -> str:
        """Have the destination listen, for the source alone, at a new place; return where.

        With a link the relay is in between, for the destination in the source's place.
        """
        source, link = self._engine(SOURCE).child, self._link
        if link:
            link.ensure_ready()
        peer = link.child if link else source
        answer = self._engine(DESTINATION).execute(command, uri=self._new_uri(), peer=peer.pid)
        uri = str(answer["uri"])
        return link.listen(self._new_uri(), uri, source.pid) if link else uri

    def _new_uri(self) -> str:
        if self.options.transport == "tcp":
            return "tcp:127.0.0.1:0"
        self._n_uris += 1
        return f"unix:{self._sockets}/main{self._n_uris}"

    def cancel(self) -> None:
        """Give up before the switchover (``migrate_cancel``): the source guest runs on."""
        self._engine(SOURCE).execute("migrate_cancel")

    @property
    def link(self) -> RelayProcess:
        """The link between the two sides, to be cut, stalled and looked at.

        Raises :class:`OptionError` when they are connected directly.
        """
        if not self.options.link:
            raise OptionError("there is no link: give the option link, as in link='200Mbit/s, 1ms'")
        if self._link is None:
            raise MigrationError("this migration has not been started, or is closed")
        return self._link

    @property
    def status(self) -> Status:
        """The source's state, QMP's MigrationStatus."""
        return self._monitor.status(SOURCE)

    @property
    def destination_status(self) -> Status:
        """The destination's state."""
        return self._monitor.status(DESTINATION)

    @property
    def pids(self) -> dict[str, int]:
        """The processes, by what they are: ``source``, ``source guest``, ``probe`` and so on."""
        pids = {role: engine.child.pid for role, engine in self._engines.items()}
        pids |= {f"{role} guest": guest.pid for role, guest in self._guests.items()}
        if self._probe:
            pids["probe"] = self._probe.pid
        return pids

    @property
    def running_guests(self) -> list[str]:
        """The sides whose guest is alive and was asked to run: one at most, ever."""
        return [role for role, guest in self._guests.items() if guest.is_running]

    @property
    def statuses(self) -> list[tuple[int, str, str]]:
        """Every state that a side has entered: (ts_ns, role, status)."""
        return self._monitor.statuses

    @property
    def errors(self) -> list[str]:
        """What failed, in words, the first first."""
        return self._monitor.errors

    @property
    def notices(self) -> list[str]:
        """What is to be known and is no failure: breaks, what is missing without root."""
        return self._monitor.notices

    def query(self) -> dict[str, Any]:
        """Return the state and the counters so far, as ``query-migrate`` would."""
        result: dict[str, Any] = {"status": self.status.value, "errors": list(self.errors)}
        for role, engine in self._engines.items():
            result[role] = {c.name.lower(): engine.counters.words[c] for c in Counter}
            result[role]["status"] = self._monitor.status(role).value
            result[role]["step"] = self._monitor.step(role)
        return result

    def page_map(self) -> npt.NDArray[np.uint8]:
        """Return a :class:`~migkit.migration.pagemap.PageState` a host page, (n_pages,) uint8.

        It is read out of shared memory: no engine is woken, no page of guest RAM is touched.
        Raises :class:`MigrationError` before :meth:`start` and after :meth:`close`.
        """
        rows = [self._engine(role).pages.snapshot() for role in ROLES]
        return page_states(*rows)

    def await_end(
        self, timeout_s: float = 600.0, progress: Callable[[dict[str, Any]], None] | None = None
    ) -> Status:
        """Wait until both sides are at rest; return the source's state.

        ``progress`` is called ten times a second with what :meth:`query` returns.
        Raises :class:`TimeoutError`; the migration goes on then.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            at_rest = self._monitor.wait_for(self._monitor.at_rest, 0.1)
            if progress:
                progress(self.query())
            if at_rest:
                return self.status
            if time.monotonic() > deadline:
                raise TimeoutError(f"the migration is still {self.status} after {timeout_s} s")

    def await_status(self, status: Status | str, timeout_s: float = 60.0) -> None:
        """Wait until the source has entered a state.

        Raises :class:`MigrationError` when the migration comes to rest without it, and
        :class:`TimeoutError`.
        """
        monitor = self._monitor
        if not monitor.wait_for(
            lambda: monitor.reached(SOURCE, status) or monitor.at_rest(), timeout_s
        ):
            raise TimeoutError(f"the migration is still {self.status} after {timeout_s} s")
        if not monitor.reached(SOURCE, status):
            raise MigrationError(f"the migration is {self.status}: {'; '.join(self.errors)}")

    def verify(self) -> Verdict:
        """Stop the guest where it runs and compare it with one that was never migrated."""
        return verify(self._survivor())

    def _survivor(self) -> GuestProcess:
        """Return the guest that goes on when the migration has come to its end."""
        self._engine(SOURCE)
        completed = self.destination_status == Status.COMPLETED
        return self._guests[DESTINATION if completed else SOURCE]

    def again(self, *, path: str | os.PathLike[str] | None = None, **options: Any) -> Self:
        """Return a new migration, not started, of the guest that has come out of this one.

        That is the one at the destination after a migration that completed, else the one at the
        source. It runs on meanwhile; this migration is recorded and closed. ``options`` are as
        before but for those given here; what the guest was made with cannot be changed.

        Raises :class:`MigrationError` when this migration has not ended or its guest is dead.
        """
        if fixed := _GUEST_OPTIONS & options.keys():
            raise OptionError(f"{', '.join(sorted(fixed))}: the guest that migrates again has it")
        if not self._monitor.at_rest() or self.status == Status.POSTCOPY_PAUSED:
            raise MigrationError(f"this migration has not ended: it is {self.status}")
        guest = self._survivor()
        if not guest.is_alive:
            raise MigrationError(f"the guest is dead: {guest.vcpu.error() or 'it was killed'}")
        new = type(self)(
            self._workload, path=path, params=self.spec.params,
            **{**self.options.as_dict(), **options},
        )  # fmt: skip
        self.record()
        new.spec = self.spec
        new._guests[SOURCE] = guest  # noqa: SLF001 — one session hands over to the next
        self._guests = {role: one for role, one in self._guests.items() if one is not guest}
        self.close()
        return new

    # Recording.

    def record(self) -> RunFolder:
        """End the engines and the probe and write the run folder; the guests live on."""
        if self._recorded:
            return self.folder
        self._monitor.ending = True
        try:
            for engine in self._engines.values():
                engine.quit()
            if self._link:
                self._link.quit()
            if self._probe:
                self._probe_result = self._probe.stop()
                self.notices.extend(self._probe_result.status.notices)
        finally:  # also when Ctrl-C comes in the middle of it
            self._monitor.end()
            self._open.close()
            if self._probe_result is not None:
                self.folder.save_probe(self._probe_result.records)
            self.folder.save_samples(np.array(self._monitor.samples, SAMPLES_DTYPE))
            self.folder.save_meta(self._meta())
            self._recorded = True
        return self.folder

    def _meta(self) -> dict[str, Any]:
        guests = {
            role: {
                "pid": guest.pid,
                "address": guest.info.address,
                "step": guest.vcpu.words[Word.STEP],
            }
            for role, guest in self._guests.items()
            if guest.is_ready
        }
        engines = {role: engine.child.pid for role, engine in self._engines.items()}
        probe = self._probe_result
        return {
            "status": self.status.value,
            "destination_status": self.destination_status.value,
            "workload": {
                "name": self.spec.name,
                "seed": self.spec.seed,
                "params": dict(self.spec.params),
            },
            "options": self.options.as_dict(),
            "block": "pc.ram",
            "guests": guests,
            "engines": engines,
            "events": sorted(self.events),
            "statuses": self.statuses,
            "errors": self.errors,
            "notices": self.notices,
            "counters": self.query() if self._engines else {},
            "probe": {
                "attached": probe is not None,
                "lost": probe.lost if probe else 0,
                **(asdict(probe.status) if probe else {}),
            },
            **host_facts(),
        }

    def close(self) -> None:
        """End every process, save what was recorded, leave no file behind but the run folder."""
        if self._engines:
            try:
                self.record()
            except OSError:
                log.exception("the run folder %s could not be completed", self.folder.path)
        self._monitor.end()
        for engine in self._engines.values():
            engine.close()
        if self._link:
            self._link.close()
            self._link = None
        for guest in self._guests.values():
            guest.close()
        self._engines.clear()
        self._guests.clear()
        self._open.close()
        if self._sockets:
            shutil.rmtree(self._sockets, ignore_errors=True)

    # The probe.

    def _start_probe(self) -> None:
        if self.options.probe == "off":
            return
        guest = self._guests[DESTINATION]
        probe = Probe([Watch(guest.pid, guest.info.address, guest.ram.size)])
        try:
            probe.start()
        except CapabilityError as error:
            if self.options.probe == "on":
                raise
            self.notices.append(f"no eBPF probe, the kernel's stages are missing: {error}")
        else:
            self._probe = probe

    def _engine(self, role: str) -> EngineProcess:
        if role not in self._engines:
            raise MigrationError("this migration has not been started, or is closed")
        return self._engines[role]
