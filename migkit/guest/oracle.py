"""The oracle: a migrated guest must be, bit for bit, what it would be had it never moved.

The same workload is run the same number of steps from the same beginning, here and now, and the
guest's RAM and CPU state are compared with the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from migkit.guest.handle import GuestProcess

_STEPS_AT_ONCE = 1 << 16
_BYTES_AT_ONCE = 4 << 20
_PAGES_NAMED = 10


@dataclass(frozen=True)
class Verdict:
    """What the oracle found; true when all is well."""

    steps: int
    n_pages: int
    wrong_pages: tuple[int, ...]
    state_ok: bool

    def __bool__(self) -> bool:
        return self.state_ok and not self.wrong_pages

    def __str__(self) -> str:
        """Return the verdict as a sentence."""
        if self:
            return f"RAM and CPU state are those of an unmigrated guest after {self.steps} steps"
        some = ", ".join(map(str, self.wrong_pages[:_PAGES_NAMED]))
        return (
            f"after {self.steps} steps {len(self.wrong_pages)} of {self.n_pages} pages differ"
            + (f" (pages {some})" if some else "")
            + ("" if self.state_ok else "; the CPU state differs")
        )


def verify(guest: GuestProcess) -> Verdict:
    """Stop a guest and compare it with one that was never migrated.

    Its RAM is read with pread(2), which allocates nothing: a page that is missing is seen as
    zeros and not filled.
    """
    config = guest.config
    guest.vcpu.stop()
    workload = config.spec.load()
    dtype = workload.full_dtype()
    found = guest.vcpu.load_state(dtype.itemsize)
    steps = int(np.frombuffer(found, dtype)["step"][0])

    states = np.zeros(1, dtype)
    ram = np.zeros((config.memory // config.page_size, config.page_size), np.uint8)
    workload.prepare(ram, states[0])
    done = 0
    while done < steps:
        n = min(_STEPS_AT_ONCE, steps - done)
        workload.step(ram, states[0], n)
        done += n
        states["step"] = done
    wrong: list[int] = []
    flat = ram.reshape(-1)
    for at in range(0, config.memory, _BYTES_AT_ONCE):
        expected = flat[at : at + _BYTES_AT_ONCE]
        actual = np.frombuffer(guest.ram.read(at, len(expected)), np.uint8)
        if not np.array_equal(actual, expected):
            differs = (actual != expected).reshape(-1, min(config.page_size, len(expected)))
            first = at // config.page_size
            wrong.extend((np.flatnonzero(differs.any(axis=1)) + first).tolist())
    return Verdict(steps, len(ram), tuple(sorted(set(wrong))), found == states.tobytes())
