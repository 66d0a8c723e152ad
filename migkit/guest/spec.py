"""Which workload a guest runs: a name or a class by value, its parameters, its identity."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import cloudpickle

from migkit.errors import OptionError
from migkit.guest.workloads import Workload, find_workload


@dataclass(frozen=True)
class WorkloadSpec:
    """A workload and all that its future depends on, but for RAM and CPU state.

    ``code`` is the class pickled by value when it is not one of ours. It goes from the session
    to its own guests over an inherited socket and nowhere else: it is as trusted as exec. Over
    the migration stream only :attr:`identity` goes.
    """

    name: str
    seed: int = 1
    params: Mapping[str, float] = field(default_factory=dict)
    code: bytes = b""

    @classmethod
    def of(
        cls,
        workload: str | type[Workload],
        seed: int = 1,
        params: Mapping[str, float] | None = None,
    ) -> WorkloadSpec:
        """Describe a workload given by name or class.

        Raises :class:`OptionError` for an unknown name or parameter, or a class that is none.
        """
        params = dict(params or {})
        if isinstance(workload, str):
            kind, code = find_workload(workload), b""
        elif inspect.isclass(workload) and issubclass(workload, Workload):
            kind, code = workload, b"" if is_ours(workload) else _pickle_by_value(workload)
        else:
            raise OptionError(
                f"workload {workload!r} is neither a name nor a subclass of migkit.Workload"
            )
        if kind.step is Workload.step:
            raise OptionError(f"workload {kind.label()} defines no step(ram, state, n)")
        kind(seed, **params)
        return cls(kind.label(), seed, params, code)

    def load(self) -> Workload:
        """Make the workload; unpickles :attr:`code`, so only in the session's own processes."""
        kind: type[Workload] = (
            cloudpickle.loads(self.code) if self.code else find_workload(self.name)
        )
        return kind(self.seed, **self.params)

    @property
    def identity(self) -> str:
        """The name and a hash of code, parameters and CPU state layout: equal at both ends."""
        layout = self.load().full_dtype().descr
        text = json.dumps([self.name, self.seed, sorted(self.params.items()), layout])
        digest = hashlib.sha256(text.encode() + self.code).hexdigest()
        return f"migkit-{self.name[:32]}-{digest[:32]}"


def is_ours(kind: type) -> bool:
    """Whether a class is imported from migkit, thus known to every process of ours."""
    return kind.__module__.partition(".")[0] == "migkit"


def _pickle_by_value(kind: type[Workload]) -> bytes:
    module = sys.modules.get(kind.__module__)
    if module is None or kind.__module__ == "__main__":
        return bytes(cloudpickle.dumps(kind))
    cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(kind))
    finally:
        cloudpickle.unregister_pickle_by_value(module)
