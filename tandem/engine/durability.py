"""How much of each stream lies outside this worker, and which streams wait for that (design §4.6).

Owns the rule: a stream of which the pool has not got the generated blocks runs at most `MAX_LAG_BLOCKS` ahead of it, unless the
pool makes no progress at all for `PATIENCE_S`; then it goes on unprotected, and that is counted. Without a pool nothing
waits. Pure: it reads marks and sets flags.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvpool.block_pool import BlockPool
from tandem.engine.sequence import Sequence

MAX_LAG_BLOCKS = 2
PATIENCE_S = 0.5


class Durability:
    """Called before each step with the sequences that generate."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._progress_s = 0.0
        self._lagging = False
        self.num_unprotected = 0
        """How often a stream went on without its protection."""
        self.num_held_back = 0
        """Steps that streams sat out for it."""

    def update(self, sequences: Iterable[Sequence], now_s: float) -> None:
        """Sets `num_kept_blocks` and `held_back` of each."""
        protected = self._pool.has_keepers
        num_losses = self._pool.num_kept_losses
        lagging: list[Sequence] = []
        for sequence in sequences:
            sequence.held_back = False
            if not protected or sequence.kept_at_loss != num_losses:  # copies may be gone: counted anew
                sequence.num_kept_blocks = 0
                sequence.kept_at_loss = num_losses
            if not protected:
                continue
            num_published = sequence.num_published_blocks
            if sequence.num_kept_blocks < num_published:
                kept = self._pool.num_kept(sequence.block_table[:num_published], sequence.num_kept_blocks)
                if kept:
                    sequence.num_kept_blocks += kept
                    sequence.unprotected = False
                    self._progress_s = now_s
                # A prompt's blocks are where they came from for a while: nobody waits for those.
                num_prompt = sequence.job.dispatch.num_prompt_tokens // self._block_size
                if num_published - max(sequence.num_kept_blocks, num_prompt) > MAX_LAG_BLOCKS:
                    lagging.append(sequence)
        if lagging and not self._lagging:
            self._progress_s = now_s  # its patience begins with the first one that lags
        self._lagging = bool(lagging)
        for sequence in lagging:
            if now_s - self._progress_s < PATIENCE_S:
                sequence.held_back = True
                self.num_held_back += 1
            elif not sequence.unprotected:
                sequence.unprotected = True
                self.num_unprotected += 1

    def position(self, sequence: Sequence) -> int:
        """Tokens of its stream whose KV is outside this worker."""
        return max(0, sequence.num_kept_blocks * self._block_size - sequence.job.dispatch.num_prompt_tokens)
