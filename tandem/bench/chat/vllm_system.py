"""vLLM's OpenAI server as a system under load: prompts and answers as token ids, streamed over HTTP.

Owns the server's process and the requests. The server is started as `benchmarks/peers/vllm_server.py` in vLLM's own virtual
environment; it ends with this process, however that ends. It has no tokenizer, so it spends nothing on text.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import msgspec
from msgspec import Struct

from tandem.bench.chat.loop import Answer
from tandem.bench.peers import VLLM, environment, installed, last_words
from tandem.clock import now_s
from tandem.errors import Cancelled, TandemError

MODEL = "model"
"""The name under which it serves."""
START_S = 600.0
_LOOK_S = 0.25
_ASK_S = 300.0
_END_S = 20.0
_MAX_LINE = 2**20
_PREFIX = b"data: "
_DONE = b"[DONE]"


class _Choice(Struct):
    token_ids: list[int] | None = None


class _PromptDetails(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens_details: _PromptDetails | None = None


class _Problem(Struct):
    message: str = ""


class _Event(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Problem | None = None


def server_program() -> list[str]:
    """What runs the server. Raises TandemError if vLLM isn't installed."""
    return installed(VLLM.name, VLLM.folder, "vllm_server.py")


def server_command(model: Path, cpus: Sequence[int], port: int, max_len: int, kv_bytes: int) -> list[str]:
    """How to start the server on these cores. Raises TandemError if vLLM isn't installed."""
    return [
        *server_program(), "--model", str(model), "--name", MODEL, "--port", str(port),
        "--cpus", ",".join(map(str, cpus)), "--max-len", str(max_len), "--kv-gib", str(max(1, kv_bytes // 2**30)),
    ]  # fmt: skip


class Server:
    """A server process. Use it as a context manager; `wait` before the first request."""

    def __init__(self, command: Sequence[str], port: int) -> None:
        self.port = port
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end is the server's
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )
        except OSError as error:
            self._output.close()
            raise TandemError(f"vllm can't be started: {error}; `make peers` installs it") from error

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, stop: threading.Event, limit_s: float = START_S) -> None:
        """Until it is ready. Raises TandemError with its last words if it ends, or isn't ready in time, Cancelled by `stop`."""
        ends_s = now_s() + limit_s
        while not self._healthy():
            if self._process.poll() is not None:
                raise self._failed(f"ended with exit code {self._process.returncode}")
            if now_s() > ends_s:
                raise self._failed(f"was not ready after {limit_s:g} s")
            if stop.wait(_LOOK_S):
                raise Cancelled("stopped while vllm was starting")

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5.0)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _failed(self, how: str) -> TandemError:
        return TandemError(f"vllm {how}; its last words: {last_words(self._output)}")

    def close(self) -> None:
        """Ends the server and whatever it started."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the group outlives its first process
        self._process.wait()
        self._output.close()


class VLLMSystem:
    """The server at that port of this machine."""

    def __init__(self, port: int) -> None:
        self.name = "vllm"
        self._port = port

    @contextmanager
    def session(self) -> Iterator[VLLMSession]:
        session = VLLMSession(self._port)
        try:
            yield session
        finally:
            session.cancel()


class VLLMSession:
    """Requests with a connection each: closing it is how one is cancelled."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._cancelled = False

    def ask(self, prompt: tuple[int, ...], num_tokens: int) -> Answer:
        """See `Session`."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_ASK_S)
        try:
            connection.connect()
            self._register(connection.sock)
            try:
                connection.request(
                    "POST", "/v1/completions", _body(prompt, num_tokens), {"Content-Type": "application/json"}
                )
                return _answer(connection.getresponse(), num_tokens)
            finally:
                with self._lock:
                    self._open.discard(connection.sock)
        except (OSError, http.client.HTTPException, ValueError) as error:
            # ValueError: reading from what `cancel` closed meanwhile.
            raise TandemError(f"vllm: {type(error).__name__}: {error}") from error
        finally:
            connection.close()

    def _register(self, sock: socket.socket) -> None:
        with self._lock:
            if self._cancelled:
                raise Cancelled("the load has ended")
            self._open.add(sock)

    def cancel(self) -> None:
        """See `Session`."""
        with self._lock:
            self._cancelled = True
            for sock in self._open:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


_WANTS_IDS = "return_token_ids"


def _body(prompt: tuple[int, ...], num_tokens: int) -> bytes:
    return msgspec.json.encode(
        {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            _WANTS_IDS: True,
        }
    )


def _answer(response: http.client.HTTPResponse, num_tokens: int) -> Answer:
    if response.status != 200:
        raise TandemError(f"vllm answered {response.status}: {response.read(500).decode('utf-8', 'replace')}")
    token_ids: list[int] = []
    times_s: list[float] = []
    num_cached = 0
    while line := response.readline(_MAX_LINE):
        if not line.startswith(_PREFIX):
            continue
        data = line[len(_PREFIX) :].strip()
        if data == _DONE:
            break
        try:
            event = msgspec.json.decode(data, type=_Event)
        except msgspec.DecodeError as error:
            raise TandemError(f"vllm said {data[:80]!r}, which is no answer ({error})") from error
        if event.error is not None:
            raise TandemError(f"vllm: {event.error.message[:500]}")
        for choice in event.choices:
            token_ids += choice.token_ids or ()
            times_s += [now_s()] * len(choice.token_ids or ())
        if event.usage is not None and event.usage.prompt_tokens_details is not None:
            num_cached = event.usage.prompt_tokens_details.cached_tokens or 0
    if len(token_ids) != num_tokens:
        raise TandemError(f"an answer of vllm has {len(token_ids)} of {num_tokens} tokens")
    return Answer(tuple(token_ids), tuple(times_s), num_cached)
