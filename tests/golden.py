"""The golden file: greedy answers of `transformers` in fp32, which the engine and the cluster must reproduce.

`python -m tests.golden` (some minutes) makes `tests/data/greedy_fp32.json` anew; `make test-full` compares the two.
Each case is `{"name", "ids", "tokens", "gaps"}`: prompt ids, the 64 greedy tokens that follow, and at each of them the distance
between the two best logits. Two right implementations may only differ where that distance is below `TIE`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.tokenizer.chat_template import Message

FILE = Path(__file__).with_name("data") / "greedy_fp32.json"
NUM_TOKENS = 64
TIE = 1e-3
RAW_LENGTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65, 129, 200, 256, 257, 511, 513, 1000, 2000, 3000)
QUESTIONS = (
    "Write one sentence about the sea.",
    "What is the capital of France?",
    "List three colours.",
    "Explain in two sentences why the sky is blue.",
    "Translate 'good morning' into Spanish.",
    "Write a haiku about autumn rain.",
    "What is 17 + 25?",
    "Give me a recipe for pancakes in five steps.",
    "def fibonacci(n):  # finish this function",
    "Who wrote Hamlet? Answer with the name only.",
    "Summarise: the cat sat on the mat, the dog sat on the cat, and the mat was not amused.",
)
_SUBJECTS = ("The harbour", "A tired clerk", "My neighbour", "The old engine", "Every student", "The river", "Nobody")
_VERBS = ("remembers", "repairs", "sells", "paints", "forgets", "measures", "carries")
_OBJECTS = (
    "the lighthouse",
    "seven wooden boxes",
    "a letter from 1892",
    "the broken clock",
    "warm bread",
    "its own name",
)
_ENDS = (
    "before dawn.",
    "in the rain.",
    "without a word.",
    "every 3rd Tuesday.",
    "for 12.50 a piece.",
    "and laughs.",
    "again!",
)


def text(num_sentences: int, seed: int) -> str:
    """Sentences that are never the same twice, our own."""
    rng = random.Random(seed)
    parts = (rng.choice(words) for _ in range(num_sentences) for words in (_SUBJECTS, _VERBS, _OBJECTS, _ENDS))
    return " ".join(parts)


def prompts(tokenizer: Any) -> list[tuple[str, list[int]]]:
    """32 prompts of 1 to 3,000 tokens: cut text, and questions in the chat template."""
    cases = []
    for seed, length in enumerate(RAW_LENGTHS):
        ids = tokenizer.encode(text(length // 4 + 8, seed))[:length]
        assert len(ids) == length
        cases.append((f"raw-{length}", ids))
    for i, question in enumerate(QUESTIONS):
        cases.append((f"chat-{i}", tokenizer.encode(tokenizer.render_chat([Message("user", question)]))))
    return cases


def load() -> list[dict[str, Any]]:
    """The cases of the golden file."""
    cases: list[dict[str, Any]] = json.loads(FILE.read_text())
    return cases


def compare(case: dict[str, Any], tokens: Sequence[int]) -> bool:
    """Whether `tokens` are the golden ones; False at an allowed difference (a tie). AssertionError at any other.

    Tokens end where the stream ended: at an end-of-sequence token, which the reference has and a stream has not.
    """
    expected = case["tokens"][: len(tokens)]
    for i, (got, want) in enumerate(zip(tokens, expected, strict=True)):
        if got != want:
            gap = case["gaps"][i]
            assert gap < TIE, f"{case['name']}: token {i} is {got}, the reference has {want}, {gap} ahead of its second"
            return False
    return True


def reference(model: Any, ids: Sequence[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens of a `transformers` model and the distance between the two best logits at each."""
    import torch

    tokens: list[int] = []
    gaps: list[float] = []
    past: Any = None
    step = torch.tensor([list(ids)])
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            out = model(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
            best = out.logits[0, -1].float().topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(round(float(best.values[0] - best.values[1]), 6))
            step = best.indices[:1].view(1, 1)
    return tokens, gaps


def main() -> None:
    from tandem.model_files import resolve_model
    from tandem.tokenizer.tokenizer import load_tokenizer
    from tests.reference import hf_reference

    path = resolve_model("smollm2-135m")
    model = hf_reference(path, "fp32")
    cases = []
    for name, ids in prompts(load_tokenizer(path)):
        tokens, gaps = reference(model, ids)
        cases.append({"name": name, "ids": ids, "tokens": tokens, "gaps": gaps})
        print(name, len(ids), min(gaps))
    FILE.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()
