"""Our side of a pair: a session whose guest times its own page faults.

The guest's clock goes around one load of a missing page, as in the floor; what is loaded through
a memoryview takes some 50 ns more than C's volatile load. It keeps each latency in the page that
it has just touched, which is present by then, so every sample survives and none costs a fault.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from migkit.guest.vcpu import Word
from migkit.guest.workloads import Workload
from migkit.migration.session import Session
from migkit.migration.states import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from benchmarks.placement import Placement

PAGE = 4096
HIT_US = 5.0  # what took less was no fault that anybody served: the page was there
_WORDS = PAGE // 8
_STEP_TIMEOUT_S = 30.0


class Touch(Workload):
    """Load one word of every page in random order, up to ``limit``; then wait to be told more.

    Only the guest that was migrated touches: :meth:`prepare` is called at the source alone.
    ``eager`` 1 touches all pages at once without being told.
    """

    state_dtype = np.dtype([("next", "<u8"), ("limit", "<u8")])
    params: ClassVar[Mapping[str, float]] = {"pages": 65536, "eager": 0}

    def __init__(self, seed: int = 1, **params: float) -> None:
        super().__init__(seed, **params)
        self.at_source = False
        self.order = np.random.default_rng(seed).permutation(int(self.pages)).tolist()

    def prepare(self, ram: Any, state: Any) -> None:
        """Let no page be zero, for a zero page would be cheaper to send."""
        del state
        ram.view(np.uint64)[:, 0] = np.arange(1, len(ram) + 1, dtype=np.uint64)
        self.at_source = True

    def step(self, ram: Any, state: Any, n: int) -> None:
        """Touch what is due; the latency in ns goes to the page's second word."""
        del n
        first = int(state["next"])
        last = len(self.order) if self.eager else int(state["limit"])
        if self.at_source or first >= last:
            time.sleep(0.0005)
            return
        words = memoryview(ram.reshape(-1)).cast("Q")
        now = time.monotonic_ns
        for page in self.order[first:last]:
            at = page * 512
            before = now()
            words[at]
            words[at + 1] = now() - before
        state["next"] = last


class Ours:
    """A session in post-copy, whose guest touches pages when it is told to."""

    def __init__(
        self, pages: int, placement: Placement, *, eager: bool = False, **options: Any
    ) -> None:
        """Describe it; by default post-copy's background is all but off, events are on."""
        self.pages = pages
        self.folder = Path(tempfile.mkdtemp(prefix="migkit-bench-"))
        self.session = Session(
            Touch, pages * PAGE, path=self.folder / "run",
            params={"pages": pages, "eager": int(eager)},
            **{"postcopy": "0 rounds", "probe": "off", "cpus": placement.option, **options},
        )  # fmt: skip
        self._order = Touch(pages=pages).order
        self._at = 0

    def __enter__(self) -> Self:
        try:
            self.session.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # A migration that is held up would be waited for; it has nothing more to tell.
        if self.session.status == Status.POSTCOPY_ACTIVE:
            os.kill(self.session._engines["source"].child.pid, signal.SIGKILL)  # noqa: SLF001
        self.session.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def guest(self) -> Any:
        """The destination guest."""
        return self.session._guests["destination"]  # noqa: SLF001

    def hold(self) -> Self:
        """Wait until post-copy runs; stop the guest, which has touched nothing yet."""
        self._await(lambda: self.session.status == Status.POSTCOPY_ACTIVE, "post-copy")
        self._await(lambda: self.guest.vcpu.words[Word.FIRST_STEP_NS], "the guest's first step")
        time.sleep(0.05)
        self.guest.vcpu.stop()
        return self

    def touch(self, count: int) -> np.ndarray:
        """Touch pages; return their latencies in us."""
        vcpu, first, last = self.guest.vcpu, self._at, self._at + count
        state = np.frombuffer(vcpu.load_state(24), Touch.full_dtype()).copy()
        state["limit"] = last
        vcpu.store_state(state.tobytes())
        vcpu.words[Word.FIRST_STEP_NS] = 0
        vcpu.start()
        self._await(lambda: vcpu.words[Word.FIRST_STEP_NS], "the guest's touches")
        vcpu.stop()
        self._at = last
        return self.latencies(first, last)

    def latencies(self, first: int, last: int) -> np.ndarray:
        """Return the latencies of touches in us, in their order, without allocating a page."""
        fd = self.guest.ram.fd
        data = b"".join(os.pread(fd, 8, page * PAGE + 8) for page in self._order[first:last])
        return np.frombuffer(data, np.uint64) / 1e3

    def finish(self) -> None:
        """Wait for the end of the migration."""
        status = self.session.await_end(120)
        if status != Status.COMPLETED:
            raise RuntimeError(f"the migration is {status}: {self.session.errors}")

    def status_ns(self, status: Status) -> int:
        """Return when the source entered a state."""
        return next(
            ts for ts, role, name in self.session.statuses
            if role == "source" and name == status.value
        )  # fmt: skip

    def _await(self, happened: Callable[[], Any], what: str) -> None:
        """Wait for something in shared memory; say what became of the session if it fails."""
        deadline = time.monotonic() + _STEP_TIMEOUT_S
        while not happened():
            if self.session.errors or time.monotonic() > deadline:
                raise RuntimeError(f"{what} did not come: {self.session.query()}")
            time.sleep(0.001)


IDLE = {"max_postcopy_bandwidth": PAGE, "downtime_limit": 0.0}
"""Options that leave post-copy's background at one page a second."""
