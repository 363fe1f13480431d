"""The process in which a grammar is tried: `python -m tandem.grammar.trial_process`, a grammar in, a verdict out.

Owns its own limits, which it sets before it reads anything. The verdict is JSON: the reason of a refusal, or "".
"""

from __future__ import annotations

import json
import resource
import sys
from typing import TypedDict

import llguidance

from tandem.grammar.form import Wrapped, compiled

CPU_S = 2
"""Of the processor, the start of the process included."""
MAX_BYTES = 64 * 2**20
"""What is compiled may take so much."""
_ADDRESS_BYTES = 1024**3
"""More is refused by the system: for the process, its libraries and what is compiled."""


class Asked(TypedDict):
    """A grammar, and what of a vocabulary its compilation may depend on: `marks` are `(id, text)`."""

    kind: str
    text: str
    vocab_size: int
    marks: list[tuple[int, str]]
    eos_token_ids: list[int]


def _tokens(asked: Asked) -> llguidance.LLTokenizer:
    """The model's marks under their ids, and a token for each byte under others."""
    tokens = [b""] * max(asked["vocab_size"], 256 + len(asked["marks"]) + len(asked["eos_token_ids"]))
    taken = {token_id for token_id, _ in asked["marks"]} | set(asked["eos_token_ids"])
    for token_id, text in asked["marks"]:
        tokens[token_id] = text.encode()
    free = (token_id for token_id in range(len(tokens)) if token_id not in taken)
    for byte in range(256):
        tokens[next(free)] = bytes([byte])
    ends = asked["eos_token_ids"]
    wrapped = Wrapped(tokens, [token_id for token_id, _ in asked["marks"]], ends[0])
    return llguidance.LLTokenizer(wrapped, eos_token=ends, slices=[])


def _used_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def verdict(asked: Asked) -> str:
    """Why no answer can be held to the grammar; "" if one can."""
    tokens = _tokens(asked)
    before = _used_bytes()
    try:
        compiled(tokens, asked["kind"], asked["text"])
    except ValueError as error:
        return str(error)
    used = _used_bytes() - before
    if used > MAX_BYTES:
        return f"compiled it takes {used // 2**20} MiB, the limit is {MAX_BYTES // 2**20} MiB"
    return ""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_BYTES, _ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    json.dump(verdict(json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main()
