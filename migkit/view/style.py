"""How our figures look: colours that survive colour blindness, marks that survive grey.

They follow matplotlib's theme: under ``matplotlib.style.use("dark_background")`` they are dark.
No pyplot: it keeps every figure alive until it is closed. Ours shows itself in a notebook.
"""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which people with any colour vision can tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, LIGHT = "#8C8C8C", "#D9D9D9"

RESOLUTION_STYLES = {
    "requested": (BLUE, "o", "requested of the source"),
    "in_flight": (ORANGE, "^", "already in flight"),
    "local": (GREEN, "s", "local: zero page or just came"),
    "background": (PURPLE, "D", "came by itself"),
    "unresolved": (VERMILION, "X", "never resolved"),
    "minor": (GREY, ".", "minor: nobody waited"),
}
"""Colour, marker and label of each way in which a fault is resolved."""

STAGE_STYLES = {
    "blocked": ("#F6C667", "||||", "thread falls asleep"),
    "read": (SKY, "", "destination reads the fault"),
    "requested": (SKY, "////", "destination sends the request"),
    "received_by_source": (LIGHT, "....", "request under way"),
    "sent": (GREEN, "", "source finds and sends the page"),
    "received": (LIGHT, "", "page under way"),
    "placed": (BLUE, "\\\\\\\\", "destination places the page"),
    "woken": ("#F6C667", "----", "thread is woken"),
    "running": (ORANGE, "xxxx", "thread gets a CPU"),
}
"""Colour, hatch and label of each step: the kernel yellow, the destination blue, the wire grey."""

PHASE_STYLES = {
    "setup": (GREY, "////"),
    "pre-copy": (SKY, ""),
    "discard": (YELLOW, "\\\\\\\\"),
    "switchover": (VERMILION, "xxxx"),
    "post-copy": (BLUE, "...."),
    "completion": (GREEN, "////"),
}
"""Colour and hatch of each phase; others are grey."""

_SMALL = 8.5
_KEY_SIZES = {".": 8}


class RunFigure(Figure):
    """A figure that a notebook shows when a cell returns it, whether or not pyplot is loaded."""

    @property
    def alt_text(self) -> str:
        """What the figure says and shows, for those who do not see it."""
        panels = "; ".join(axes.get_title(loc="left") for axes in self.axes)
        title = self.get_suptitle()
        return f"{title}. Panels: {panels}." if title else f"{panels}."

    def _repr_mimebundle_(self, **_: object) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
        """Return the picture, and HTML with its text: notebooks drop the text of a mere picture."""
        png, about = self._repr_png_()
        data = base64.b64encode(png).decode()
        html = f'<img alt="{escape(self.alt_text)}" src="data:image/png;base64,{data}">'
        return {"image/png": data, "text/html": html}, {"image/png": about}

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        data = io.BytesIO()
        text = {"Description": self.alt_text}
        self.savefig(data, format="png", bbox_inches="tight", metadata=text)
        return data.getvalue(), {"alt": self.alt_text}


def new_figure(width: float, height: float) -> RunFigure:
    """Return an empty figure of so many inches."""
    figure = RunFigure(figsize=(width, height), layout="constrained", dpi=110)
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06)  # type: ignore[union-attr,call-arg]
    return figure


def ink() -> str:
    """Return the colour of lines and letters in the theme that is set."""
    return str(rcParams["text.color"])


def paper() -> str:
    """Return the colour behind them."""
    return str(rcParams["axes.facecolor"])


def dress(axes: Axes, *, grid: str = "both") -> None:
    """Give axes thin lines: no box, a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=ink(), alpha=0.15, linewidth=0.6)  # type: ignore[arg-type]
    axes.tick_params(labelsize=_SMALL)


def headline(axes: Axes, text: str) -> None:
    """Say above the axes what is seen in them."""
    axes.set_title(text, loc="left", fontsize=10)


def note(axes: Axes, text: str) -> None:
    """Say in the middle of empty axes why they are empty."""
    axes.grid(visible=False)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def legend(axes: Axes) -> None:
    """Explain the marks beside the axes."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=_SMALL,
            frameon=False,
        )  # fmt: skip


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """Explain the marks of these axes below all panels, where no panel gets narrower for it."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, fontsize=_SMALL,
            frameon=False, handlelength=3.0,
        )  # fmt: skip


def resolution_key(axes: Axes, resolution: str, count: int, line: str = "") -> None:
    """Have the legend explain a resolution's mark, large and opaque however it is drawn."""
    color, marker, label = RESOLUTION_STYLES[resolution]
    axes.plot(
        [], [], color=color, marker=marker, linestyle=line, markersize=_KEY_SIZES.get(marker, 6),
        label=f"{label} ({count:,})",
    )  # fmt: skip


def mark_downtime(axes: Axes, start_ms: float, end_ms: float) -> None:
    """Shade the time in which the guest ran nowhere; a line shows it however short it is."""
    axes.axvspan(start_ms, end_ms, color=VERMILION, alpha=0.25, linewidth=0, zorder=0)
    axes.axvline(start_ms, color=VERMILION, linewidth=0.8, zorder=1)


def duration(us: float) -> str:
    """Return a duration with the unit that suits it: 850 us, 3.2 ms, 1.5 s."""
    if 0 < us < 0.5:
        return "under 1 µs"
    scale, unit = (1.0, "µs") if us < 1e3 else (1e3, "ms") if us < 1e6 else (1e6, "s")
    value = us / scale
    return f"{value:.0f} {unit}" if value >= 100 or unit == "µs" else f"{value:.3g} {unit}"


def duration_ticks() -> FuncFormatter:
    """Return a formatter for axes in us."""
    return FuncFormatter(lambda us, _: duration(us) if us else "0")
