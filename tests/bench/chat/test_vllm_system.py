"""vLLM's server as the bench sees it: a process that may do anything, and a stream that may say anything."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tandem.bench import peers
from tandem.bench.chat.vllm_system import MODEL, Server, VLLMSession, VLLMSystem, server_command
from tandem.bench.peers import free_port
from tandem.clock import now_s
from tandem.errors import Cancelled, TandemError

SCRIPT = Path(peers.__file__).resolve().parents[2] / "benchmarks" / "peers" / "vllm_server.py"


def event(**values: object) -> bytes:
    return b"data: " + json.dumps(values).encode() + b"\n\n"


def token(*ids: int) -> bytes:
    return event(choices=[{"index": 0, "text": "", "token_ids": ids}])


GOOD = (
    token(11)
    + token(12, 13)
    + event(choices=[], usage={"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}})
    + b"data: [DONE]\n\n"
)


class Handler(http.server.BaseHTTPRequestHandler):
    status = 200
    body = GOOD
    hangs = False
    bodies: list[dict[str, object]]
    reached: threading.Event

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)
        self.wfile.flush()
        self.reached.set()
        if self.hangs:
            self.rfile.read(1)  # until the client is gone

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def handler() -> type[Handler]:
    return type("Own", (Handler,), {"bodies": [], "reached": threading.Event()})


@pytest.fixture
def session(handler: type[Handler]) -> Iterator[VLLMSession]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        with VLLMSystem(server.server_address[1]).session() as session:
            yield session
        server.shutdown()
        thread.join()


def test_an_answer_is_its_tokens_with_their_times(session: VLLMSession, handler: type[Handler]) -> None:
    before_s = now_s()
    answer = session.ask((1, 2, 3), 3)
    assert answer.token_ids == (11, 12, 13)
    assert answer.num_cached_tokens == 2
    assert before_s < answer.times_s[0] <= answer.times_s[1] == answer.times_s[2] < now_s()
    (body,) = handler.bodies
    assert body["model"] == MODEL
    assert body["prompt"] == [1, 2, 3]
    assert (body["max_tokens"], body["temperature"], body["ignore_eos"], body["stream"]) == (3, 0, True, True)


@pytest.mark.parametrize(
    ("status", "body", "problem"),
    [
        (404, b'{"error": "no such model"}', "answered 404: .*no such model"),
        (200, token(11) + b"data: [DONE]\n\n", "has 1 of 3 tokens"),
        (200, token(11), "has 1 of 3 tokens"),
        (200, b"data: {\n\n", "which is no answer"),
        (200, event(error={"message": "out of memory", "code": 500}), "vllm: out of memory"),
    ],
)
def test_anything_less_than_an_answer_is_an_error(
    session: VLLMSession, handler: type[Handler], status: int, body: bytes, problem: str
) -> None:
    handler.status, handler.body = status, body
    with pytest.raises(TandemError, match=problem):
        session.ask((1, 2, 3), 3)


def test_cancelling_ends_what_is_under_way_and_what_comes_later(session: VLLMSession, handler: type[Handler]) -> None:
    handler.hangs, handler.body = True, token(11)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            session.ask((1,), 3)
        except TandemError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert handler.reached.wait(10)
    session.cancel()
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1
    with pytest.raises(Cancelled):
        session.ask((1,), 3)


def test_nobody_listening_is_an_error() -> None:
    with pytest.raises(TandemError, match="vllm: ConnectionRefusedError"), VLLMSystem(free_port()).session() as session:
        session.ask((1,), 3)


def server(source: str) -> Server:
    return Server([sys.executable, "-c", source], free_port())


def test_a_server_that_ends_is_an_error_with_its_last_words() -> None:
    with server("raise SystemExit('no such model')") as running, pytest.raises(TandemError) as caught:
        running.wait(threading.Event(), 30)
    assert "vllm ended with exit code 1; its last words: no such model" in str(caught.value)


def test_a_server_that_is_never_ready_is_an_error_in_time() -> None:
    with server("import time; time.sleep(600)") as running:
        with pytest.raises(TandemError, match=r"not ready after 0\.5 s"):
            running.wait(threading.Event(), 0.5)
        pid = running.pid
        # It never looks at its stdin: the end of the wait for it is by force.
        psutil.Process(pid).kill()
    assert not psutil.pid_exists(pid)


def test_waiting_for_a_server_can_be_stopped() -> None:
    stop = threading.Event()
    stop.set()
    with server("input()") as running, pytest.raises(Cancelled):
        running.wait(stop, 30)


def words_of(note: Path, count: int) -> list[str]:
    deadline_s = now_s() + 30
    while not (note.is_file() and len(words := note.read_text().split()) == count):
        assert now_s() < deadline_s
        threading.Event().wait(0.02)
    return words


def test_the_server_and_what_it_started_end_when_the_bench_is_gone(tmp_path: Path) -> None:
    """The real script, with a fake vLLM that has a child."""
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    note = tmp_path / "pid"
    (package / "api_server.py").write_text(
        "import os, pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"note = pathlib.Path({str(note)!r})\n"
        "note.write_text(f'{os.getpid()} {child.pid} ' + os.environ['VLLM_CPU_OMP_THREADS_BIND'])\n"
        "time.sleep(600)\n"
    )
    options = ["--model", "m", "--name", "n", "--port", "1", "--cpus", "0", "--max-len", "64", "--kv-gib", "1"]
    script = subprocess.Popen(
        [sys.executable, str(SCRIPT), *options],
        stdin=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        start_new_session=True,
    )
    words = words_of(note, 3)
    processes = [psutil.Process(int(word)) for word in words[:2]]
    assert words[2] == "0"
    assert script.stdin is not None
    script.stdin.close()  # as it is when the parent is killed
    script.wait(20)
    gone, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive
    assert len(gone) == 2


def test_a_closed_server_leaves_nothing_that_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    running = server(
        "import pathlib, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid))\n"
        "sys.stdin.read()\n"
    )
    child = psutil.Process(int(words_of(note, 1)[0]))
    running.close()
    _, alive = psutil.wait_procs([child], timeout=20)
    assert not alive
    assert not psutil.pid_exists(running.pid)


def test_a_server_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "_REPOSITORY", tmp_path)
    with pytest.raises(TandemError, match="vllm is not installed .*`make peers`"):
        server_command(Path("model"), [0, 1], 8000, 2048, 2**30)
