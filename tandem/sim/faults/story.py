"""What happened in a run, for people.

Owns the lines and when they were said. A run without a story keeps nothing: it is told when a seed that failed is run again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

LOGGERS = ("router", "kvpool", "tandem")


class Story:
    """The lines of one run. `digest` is of all lines so far, for the question whether two runs were the same."""

    def __init__(self, *, kept: bool) -> None:
        self.kept = kept
        self.lines: list[str] = []
        self._digest = hashlib.sha256()

    def add(self, time_s: float, text: str) -> None:
        """`time_s` since the begin of the run."""
        line = f"{time_s:9.4f}  {text}"
        self._digest.update(line.encode())
        if self.kept:
            self.lines.append(line)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()[:16]


class LogToStory(logging.Handler):
    """What production code logs becomes part of the story, or is dropped where none is kept. A context."""

    def __init__(self, story: Story) -> None:
        super().__init__(logging.INFO)
        self._story = story
        self._before: list[tuple[logging.Logger, int, bool]] = []
        self.time_s: Callable[[], float] = lambda: 0.0
        self.who: Callable[[], str] = lambda: ""

    def emit(self, record: logging.LogRecord) -> None:
        self._story.add(self.time_s(), f"{self.who():<10} log: {record.getMessage()}")

    def __enter__(self) -> LogToStory:
        for name in LOGGERS:
            logger = logging.getLogger(name)
            self._before.append((logger, logger.level, logger.propagate))
            logger.propagate = False
            logger.setLevel(logging.INFO if self._story.kept else logging.CRITICAL)
            logger.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        for logger, level, propagate in self._before:
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = propagate
