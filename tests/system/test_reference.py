"""Through router, prefill, transfer and decode, in fp32, the answers are those of `transformers`, token for token."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tandem.model_files import resolve_model
from tests import golden
from tests.system.harness import RunningCluster


@pytest.mark.timeout(400)
@pytest.mark.parametrize("longest", [520, pytest.param(3000, marks=pytest.mark.slow)])
def test_fp32_greedy_answers_of_the_cluster_equal_the_reference(tmp_path: Path, longest: int) -> None:
    running = RunningCluster(tmp_path, {"model": {"dtype": "fp32"}})
    try:
        running.start()
        cases = [case for case in golden.load() if len(case["ids"]) <= longest]
        assert len(cases) == (32 if longest == 3000 else 29)
        with ThreadPoolExecutor(4) as clients:
            answers = list(
                clients.map(
                    lambda case: running.generate(case["ids"], max_tokens=golden.NUM_TOKENS, ignore_eos=True), cases
                )
            )
        same = [golden.compare(case, answer.tokens[0]) for case, answer in zip(cases, answers, strict=True)]
        ties = [case["name"] for case, equal in zip(cases, same, strict=True) if not equal]
        assert len(ties) <= 2, ties
        assert all(len(answer.tokens[0]) == golden.NUM_TOKENS for answer in answers)
        assert sum(answer.run("decode").fetched_tokens > 0 for answer in answers) >= 5
    finally:
        codes = running.stop()
    assert set(codes.values()) == {0}, f"{codes}\n{running.logs()}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_golden_file_is_what_the_reference_says_today() -> None:
    from tests.reference import hf_reference

    model = hf_reference(resolve_model("smollm2-135m"), "fp32")
    for case in golden.load():
        tokens, gaps = golden.reference(model, case["ids"])
        assert golden.compare({**case, "gaps": gaps}, tokens), case["name"]
