"""The Console's figures as HTML: the guest, the transfer, the faults; text first, bars beside."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from migkit.view.style import duration
from migkit.widgets.live import SENT

if TYPE_CHECKING:
    from migkit.widgets.live import Live

_MIB = 1 << 20
_STRIPES = "repeating-linear-gradient({}deg,transparent 0 6px,{} 6px 8px)"
_KINDS = dict(zip(SENT, (
    ("pre-copy", "#7CC7F0", ""),
    ("background", "#004C80", _STRIPES.format(90, "#FFFFFF")),
    ("requested", "#CC8800", _STRIPES.format(45, "#000000")),
), strict=True))  # fmt: skip
_SEEN = (
    "<footer>Waits as user space sees them: from reading a fault to placing its page, without "
    "the kernel's part. <code>run.faults</code> has that, where the probe runs.</footer>"
)
STYLE = (
    "<style>.migkit-cards{display:grid;gap:8px;"
    "grid-template-columns:repeat(auto-fit,minmax(290px,1fr));"
    "color:var(--jp-ui-font-color1,inherit);font:15px/1.45 var(--jp-ui-font-family,sans-serif)}"
    ".migkit-cards section{border:1px solid #8c8c8c;border-radius:6px;padding:6px 8px;"
    "min-width:0;box-sizing:border-box}.migkit-cards footer{font-size:14px;margin-top:4px}"
    ".migkit-cards h4{margin:0 0 4px;font-size:15px}"
    ".migkit-cards td{padding:0 8px 0 0;white-space:nowrap}.migkit-cards td:nth-child(2)"
    "{text-align:right;font-variant-numeric:tabular-nums;font-weight:600}"
    ".migkit-bar{display:inline-block;height:13px;border:1px solid #666;vertical-align:-2px}"
    "</style>"
)


def cards(live: Live) -> str:
    """Return the cards of a migration as it is now."""
    return f'{STYLE}<div class="migkit-cards">{_guest(live)}{_transfer(live)}{_faults(live)}</div>'


def _card(title: str, rows: list[tuple[str, str, str]], foot: str = "") -> str:
    body = "".join(f"<tr><td>{a}</td><td>{b}</td><td>{c}</td></tr>" for a, b, c in rows)
    return f"<section><h4>{title}</h4><table>{body}</table>{foot}</section>"


def _guest(live: Live) -> str:
    source, n_pages = live.figures["source"], len(live.history.states)
    left = min(source["remaining_pages"], n_pages)
    rows = [
        ("runs at", live.running or "nowhere", ""),
        ("steps", f"{live.steps:,}", ""),
        ("steps a second", f"{live.rate:,.0f}", ""),
        ("pages to send", f"{left:,}", _bar(left / n_pages, "#8C8C8C", "")),
        ("pass over RAM", f"{source['round']}", ""),
    ]
    return _card("Guest", rows, _curve(live))


def _transfer(live: Live) -> str:
    source, destination = live.figures["source"], live.figures["destination"]
    most = max(1, *(source[key] for key in SENT))
    rows = [
        (label, f"{source[key] / _MIB:,.1f} MiB", _bar(source[key] / most, color, pattern))
        for key, (label, color, pattern) in _KINDS.items()
    ]
    rows += [
        ("bandwidth", f"{live.bandwidth / _MIB:,.0f} MiB/s", ""),
        ("zero pages", f"{destination['zero_pages']:,}", ""),
        ("pages discarded", f"{destination['discarded_pages']:,}", ""),
    ]
    return _card("Sent", rows)


def _faults(live: Live) -> str:
    counts, waits = live.figures["destination"], live.latencies

    def wait(us: float) -> str:
        return duration(us) if len(waits) else "not known yet"

    rows = [
        ("page faults", f"{counts['faults']:,}", ""),
        ("answered on the spot", f"{counts['local_faults']:,}", ""),
        ("waiting now", f"{counts['outstanding']:,}", ""),
        ("half waited less than", wait(waits.quantile_us(0.5)), ""),
        ("99 % waited less than", wait(waits.quantile_us(0.99)), ""),
        ("longest wait", wait(waits.greatest_us), ""),
    ]
    return _card("Faults of the destination guest", rows, _SEEN)


def _bar(share: float, color: str, pattern: str) -> str:
    image = f"background-image:{pattern};" if pattern else ""
    return (
        f'<span class="migkit-bar" style="width:{max(0.0, min(1.0, share)) * 72:.0f}px;'
        f'background-color:{color};{image}"></span>'
    )


def _curve(live: Live) -> str:
    """Draw steps a second over the last seconds; dashed where the guest ran at the destination."""
    points = list(live.curve)
    most = max((rate for _, rate, _ in points), default=0.0)
    if len(points) < 2 or most <= 0:
        return ""
    first, last = points[0][0], points[-1][0]
    scale = 280 / max(last - first, 1e-3)
    parts = []
    for side, dash in (("source", ""), ("destination", 'stroke-dasharray="6 3"')):
        line = " ".join(
            f"{(t - first) * scale:.1f},{42 - rate / most * 40:.1f}"
            for t, rate, where in points
            if where == side
        )
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="2" {dash}/>'
        )
    says = f"steps a second, at most {most:,.0f}, over {last - first:.0f} s"
    return (
        '<svg viewBox="0 0 280 44" style="width:100%;height:44px" preserveAspectRatio="none" '
        f'role="img" aria-label="{says}">'
        f"{''.join(parts)}</svg><footer>{says};<br>dashed: at the destination</footer>"
    )


def events(lines: list[str]) -> str:
    """Return the last trace events as a block of text."""
    text = "\n".join(escape(line) for line in lines) or "none yet"
    return (
        '<pre style="font-size:13px;line-height:1.35;margin:0;overflow-x:auto;'
        f'color:var(--jp-ui-font-color1,inherit)">{text}</pre>'
    )
