"""What a worker takes on: its limits, and the check of a dispatch against them.

Owns no state. What exceeds a limit can never run here, however long it waits; room that is short just now is the
scheduler's.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpool.keys import tokens_from_bytes
from protos.control import Dispatch
from tandem.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What a worker takes on. `max_model_len` counts prompt and answer."""

    max_model_len: int
    vocab_size: int
    max_running: int
    max_step_tokens: int
    recompute_limit_tokens: int
    fetch_timeout_s: float
    block_size: int
    slab_bytes: int

    def checked_tokens(self, dispatch: Dispatch) -> list[int]:
        """The dispatch's token ids. Raises InvalidRequest, with the limit, if it can never run here."""
        try:
            tokens = tokens_from_bytes(dispatch.token_ids)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        if not tokens or dispatch.num_prompt_tokens > len(tokens):
            raise InvalidRequest(f"{len(tokens)} tokens with a prompt of {dispatch.num_prompt_tokens}")
        if max(tokens) >= self.vocab_size:
            raise InvalidRequest(f"token id {max(tokens)} is not below the vocabulary's {self.vocab_size}")
        num_tokens = dispatch.num_prompt_tokens + dispatch.sampling.max_tokens
        if num_tokens > self.max_model_len:
            raise InvalidRequest(
                f"prompt and answer are {num_tokens} tokens, this worker holds at most {self.max_model_len}"
            )
        if len(tokens) >= num_tokens:
            raise InvalidRequest(f"{len(tokens)} tokens leave nothing of {num_tokens} to generate")
        if dispatch.n > self.max_running:
            raise InvalidRequest(f"{dispatch.n} samples, this worker runs at most {self.max_running} sequences")
        return tokens
