"""A thin synchronous client of the public gRPC API.

Owns one channel and the translation of gRPC statuses back into Tandem's errors. It adds nothing to the API: no retry, no
resume, no text processing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, cast

import grpc

from protos import tandem_pb2 as pb
from protos import tandem_pb2_grpc
from protos.metadata import TENANT
from tandem.errors import Cancelled, DeadlineExceeded, InvalidRequest, Overloaded, TandemError, Unavailable

Prompt = str | Sequence[int] | Sequence[tuple[str, str]]
"""Plain text, token ids, or a conversation of `(role, content)`."""

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_ERRORS: dict[grpc.StatusCode, type[TandemError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}


class Client:
    """Speaks to one router at `target` (`host:port`). Use it as a context manager, or `close` it. Threads may share it."""

    def __init__(self, target: str) -> None:
        self.target = target
        # The address is this machine's or the cluster's: no proxy of the environment stands between.
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.enable_http_proxy", 0)]
        self._channel = grpc.insecure_channel(target, options=options)
        self._stub = tandem_pb2_grpc.TandemStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the channel; calls in flight are cancelled."""
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        sampling: pb.SamplingParams | None = None,
        *,
        model: str = "",
        timeout_s: float | None = None,
        tenant: str = "",
        batch: bool = False,
    ) -> Stream:
        """Starts a request; the stream yields the answer's events. `tenant` is who shares fairly with others; `batch` requests
        wait while others are due sooner."""
        request = _request(prompt, sampling, model)
        request.batch = batch
        metadata = ((TENANT, tenant),) if tenant else ()
        return Stream(self._stub.Generate(request, timeout=timeout_s, metadata=metadata), self.target)

    def cluster(self, timeout_s: float = 5.0) -> pb.GetClusterResponse:
        """What runs where. Raises Unavailable if no router answers."""
        try:
            return self._stub.GetCluster(pb.GetClusterRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise _translated(error, self.target) from error

    def explain(self, request_id: str = "", timeout_s: float = 5.0) -> pb.ExplainResponse:
        """Why a request that has ended went where it went; "" is the last one. Raises InvalidRequest for one that the router
        doesn't remember."""
        try:
            return self._stub.Explain(pb.ExplainRequest(request_id=request_id), timeout=timeout_s)
        except grpc.RpcError as error:
            raise _translated(error, self.target) from error

    def audit(self, timeout_s: float = 30.0) -> pb.AuditResponse:
        """The router's cross-check of what it believes against what its processes report."""
        try:
            return self._stub.Audit(pb.AuditRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise _translated(error, self.target) from error


class Stream:
    """One answer: `accepted`, `chunk`s, `completed`. Iterating raises a TandemError for whatever ends the call early.

    `cancel` may be called from any thread; leaving a loop over the stream cancels it too.
    """

    def __init__(self, call: Any, target: str) -> None:
        self._call = call
        self._target = target

    def __iter__(self) -> Iterator[pb.GenerateResponse]:
        try:
            yield from self._call
        except grpc.RpcError as error:
            raise _translated(error, self._target) from error
        finally:
            self._call.cancel()

    def cancel(self) -> None:
        """Ends the request here and in the cluster."""
        self._call.cancel()


def _translated(error: grpc.RpcError, target: str) -> TandemError:
    call = cast("grpc.Call", error)  # an error that a call raised is that call
    code, details = call.code(), call.details() or str(call.code())
    if code is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details:
        details = f"no router answers at {target}"
    return _ERRORS.get(code, TandemError)(details)


def _request(prompt: Prompt, sampling: pb.SamplingParams | None, model: str) -> pb.GenerateRequest:
    request = pb.GenerateRequest(sampling=sampling, model=model)
    if isinstance(prompt, str):
        request.prompt = prompt
    elif prompt and isinstance(prompt[0], tuple):
        messages = [item for item in prompt if isinstance(item, tuple)]
        request.chat.messages.extend(pb.ChatMessage(role=role, content=content) for role, content in messages)
    else:
        request.token_ids.ids.extend(item for item in prompt if isinstance(item, int))
    return request
