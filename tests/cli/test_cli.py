"""The `tandem` command as a user meets it: real subprocesses, a real gRPC server with scripted answers."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from rich.console import Console

from protos import tandem_pb2 as pb
from protos import tandem_pb2_grpc
from protos.rich_errors import STATUS_DETAILS, status_details
from tandem.cli.common import cluster_table
from tandem.cli.run_file import RunFile, Running
from tandem.errors import ConfigError, WorkerLost

COMMAND = [sys.executable, "-m", "tandem.cli"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "200")


def tandem(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False)


class ScriptedRouter(tandem_pb2_grpc.TandemServicer):
    """Answers "hello" with two chunks; remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.ready = True
        self.pause = threading.Event()

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        if request.chat.messages and request.chat.messages[-1].content == "no template":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the model has no chat template: send a plain prompt")
        if request.sampling.max_tokens == 999:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "max_tokens is 999, the limit is 100")
        yield pb.GenerateResponse(accepted=pb.Accepted(request_id="r-1", seed=2**63 - 1, num_prompt_tokens=3))
        ends = "length" if request.sampling.max_tokens == 2 else "stop"
        for index in range(request.sampling.n or 1):
            yield pb.GenerateResponse(chunk=pb.Chunk(index=index, position=0, token_ids=[1], text="good"))
            yield pb.GenerateResponse(
                chunk=pb.Chunk(index=index, position=1, token_ids=[2], text=" day", finish_reason=ends)
            )
        if request.sampling.max_tokens == 500:
            context.set_trailing_metadata(((STATUS_DETAILS, status_details(WorkerLost("decode-0 was lost"))),))
            context.abort(grpc.StatusCode.UNAVAILABLE, "decode-0 was lost")
        while request.sampling.max_tokens == 600 and context.is_active():
            self.pause.wait(0.05)
        if request.sampling.max_tokens == 13:
            return
        source = pb.FetchedFrom(process="prefill-0", tier="DEVICE", transport="shm", num_blocks=2, num_bytes=2**20)
        run = pb.RoleRun(role="decode", process="decode-0", fetched_tokens=32, fetched=[source])
        yield pb.GenerateResponse(
            completed=pb.Completed(request_id="r-1", num_prompt_tokens=3, ttft_s=0.25, runs=[run])
        )

    def GetCluster(self, request: pb.GetClusterRequest, context: Any) -> pb.GetClusterResponse:
        process = pb.ProcessStatus(name="decode-0", role="decode", pid=7, num_blocks=10, free_blocks=9)
        process.counters.update({"steps": 3, "aborted_waiting": 0, "finished": 2**60})
        return pb.GetClusterResponse(router="router", model="tiny", ready=self.ready, processes=[process])

    def Audit(self, request: pb.AuditRequest, context: Any) -> pb.AuditResponse:
        return pb.AuditResponse(
            ok=self.ready, checks=[pb.AuditCheck(check="blocks", ok=self.ready, evidence="10 of 10")]
        )


@pytest.fixture
def router() -> Iterator[ScriptedRouter]:
    yield from serve_scripted()


def serve_scripted() -> Iterator[ScriptedRouter]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    router = ScriptedRouter()
    tandem_pb2_grpc.add_TandemServicer_to_server(router, server)
    router.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"  # type: ignore[attr-defined]
    server.start()
    yield router
    server.stop(0).wait(10)


def test_help_names_every_command_and_imports_neither_torch_nor_ray() -> None:
    code = "import sys; from tandem.cli import main; print([name for name in ('torch', 'ray') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    result = tandem("--help")
    assert result.returncode == 0
    for name in (
        "pull",
        "serve",
        "down",
        "status",
        "audit",
        "explain",
        "generate",
        "chat",
        "doctor",
        "demo",
        "sim",
        "bench",
    ):
        assert f" {name} " in result.stdout


@pytest.mark.parametrize(
    "arguments", [("generate", "x"), ("status",), ("audit",), ("chat",), ("status", "--json")], ids=" ".join
)
def test_without_a_cluster_a_command_fails_with_one_sentence(arguments: tuple[str, ...]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound and not listening: refused, and nobody else's
        target = f"127.0.0.1:{probe.getsockname()[1]}"
        result = tandem(*arguments, "--target", target, stdin="hi\n")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"error: no router answers at {target}\n"


def test_an_answer_streams_and_its_report_says_where_it_ran(router: Any) -> None:
    result = tandem("generate", "hello", "--target", router.target, "--report", "--stop", "\n\n", "--seed", "5")
    assert (result.returncode, result.stdout) == (0, "good day\n")
    assert "decode on decode-0" in result.stderr
    assert "2 blocks (1.0 MiB) from prefill-0's DEVICE tier over shm" in result.stderr
    (request,) = router.requests
    assert [(m.role, m.content) for m in request.chat.messages] == [("user", "hello")]
    assert (list(request.sampling.stop), request.sampling.seed) == (["\n\n"], 5)
    assert not request.sampling.HasField("max_tokens")


def test_the_prompt_may_be_raw_and_come_from_stdin(router: Any) -> None:
    assert tandem("generate", "-", "--raw", "--target", router.target, stdin="once upon").returncode == 0
    assert router.requests[0].prompt == "once upon"


def test_an_answer_can_be_held_to_a_schema_or_a_regular_expression(router: Any, tmp_path: Path) -> None:
    schema = tmp_path / "answer.json"
    schema.write_text('{"type": "object", "description": "größer"}', encoding="utf-8")
    assert tandem("generate", "hello", "--json-schema", str(schema), "--target", router.target).returncode == 0
    assert tandem("generate", "hello", "--regex", "(yes|no)", "--target", router.target).returncode == 0
    assert tandem("generate", "hello", "--target", router.target).returncode == 0
    held, matched, free = (request.sampling for request in router.requests)
    assert held.grammar.json_schema == schema.read_text(encoding="utf-8")
    assert matched.grammar.regex == "(yes|no)"
    assert not free.HasField("grammar")


def test_one_grammar_at_most_and_only_one_that_can_be_read(router: Any, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.json")
    result = tandem("generate", "hello", "--json-schema", missing, "--target", router.target)
    assert (result.returncode, missing in result.stderr) == (1, True)
    result = tandem("generate", "hello", "--json-schema", missing, "--regex", "a", "--target", router.target)
    assert (result.returncode, "one of them" in result.stderr) == (1, True)
    assert not router.requests


def test_samples_are_told_apart(router: Any) -> None:
    result = tandem("generate", "hello", "-n", "2", "--target", router.target)
    assert result.stdout == "--- 0\ngood day\n--- 1\ngood day\n"


def test_json_is_one_event_a_line(router: Any) -> None:
    result = tandem("generate", "hello", "--json", "--target", router.target)
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [list(event) for event in events] == [["accepted"], ["chunk"], ["chunk"], ["completed"]]
    assert events[0]["accepted"]["seed"] == 2**63 - 1
    assert events[2]["chunk"]["finish_reason"] == "stop"


def test_a_refused_request_shows_the_servers_sentence(router: Any) -> None:
    result = tandem("generate", "hello", "--max-tokens", "999", "--target", router.target)
    assert (result.returncode, result.stderr) == (1, "error: max_tokens is 999, the limit is 100\n")


def test_an_error_after_text_begins_a_line_of_its_own(router: Any) -> None:
    result = tandem("generate", "hello", "--max-tokens", "500", "--target", router.target)
    assert (result.returncode, result.stdout) == (1, "good day\n")
    assert result.stderr == "error: decode-0 was lost\n"


def test_the_clients_own_deadline_is_told_as_such(router: Any) -> None:
    result = tandem("generate", "hello", "--max-tokens", "600", "--timeout-s", "0.5", "--target", router.target)
    assert (result.returncode, result.stdout) == (1, "good day\n")
    assert result.stderr == "error: gave up after 0.5 s (--timeout-s)\n"


def test_with_json_an_error_is_the_last_line(router: Any) -> None:
    result = tandem("generate", "hello", "--json", "--max-tokens", "500", "--target", router.target)
    assert result.returncode == 1
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "error": {"code": "worker_lost", "message": "decode-0 was lost"}
    }


def test_a_model_without_a_chat_template_leads_to_raw(router: Any) -> None:
    result = tandem("generate", "no template", "--target", router.target)
    assert result.returncode == 1
    assert result.stderr == "error: the model has no chat template: send a plain prompt; use --raw\n"


def test_an_answer_that_was_cut_is_marked_beside_its_text(router: Any) -> None:
    result = tandem("generate", "hello", "--max-tokens", "2", "--target", router.target)
    assert (result.returncode, result.stdout, result.stderr) == (0, "good day\n", "(cut at 2 tokens)\n")
    assert tandem("generate", "hello", "--target", router.target).stderr == ""
    chat = tandem("chat", "--max-tokens", "2", "--target", router.target, stdin="hello\n")
    assert (chat.stdout, chat.stderr) == ("good day\n\n", "(cut at 2 tokens)\n")


@pytest.mark.parametrize("command", [("generate", ""), ("generate", "-"), ("demo", "")], ids=" ".join)
def test_an_empty_prompt_is_refused_at_once(command: tuple[str, ...]) -> None:
    result = tandem(*command)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "error: the prompt is empty\n")


@pytest.mark.parametrize("command", [("serve",), ("demo",), ("bench", "serve")], ids=" ".join)
def test_a_cluster_without_a_decode_worker_is_refused_at_once(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_DECODE__REPLICAS", "0")
    result = tandem(*command)
    assert (result.returncode, result.stderr) == (1, "error: decode.replicas is 0, must be at least 1 to serve\n")


def test_the_table_of_a_narrow_terminal_has_fewer_columns_and_whole_numbers() -> None:
    process = pb.ProcessStatus(name="prefill-0", pid=4_194_303, num_blocks=10**9, prefill_tokens=10**15)
    cluster = pb.GetClusterResponse(router="router-default", model="m" * 100, processes=[process])
    for width, absent in ((200, ()), (80, ("fetched", "hits", "beat", "tokens")), (50, ("tokens", "pid", "wait"))):
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(cluster_table(cluster, console))
        rows = console.export_text().splitlines()
        assert "…" not in "".join(rows)
        (line,) = [row for row in rows if row.strip().startswith("prefill-0")]
        assert f"{10**9}/{10**9}" in line
        assert (str(10**15) in line) == ("tokens" not in absent)
        (head,) = [row for row in rows if "KV blocks" in row]
        assert not any(name in head for name in absent)
        assert absent or "fetched" in head


def test_what_is_piped_is_not_cut_to_a_terminals_width(router: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert "fetched" in tandem("status", "--target", router.target).stdout


def test_a_stream_without_a_terminal_message_is_an_error(router: Any) -> None:
    result = tandem("generate", "hello", "--max-tokens", "13", "--target", router.target)
    assert result.returncode == 1
    assert "without its terminal message" in result.stderr


def test_a_chat_sends_the_whole_conversation_each_turn(router: Any) -> None:
    result = tandem("chat", "--system", "be kind", "--target", router.target, stdin="hello\n\nagain\n")
    assert (result.returncode, result.stdout) == (0, "good day\ngood day\n\n")
    assert [[m.content for m in request.chat.messages] for request in router.requests] == [
        ["be kind", "hello"],
        ["be kind", "hello", "good day", "again"],
    ]


def test_status_and_audit_are_zero_only_if_all_is_ok(router: Any) -> None:
    status = tandem("status", "--json", "--target", router.target)
    assert status.returncode == 0
    process = json.loads(status.stdout)["processes"][0]
    assert (process["num_running"], process["num_blocks"]) == (
        0,
        10,
    )  # zeros are there to read, wide integers are numbers
    assert list(process)[:4] == ["name", "role", "epoch", "pid"]
    assert list(process["counters"].items()) == [("aborted_waiting", 0), ("finished", 2**60), ("steps", 3)]
    audit = tandem("audit", "--json", "--target", router.target)
    assert audit.returncode == 0
    assert (
        json.loads(audit.stdout.splitlines()[0]).items()
        >= {"check": "blocks", "ok": True, "evidence": "10 of 10"}.items()
    )
    assert "decode-0" in tandem("status", "--target", router.target).stdout
    router.ready = False
    assert tandem("status", "--target", router.target).returncode == 1
    assert tandem("audit", "--target", router.target).returncode == 1


def test_serve_without_the_model_says_how_to_get_it_and_starts_nothing(tmp_path: Path) -> None:
    result = tandem("serve")
    assert result.returncode == 1
    assert "tandem pull smollm2-135m" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "cache" / "run").exists()


def test_a_wrong_configuration_names_file_and_key(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("decode: {replica: 2}\n")
    result = tandem("serve", "--config", str(tmp_path / "bad.yaml"))
    assert (result.returncode, result.stderr) == (
        1,
        f"error: {tmp_path}/bad.yaml: decode.replica: there is no such key\n",
    )


def test_down_without_a_cluster_says_so() -> None:
    result = tandem("down")
    assert result.returncode == 1
    assert "no cluster 'default' runs here" in result.stderr


def test_down_stops_the_process_that_holds_the_run_file(tmp_path: Path) -> None:
    run_path = tmp_path / "cache" / "run" / "default"
    code = (
        "import signal, sys; from pathlib import Path; from tandem.cli.run_file import RunFile\n"
        "file = RunFile(Path(sys.argv[1])); file.acquire(); file.write('127.0.0.1:1'); print('up', flush=True)\n"
        "signal.sigwait({signal.SIGTERM}); file.release()"
    )
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n" + code,
            run_path,
        ],
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "up\n"
        assert RunFile(run_path).read() == Running(holder.pid, "127.0.0.1:1", "")
        with pytest.raises(ConfigError, match=f"process {holder.pid} at 127.0.0.1:1"):
            RunFile(run_path).acquire()
        result = tandem("down")
        assert holder.wait(10) == 0
    assert (result.returncode, result.stdout) == (0, f"stopped process {holder.pid} that served at 127.0.0.1:1\n")
    assert RunFile(run_path).read() is None


def test_what_a_killed_holder_left_is_found_and_its_pid_is_never_signalled(tmp_path: Path) -> None:
    dead = RunFile(tmp_path)
    assert dead.acquire() is None
    dead.write("127.0.0.1:1", "/tmp/tandem-ray-x")
    os.close(
        dead._file or 0
    )  # as the kernel does when the process is killed; the pid in the file is this living process
    assert RunFile(tmp_path).read() is None
    again = RunFile(tmp_path)
    assert again.acquire() == Running(os.getpid(), "127.0.0.1:1", "/tmp/tandem-ray-x")
    again.release()
    assert RunFile(tmp_path).acquire() is None


def test_ctrl_c_ends_a_chat_cleanly(router: Any) -> None:
    with subprocess.Popen(
        [*COMMAND, "chat", "--target", router.target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write(b"hello\n")
        chat.stdin.flush()
        assert chat.stdout.readline() == b"good day\n"
        chat.send_signal(signal.SIGINT)
        _, errors = chat.communicate(timeout=20)
    assert (chat.returncode, errors) == (0, b"")


class Terminal:
    """What a program shows on a terminal, read piece by piece: nothing that came with a piece is lost to the next."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unread = b""

    def read_until(self, text: bytes, again: Callable[[], None] = lambda: None) -> None:
        """Reads up to the end of `text`; calls `again` after each second without anything."""
        deadline_s = time.monotonic() + 20
        while text not in self._unread:
            assert time.monotonic() < deadline_s, f"{text!r} did not come after {self._unread!r}"
            if select.select([self._descriptor], [], [], 1)[0]:
                self._unread += os.read(self._descriptor, 4096)
            else:
                again()
        self._unread = self._unread.partition(text)[2]


def test_ctrl_c_at_an_empty_prompt_of_a_chat_says_how_to_leave_and_goes_on(router: Any) -> None:
    master, slave = pty.openpty()
    chat = subprocess.Popen([*COMMAND, "chat", "--target", router.target], stdin=slave, stdout=slave, stderr=slave)
    terminal = Terminal(master)
    try:
        os.close(slave)
        terminal.read_until(b"> ")
        chat.send_signal(signal.SIGINT)
        # Between the prompt and the wait for a line Python notes a signal and goes on to wait: a person presses the keys again.
        terminal.read_until(b"Ctrl-D ends the conversation", again=lambda: chat.send_signal(signal.SIGINT))
        os.write(master, b"hello\n")
        terminal.read_until(b"good day")
        terminal.read_until(b"> ")
        os.write(master, b"\x04")
        assert chat.wait(20) == 0
    finally:
        chat.kill()
        chat.wait()
        os.close(master)
