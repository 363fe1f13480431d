"""Policies side by side as a picture.

Owns which figures are shown; `tandem.picture` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tandem import picture
from tandem.picture import Bar, Column, Range
from tandem.sim.compare import Result

_ROW = 32


def draw(results: Sequence[Result], workers: int) -> str:
    """The SVG document: who serves most as promised first, at each rate. `results` must not be empty."""
    rates = list(dict.fromkeys(result.rate for result in results))
    ordered = [r for rate in rates for r in sorted(results, key=lambda r: -r.goodput) if r.rate == rate]
    columns = [
        Column("served as promised", "of all requests", [Bar(r.goodput, f"{r.goodput:.1%}") for r in ordered]),
        Column("time to first token", "p50 to p90, logarithmic", [_range(r.ttft_p50, r.ttft_p90) for r in ordered]),
        Column("time per output token", "p50 to p90, logarithmic", [_range(r.tpot_p50, r.tpot_p90) for r in ordered]),
        Column("prompt tokens found", "in any tier", [Bar(r.hit_rate, f"{r.hit_rate:.1%}") for r in ordered]),
    ]
    rows = [_row(result, several=len(rates) > 1) for result in ordered]
    first = ordered[0]
    rate = f"{first.rate:.1f} requests/s" if len(rates) == 1 else " and ".join(f"{rate:.1f}" for rate in rates)
    title = f"Where requests go: {workers} workers, {rate}" + (" requests/s" if len(rates) > 1 else "")
    return picture.draw(title, "Routing policies side by side on one trace", rows, columns, _ROW)


def _range(low_s: float, high_s: float) -> Range | str:
    if not (math.isfinite(low_s) and math.isfinite(high_s)) or low_s <= 0.0:
        return "–"
    return Range(low_s, high_s)


def _row(result: Result, several: bool) -> str:
    setting = result.setting.replace(",", "")
    notes = [setting] if setting else []
    if several:
        notes.append(f"{result.load:.0%} of capacity" if result.load is not None else f"{result.rate:.1f}/s")
    return f"{result.policy} ({' · '.join(notes)})" if notes else result.policy
