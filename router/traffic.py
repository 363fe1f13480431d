"""What has come to this router, counted: totals from which rates are made elsewhere.

Owns the sums. Nothing here forgets or divides; two looks at them are a rate. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """Totals since the router began. A request is counted once, when it may first be placed. Pairs are of a computed token and
    one that it attends to; squares are of one request's uncached tokens: with them a mean becomes a spread."""

    num_requests: int = 0
    num_samples: int = 0
    prompt_tokens: int = 0
    uncached_tokens: int = 0
    """Of the prompts, what no place was known to hold."""
    uncached_pairs: float = 0.0
    uncached_squares: float = 0.0
    here_tokens: int = 0
    """Sent to decode workers to be computed there."""
    here_pairs: float = 0.0

    def arrived(self, num_tokens: int, uncached_tokens: int, num_samples: int = 1) -> None:
        """A request whose prompt has so many tokens, of which nobody holds the last `uncached_tokens`."""
        self.num_requests += 1
        self.num_samples += num_samples
        self.prompt_tokens += num_tokens
        self.uncached_tokens += uncached_tokens
        self.uncached_pairs += uncached_tokens * (num_tokens - uncached_tokens / 2)
        self.uncached_squares += uncached_tokens**2

    def computed_here(self, num_tokens: int, num_pairs: float) -> None:
        """A decode worker was given so much of a prompt to compute."""
        self.here_tokens += num_tokens
        self.here_pairs += num_pairs
