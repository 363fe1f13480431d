"""llama.cpp as a peer: its own C API through llama-cpp-python, flash attention on, one KV stream a sequence, greedy drawing.

Runs in `.peers/llama-cpp` (`make peers`). Prompts of a decode measurement are computed once and kept, as Tandem's are.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import random
import time
from dataclasses import dataclass

import llama_cpp as ll
from child import arguments, own_stdout, random_tokens, serve

PREFILL_TOKENS = 512
"""Tokens of one call of llama_decode at most; llama.cpp's own default for what is computed at once."""

ERROR_LEVEL = 4
"""GGML_LOG_LEVEL_ERROR, which the binding doesn't name."""


@dataclass
class Context:
    """A context for `batch` sequences, and how many tokens of a prompt each of them holds."""

    pointer: ll.llama_context_p
    prompt_tokens: int = 0


class Llama:
    def __init__(self, path: str, vocab: int, threads: int, max_len: int) -> None:
        ll.llama_backend_init()
        params = ll.llama_model_default_params()
        params.n_gpu_layers = 0
        model = ll.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise RuntimeError(f"llama.cpp can't load {path}")
        self._model = model
        self._vocab = vocab
        self._threads = threads
        self._max_len = max_len
        self._random = random.Random(7)
        self._contexts: dict[int, Context] = {}
        self._batch = ll.llama_batch_init(PREFILL_TOKENS, 0, 1)
        self._greedy = ll.llama_sampler_init_greedy()

    def _context(self, batch: int) -> Context:
        if batch not in self._contexts:
            params = ll.llama_context_default_params()
            # Every sequence has a stream of its own, padded to a multiple of 256 tokens.
            params.n_ctx = batch * -(-self._max_len // 256) * 256
            params.n_seq_max = batch
            params.n_batch = params.n_ubatch = PREFILL_TOKENS
            params.kv_unified = False
            params.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_ENABLED
            params.n_threads = params.n_threads_batch = self._threads
            pointer = ll.llama_init_from_model(self._model, params)
            if not pointer:
                raise RuntimeError(f"llama.cpp can't make a context of {params.n_ctx} tokens")
            self._contexts[batch] = Context(pointer)
        return self._contexts[batch]

    def _run(self, context: Context, items: list[tuple[int, int, int, bool]]) -> None:
        """One call of llama_decode; `items` are (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(items)
        for i, (token, position, sequence, logits) in enumerate(items):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, logits
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
        code = ll.llama_decode(context.pointer, batch)
        if code:
            raise RuntimeError(f"llama_decode of {len(items)} tokens answered {code}")

    def _draw(self, context: Context, row: int) -> int:
        return int(ll.llama_sampler_sample(self._greedy, context.pointer, row))

    def _compute_prompt(self, context: Context, sequence: int, length: int) -> int:
        """Computes a random prompt from an empty sequence; its first token."""
        tokens = random_tokens(self._random, self._vocab, length)
        num_last = 0
        for start in range(0, length, PREFILL_TOKENS):
            part = tokens[start : start + PREFILL_TOKENS]
            num_last = len(part)
            self._run(context, [(token, start + i, sequence, start + i + 1 == length) for i, token in enumerate(part)])
        return self._draw(context, num_last - 1)

    def prefill(self, batch: int, context: int) -> tuple[int, float]:
        """One prompt after the other."""
        state = self._context(batch)
        ll.llama_memory_clear(ll.llama_get_memory(state.pointer), True)
        state.prompt_tokens = 0
        began = time.perf_counter()
        for sequence in range(batch):
            self._compute_prompt(state, sequence, context)
        return batch * context, time.perf_counter() - began

    def decode(self, batch: int, context: int, tokens: int) -> tuple[int, float]:
        """From prompts that are there, or are computed now, untimed."""
        state = self._context(batch)
        memory = ll.llama_get_memory(state.pointer)
        if state.prompt_tokens != context:
            ll.llama_memory_clear(memory, True)
            for sequence in range(batch):
                self._compute_prompt(state, sequence, context)
            state.prompt_tokens = context
        else:
            for sequence in range(batch):
                ll.llama_memory_seq_rm(memory, sequence, context, -1)
        drawn = random_tokens(self._random, self._vocab, batch)
        began = time.perf_counter()
        for step in range(tokens):
            self._run(state, [(token, context + step, sequence, True) for sequence, token in enumerate(drawn)])
            drawn = [self._draw(state, sequence) for sequence in range(batch)]
        return batch * tokens, time.perf_counter() - began


# It would say a line a tensor; errors alone are kept, for the parent's message. It says nothing while it computes.
@ll.llama_log_callback
def _log(level: int, text: bytes, _data: ctypes.c_void_p) -> None:
    if level == ERROR_LEVEL:
        print(text.decode("utf-8", "replace"), end="", flush=True)


if __name__ == "__main__":
    options = arguments()
    answers = own_stdout()
    ll.llama_log_set(_log, ctypes.c_void_p(0))
    engine = Llama(options.model, options.vocab, len(options.cpus), options.max_len)
    serve(answers, importlib.metadata.version("llama-cpp-python"), engine)
