"""The router process: asyncio, gRPC, HTTP, ZeroMQ and timers around RouterCore.

Owns the event loop, the front door's life (listen, serve, drain, stop) and the way of each request between a client and the
core. Decides nothing about requests: the core's actions are carried out in order. One thread, but for tokenisation of long
prompts and the trials of grammars.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import secrets
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

import grpc
import grpc.aio
import msgspec
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvpool.keys import tokens_as_bytes
from protos import tandem_pb2, tandem_pb2_grpc
from protos.control import Grammar, Owned, ToRouter
from protos.kv_events import EventBatch
from router import request_log, trace_context
from router.access import Access, Caller
from router.actions import Action, Emit, Replay, Send, Subscribe, TokensEvent, Unsubscribe
from router.admission import Slo
from router.answer import Answer
from router.auditor import Auditor
from router.calls import abort, caller_of, write_all
from router.control_plane import ControlPlane, Handlers
from router.explain import explain
from router.gate import Gate
from router.gateway.service import SERVICE as GATEWAY_SERVICE
from router.gateway.service import VllmEngine, add_to_server
from router.http.apps import admin_app, client_app
from router.http.listener import HttpListener
from router.journal import Request, Resumed, Summary
from router.keys_file import KeysFile
from router.live import Live
from router.live_feed import LiveFeed
from router.metrics import Metrics
from router.open_answers import MAX_KEY_CHARS, Open, OpenAnswers
from router.quotas import Quotas
from router.reports import audit, cluster, completed
from router.router import RouterCore, Settings
from router.secret import secret_path, shared_secret
from router.spans import Began
from router.tickets import Ticket, Tickets, digest_of
from router.tls import ServerTls
from router.validation import Asked, Validator, prompt_bytes
from router.watched_files import WatchedFiles
from tandem.clock import now_s
from tandem.config import Config, RouterConfig, SloConfig, TracingConfig, is_loopback, router_number
from tandem.curve import load_keyring
from tandem.errors import Cancelled, ConfigError, Draining, InvalidRequest, Overloaded, TandemError
from tandem.model_files import default_model_name, resolve_model
from tandem.tokenizer.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from router.tracing import Tracing

log = logging.getLogger(__name__)

TICK_S = 0.05
REFRESH_S = 1.0
DRAIN_S = 5.0
LONG_PROMPT_BYTES = 16_384
"""Tokenised on another thread: what takes less than some 3 ms costs more by changing threads than by being waited for."""
AUDIT_S = 5.0
AUDIT_ROUND_S = 2.5
AUDIT_PAUSE_S = 0.1
AUDIT_LOOK_S = 0.01
SERVICE = "tandem.v1.Tandem"

P = ParamSpec("P")


def run(config: Config, name: str, stop: threading.Event) -> None:
    """Serves as router `name` until `stop` is set, then drains: `router` is the first one of its machine, `router-1` the next.
    Raises TandemError if a port is in use, there is no model, or the name is not that of a router."""
    config = config.model_copy(update={"router": config.router.replica(router_number(name))})
    tokenizer = load_tokenizer(resolve_model(config.model.path))
    run_server(RouterServer(config, tokenizer, name=name), stop)


def run_server(server: RouterServer, stop: threading.Event) -> None:
    """`serve` on an event loop of its own, in this thread."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.serve(stop))


def _slo(config: SloConfig) -> Slo:
    return Slo(config.ttft_s, config.ttft_per_1k_tokens_s / 1000.0, config.tpot_s)


def _promises(settings: RouterConfig) -> dict[tuple[str, str], float]:
    """Seconds by class and objective, of what is promised."""
    classes = {"interactive": settings.interactive, "batch": settings.batch}
    found = {(name, key): getattr(slo, f"{key}_s") for name, slo in classes.items() for key in ("ttft", "tpot")}
    return {labels: seconds for labels, seconds in found.items() if seconds}


def _tracing_of(config: TracingConfig, router: str, model: str) -> Tracing | None:
    """None where nobody wants traces: what they are made with costs memory and time to load."""
    if not config.endpoint:
        return None
    from router.tracing import Tracing

    return Tracing(config.endpoint, sample_ratio=config.sample_ratio, router=router, model=model)


def _logged(handler: Callable[P, None]) -> Callable[P, None]:
    """`handler`, with its exceptions logged instead of raised: one bad message must end neither the router nor the task that
    brought it."""

    @functools.wraps(handler)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            handler(*args, **kwargs)
        except Exception:
            log.exception("%s: what %s sent was not handled", handler.__name__, args[0])

    return guarded


class RouterServer:
    """One router. `serve` runs it; the ports it listens on are known once `started` is set."""

    def __init__(self, config: Config, tokenizer: Tokenizer, drain_s: float = DRAIN_S, name: str = "router") -> None:
        self._config = config
        self._drain_s = drain_s
        self.tokenizer = tokenizer
        self.model = config.model.name or default_model_name(Path(config.model.path).expanduser())
        self._validator = Validator(config.limits, tokenizer, self.model)
        settings = config.router
        self.core = RouterCore(
            Settings(
                router=name,
                epoch=secrets.token_bytes(8),
                model=self.model,
                heartbeat_s=settings.heartbeat_s,
                liveness_s=settings.liveness_s,
                progress_s=settings.progress_s,
                max_attempts=settings.max_attempts,
                max_active_requests=config.limits.max_active_requests,
                max_model_len=config.model.max_len,
                hold_s=config.transfer.hold_s,
                interactive=_slo(settings.interactive),
                batch=_slo(settings.batch),
                max_index_keys=settings.max_index_keys,
                reject_late=settings.reject_late,
            ),
            random.Random(secrets.randbits(64)),
        )
        self.metrics = Metrics()
        self.metrics.identify(name, self.model, _promises(settings))
        secret = shared_secret(secret_path(config))
        self._keys_file = KeysFile(Path(settings.keys_file).expanduser()) if settings.keys_file else None
        self._watched_keys = WatchedFiles([self._keys_file.path] if self._keys_file is not None else [])
        self._tls = ServerTls(settings.tls) if settings.tls.cert else None
        self._watched_tls = WatchedFiles(self._tls.paths if self._tls is not None else [])
        self.access = Access(secret, self._keys_file.read() if self._keys_file is not None else None)
        self.live = LiveFeed(Live(self.core, self.model), now_s)
        self._tickets = Tickets(secret)
        self._quotas = Quotas()
        self._tracing = _tracing_of(config.tracing, name, self.model)
        self.answers = OpenAnswers()
        self.started = threading.Event()
        self.grpc_port = settings.grpc_port
        self.control_port = settings.control_port
        self.http_port = settings.http_port
        self._num_opening = 0
        self._auditors: dict[int, Auditor] = {}
        self._num_audits = 0
        self._stopping = False
        self._serving = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._trials = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._health = health.aio.HealthServicer()
        self._control: ControlPlane | None = None
        self._keys = load_keyring(config.control.curve, name, "router")

    # --- life ----------------------------------------------------------------------------------------------------------

    async def serve(self, stop: threading.Event) -> None:
        """Listens and serves until `stop` is set; active requests then get a bounded time to end."""
        handlers = Handlers(
            on_message=_logged(self._on_message),
            on_closed=_logged(self._on_closed),
            on_events=_logged(self._on_events),
            on_replayed=_logged(self._on_replayed),
            on_replay_end=_logged(self.core.on_replay_end),
        )
        host = self._config.router.host
        control = self._control = ControlPlane(host, self._config.router.control_port, handlers, self._keys)
        server = self._grpc_server()
        listeners: list[HttpListener] = []
        try:
            self.control_port = control.bind()
            self.grpc_port = self._listen(server)
            for key, app in (("http_port", client_app), ("admin_port", admin_app)):
                if port := getattr(self._config.router, key):
                    tls = self._tls.ssl_context() if self._tls is not None else None
                    listeners.append(HttpListener(app(self), self.client_patience_s, tls))
                    listeners[-1].listen(f"router.{key}", host, port)
            await self._show_health(force=True)
            await server.start()
            control.listen()
            for listener in listeners:
                listener.start()
            log.info(
                "model %s: gRPC on %s:%d, control on %s:%d", self.model, host, self.grpc_port, host, self.control_port
            )
            if self.access.needs_key and self._tls is None and not is_loopback(host):
                log.warning(
                    "API keys cross the network as they are: set router.tls, or let what stands before it do TLS"
                )
            self.started.set()
            await self._tick_until(stop)
            await self._drain()
        finally:
            await server.stop(grace=1.0)
            self.live.close()
            for listener in listeners:
                await listener.stop()
            await control.close()
            if self._tracing is not None:
                await asyncio.to_thread(self._tracing.close)
            self._executor.shutdown(cancel_futures=True)
            self._trials.shutdown(wait=False, cancel_futures=True)

    def _grpc_server(self) -> grpc.aio.Server:
        # Token ids take up to five bytes each on the wire where the limit counts four: leave the verdict to the validation.
        max_bytes = 2 * self._config.limits.max_prompt_bytes + 2**20
        # Without SO_REUSEPORT a second router on the port is an error, not a silent share of the requests.
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", max_bytes),
            # Clients ask a silent connection whether it is still there.
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
        server = grpc.aio.server(options=options, interceptors=[Gate(self.access)] if self.access.needs_key else None)
        tandem_pb2_grpc.add_TandemServicer_to_server(_Servicer(self), server)
        add_to_server(VllmEngine(self, self.tokenizer, self._config.model.path, self._tickets), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        services = (SERVICE, GATEWAY_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(services, server)
        return server

    def _listen(self, server: grpc.aio.Server) -> int:
        host, port = self._config.router.host, self._config.router.grpc_port
        shown = f"[{host}]" if ":" in host else host
        message = f"router.grpc_port: can't listen on {host}:{port}: it is in use, or the address is not this machine's"
        try:
            if self._tls is None:
                bound = server.add_insecure_port(f"{shown}:{port}")
            else:
                bound = server.add_secure_port(f"{shown}:{port}", self._tls.grpc_credentials())
        except RuntimeError as error:
            raise ConfigError(message) from error
        if bound == 0:
            raise ConfigError(message)
        return bound

    async def _tick_until(self, stop: threading.Event) -> None:
        refresh_at_s = 0.0
        while not stop.is_set():
            time_s = now_s()
            self._tick(time_s)
            await self._show_health()
            if time_s >= refresh_at_s:
                refresh_at_s = time_s + REFRESH_S
                self.metrics.refresh(self.core, time_s, self._tracing.counts if self._tracing is not None else None)
                await self._reload()
            await asyncio.sleep(TICK_S)

    async def _reload(self) -> None:
        """Takes up the keys file and the certificate where they have changed; of wrong ones nothing, and those of before stay
        good."""
        loop = asyncio.get_running_loop()
        if self._keys_file is not None and self._watched_keys.changed():
            try:
                keyring = await loop.run_in_executor(self._executor, self._keys_file.read)
                self.access.use(keyring)
                log.info("%d API keys are good from now on", len(keyring.keys))
            except ConfigError as error:
                log.error("the API keys stay as they were: %s", error)
        if self._tls is not None and self._watched_tls.changed():
            try:
                self._tls.reload()
                log.info("router.tls: there is another certificate")
            except ConfigError as error:
                log.error("the certificate stays as it was: %s", error)

    def _tick(self, time_s: float) -> None:
        try:
            self._do(self.core.tick(time_s))
        except Exception:  # one record that can't be served must not end all streams
            log.exception("a tick failed")

    async def _drain(self) -> None:
        self._stopping = True
        await self._show_health()
        end_s = now_s() + self._drain_s
        while self.answers and now_s() < end_s:
            self._tick(now_s())
            await asyncio.sleep(TICK_S)
        for request_id in self.answers.ids():
            self._do(self.core.cancel(request_id, now_s(), Draining("the router is stopping")))
        end_s = now_s() + 1.0
        while self.answers and now_s() < end_s:
            await asyncio.sleep(TICK_S)

    async def _show_health(self, force: bool = False) -> None:
        serving = self.ready
        if serving == self._serving and not force:
            return
        self._serving = serving
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in (health.OVERALL_HEALTH, SERVICE, GATEWAY_SERVICE):
            await self._health.set(service, status)

    # --- between the sockets and the core ------------------------------------------------------------------------------

    def _on_message(self, process: str, epoch: bytes, message: ToRouter) -> None:
        if isinstance(message, Owned):
            if (auditor := self._auditors.get(message.number)) is not None:
                auditor.take(process, epoch, message)
            return
        self._do(self.core.on_message(process, epoch, message, now_s()))

    def _on_closed(self, process: str, epoch: bytes) -> None:
        self._do(self.core.on_closed(process, epoch, now_s()))

    def _on_events(self, process: str, epoch: bytes, seq: int, batch: EventBatch) -> None:
        self._do(self.core.on_events(process, epoch, seq, batch, now_s()))

    def _on_replayed(self, process: str, epoch: bytes, seq: int, batch: EventBatch) -> None:
        self.core.on_replayed(process, epoch, seq, batch, now_s())

    def _do(self, actions: list[Action]) -> None:
        control = self._control
        assert control is not None, "the core acted before the router listened"
        for action in actions:
            match action:
                case Send(process=process, epoch=epoch, message=message):
                    control.send(process, epoch, message)
                    request_log.sent(action)
                case Emit():
                    self._emit(action)
                case Subscribe(process=process):
                    log.info("%s has joined", process)
                    control.subscribe(action)
                case Unsubscribe(process=process, epoch=epoch, reason=reason):
                    log.warning("%s is gone: %s", process, reason)
                    control.unsubscribe(process, epoch)
                case Replay():
                    control.replay(action)

    def _emit(self, emit: Emit) -> None:
        time_s = now_s()
        self.metrics.emitted(emit, time_s)
        num_tokens = self.answers.emit(emit.request_id, emit.event, time_s)
        if num_tokens is not None and isinstance(emit.event, TokensEvent):
            self._do(self.core.stop_sample(emit.request_id, emit.event.index, num_tokens, time_s))

    # --- requests ------------------------------------------------------------------------------------------------------

    async def generate(
        self, request: tandem_pb2.GenerateRequest, budget_s: float | None, caller: Caller
    ) -> AsyncGenerator[tandem_pb2.GenerateResponse, None]:
        """Serves one request of `caller`, within `budget_s` seconds if it gave any. Raises the TandemError with which it ends, if
        it does not complete. Closing the iterator early cancels the request."""
        try:
            async with contextlib.aclosing(self._generate(request, budget_s, caller)) as responses:
                async for response in responses:
                    yield response
        except TandemError as error:
            self.metrics.failed(error.code)
            raise

    async def _generate(
        self, request: tandem_pb2.GenerateRequest, budget_s: float | None, caller: Caller
    ) -> AsyncGenerator[tandem_pb2.GenerateResponse, None]:
        arrived_s = now_s()
        limits = self._config.limits
        if self._stopping:
            raise Draining("the router is stopping")
        if len(self.answers) + self._num_opening >= limits.max_active_requests:
            raise Overloaded(
                f"{len(self.answers) + self._num_opening} requests are active, the limit is {limits.max_active_requests}"
            )
        with self._quotas.begin(caller.tenant, caller.rules, arrived_s, resumed=request.HasField("resume")) as use:
            self._num_opening += 1
            try:
                asked = self._validator.check(request)
                prompt = await self._tokenize(request)
                await self._check_grammar(asked)
            finally:
                self._num_opening -= 1
            use.tokens(len(prompt), now_s())
            budget_s = min(limits.default_deadline_s, budget_s) if budget_s is not None else limits.default_deadline_s
            opened, submitted, answer = self._open(request, asked, prompt, arrived_s + budget_s, caller)
            ended = False
            try:
                if submitted is not None and self._tracing is not None:
                    operation = "chat" if request.WhichOneof("input") == "chat" else "text_completion"
                    began = Began(arrived_s, operation, submitted.sampling, submitted.n, trace_context.current())
                    self._tracing.began(opened.request_id, began)
                if submitted is not None:
                    self._do(self.core.submit(submitted, now_s()))
                yield tandem_pb2.GenerateResponse(accepted=opened.accepted)
                async for chunk in answer.chunks():
                    use.tokens(len(chunk.token_ids), now_s())
                    yield tandem_pb2.GenerateResponse(chunk=chunk)
                assert answer.summary is not None
                ended = True
                message = completed(answer.summary, answer.num_generated_tokens)
                yield tandem_pb2.GenerateResponse(completed=message)
            finally:
                if self.answers.leave(opened, answer):
                    self._do(self.core.cancel(opened.request_id, now_s()))
                if self.answers.close(opened, remember=ended):
                    self._count(opened.request_id, answer)

    def _open(
        self,
        request: tandem_pb2.GenerateRequest,
        asked: Asked,
        prompt: tuple[int, ...],
        deadline_s: float,
        caller: Caller,
    ) -> tuple[Open, Request | None, Answer]:
        """A new answer with its reader, and what is to be submitted for it: nothing where a request of the same idempotency key
        is answered already. Raises InvalidRequest for what does not fit the ticket or the key that comes with it."""
        digest, tenant = digest_of(tokens_as_bytes(prompt), asked.sampling, asked.n, asked.stop), caller.tenant
        answer_to = functools.partial(
            Answer,
            tokenizer=self.tokenizer,
            stop=asked.stop,
            n=asked.n,
            continues=request.WhichOneof("input") != "chat",
        )
        given_seed = request.sampling.seed if request.sampling.HasField("seed") else None
        if len(request.idempotency_key) > MAX_KEY_CHARS:
            raise InvalidRequest(
                f"idempotency_key has {len(request.idempotency_key)} characters, the limit is {MAX_KEY_CHARS}"
            )
        ticket = Ticket(
            request_id=secrets.token_hex(12),
            resume_no=0,
            asked=digest,
            seed=asked.sampling.seed,
            root=self.core.root,
            tenant=tenant,
        )
        key, resumed = None, None
        if request.HasField("resume"):
            before = self._tickets.read(request.resume.ticket)
            if (before.asked, before.tenant) != (digest, tenant) or given_seed not in (None, before.seed):
                raise InvalidRequest("the ticket is of another request, or of another tenant")
            ticket = msgspec.structs.replace(before, resume_no=before.resume_no + 1)
            so_far = self._validator.so_far(request.resume, asked)
            # The call that had it is broken, or will be: an answer has one place.
            self._do(
                self.core.cancel(before.request_id, now_s(), Cancelled("its client goes on with it in another call"))
            )
        elif request.idempotency_key:
            key = (tenant, request.idempotency_key)
            if (opened := self.answers.find(key, (digest, given_seed), now_s())) is not None:
                answer = answer_to(opened.request_id)
                self.answers.join(opened, answer)
                return opened, None, answer
        answer = answer_to(ticket.request_id)
        if request.HasField("resume"):
            had = tuple(answer.resume(index, sample) for index, sample in enumerate(so_far))
            resumed = Resumed(ticket.resume_no, ticket.root, had)
        accepted = tandem_pb2.Accepted(
            request_id=ticket.request_id,
            seed=ticket.seed,
            num_prompt_tokens=len(prompt),
            ticket=self._tickets.sign(ticket),
            resume_no=ticket.resume_no,
        )
        opened = Open(accepted, (digest, given_seed), [answer], key)
        self.answers.add(opened)
        sampling = msgspec.structs.replace(asked.sampling, seed=ticket.seed)
        submitted = Request(
            ticket.request_id,
            prompt,
            sampling,
            asked.n,
            deadline_s,
            tenant=tenant,
            tenant_salt=caller.salt,
            batch=request.batch,
            resumed=resumed,
        )
        return opened, submitted, answer

    async def _tokenize(self, request: tandem_pb2.GenerateRequest) -> tuple[int, ...]:
        max_model_len = self.core.max_model_len()
        if prompt_bytes(request) < LONG_PROMPT_BYTES:
            return self._validator.tokenize(request, max_model_len)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._validator.tokenize, request, max_model_len)

    async def _check_grammar(self, asked: Asked) -> None:
        if isinstance(asked.sampling.grammar, Grammar):
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._trials, self._validator.check_grammar, asked.sampling.grammar)

    def _count(self, request_id: str, answer: Answer) -> None:
        summary: Summary | None = answer.summary or next(
            (s for s in reversed(self.core.journal.recent) if s.request_id == request_id), None
        )
        if self._tracing is not None:
            self._tracing.ended(request_id, summary, answer.num_generated_tokens)
        if summary is not None:
            request_log.ended(summary)
            self.metrics.ended(summary, answer.num_generated_tokens)

    @property
    def ready(self) -> bool:
        """Whether a request can be served now."""
        return self.core.ready and not self._stopping

    @property
    def max_body_bytes(self) -> int:
        """A request's body may be so large: token ids take up to eight bytes each as text where the limit counts four, and any
        character up to six as a JSON escape. Past it nothing is read; what fits may still be refused."""
        return 6 * self._config.limits.max_prompt_bytes + 2**20

    @property
    def client_patience_s(self) -> float:
        """How long a client may leave what it is sent unread."""
        return self._config.limits.client_patience_s

    def cancel(self, request_id: str) -> None:
        """Ends a request, if it is active: whoever reads its answer gets Cancelled."""
        self._do(self.core.cancel(request_id, now_s(), Cancelled("it was cancelled by another call")))

    def cluster(self) -> tandem_pb2.GetClusterResponse:
        """What runs where."""
        return cluster(self.core, self.model, now_s())

    def explain(self, request_id: str, caller: Caller) -> tandem_pb2.ExplainResponse:
        """Why a request went where it went. Raises InvalidRequest for one that isn't remembered, or that `caller` may not see."""
        return explain(self.core.journal, request_id, caller)

    def set_replicas(self, request: tandem_pb2.SetReplicasRequest, caller: Caller) -> tandem_pb2.Replicas:
        """What is wanted from now on. Raises PermissionDenied unless the caller is an admin, InvalidRequest for what can't be."""
        caller.check_admin("SetReplicas")
        self.core.wanted.set(request)
        return self.core.wanted.as_message()

    def drain(self, process: str, caller: Caller) -> tandem_pb2.DrainResponse:
        """Tells a process to finish what it has and to leave. Raises as `set_replicas`."""
        caller.check_admin("Drain")
        num_dispatches, actions = self.core.drain(process, "an operator asked for it")
        self._do(actions)
        return tandem_pb2.DrainResponse(num_dispatches=num_dispatches, wanted=self.core.wanted.as_message())

    async def audit(self) -> tandem_pb2.AuditResponse:
        """What the router believes against what its processes own: rounds until all agree, or `AUDIT_S` are over."""
        auditor = Auditor(self.core)
        end_s = now_s() + AUDIT_S
        try:
            while True:
                self._num_audits += 1
                self._auditors[self._num_audits] = auditor
                self._do([*auditor.ask(self._num_audits)])
                round_end_s = min(end_s, now_s() + AUDIT_ROUND_S)
                while not auditor.is_complete() and now_s() < round_end_s:
                    await asyncio.sleep(AUDIT_LOOK_S)
                del self._auditors[self._num_audits]
                response = audit(self.core, self.answers.ids(), now_s(), auditor.findings())
                if response.ok or now_s() >= end_s:
                    return response
                await asyncio.sleep(AUDIT_PAUSE_S)
        finally:
            self._auditors = {number: other for number, other in self._auditors.items() if other is not auditor}


class _Servicer(tandem_pb2_grpc.TandemServicer):
    """The gRPC face: maps errors to statuses, nothing else."""

    def __init__(self, server: RouterServer) -> None:
        self._server = server

    async def Generate(
        self,
        request: tandem_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[tandem_pb2.GenerateRequest, tandem_pb2.GenerateResponse],
    ) -> None:
        caller = await caller_of(context, self._server.access)
        responses = self._server.generate(request, context.time_remaining(), caller)
        await write_all(context, responses, self._server.client_patience_s)

    async def GetCluster(self, request: tandem_pb2.GetClusterRequest, context: object) -> tandem_pb2.GetClusterResponse:
        return self._server.cluster()

    async def SetReplicas(
        self,
        request: tandem_pb2.SetReplicasRequest,
        context: grpc.aio.ServicerContext[tandem_pb2.SetReplicasRequest, tandem_pb2.Replicas],
    ) -> tandem_pb2.Replicas:
        try:
            return self._server.set_replicas(request, await caller_of(context, self._server.access))
        except TandemError as error:
            await abort(context, error)

    async def Drain(
        self,
        request: tandem_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[tandem_pb2.DrainRequest, tandem_pb2.DrainResponse],
    ) -> tandem_pb2.DrainResponse:
        try:
            return self._server.drain(request.process, await caller_of(context, self._server.access))
        except TandemError as error:
            await abort(context, error)

    async def Audit(self, request: tandem_pb2.AuditRequest, context: object) -> tandem_pb2.AuditResponse:
        return await self._server.audit()

    async def Explain(
        self,
        request: tandem_pb2.ExplainRequest,
        context: grpc.aio.ServicerContext[tandem_pb2.ExplainRequest, tandem_pb2.ExplainResponse],
    ) -> tandem_pb2.ExplainResponse:
        caller = await caller_of(context, self._server.access)
        try:
            return self._server.explain(request.request_id, caller)
        except TandemError as error:
            await abort(context, error)
