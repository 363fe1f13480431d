"""A peer is a child process that may do anything: what it measures is believed, everything else is one clear error in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tandem.bench import peers
from tandem.bench.cases import DECODE_TOKENS, Case
from tandem.bench.peers import LLAMA_CPP, Peer
from tandem.clock import now_s
from tandem.errors import TandemError

HALF = Path(peers.__file__).resolve().parents[2] / "benchmarks" / "peers"
READY = """print('{"t": "ready", "version": "1.2"}', flush=True)"""
WORKING = f"""
import sys
sys.path.insert(0, {str(HALF)!r})
from child import arguments, own_stdout, serve
options = arguments()
answers = own_stdout()

class Engine:
    def prefill(self, batch, context):
        print("a library that talks")
        return batch * context, 0.5

    def decode(self, batch, context, tokens):
        if context > 1000:
            raise ValueError("context too long")
        return batch * tokens, 0.25

serve(answers, "1.2", Engine())
"""
OPTIONS = ["--model", "m", "--vocab", "9", "--max-batch", "2", "--max-len", "600"]

Start = Callable[..., Peer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a peer that runs the given source."""
    started: list[Peer] = []

    def run(source: str, *, start_s: float = 30.0, answer_s: float = 30.0) -> Peer:
        script = tmp_path / "peer.py"
        script.write_text(source)
        cpu = min(os.sched_getaffinity(0))
        command = [sys.executable, str(script), *OPTIONS, "--cpus", str(cpu)]
        started.append(Peer("fake", command, start_s=start_s, answer_s=answer_s))
        return started[-1]

    yield run
    for peer in started:
        peer.close()


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(TandemError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith("fake ")
    assert "make peers" in message
    assert "\n" not in message
    return message


def no_children() -> bool:
    return not psutil.Process().children()


def test_a_peer_answers_rates_whatever_its_libraries_print(start: Start) -> None:
    peer = start(WORKING)
    assert peer.version == "1.2"
    assert peer.rate(Case("prefill", 1, 512)) == 1024
    assert peer.rate(Case("decode", 8, 512)) == 8 * DECODE_TOKENS / 0.25
    assert peer.rate(Case("prefill", 2, 100)) == 400


def test_what_a_peer_can_not_do_is_said_with_its_reason(start: Start) -> None:
    peer = start(WORKING)
    message = error_of(lambda: peer.rate(Case("decode", 1, 2048)))
    assert "has not answered decode of 1 x 2048 tokens: ValueError: context too long" in message
    assert no_children()


def test_a_closed_peer_is_gone(start: Start) -> None:
    peer = start(WORKING)
    assert not no_children()
    peer.close()
    assert no_children()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("raise SystemExit('no such model')", "ended with exit code 1; its last words: no such model"),
        ("print('Loading weights', flush=True); input()", "said b'Loading weights', which is no answer"),
        (
            """print('{"t": "measured", "tokens": 1, "seconds": 1}', flush=True); input()""",
            "should have loaded its model",
        ),
        ("print('x' * 70000, end='', flush=True); input()", "the limit is 65536"),
        ("import time; time.sleep(600)", "has not loaded its model for 0.5 s"),
    ],
)
def test_a_peer_that_does_not_start_is_an_error_in_time(start: Start, source: str, expected: str) -> None:
    seconds = 0.5 if "sleep" in source else 30.0
    assert expected in error_of(lambda: start(source, start_s=seconds))
    assert no_children()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("input(); import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        (
            "input(); import sys; sys.stderr.write('out of memory'); sys.exit(3)",
            "exit code 3; its last words: out of memory",
        ),
        ("pass", "ended with exit code 0"),
        ("input(); print('{', flush=True); input()", "said b'{', which is no answer"),
        ("input(); print('[1]', flush=True); input()", "which is no answer"),
        (
            """input(); print('{"t": "measured", "tokens": 5, "seconds": 0}', flush=True); input()""",
            "which is no answer",
        ),
        ("""input(); print('{"t": "ready", "version": ""}', flush=True); input()""", "where it should have answered"),
        ("input(); import time; time.sleep(600)", "has not answered prefill of 1 x 64 tokens for 0.5 s"),
    ],
)
def test_a_peer_that_fails_later_is_an_error_in_time(start: Start, source: str, expected: str) -> None:
    peer = start(f"{READY}\n{source}", answer_s=0.5 if "sleep" in source else 30.0)
    assert expected in error_of(lambda: peer.rate(Case("prefill", 1, 64)))
    assert no_children()


@pytest.mark.parametrize("source", ["time.sleep(600)", "while True: print('.', end='', flush=True); time.sleep(0.01)"])
def test_a_deadline_holds_for_a_peer_that_is_silent_and_for_one_that_drips(start: Start, source: str) -> None:
    peer = start(f"{READY}\nimport time\n{source}", answer_s=0.5)
    began_s = now_s()
    error_of(lambda: peer.rate(Case("prefill", 1, 64)))
    assert 0.5 <= now_s() - began_s < 10


def test_what_a_silent_peer_has_started_ends_with_it(start: Start, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    peer = start(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\n{READY}\ntime.sleep(600)",
        answer_s=0.5,
    )
    left = psutil.Process(int(note.read_text()))
    error_of(lambda: peer.rate(Case("prefill", 1, 64)))
    gone, alive = psutil.wait_procs([left], timeout=20)
    assert gone
    assert not alive


def test_a_program_that_can_not_be_started_is_said() -> None:
    with pytest.raises(TandemError, match="can't be started.*make peers"):
        Peer("fake", ["/no/such/python"])


def test_a_peer_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "_REPOSITORY", tmp_path)
    with pytest.raises(TandemError, match=r"llama\.cpp is not installed .*`make peers`"):
        LLAMA_CPP.command(Path("m.gguf"), 9, [0], 1, 64)


def test_a_peers_process_has_the_cores_and_threads_it_was_given(tmp_path: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    source = (
        f"import sys; sys.path.insert(0, {str(HALF)!r})\n"
        "from child import arguments\narguments()\n"
        "import json, os; print(json.dumps([sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS']]))"
    )
    command = [sys.executable, "-c", source, *OPTIONS, "--cpus", str(cpu)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(done.stdout) == [[cpu], "1"]
