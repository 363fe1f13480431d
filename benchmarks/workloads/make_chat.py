"""Makes `chat.json`, the load of `tandem bench serve --against`: seeded conversations cut from `benchmarks/texts/alice.txt`.

Run it as `python benchmarks/workloads/make_chat.py`; it writes the same bytes every time. Standard library alone. The fields are
described in README.md beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

FOLDER = Path(__file__).resolve().parent
SEED = 2718
NUM_SYSTEM_PROMPTS = 4
SYSTEM_CHARS = 2_700
"""Some 700 tokens of SmolLM2's vocabulary, which has 3.84 characters of this text to a token."""
NUM_CONVERSATIONS = 192
NUM_TURNS = 4
TURN_CHARS = (80, 300)
"""Some 20 to 80 tokens."""
ANSWER_TOKENS = 48
THINK_S = (0.5, 2.0, 6.0)
"""Shortest, mean of the exponential distribution that they are drawn from, longest."""


def main() -> None:
    random = Random(SEED)
    words = (FOLDER.parent / "texts" / "alice.txt").read_text(encoding="utf-8").split()
    systems = []
    for _ in range(NUM_SYSTEM_PROMPTS):
        text, words = _take(words, SYSTEM_CHARS)
        systems.append(text)
    arrival, conversations = 0.0, []
    for _ in range(NUM_CONVERSATIONS):
        arrival += random.expovariate(1.0)
        system = random.randrange(NUM_SYSTEM_PROMPTS)
        turns = [_turn(random, words) for _ in range(NUM_TURNS)]
        conversations.append({"arrival": round(arrival, 4), "system": system, "turns": turns})
    load = {"answer_tokens": ANSWER_TOKENS, "systems": systems, "conversations": conversations}
    (FOLDER / "chat.json").write_text(json.dumps(load, indent=1) + "\n", encoding="utf-8")


def _turn(random: Random, words: list[str]) -> dict[str, object]:
    # From anywhere: turns may have words in common, but not their beginnings.
    text, _ = _take(words[random.randrange(len(words) - TURN_CHARS[1]) :], random.randint(*TURN_CHARS))
    shortest_s, mean_s, longest_s = THINK_S
    think_s = min(longest_s, max(shortest_s, random.expovariate(1 / mean_s)))
    return {"text": text, "think_s": round(think_s, 3)}


def _take(words: list[str], num_chars: int) -> tuple[str, list[str]]:
    """The first words that make at least so many characters, and those after them."""
    length, count = 0, 0
    while length < num_chars:
        length += len(words[count]) + 1
        count += 1
    return " ".join(words[:count]), words[count:]


if __name__ == "__main__":
    main()
