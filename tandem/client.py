"""The Python client of the gRPC API, synchronous and asynchronous.

Owns channels to the routers of one cluster, and the translation of gRPC statuses back into Tandem's errors. An answer whose
router is lost goes on at another one, or at the same one once it is back, with the same tokens (`tandem/continuation.py`):
whoever iterates sees a pause. It processes no text.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar, cast

import grpc
import grpc.aio

from protos import tandem_pb2 as pb
from protos import tandem_pb2_grpc
from protos.metadata import TENANT, TRACEPARENT
from protos.rich_errors import STATUS_DETAILS, error_of
from tandem.clock import now_s
from tandem.continuation import Continuation
from tandem.credentials import Credentials
from tandem.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RouterLost,
    TandemError,
)

Prompt = str | Sequence[int] | Sequence[tuple[str, str]]
"""Plain text, token ids, or a conversation of `(role, content)`."""

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
PATIENCE_S = 30.0
OVERLOAD_RETRIES = 0

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # The address is this machine's or the cluster's: no proxy of the environment stands between.
    ("grpc.enable_http_proxy", 0),
    # A router that is back is found again soon, and one that froze is noticed.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Despite its name: how long a connection may take to stand. A handshake of TLS is several ways to the router and back.
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.max_pings_without_data", 0),
]

_ERRORS: dict[grpc.StatusCode, type[TandemError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAVAILABLE: RouterLost,
}

_T = TypeVar("_T")


def targets_of(target: str) -> list[str]:
    """The routers of `host:port[,host:port…]`. Raises InvalidRequest if there is none."""
    found = [part.strip() for part in target.split(",") if part.strip()]
    if not found:
        raise InvalidRequest(f"target {target!r} names no router; it is host:port, or several with commas between")
    return found


class Client:
    """Speaks to the routers at `target` (`host:port`, or several with commas between). Use it as a context manager, or `close`
    it. Threads may share it.

    `credentials`: the API key that goes with each call, and TLS. `patience_s`: so long a router is looked for when the one of a
    call is lost, before `RouterLost` is raised.
    """

    def __init__(
        self, target: str, *, credentials: Credentials = Credentials(), patience_s: float = PATIENCE_S
    ) -> None:
        self.target = target
        self._targets = targets_of(target)
        self._patience_s = patience_s
        self._rng = random.Random()
        self._metadata = credentials.metadata()
        if credentials.tls is None:
            self._channels = [grpc.insecure_channel(one, options=_OPTIONS) for one in self._targets]
        else:
            secure = credentials.tls.channel_credentials()
            self._channels = [grpc.secure_channel(one, secure, options=_OPTIONS) for one in self._targets]
        self._stubs = [tandem_pb2_grpc.TandemStub(channel) for channel in self._channels]
        self._preferred = self._rng.randrange(len(self._targets))
        self._reached = False

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the channels; calls in flight are cancelled."""
        for channel in self._channels:
            channel.close()

    def generate(
        self,
        prompt: Prompt,
        sampling: pb.SamplingParams | None = None,
        *,
        model: str = "",
        timeout_s: float | None = None,
        tenant: str = "",
        batch: bool = False,
        idempotency_key: str = "",
        overload_retries: int = OVERLOAD_RETRIES,
        traceparent: str = "",
    ) -> Stream:
        """Starts a request; the stream yields the answer's events. `tenant` is who shares fairly with others, where there are no
        API keys; `batch` requests
        wait while others are due sooner. A request that is asked again with the same `idempotency_key` gets the first one's
        answer. What is refused for lack of room is asked again `overload_retries` times, after the time that the router says.
        `traceparent` is the caller's span (W3C Trace Context); those of all routers that serve the request are its children."""
        continuation = Continuation(
            request_of(prompt, sampling, model, batch=batch, idempotency_key=idempotency_key),
            deadline_s=None if timeout_s is None else now_s() + timeout_s,
            patience_s=self._patience_s,
            overload_retries=overload_retries,
            rng=self._rng,
        )
        return Stream(self, continuation, (*self._metadata, *_call_metadata(tenant, traceparent)))

    def cluster(self, timeout_s: float = 5.0) -> pb.GetClusterResponse:
        """What runs where. Raises RouterLost if no router answers."""
        return self._ask(
            lambda stub: stub.GetCluster(pb.GetClusterRequest(), timeout=timeout_s, metadata=self._metadata)
        )

    def explain(self, request_id: str = "", timeout_s: float = 5.0) -> pb.ExplainResponse:
        """Why a request that has ended went where it went; "" is the last one. Raises InvalidRequest for one that the router
        doesn't remember."""
        return self._ask(
            lambda stub: stub.Explain(
                pb.ExplainRequest(request_id=request_id), timeout=timeout_s, metadata=self._metadata
            )
        )

    def set_replicas(
        self,
        prefill: int | None = None,
        decode: int | None = None,
        reason: str = "",
        *,
        revision: int = 0,
        timeout_s: float = 5.0,
    ) -> pb.Replicas:
        """So many workers are wanted from now on; None: as many as were. Returns what is wanted. Whoever keeps the cluster starts
        and ends workers for it. `revision` is for those who pass on what another router knows."""
        request = pb.SetReplicasRequest(prefill=prefill, decode=decode, reason=reason, revision=revision)
        return self._ask(lambda stub: stub.SetReplicas(request, timeout=timeout_s))

    def drain(self, process: str, timeout_s: float = 5.0) -> pb.DrainResponse:
        """Tells a worker to finish what it has and to leave. Raises InvalidRequest for one that the router doesn't know."""
        return self._ask(lambda stub: stub.Drain(pb.DrainRequest(process=process), timeout=timeout_s))

    def audit(self, timeout_s: float = 30.0) -> pb.AuditResponse:
        """The router's cross-check of what it believes against what its processes report."""
        return self._ask(lambda stub: stub.Audit(pb.AuditRequest(), timeout=timeout_s, metadata=self._metadata))

    def _ask(self, call: Callable[[tandem_pb2_grpc.TandemStub], _T]) -> _T:
        """Of the first router that answers."""
        for tried in range(1, len(self._targets) + 1):
            number = self._preferred
            try:
                answer = call(self._stubs[number])
                self._reached = True
                return answer
            except grpc.RpcError as error:
                translated = _translated(error, self._targets[number])
                if not isinstance(translated, RouterLost) or tried == len(self._targets):
                    raise translated from error
                self._leave(number)
        raise AssertionError("there is no target")

    def _leave(self, number: int) -> None:
        """A router is lost: others are asked from now on."""
        if self._preferred == number:
            self._preferred = (number + 1) % len(self._targets)


class Stream:
    """One answer: `accepted`, `chunk`s, `completed`. Iterating raises a TandemError for whatever ends the call early.

    `cancel` may be called from any thread; leaving a loop over the stream cancels it too.
    """

    def __init__(self, client: Client, continuation: Continuation, metadata: tuple[tuple[str, str], ...]) -> None:
        self._client = client
        self._continuation = continuation
        self._metadata = metadata
        self._cancelled = threading.Event()
        self._number = -1
        self._call: Any = None
        self._begin()

    @property
    def num_resumes(self) -> int:
        """How often the answer went on at another router, or anew at the same one."""
        return self._continuation.num_resumes

    def __iter__(self) -> Iterator[pb.GenerateResponse]:
        try:
            while True:
                try:
                    for response in self._call:
                        self._client._reached = True
                        if self._continuation.take(response):
                            yield response
                    return
                except grpc.RpcError as error:
                    self._go_on(error)
        finally:
            self._call.cancel()

    def cancel(self) -> None:
        """Ends the request here and in the cluster."""
        self._cancelled.set()
        self._call.cancel()

    def _begin(self) -> None:
        client = self._client
        self._number = client._preferred
        self._call = client._stubs[self._number].Generate(
            self._continuation.next_request(),
            timeout=self._continuation.remaining_s(now_s()),
            metadata=self._metadata,
        )

    def _go_on(self, error: grpc.RpcError) -> None:
        """Asks again after a pause, or raises what ended the call."""
        client = self._client
        translated = _translated(error, client._targets[self._number], lost=not self._cancelled.is_set())
        pause_s = self._continuation.after(
            translated, now_s(), num_targets=len(client._targets), reached=client._reached
        )
        if pause_s is None or self._cancelled.wait(pause_s):
            raise translated from error
        if not isinstance(translated, Overloaded):
            client._leave(self._number)
        self._begin()
        if self._cancelled.is_set():
            self._call.cancel()


class AsyncClient:
    """As `Client`, for asyncio. Use it as an async context manager within one running loop."""

    def __init__(
        self, target: str, *, credentials: Credentials = Credentials(), patience_s: float = PATIENCE_S
    ) -> None:
        self.target = target
        self._targets = targets_of(target)
        self._patience_s = patience_s
        self._rng = random.Random()
        self._metadata = credentials.metadata()
        self._secure = None if credentials.tls is None else credentials.tls.channel_credentials()
        self._channels: list[grpc.aio.Channel] = []
        self._stubs: list[Any] = []
        self._preferred = self._rng.randrange(len(self._targets))
        self._reached = False

    async def __aenter__(self) -> AsyncClient:
        if self._secure is None:
            self._channels = [grpc.aio.insecure_channel(one, options=_OPTIONS) for one in self._targets]
        else:
            self._channels = [grpc.aio.secure_channel(one, self._secure, options=_OPTIONS) for one in self._targets]
        self._stubs = [tandem_pb2_grpc.TandemStub(channel) for channel in self._channels]  # type: ignore[arg-type]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for channel in self._channels:
            await channel.close()

    async def generate(
        self,
        prompt: Prompt,
        sampling: pb.SamplingParams | None = None,
        *,
        model: str = "",
        timeout_s: float | None = None,
        tenant: str = "",
        batch: bool = False,
        idempotency_key: str = "",
        overload_retries: int = OVERLOAD_RETRIES,
        traceparent: str = "",
    ) -> AsyncIterator[pb.GenerateResponse]:
        """The answer's events, as `Client.generate`. Closing the iterator, or cancelling the task, ends the request."""
        continuation = Continuation(
            request_of(prompt, sampling, model, batch=batch, idempotency_key=idempotency_key),
            deadline_s=None if timeout_s is None else now_s() + timeout_s,
            patience_s=self._patience_s,
            overload_retries=overload_retries,
            rng=self._rng,
        )
        while True:
            number = self._preferred
            call = self._stubs[number].Generate(
                continuation.next_request(),
                timeout=continuation.remaining_s(now_s()),
                metadata=(*self._metadata, *_call_metadata(tenant, traceparent)),
            )
            try:
                async for response in call:
                    self._reached = True
                    if continuation.take(response):
                        yield response
                return
            except grpc.aio.AioRpcError as error:
                translated = _translated(error, self._targets[number], lost=True)
                pause_s = continuation.after(translated, now_s(), num_targets=len(self._targets), reached=self._reached)
                if pause_s is None:
                    raise translated from error
                if not isinstance(translated, Overloaded):
                    self._leave(number)
                await asyncio.sleep(pause_s)
            finally:
                call.cancel()

    async def cluster(self, timeout_s: float = 5.0) -> pb.GetClusterResponse:
        """What runs where. Raises RouterLost if no router answers."""
        return await self._ask(
            lambda stub: stub.GetCluster(pb.GetClusterRequest(), timeout=timeout_s, metadata=self._metadata)
        )

    async def explain(self, request_id: str = "", timeout_s: float = 5.0) -> pb.ExplainResponse:
        """As `Client.explain`."""
        return await self._ask(
            lambda stub: stub.Explain(
                pb.ExplainRequest(request_id=request_id), timeout=timeout_s, metadata=self._metadata
            )
        )

    async def audit(self, timeout_s: float = 30.0) -> pb.AuditResponse:
        """As `Client.audit`."""
        return await self._ask(lambda stub: stub.Audit(pb.AuditRequest(), timeout=timeout_s, metadata=self._metadata))

    async def _ask(self, call: Callable[[Any], Awaitable[_T]]) -> _T:
        for tried in range(1, len(self._targets) + 1):
            number = self._preferred
            try:
                answer = await call(self._stubs[number])
                self._reached = True
                return answer
            except grpc.aio.AioRpcError as error:
                translated = _translated(error, self._targets[number])
                if not isinstance(translated, RouterLost) or tried == len(self._targets):
                    raise translated from error
                self._leave(number)
        raise AssertionError("there is no target")

    def _leave(self, number: int) -> None:
        if self._preferred == number:
            self._preferred = (number + 1) % len(self._targets)


def _call_metadata(tenant: str, traceparent: str) -> tuple[tuple[str, str], ...]:
    said = {TENANT: tenant, TRACEPARENT: traceparent}
    return tuple((name, value) for name, value in said.items() if value)


def _translated(error: grpc.RpcError, target: str, *, lost: bool = False) -> TandemError:
    """What a router said has its details with it; without them it is the connection's end. `lost`: a call that nobody here
    cancelled and that was cancelled all the same ended with its router."""
    call = cast("grpc.Call", error)  # an error that a call raised is that call
    status, details = call.code(), call.details() or str(call.code())
    for key, value in call.trailing_metadata() or ():
        if key == STATUS_DETAILS and isinstance(value, bytes) and (found := error_of(value)) is not None:
            return found
    if status is grpc.StatusCode.CANCELLED and lost:
        return RouterLost(f"the router at {target} ended the call: {details}")
    if status is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details:
        details = f"no router answers at {target}"
    return _ERRORS.get(status, TandemError)(details)


def request_of(
    prompt: Prompt,
    sampling: pb.SamplingParams | None,
    model: str,
    *,
    batch: bool = False,
    idempotency_key: str = "",
) -> pb.GenerateRequest:
    """The message that asks for it."""
    request = pb.GenerateRequest(sampling=sampling, model=model, batch=batch, idempotency_key=idempotency_key)
    if isinstance(prompt, str):
        request.prompt = prompt
    elif prompt and isinstance(prompt[0], tuple):
        messages = [item for item in prompt if isinstance(item, tuple)]
        request.chat.messages.extend(pb.ChatMessage(role=role, content=content) for role, content in messages)
    else:
        request.token_ids.ids.extend(item for item in prompt if isinstance(item, int))
    return request
