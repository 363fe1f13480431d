"""A module of these tests as a process of its own: it is told what to do in JSON, line by line, and answers so."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

REPOSITORY = Path(__file__).parents[2]


class Child:
    """`python -m MODULE ARGUMENTS`, the arguments as JSON, by way of the command `by` if there is one."""

    def __init__(
        self, module: str, arguments: object = None, *, by: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        self.popen = subprocess.Popen(
            [*by, sys.executable, "-m", module, msgspec.json.encode(arguments).decode()],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def tell(self, what: object) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(msgspec.json.encode(what).decode() + "\n")
        self.popen.stdin.flush()

    def hear(self, kind: Any = Any) -> Any:
        """The next thing that it says, a `kind`."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line, "the process ended without an answer"
        return msgspec.json.decode(line, type=kind)

    def stop(self) -> None:
        self.popen.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.kill()
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream is not None:
                stream.close()


def say(what: object) -> None:
    """In the child: what its parent hears."""
    print(msgspec.json.encode(what).decode(), flush=True)
