"""A run as lines and as a page."""

from __future__ import annotations

import re

from tandem.drills.checks import Check
from tandem.drills.report import lines, page, table
from tandem.drills.run import Result, Span

GOOD = Result("good", "It holds.", [Check("one", True, "1 of 1")], 2.5)
BAD = Result(
    "bad",
    "It <breaks>.",
    [Check("one", True, "1 of 1"), Check("two", False, "3 < 4")],
    4.0,
    [Span("q-0", 0.0, 3.0, (0.5, 0.6, 2.0, 2.1), "completed"), Span("q-1", 0.0, 1.0, (), "worker_lost")],
    [(0.7, "KILL decode-0")],
)


def test_a_check_a_line_as_audits_print_them() -> None:
    assert lines(BAD) == [
        {"check": "bad: one", "ok": True, "evidence": "1 of 1", "seconds": 4.0},
        {"check": "bad: two", "ok": False, "evidence": "3 < 4", "seconds": 4.0},
    ]


def test_the_table_has_a_drill_a_row() -> None:
    assert table([GOOD, BAD]).row_count == 2


def test_the_page_shows_every_drill_and_needs_nothing_from_outside() -> None:
    text = page([GOOD, BAD], "A run")
    assert "1 of 2 drills hold" in text
    assert "It &lt;breaks&gt;." in text
    assert "KILL decode-0 at 0.70 s" in text
    assert text.count('class="run"') == 2, "a bar before the pause and one after it"
    assert not re.findall(r"(?:src|href)=\"(?!#)", text)
    assert "http" not in text
