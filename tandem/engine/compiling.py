"""Grammars are compiled beside the engine's thread: no stream waits for another one's grammar.

Owns the thread that does it, and nothing else. Dispatches with a grammar come into line when their matcher is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from protos.control import Grammar
from tandem.errors import InvalidRequest
from tandem.grammar.matcher import Grammars, Matcher

log = logging.getLogger(__name__)


class Compiling:
    """A MatcherSource that answers later. Its thread begins with the first grammar."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self.on_ready: Callable[[], None] = lambda: None
        """Called, on that thread, when a matcher has been made or could not be."""

    def begin(self, grammar: Grammar, token_ids: Sequence[int]) -> Future[Matcher]:
        """As MatcherSource. A future that is cancelled before its turn costs nothing."""
        future = self._executor.submit(self._grammars.matcher, grammar, token_ids)
        future.add_done_callback(lambda _: self.on_ready())
        future.add_done_callback(lambda done: self._prepare(grammar, done))
        return future

    def close(self) -> None:
        """Compiles nothing more; what is being compiled is waited for."""
        self._executor.shutdown(cancel_futures=True)

    def _prepare(self, grammar: Grammar, done: Future[Matcher]) -> None:
        """Whoever comes next with that grammar finds it compiled. On the thread that made the last one, after everyone else."""
        if done.cancelled() or done.exception() is not None:
            return
        try:
            self._executor.submit(self._keep, grammar)
        except RuntimeError:  # it is being closed
            return

    def _keep(self, grammar: Grammar) -> None:
        try:
            self._grammars.prepare(grammar)
        except InvalidRequest as error:
            log.warning("a grammar that has been compiled before can't be: %s", error)
