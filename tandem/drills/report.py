"""A run of drills as a table, as JSON lines, and as a page with a timeline of each drill.

Owns the form. The page is one file that needs nothing from anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from tandem.drills.run import Result, Span

_WIDTH, _LABEL, _ROW, _MAX_ROWS = 900, 110, 16, 40
_PAUSE_S = 0.25
"""A stream that stands still for so long is drawn with a gap."""
_STYLE = """
  :root { color-scheme: light dark; --ink: #1f2328; --ground: #fff; --note: #59636e; --line: #d1d9e0; --bar: #2f6fdd;
          --bad: #cf222e; --good: #1a7f64; --mark: #d2691e }
  @media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --ground: #0d1117; --note: #9198a1; --line: #3d444d;
          --bar: #5b9bff; --bad: #ff7b72; --good: #3fb68b; --mark: #f0883e } }
  body { background: var(--ground); color: var(--ink); font: 14px system-ui, sans-serif; max-width: 960px; margin: 2em auto;
         padding: 0 1em }
  table { border-collapse: collapse } td, th { padding: 2px 10px 2px 0; text-align: left; vertical-align: top }
  .ok { color: var(--good) } .bad { color: var(--bad) } .note { color: var(--note) } h2 { margin: 1.6em 0 .2em }
  svg text { fill: var(--note); font: 11px system-ui, sans-serif } svg .wait { stroke: var(--line); stroke-width: 3 }
  svg .run { stroke: var(--bar); stroke-width: 7 } svg .mark { stroke: var(--mark); stroke-width: 1.5 }
  svg .step { fill: var(--mark) } svg .bad { fill: var(--bad) }
"""


def lines(result: Result) -> list[dict[str, Any]]:
    """One object a check, as `tandem audit` prints them."""
    return [
        {
            "check": f"{result.name}: {check.check}",
            "ok": check.ok,
            "evidence": check.evidence,
            "seconds": result.seconds,
        }
        for check in result.checks
    ]


def table(results: Sequence[Result]) -> Table:
    """A drill a row; of a failed one what failed."""
    shown = Table(box=SIMPLE, pad_edge=False)
    for column in ("", "drill", "seconds", "checks", "longest pause, or what failed"):
        shown.add_column(column, justify="right" if column in ("seconds", "checks") else "left")
    for result in results:
        failed = [f"{check.check}: {check.evidence}" for check in result.checks if not check.ok]
        pauses = [check.evidence for check in result.checks if check.check.startswith("recovery")]
        said = "\n".join(failed) if failed else (pauses[0].partition(";")[0] if pauses else "")
        good = sum(check.ok for check in result.checks)
        shown.add_row(
            "ok" if result.ok else "FAIL", result.name, f"{result.seconds:.1f}", f"{good}/{len(result.checks)}", said
        )
    return shown


def page(results: Sequence[Result], title: str) -> str:
    """The HTML document."""
    good = sum(result.ok for result in results)
    total_s = sum(result.seconds for result in results)
    rows = "".join(
        f'<tr><td class="{"ok" if r.ok else "bad"}">{"ok" if r.ok else "FAIL"}</td>'
        f'<td><a href="#{escape(r.name)}">{escape(r.name)}</a></td><td>{r.seconds:.1f} s</td>'
        f'<td class="note">{escape(r.about)}</td></tr>'
        for r in results
    )
    parts = [_section(result) for result in results]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{escape(title)}</h1><p>{good} of {len(results)} drills hold, in {total_s:.0f} s.</p>"
        f"<table>{rows}</table>{''.join(parts)}</html>\n"
    )


def _section(result: Result) -> str:
    checks = "".join(
        f'<tr><td class="{"ok" if check.ok else "bad"}">{"ok" if check.ok else "FAIL"}</td><td>{escape(check.check)}</td>'
        f'<td class="note">{escape(check.evidence)}</td></tr>'
        for check in result.checks
    )
    return (
        f'<h2 id="{escape(result.name)}">{escape(result.name)}</h2><p class="note">{escape(result.about)}</p>'
        f"{timeline(result)}<table>{checks}</table>"
    )


def timeline(result: Result) -> str:
    """Requests as bars, from their first to their last token, with gaps where they stood still; steps as marks."""
    spans = result.spans[:_MAX_ROWS]
    if not spans:
        return ""
    end_s = max([span.end_s for span in spans] + [at for at, _ in result.marks] + [0.1])
    scale = (_WIDTH - _LABEL - 20) / end_s
    top = 14 * len(result.marks) + 8
    height = top + _ROW * len(spans) + 24
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" width="100%" role="img" aria-label="timeline of {escape(result.name)}">'
    ]
    for number, span in enumerate(spans):
        parts += _row(span, top + _ROW * number + 8, scale)
    for number, (at_s, name) in enumerate(result.marks):
        x = _LABEL + at_s * scale
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{14 * number + 6}" y2="{height - 20}"/>')
        side = ("end", -4) if x > _WIDTH * 0.75 else ("start", 4)
        parts.append(
            f'<text class="step" x="{x + side[1]:.1f}" y="{14 * number + 12}" text-anchor="{side[0]}">'
            f"{escape(name)} at {at_s:.2f} s</text>"
        )
    left = len(result.spans) - len(spans)
    note = f"0 to {end_s:.1f} s" + (f"; {left} requests more" if left else "")
    parts.append(f'<text x="{_LABEL}" y="{height - 6}">{note}</text></svg>')
    return "".join(parts)


def _row(span: Span, y: float, scale: float) -> list[str]:
    begin, end = _LABEL + span.begin_s * scale, _LABEL + span.end_s * scale
    style = "" if span.end in ("completed", "left") else ' class="bad"'
    parts = [
        f'<text x="0" y="{y + 4:.1f}">{escape(span.key)}</text>',
        f'<line class="wait" x1="{begin:.1f}" x2="{max(end, begin + 1):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>',
    ]
    if span.end != "completed":
        parts.append(f'<text{style} x="{end + 4:.1f}" y="{y + 4:.1f}">{escape(span.end)}</text>')
    run: list[float] = []
    for at_s in (*span.tokens_s, float("inf")):
        if run and at_s - run[-1] > _PAUSE_S:
            x1, x2 = _LABEL + run[0] * scale, _LABEL + run[-1] * scale
            parts.append(f'<line class="run" x1="{x1:.1f}" x2="{max(x2, x1 + 1):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            run = []
        run.append(at_s)
    return parts
