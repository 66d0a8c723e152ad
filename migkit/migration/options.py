"""What can be set of a migration: one model for the API, the command line and the widgets.

Each option carries its help and, where QEMU has the same, QEMU's name: a parameter
(``max-bandwidth``) or a capability (``postcopy-preempt``).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from migkit.errors import OptionError, close_matches
from migkit.kernel.memory import PAGE_SIZE, check_size, memory_available
from migkit.migration.link import Link

SIZES = ("memory", "page_size", "max_bandwidth", "max_postcopy_bandwidth")
"""The options that are sizes in bytes, or bytes a second."""

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?b?)\s*", re.IGNORECASE)
_POSTCOPY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(rounds?|s|ms)\s*", re.IGNORECASE)


def option(default: Any, help_text: str, *, qemu: str = "", choices: tuple[str, ...] = ()) -> Any:
    """Declare an option with its default, its help, QEMU's name for it and its choices."""
    return field(default=default, metadata={"help": help_text, "qemu": qemu, "choices": choices})


@dataclass(frozen=True)
class Options:
    """All options of a migration; sizes accept ``"256MiB"``, rates are bytes or steps a second."""

    memory: int = option(256 << 20, "guest RAM, as in 256MiB or 4GiB")
    page_size: int = option(PAGE_SIZE, "host page size: 4KiB, 2MiB or 1GiB (huge pages)")
    seed: int = option(1, "seed of the workload's randomness")
    rate: float = option(0.0, "page writes a second of the guest; 0 for as many as it can")
    postcopy: str = option(
        "1 round",
        "when post-copy starts: 'N rounds', 'N s', 'manual', 'auto' (pre-copy does not converge) "
        "or 'off' (pre-copy only)",
        qemu="postcopy-ram",
    )
    postcopy_preempt: bool = option(
        True, "send requested pages on a channel of their own", qemu="postcopy-preempt"
    )
    return_path: bool = option(
        True, "have the destination answer, also in pre-copy only", qemu="return-path"
    )
    pause_before_switchover: bool = option(
        False,
        "stop the guest and wait for continue_() before the switchover; by hand only",
        qemu="pause-before-switchover",
    )
    max_bandwidth: int = option(
        0, "limit of pre-copy in bytes a second; 0 for none", qemu="max-bandwidth"
    )
    max_postcopy_bandwidth: int = option(
        0,
        "limit of post-copy's background transfer in bytes a second; 0 for none",
        qemu="max-postcopy-bandwidth",
    )
    mem_lock: bool = option(
        False,
        "lock guest RAM: its pages stay in memory from when they are there",
        qemu="-overcommit mem-lock",
    )
    switchover_ack: bool = option(
        False,
        "switch only when the destination has said that it is ready",
        qemu="switchover-ack",
    )
    downtime_limit: float = option(
        0.3,
        "how long the guest may stand still at the end of pre-copy, in s",
        qemu="downtime-limit",
    )
    transport: str = option("unix", "what connects the two sides", choices=("unix", "tcp"))
    link: str = option(
        "",
        "a link between the two sides, of a bandwidth and a one-way latency, as in "
        "'200Mbit/s, 1ms' or 'unlimited'",
    )
    trace: tuple[str, ...] = option(
        ("migration", "savevm", "faults", "transfer"),
        "trace events to record: names, globs or groups; '-x' removes, 'all' is all",
    )
    probe: str = option(
        "auto",
        "the eBPF probe: 'on' insists, 'auto' uses it where it can",
        choices=("auto", "on", "off"),
    )
    cpus: str = option(
        "", "CPUs of source guest, source, destination, destination guest, as in 0,0,1,1"
    )

    @classmethod
    def make(cls, **values: Any) -> Options:
        """Make options from values as people write them; raises :class:`OptionError`."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        clean: dict[str, Any] = {}
        for name, value in values.items():
            key = name.replace("-", "_")
            if key not in known:
                raise OptionError(f"no option {name!r}: " + close_matches(key, known))
            if value is not None:
                clean[key] = _convert(key, value)
        options = cls(**clean)
        options.check()
        return options

    def check(self) -> None:
        """Raise :class:`OptionError` for values that cannot be used together or at all."""
        check_size(self.memory, self.page_size)
        need, have = 2 * self.memory, memory_available()
        if self.page_size == PAGE_SIZE and have and need > have:
            raise OptionError(
                f"two guests of {self.memory >> 20} MiB need {need >> 20} MiB, this machine has "
                f"{have >> 20} MiB free: at most {have // 2 >> 20} MiB will do"
            )
        for f in dataclasses.fields(self):
            choices = f.metadata["choices"]
            value = getattr(self, f.name)
            if choices and value not in choices:
                raise OptionError(f"{f.name} {value!r}: " + close_matches(str(value), choices))
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise OptionError(f"{f.name} of {value} is not a number from 0 on")
        Trigger.parse(self.postcopy)
        if self.switchover_ack and not self.uses_return_path:
            raise OptionError("switchover_ack comes on the return path: return_path must be on")
        if self.link:
            Link.parse(self.link)
        allowed = os.sched_getaffinity(0)
        if not allowed.issuperset(cpu for cpu in self.cpu_list() if cpu is not None):
            raise OptionError(f"cpus {self.cpus!r}: this process may use {sorted(allowed)}")

    @property
    def postcopy_ram(self) -> bool:
        """QEMU's capability ``postcopy-ram``."""
        return self.postcopy != "off"

    @property
    def uses_return_path(self) -> bool:
        """Whether the return path is opened: for post-copy always, else by option."""
        return self.postcopy_ram or self.return_path

    def cpu_list(self) -> tuple[int | None, ...]:
        """Return the CPUs of source guest, source, destination, destination guest."""
        if not self.cpus:
            return (None, None, None, None)
        try:
            cpus = tuple(int(part) for part in self.cpus.split(","))
        except ValueError:
            cpus = ()
        if len(cpus) != 4:
            raise OptionError(f"cpus {self.cpus!r}: four numbers, as in 0,0,1,1")
        return cpus

    def as_dict(self) -> dict[str, Any]:
        """Return the options as plain values, for meta.json and the engines."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Options:
        """Rebuild options from :meth:`as_dict`, after JSON made lists of tuples."""
        known = {f.name for f in dataclasses.fields(cls)}
        kept = {name: value for name, value in values.items() if name in known}
        return cls(**{**kept, "trace": tuple(kept.get("trace", ()))})


@dataclass(frozen=True)
class Trigger:
    """When post-copy starts by itself: after rounds, after a time, when it does not converge."""

    rounds: float = float("inf")
    seconds: float = float("inf")
    auto: bool = False

    @classmethod
    def parse(cls, text: str) -> Trigger:
        """Parse the option ``postcopy``."""
        if text in ("manual", "off"):
            return cls()
        if text == "auto":
            return cls(auto=True)
        match = _POSTCOPY.fullmatch(text)
        if not match:
            raise OptionError(
                f"postcopy {text!r}: one of 'N rounds', 'N s', 'manual', 'auto', 'off'"
            )
        number, unit = float(match[1]), match[2].lower()
        if unit.startswith("round"):
            return cls(rounds=number)
        return cls(seconds=number / (1000 if unit == "ms" else 1))


def parse_size(text: str | float) -> int:
    """Return bytes for ``"256MiB"``, ``"4G"``, ``"1.5 GiB"`` or a number; units are binary."""
    if isinstance(text, int | float):
        return int(text)
    match = _SIZE.fullmatch(text)
    if not match:
        raise OptionError(f"{text!r} is not a size: write 256MiB, 4G or a number of bytes")
    return int(float(match[1]) * (1 << _UNITS[match[2].lower()]))


def format_size(n_bytes: int) -> str:
    """Return a size as :func:`parse_size` reads it, exact: ``256MiB``; ``0``, ``1000``."""
    for unit, bits in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n_bytes and n_bytes % (1 << bits) == 0:
            return f"{n_bytes >> bits}{unit}"
    return str(n_bytes)


def default_text(option_field: dataclasses.Field[Any]) -> str:
    """Return an option's default as people write it; empty for none."""
    default: Any = option_field.default
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ",".join(default)
    if option_field.name in SIZES:
        return format_size(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def _convert(name: str, value: Any) -> Any:
    kind = type(getattr(Options, name))
    try:
        if name in SIZES:
            return parse_size(value)
        if kind is tuple:
            return tuple(value.split(",")) if isinstance(value, str) else tuple(value)
        if kind is bool and isinstance(value, str):
            return {"on": True, "true": True, "off": False, "false": False}[value.lower()]
        return kind(value)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"{name} {value!r} is not a {kind.__name__}") from error
