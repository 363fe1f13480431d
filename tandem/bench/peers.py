"""What Tandem is measured against, and its own helpers, as long-lived child processes, so that they can take turns.

Owns the child: its environment, its start, its lines, its deadlines, its last words, its end. Speaks JSON lines: the child says
`ready` once, then answers each request on stdin (to an engine `prefill` or `decode`) with an answer (of an engine `measured`)
or `failed` on stdout. What it writes to stderr is kept for the message of its error. The other half is `benchmarks/peers`,
which runs in the peer's own virtual environment and knows nothing of Tandem.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, TypeVar, Union

import msgspec
from msgspec import Meta, Struct

from tandem.bench.cases import DECODE_TOKENS, Case
from tandem.clock import now_s
from tandem.errors import TandemError

_REPOSITORY = Path(__file__).resolve().parents[2]
START_S = 600.0
"""A peer may compile itself the first time it starts."""
ANSWER_S = 300.0
_END_S = 10.0
_MAX_LINE = 65_536
_ADVICE = "If its installation is damaged, remove .peers and run `make peers`"
_LAST_WORDS = 4_000
_LAST_LINES = 6
_OURS = (
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
)


class Ready(Struct, tag="ready", tag_field="t"):
    """Child → parent, first: the model is loaded."""

    version: Annotated[str, Meta(max_length=100)]


class Measured(Struct, tag="measured", tag_field="t"):
    """Child → parent: what was asked for, and how long it took."""

    tokens: Annotated[int, Meta(ge=1)]
    seconds: Annotated[float, Meta(gt=0)]


class Failed(Struct, tag="failed", tag_field="t"):
    """Child → parent: why it could not."""

    message: str


class Prefill(Struct, tag="prefill", tag_field="t"):
    """Parent → child: compute prompts that were never seen before."""

    batch: int
    context: int


class Decode(Struct, tag="decode", tag_field="t"):
    """Parent → child: `tokens` steps of sequences that each have a prompt of their own."""

    batch: int
    context: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Program:
    """A peer that `make peers` installs: its folder in `.peers`, its script in `benchmarks/peers`."""

    name: str
    folder: str
    script: str

    def command(self, model: Path, vocab_size: int, cpus: Sequence[int], max_batch: int, max_len: int) -> list[str]:
        """How to start it on these cores, a thread each. Raises TandemError if it isn't installed."""
        return [
            *installed(self.name, self.folder, self.script), "--model", str(model), "--vocab", str(vocab_size),
            "--cpus", ",".join(map(str, cpus)), "--max-batch", str(max_batch), "--max-len", str(max_len),
        ]  # fmt: skip


def installed(name: str, folder: str, script: str) -> list[str]:
    """The peer's own Python and its script. Raises TandemError if it isn't installed."""
    python = _REPOSITORY / ".peers" / folder / "bin" / "python"
    path = _REPOSITORY / "benchmarks" / "peers" / script
    if not (python.parent.parent / ".installed").is_file() or not path.is_file():
        raise TandemError(
            f"{name} is not installed beside Tandem's source (looked for {python}): `make peers` installs it"
        )
    return [str(python), str(path)]


LLAMA_CPP = Program("llama.cpp", "llama-cpp", "llama_cpp_peer.py")
VLLM = Program("vllm", "vllm", "vllm_peer.py")
PROGRAMS = {program.name: program for program in (LLAMA_CPP, VLLM)}


_Answer = TypeVar("_Answer", bound=Struct)


class Peer:
    """A running peer. Any failure is a TandemError and ends it: it answers nothing afterwards."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        start_s: float = START_S,
        answer_s: float = ANSWER_S,
        advice: str = _ADVICE,
        begins: str = "loaded its model",
    ) -> None:
        """Starts the child and waits until it is ready, which is to say that it has `begins`. `advice` ends the message of any
        error."""
        self.name = name
        self._advice = advice
        self._answer_s = answer_s
        self._buffer = b""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=environment(),
                start_new_session=True,  # so that whatever it starts ends with it
            )
        except OSError as error:
            self._stderr.close()
            raise TandemError(f"{name} can't be started: {error}; `make peers` installs it") from error
        try:
            self.version = self._receive(Ready, start_s, begins).version
        except BaseException:
            self.kill()
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def rate(self, case: Case) -> float:
        """Tokens a second of one run of `case`."""
        request: Prefill | Decode = (
            Prefill(case.batch, case.context)
            if case.what == "prefill"
            else Decode(case.batch, case.context, DECODE_TOKENS)
        )
        measured = self.ask(request, Measured, f"answered {case.what} of {case.batch} x {case.context} tokens")
        return measured.tokens / measured.seconds

    def ask(self, request: Struct, expected: type[_Answer], what: str) -> _Answer:
        """The answer to `request`, which is to say that the child has done `what`."""
        self.tell(request)
        return self._receive(expected, self._answer_s, what)

    def tell(self, request: Struct) -> None:
        """Sends what has no answer."""
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), msgspec.json.encode(request) + b"\n")
        except (OSError, ValueError) as error:
            raise self._ended() from error

    def pause(self) -> None:
        """Stops it and whatever it started: it takes no core from others while they have their turn."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """After `pause`; else it does nothing."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Ends it and whatever it started, by force. `close` has to follow."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """Ends the child, if need be by force."""
        process = self._process
        self.resume()
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018
        with suppress(OSError):
            process.stdin.close()  # which it takes as the end
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.kill()
        process.stdout.close()
        self._stderr.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self, expected: type[_Answer], limit_s: float, what: str) -> _Answer:
        line = self._line(limit_s, what)
        try:
            answer = msgspec.json.decode(line, type=Union[Ready, Measured, Failed, expected])  # noqa: UP007
        except msgspec.DecodeError as error:
            raise self._fail(f"said {line[:80]!r}, which is no answer ({error})") from error
        if isinstance(answer, Failed):
            raise self._fail(f"has not {what}: {answer.message[:500]}")
        if not isinstance(answer, expected):
            raise self._fail(f"said {line[:80]!r} where it should have {what}")
        return answer

    def _line(self, limit_s: float, what: str) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        ends_s = now_s() + limit_s
        while b"\n" not in self._buffer:
            remaining_s = ends_s - now_s()
            if remaining_s <= 0 or not poll.poll(remaining_s * 1000):
                raise self._fail(f"has not {what} for {limit_s:g} s")
            part = os.read(fd, _MAX_LINE)
            if not part:
                raise self._ended()
            self._buffer += part
            if len(self._buffer) > _MAX_LINE:
                raise self._fail(f"said {len(self._buffer)} bytes, the limit is {_MAX_LINE}: {self._buffer[:80]!r}")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _ended(self) -> TandemError:
        """It closed its stdout or no longer reads: it is gone, or will be."""
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return self._fail("closed its stdout")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return self._fail(how)

    def _fail(self, what: str) -> TandemError:
        self.kill()
        words = last_words(self._stderr)
        self.close()
        return TandemError(f"{self.name} {what}; its last words: {words}. {self._advice}".rstrip())


def environment() -> dict[str, str]:
    """Ours, without what it says of our own process alone."""
    return {key: value for key, value in os.environ.items() if key not in _OURS}


def answer(message: Struct) -> None:
    """In a child of ours: what the parent hears."""
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.flush()


def last_words(output: IO[bytes]) -> str:
    """The last lines of what a process wrote into that file, as one."""
    end = output.seek(0, os.SEEK_END)
    output.seek(max(0, end - _LAST_WORDS))
    lines = [line.strip() for line in output.read().decode("utf-8", "replace").splitlines()]
    return " | ".join([line for line in lines if line][-_LAST_LINES:]) or "none"


def free_port() -> int:
    """A TCP port of the loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
