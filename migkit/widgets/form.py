"""The Console's form: a control for every option of a migration, from the one options model."""

from __future__ import annotations

import dataclasses
from typing import Any

import ipywidgets as ipw

from migkit.errors import OptionError
from migkit.guest.workloads import WORKLOADS, Workload
from migkit.migration.options import SIZES, Options, format_size

_FIRST = (
    "memory", "rate", "link", "postcopy", "postcopy_preempt", "max_bandwidth",
    "max_postcopy_bandwidth", "downtime_limit", "pause_before_switchover", "probe",
)  # fmt: skip
_LAYOUT = {"width": "310px"}
_STYLE = {"description_width": "170px"}


class Form:
    """Controls for the workload and every field of :class:`Options`; :attr:`box` holds them."""

    def __init__(self, workload: str | type[Workload], presets: dict[str, Any]) -> None:
        """Show presets where there are some, else the defaults."""
        fields = {field.name: field for field in dataclasses.fields(Options)}
        Options.make(**presets)  # an unknown name or a bad value is told before anything is shown
        self._own = workload if not isinstance(workload, str) else None
        names = [self._own.label()] if self._own else list(WORKLOADS)
        self.workload = ipw.Dropdown(
            options=names, value=names[0] if self._own else workload, description="workload",
            layout=_LAYOUT, style=_STYLE,
        )  # fmt: skip
        self.controls = {name: _control(field, presets) for name, field in fields.items()}
        first = [self.workload, *(self.controls[name] for name in _FIRST)]
        rest = [control for name, control in self.controls.items() if name not in _FIRST]
        more = ipw.Accordion([_flow(rest)], titles=["More options"])
        self.box = ipw.VBox([_flow(first), more])

    def values(self) -> dict[str, Any]:
        """Return what is set, as the arguments of a :class:`~migkit.Migration`."""
        chosen = {name: control.value for name, control in self.controls.items()}
        return {"workload": self._own or self.workload.value, **chosen}

    def enable(self, *, enabled: bool) -> None:
        """Let the controls be used, or not."""
        for control in (self.workload, *self.controls.values()):
            control.disabled = not enabled


def _flow(children: list[ipw.Widget]) -> ipw.Box:
    return ipw.Box(children, layout={"flex_flow": "row wrap", "grid_gap": "2px 14px"})


def _control(field: dataclasses.Field[Any], presets: dict[str, Any]) -> ipw.Widget:
    value = presets.get(field.name, field.default)
    qemu = field.metadata["qemu"]
    common = {
        "description": field.name.replace("_", " "),
        "tooltip": field.metadata["help"] + (f" [QEMU: {qemu}]" if qemu else ""),
        "layout": _LAYOUT,
        "style": _STYLE,
    }
    if isinstance(field.default, bool):
        return ipw.Checkbox(value=_as_bool(field.name, value), indent=False, **common)
    if field.metadata["choices"]:
        return ipw.Dropdown(options=field.metadata["choices"], value=value, **common)
    if isinstance(value, tuple):
        value = ",".join(value)
    elif field.name in SIZES and isinstance(value, int):
        value = format_size(value)
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    return ipw.Text(value=str(value), continuous_update=False, **common)


def _as_bool(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise OptionError(f"{name} {value!r}: True or False")
