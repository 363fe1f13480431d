"""`tandem sim` as a user meets it: a table for people, lines for programs, one sentence for what is wrong."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from kvpool.block_pool import BlockPool
from tandem.cli.main import main

COMMAND = [sys.executable, "-m", "tandem.cli", "sim", "trace"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "220")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Thirty requests after one system prompt, one a second."""
    path = tmp_path / "tiny.jsonl"
    path.write_text("".join(line(at) for at in range(30)))
    return path


def line(at: int, **changed: object) -> str:
    blocks = [0, *(100 * at + block for block in range(1, 16))]
    request = {"timestamp": 1000 * at, "input_length": 8000, "output_length": 20, "hash_ids": blocks}
    return json.dumps(request | changed) + "\n"


def sim(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says on stderr when it ends with 1, having printed nothing; in this process, for speed."""
    monkeypatch.setattr(sys, "argv", ["tandem", "sim", "trace", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (1, "")
    return said.err


def test_a_table_for_each_rate_has_the_bound_and_who_was_asked_for(file: Path) -> None:
    done = sim(file, "--workers", 4, "--rate", "2,8", "--policy", "tandem, mooncake", "--without", "fetch")
    assert done.returncode == 0, done.stderr
    assert "30 requests of 8,000 tokens, answers of 20; 6.0% of all blocks came before. 4 workers." in done.stdout
    assert "h100-llama-70b: 4 x NVIDIA H100" in done.stdout
    at = [done.stdout.index(f"{rate}.00 requests/s") for rate in (2, 8)]
    for table in (done.stdout[at[0] : at[1]], done.stdout[at[1] :]):
        rows = [row.split("  ")[0].strip() for row in table.splitlines() if "%" in row]
        who = ["tandem", "mooncake", "tandem without fetch"]
        assert rows == ["bound", *who, *who], "first how soon, then where the blocks were"
        assert "as promised" in table
        assert "TTFT p50" in table
        assert "handed over" in table
    assert "2.00 requests/s: mooncake" in done.stderr


def test_json_is_one_object_a_line_and_the_same_again(file: Path) -> None:
    arguments = (file, "--workers", 4, "--rate", 3, "--policy", "all", "--seed", 5, "--json")
    done = sim(*arguments)
    assert done.returncode == 0, done.stderr
    about, *results = [json.loads(text, parse_constant=lambda name: math.nan) for text in done.stdout.splitlines()]
    assert about.pop("source")
    assert about == {
        "trace": "tiny.jsonl",
        "requests": 30,
        "prompt_tokens": 8000,
        "answer_tokens": 20,
        "block_hit_rate": pytest.approx(29 / 480),
        "block_tokens": 512,
        "workers": 4,
        "preset": "h100-llama-70b",
    }
    assert [result["policy"] for result in results[:2]] == ["bound", "tandem"]
    assert len({result["policy"] for result in results}) == len(results) == 12
    for result in results:
        assert (result["rate"], result["load"]) == (3.0, None)
        assert 0.0 <= result["goodput"] <= 1.0
        assert 0.0 < result["ttft_p50"] <= result["ttft_p90"] <= result["ttft_p99"]
    again = [json.loads(text, parse_constant=lambda name: math.nan) for text in sim(*arguments).stdout.splitlines()][1:]
    for result in (*results, *again):
        del result["requests_per_s"], result["prediction_error"]
    assert again == results


def test_a_load_is_a_part_of_what_least_loaded_can_take_and_the_file_may_be_compressed(tmp_path: Path) -> None:
    path = tmp_path / "tiny.jsonl.gz"
    path.write_bytes(gzip.compress("".join(line(at) for at in range(60)).encode()))
    done = sim(path, "--workers", 2, "--load", "0.5,1", "--policy", "least-loaded", "--json")
    assert done.returncode == 0, done.stderr
    results = [json.loads(text) for text in done.stdout.splitlines()[1:]]
    assert [(result["policy"], result["load"]) for result in results] == [
        ("bound", 0.5),
        ("least-loaded", 0.5),
        ("bound", 1.0),
        ("least-loaded", 1.0),
    ]
    assert results[3]["rate"] == pytest.approx(2 * results[1]["rate"])
    assert results[3]["goodput"] >= 0.9
    assert "capacity of 2 workers: " in done.stderr


def test_policies_of_others_may_be_tuned(file: Path) -> None:
    done = sim(file, "--workers", 2, "--rate", "4", "--policy", "mooncake", "--tune", "--json")
    assert done.returncode == 0, done.stderr
    assert "mooncake as published: " in done.stderr
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "sglnag"), "error: policy 'sglnag' is not known"),
        (("--without", "quue"), "error: --without 'quue' is no part of the policy"),
        (("--preset", "h1000"), "error: --preset 'h1000' is not known (h100-llama-70b, "),
        (("--rate", "fast"), "error: --rate is 'fast', must be numbers separated by commas"),
        (("--rate", "3,0"), "error: --rate is '3,0', each must be more than 0 and at most 1,000,000"),
        (("--rate", "nan"), "error: --rate is 'nan', each must be"),
        (("--load", "inf"), "error: --load is 'inf', each must be"),
        (("--load", "-1"), "error: --load is '-1', each must be"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    file: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = refused(monkeypatch, capsys, file, *arguments)
    assert said.startswith(message)
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read: "),
        ("", "no requests"),
        ("not json\n", "line 1: "),
        (line(0) + line(1, hash_ids=[1]), "line 2: 1 hash_ids for 8000 tokens, must be 16"),
        (line(0, input_length=-1), "line 1: "),
    ],
    ids=["missing", "empty", "no json", "too few blocks", "negative"],
)
def test_a_file_that_is_no_trace_is_refused_with_the_line(
    tmp_path: Path,
    content: str | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    said = refused(monkeypatch, capsys, path, "--rate", 1)
    assert said.startswith(f"error: {path}")
    assert message in said


def test_an_error_ends_the_process_with_1(tmp_path: Path) -> None:
    done = sim(tmp_path / "none.jsonl")
    assert (done.returncode, done.stdout) == (1, "")
    assert "none.jsonl: can't be read: " in done.stderr


def test_one_worker_is_no_cluster(file: Path) -> None:
    done = sim(file, "--workers", 1)
    assert done.returncode != 0
    assert "--workers" in done.stderr


def test_seeds_that_hold_are_a_line_each_and_exit_with_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_faults(monkeypatch, capsys, "--seeds", "2", "--requests", "20", "--json")
    first, second, total = map(json.loads, out.splitlines())
    assert code == 0
    assert (first["seed"], second["seed"], first["ok"], first["requests"]) == (1, 2, True, 20)
    assert (total["seeds"], total["ok"], total["requests"]) == (2, True, 40)


def test_a_seed_that_fails_is_told_with_the_command_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: BlockPool) -> None:
        raise AssertionError("a block is in no class")

    monkeypatch.setattr(BlockPool, "check", broken)
    code, out, err = run_faults(monkeypatch, capsys, "--seeds", "1", "--first-seed", "5", "--requests", "20")
    assert code == 1
    assert "VIOLATION" in out
    assert "tandem sim faults --seeds 1 --first-seed 5 --requests 20" in err


def run_faults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tandem", "sim", "faults", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    captured = capsys.readouterr()
    return int(exit_info.value.code or 0), captured.out, captured.err
