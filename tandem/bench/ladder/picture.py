"""The ladder as a picture: an SVG of its own, light or dark as the reader's screen is.

Owns the drawing; knows the figures and nothing of how they were made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from tandem.bench.ladder.results import Step

_WIDTH = 980
_TOP = 96
_ROW = 44
_LABELS = 236
_PANEL = 172
_GAP = 14
_STYLE = """
  .ground { fill: #ffffff } text { fill: #1f2328; font: 12px system-ui, sans-serif } .head { font-weight: 600 }
  .title { font-size: 16px; font-weight: 600 } .note { fill: #59636e; font-size: 11px } .line { stroke: #d1d9e0 }
  .bar { fill: #2f6fdd } .waste { fill: #d2691e } .range { stroke: #1a7f64; stroke-width: 3; stroke-linecap: round }
  .dot { fill: #1a7f64 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117 } text { fill: #e6edf3 } .note { fill: #9198a1 } .line { stroke: #3d444d }
    .bar { fill: #5b9bff } .waste { fill: #f0883e } .range { stroke: #3fb68b } .dot { fill: #3fb68b }
  }
"""


@dataclass(frozen=True, slots=True)
class _Panel:
    """One column: a head, and what it draws for a step at `(x, y)`."""

    head: str
    note: str
    draw: Callable[[Step, float, float], list[str]]


def draw(steps: Sequence[Step]) -> str:
    """The SVG document. `steps` must not be empty."""
    panels = [
        _Panel("tokens/s", "more is better", _bars(steps)),
        _Panel("time to first token", "p50 to p95, logarithmic", _ranges(steps, "ttft")),
        _Panel("time per output token", "p50 to p95, logarithmic", _ranges(steps, "tpot")),
        _Panel("KV memory wasted", "share of reserved slots", _shares),
    ]
    height = _TOP + _ROW * len(steps) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'role="img" aria-label="What each serving technique buys">',
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" width="{_WIDTH}" height="{height}" rx="8"/>',
        _text(16, 30, "What each technique buys: one workload, rung by rung", "title"),
    ]
    for number, panel in enumerate(panels):
        x = _LABELS + number * (_PANEL + _GAP)
        parts += [_text(x, 62, panel.head, "head"), _text(x, 78, panel.note, "note")]
    for row, step in enumerate(steps):
        y = _TOP + row * _ROW + _ROW / 2
        parts.append(f'<line class="line" x1="16" x2="{_WIDTH - 16}" y1="{y - _ROW / 2:g}" y2="{y - _ROW / 2:g}"/>')
        parts += _label(step.title, y)
        for number, panel in enumerate(panels):
            parts += panel.draw(step, _LABELS + number * (_PANEL + _GAP), y)
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, style: str = "") -> str:
    style = f' class="{style}"' if style else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _label(title: str, y: float) -> list[str]:
    """One line, or two where the title says more after a bracket or comma."""
    for mark in (" (", ", "):
        first, found, second = title.partition(mark)
        if found:
            return [_text(16, y - 3, first), _text(16, y + 12, found.strip(" ,") + second, "note")]
    return [_text(16, y + 4, title)]


def _bar(x: float, y: float, share: float, label: str, style: str) -> list[str]:
    width = max(1.0, share * (_PANEL - 52))
    rectangle = f'<rect class="{style}" x="{x:.1f}" y="{y - 8:.1f}" width="{width:.1f}" height="16" rx="2"/>'
    return [rectangle, _text(x + width + 5, y + 4, label)]


def _bars(steps: Sequence[Step]) -> Callable[[Step, float, float], list[str]]:
    highest = max(step.tokens_per_s for step in steps)
    return lambda step, x, y: _bar(x, y, step.tokens_per_s / highest, f"{step.tokens_per_s:.3g}", "bar")


def _shares(step: Step, x: float, y: float) -> list[str]:
    if step.wasted is None:
        return [_text(x, y + 4, "keeps no KV", "note")]
    return _bar(x, y, max(0.0, step.wasted), f"{100 * step.wasted:.1f} %", "waste")


def _ranges(steps: Sequence[Step], name: str) -> Callable[[Step, float, float], list[str]]:
    def pair(step: Step) -> tuple[float, float]:
        return getattr(step, f"{name}_p50_s"), getattr(step, f"{name}_p95_s")

    lowest = math.log(max(1e-6, min(pair(step)[0] for step in steps)))
    width = max(1e-6, math.log(max(1e-6, max(pair(step)[1] for step in steps))) - lowest)

    def drawn(step: Step, x: float, y: float) -> list[str]:
        low, high = (x + 6 + (_PANEL - 24) * (math.log(max(1e-6, value)) - lowest) / width for value in pair(step))
        p50, p95 = pair(step)
        # The label stays inside its panel: it begins at the range, or ends at the panel's edge.
        label_x = min(low - 4, x + _PANEL - 100)
        return [
            f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{y + 7:.1f}" y2="{y + 7:.1f}"/>',
            *(f'<circle class="dot" cx="{at:.1f}" cy="{y + 7:.1f}" r="4"/>' for at in (low, high)),
            _text(label_x, y - 4, f"{_seconds(p50)} – {_seconds(p95)}"),
        ]

    return drawn


def _seconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"
