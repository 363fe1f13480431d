"""Natural texts of one size, as prompts: the same for the router's clients and for its tokenizer alone.

Owns where they come from. They share words and no beginning, so no prompt is a prefix hit of another.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from random import Random

from tandem.errors import ConfigError

TEXT = Path(__file__).resolve().parents[3] / "benchmarks" / "texts" / "alice.txt"
TEXT_BYTES = 4096
NUM_TEXTS = 256
_MAX_WORDS = TEXT_BYTES // 2


@lru_cache(maxsize=4)
def texts(seed: int) -> tuple[str, ...]:
    """`NUM_TEXTS` texts of `TEXT_BYTES` bytes each, the same for the same seed. Raises ConfigError without a checkout."""
    if not TEXT.is_file():
        raise ConfigError(f"{TEXT} is not there: the router's end-to-end bench needs a checkout of Tandem's source")
    words = TEXT.read_text(encoding="utf-8").encode("ascii", "ignore").decode().split(" ")
    random = Random(seed)
    found = []
    for number in range(NUM_TEXTS):
        at = random.randrange(len(words) - _MAX_WORDS)
        found.append(f"{number}. {' '.join(words[at : at + _MAX_WORDS])}"[:TEXT_BYTES])
    return tuple(found)
