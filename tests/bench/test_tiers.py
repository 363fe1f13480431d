"""The tiers bench: what it refuses, and that it believes no tier that it did not see."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest

from protos import tandem_pb2 as pb
from tandem.bench.tiers import PROMPT_TOKENS, _check_tier, parts_named
from tandem.cli.main import main
from tandem.errors import ConfigError, TandemError


def answer(cached: int, fetched: Sequence[tuple[str, int]]) -> pb.Completed:
    items = [pb.FetchedFrom(process="pool-0", tier=tier, num_blocks=num) for tier, num in fetched]
    return pb.Completed(num_cached_tokens=cached, runs=[pb.RoleRun(role="decode", fetched=items)])


def test_parts_are_taken_once_each_and_others_refused() -> None:
    assert parts_named(["handover", "ttft", "handover"]) == ["handover", "ttft"]
    for wrong in ([], ["ttft", "tft"]):
        with pytest.raises(ConfigError, match=r"no measurement .*\(ttft, handover, checkpoints are\)"):
            parts_named(wrong)


@pytest.mark.parametrize(
    ("cached", "fetched"),
    [
        (PROMPT_TOKENS - 1, [("HOST", 124)]),
        (PROMPT_TOKENS - 1, [("DISK", 60), ("HOST", 64)]),
        (PROMPT_TOKENS // 2, [("DISK", 62)]),
    ],
)
def test_a_prompt_that_came_from_elsewhere_is_an_error(cached: int, fetched: Sequence[tuple[str, int]]) -> None:
    with pytest.raises(TandemError, match="was to be found in DISK"):
        _check_tier(answer(cached, fetched), "DISK")
    _check_tier(answer(PROMPT_TOKENS - 1, [("DISK", 124), ("HOST", 1)]), "DISK")


def test_the_command_says_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tandem", "bench", "tiers", "--what", "ttft,speed"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "'speed' is no measurement" in capsys.readouterr().err
