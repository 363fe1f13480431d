"""Traces are read whole or refused with the line; the conversation trace has the hit rate that it is known for."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import ConfigError
from tandem.sim.trace import infinite_cache_hit_rate, read_trace

CONVERSATION = Path(__file__).resolve().parents[2] / "benchmarks" / "traces" / "mooncake_conversation.jsonl.gz"


def line(**changes: Any) -> str:
    return json.dumps({"timestamp": 1000, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]} | changes)


def test_the_conversation_trace_is_the_known_one() -> None:
    requests = read_trace(CONVERSATION)
    assert len(requests) == 12_031
    assert round(sum(request.input_length for request in requests) / len(requests)) == 12_035
    assert round(sum(request.output_length for request in requests) / len(requests)) == 343
    assert infinite_cache_hit_rate(requests) == pytest.approx(0.366, abs=0.0005)
    assert all(earlier.timestamp <= later.timestamp for earlier, later in pairwise(requests))


def test_lines_come_in_the_order_of_arrival_and_empty_ones_are_nothing(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(line(timestamp=2500.5) + "\n\n" + line(hash_ids=[2, 3], more="ignored") + "\n")
    requests = read_trace(file)
    assert [request.arrival_s for request in requests] == [1.0, 2.5005]
    assert requests[0].hash_ids == [2, 3]
    assert infinite_cache_hit_rate(requests) == 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no requests"),
        (line() + "\n{", "line 2:"),
        (line(input_length=0), "line 1: .*>= 1"),
        (line(timestamp=-1), "line 1: .*>= 0"),
        (line(hash_ids=[]), "line 1: .*>= 1"),
        (line(hash_ids=[1, -2]), "line 1: .*>= 0"),
        (line(hash_ids=[1]), "1 hash_ids for 600 tokens, must be 2"),
        (line(input_length="many"), "line 1: .*int"),
        ("[1, 2]", "line 1: .*object"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace(file)


def test_files_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing.jsonl: can't be read"):
        read_trace(tmp_path / "missing.jsonl")
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(line().encode())[:-12])
    with pytest.raises(ConfigError, match="broken.jsonl.gz: can't be read"):
        read_trace(broken)
    broken.write_bytes(b"plain text")
    with pytest.raises(ConfigError, match="broken.jsonl.gz: can't be read"):
        read_trace(broken)
