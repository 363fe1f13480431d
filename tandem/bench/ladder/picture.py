"""The ladder as a picture: its figures, row by row.

Owns which figures are shown; `tandem.picture` draws them.
"""

from __future__ import annotations

from collections.abc import Sequence

from tandem import picture
from tandem.bench.ladder.results import Step
from tandem.picture import Bar, Column, Range


def draw(steps: Sequence[Step]) -> str:
    """The SVG document. `steps` must not be empty."""
    highest = max(step.tokens_per_s for step in steps)
    columns = [
        Column(
            "tokens/s",
            "more is better",
            [Bar(step.tokens_per_s / highest, f"{step.tokens_per_s:.3g}") for step in steps],
        ),
        Column(
            "time to first token",
            "p50 to p95, logarithmic",
            [Range(step.ttft_p50_s, step.ttft_p95_s) for step in steps],
        ),
        Column(
            "time per output token",
            "p50 to p95, logarithmic",
            [Range(step.tpot_p50_s, step.tpot_p95_s) for step in steps],
        ),
        Column(
            "KV memory wasted",
            "share of reserved slots",
            [
                "keeps no KV" if step.wasted is None else Bar(step.wasted, f"{100 * step.wasted:.1f} %", waste=True)
                for step in steps
            ],
        ),
    ]
    title = "What each technique buys: one workload, rung by rung"
    return picture.draw(title, "What each serving technique buys", [step.title for step in steps], columns)
