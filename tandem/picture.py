"""Figures as a picture: rows with a bar or a range in each column, an SVG of its own, light or dark as the reader's screen is.

Owns the drawing; knows nothing of what the figures mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape  # nosec B406 # writes XML, parses none

_WIDTH = 980
_TOP = 96
_LABELS = 236
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
class Bar:
    """`share` of the column, 0 to 1; `waste` is drawn in another colour."""

    share: float
    label: str
    waste: bool = False


@dataclass(frozen=True, slots=True)
class Range:
    """Seconds; a column's ranges share one logarithmic scale."""

    low_s: float
    high_s: float


Cell = Bar | Range | str
"""A string is a note."""


@dataclass(frozen=True, slots=True)
class Column:
    """What it shows, how to read it, and a cell for each row."""

    head: str
    note: str
    cells: Sequence[Cell]


def draw(title: str, about: str, rows: Sequence[str], columns: Sequence[Column], row_height: int = 44) -> str:
    """The SVG document; `about` is for who can't see it. There is a row at least, and a column."""
    height = _TOP + row_height * len(rows) + 16
    width = (_WIDTH - _LABELS - 16) / len(columns) - _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(about)}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" width="{_WIDTH}" height="{height}" rx="8"/>',
        _text(16, 30, title, "title"),
    ]
    middles = [_TOP + row_height * (row + 0.5) for row in range(len(rows))]
    for label, y in zip(rows, middles, strict=True):
        top = y - row_height / 2
        parts.append(f'<line class="line" x1="16" x2="{_WIDTH - 16}" y1="{top:g}" y2="{top:g}"/>')
        parts += _label(label, y)
    for number, column in enumerate(columns):
        x = _LABELS + number * (width + _GAP)
        parts += [_text(x, 62, column.head, "head"), _text(x, 78, column.note, "note")]
        ranges = [cell for cell in column.cells if isinstance(cell, Range)]
        for cell, y in zip(column.cells, middles, strict=True):
            parts += _cell(cell, x, y, width, ranges)
    return "\n".join([*parts, "</svg>", ""])


def seconds(value: float) -> str:
    """For labels."""
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def _cell(cell: Cell, x: float, y: float, width: float, ranges: Sequence[Range]) -> list[str]:
    match cell:
        case str():
            return [_text(x, y + 4, cell, "note")]
        case Bar():
            long = max(1.0, min(1.0, max(0.0, cell.share)) * (width - 52))
            style = "waste" if cell.waste else "bar"
            rectangle = f'<rect class="{style}" x="{x:.1f}" y="{y - 8:.1f}" width="{long:.1f}" height="16" rx="2"/>'
            return [rectangle, _text(x + long + 5, y + 4, cell.label)]
        case Range():
            return _range(cell, x, y, width, ranges)


def _range(cell: Range, x: float, y: float, width: float, ranges: Sequence[Range]) -> list[str]:
    lowest = math.log(max(1e-6, min(other.low_s for other in ranges)))
    scale = max(1e-6, math.log(max(1e-6, max(other.high_s for other in ranges))) - lowest)
    low, high = (
        x + 6 + (width - 24) * (math.log(max(1e-6, value)) - lowest) / scale for value in (cell.low_s, cell.high_s)
    )
    # The label stays inside its column: it begins at the range, or ends at the column's edge.
    label_x = min(low - 4, x + width - 100)
    return [
        f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{y + 7:.1f}" y2="{y + 7:.1f}"/>',
        *(f'<circle class="dot" cx="{at:.1f}" cy="{y + 7:.1f}" r="4"/>' for at in (low, high)),
        _text(label_x, y - 4, f"{seconds(cell.low_s)} – {seconds(cell.high_s)}"),
    ]


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
