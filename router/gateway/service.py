"""`vllm.grpc.engine.VllmEngine` on the router's gRPC port: a gateway that knows vLLM's engines takes the cluster for one.

Owns the service's face and the tickets of split requests; understands requests through `translation`. To a gateway the whole
cluster is one engine, whichever role it takes it for. A gateway that splits a request asks first for one token ("prefill"), and
then, with what it was given there, for the whole answer ("decode"). What it is given is a signed ticket that fixes prompt and
seed; the second call finds the prompt's KV by its content, as every request does. Nothing in a ticket says where KV is.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
import json
import zipfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from importlib.metadata import version

import grpc.aio
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2 as smg

from kvpool.keys import tokens_as_bytes
from protos import tandem_pb2
from protos.control import Sampling
from router.access import Caller
from router.calls import Context, abort, caller_of, write_all
from router.front import Front
from router.gateway.translation import Answers, request_of
from router.tickets import MAX_TICKET_BYTES, Ticket, Tickets, digest_of
from tandem.clock import now_s
from tandem.errors import InvalidRequest, ModelError
from tandem.model_files import resolve_model
from tandem.tokenizer.files import tokenizer_files
from tandem.tokenizer.tokenizer import Tokenizer

SERVICE = "vllm.grpc.engine.VllmEngine"
CONNECTOR = "TandemConnector"
TICKET_KEY = "tandem_ticket"
MAX_TRANSFER_PARAMS_BYTES = 4 * MAX_TICKET_BYTES
_CHUNK_BYTES = 1 << 20
_ANY_SAMPLING = Sampling(max_tokens=1)
"""What a split request's tickets are of: the prompt alone, since its two halves differ in the rest."""


def add_to_server(engine: VllmEngine, server: grpc.aio.Server) -> None:
    """Serves `engine` on it."""
    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(engine, server)


def _zipped(files: dict[str, bytes]) -> bytes:
    """As an archive whose bytes depend on the files alone: gateways know it by its digest."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name), content)
    return data.getvalue()


class VllmEngine(vllm_engine_pb2_grpc.VllmEngineServicer):  # type: ignore[misc]
    """The engine that a gateway sees. What is not answered here (embeddings, profiles, KV events) is UNIMPLEMENTED, which
    gateways take for an answer."""

    def __init__(self, front: Front, tokenizer: Tokenizer, model_path: str, tickets: Tickets) -> None:
        self._front = front
        self._tokenizer = tokenizer
        self._model_path = model_path
        self._tickets = tickets
        self._started_s = now_s()
        self._active: dict[tuple[str, str], set[str]] = {}
        """By tenant and a gateway's id of a request, ours: several, if the gateway uses one twice."""
        self._archive: bytes | None = None

    # --- requests ------------------------------------------------------------------------------------------------------

    async def Generate(self, request: vllm.GenerateRequest, context: Context) -> None:
        caller = await caller_of(context, self._front.access)
        responses = self._responses(request, context.time_remaining(), caller)
        await write_all(context, responses, self._front.client_patience_s)

    async def _responses(
        self, request: vllm.GenerateRequest, budget_s: float | None, caller: Caller
    ) -> AsyncIterator[vllm.GenerateResponse]:
        asked = request_of(request)
        ticket = self._read(request)
        if ticket is not None:
            self._check(ticket, asked, caller)
            if not asked.sampling.HasField("seed"):
                asked.sampling.seed = ticket.seed
        splits = asked.sampling.max_tokens == 1 and ticket is None and asked.WhichOneof("input") == "token_ids"
        responses = self._front.generate(asked, budget_s, caller)
        answers: Answers | None = None
        accepted: tandem_pb2.Accepted | None = None
        named = (caller.tenant, request.request_id)
        try:
            async for response in responses:
                match response.WhichOneof("event"):
                    case "accepted":
                        accepted = response.accepted
                        self._active.setdefault(named, set()).add(accepted.request_id)
                        answers = Answers(accepted.num_prompt_tokens, asked.sampling.n or 1, self._stops(asked))
                    case "chunk":
                        assert answers is not None, "a chunk came before the request was accepted"
                        said = answers.chunk(response.chunk)
                        if said is not None and request.stream:
                            yield said
                    case "completed":
                        assert answers is not None
                        assert accepted is not None
                        given = self._ticket(accepted, asked, caller) if splits else None
                        for complete in answers.complete(response.completed.num_cached_tokens, given):
                            yield complete
        finally:
            await responses.aclose()
            if accepted is not None:
                self._forget(named, accepted.request_id)

    def _stops(self, asked: tandem_pb2.GenerateRequest) -> frozenset[int]:
        ends = frozenset[int]() if asked.sampling.ignore_eos else self._tokenizer.eos_token_ids
        return ends | frozenset(asked.sampling.stop_token_ids)

    def _forget(self, named: tuple[str, str], ours: str) -> None:
        active = self._active[named]
        active.discard(ours)
        if not active:
            del self._active[named]

    async def Abort(self, request: vllm.AbortRequest, context: Context) -> vllm.AbortResponse:
        caller = await caller_of(context, self._front.access)
        for theirs in request.request_ids:
            for ours in tuple(self._active.get((caller.tenant, theirs), ())):
                self._front.cancel(ours)
        return vllm.AbortResponse()

    # --- tickets of split requests -------------------------------------------------------------------------------------

    def _ticket(self, accepted: tandem_pb2.Accepted, asked: tandem_pb2.GenerateRequest, caller: Caller) -> str:
        ticket = Ticket(
            request_id=accepted.request_id,
            resume_no=0,
            asked=_digest(asked),
            seed=accepted.seed,
            root=b"",
            tenant=caller.tenant,
        )
        return json.dumps({TICKET_KEY: base64.b64encode(self._tickets.sign(ticket)).decode()})

    def _read(self, request: vllm.GenerateRequest) -> Ticket | None:
        """The ticket that comes with a split request's second half. Anything else in its parameters is a gateway's own and
        decides nothing. Raises InvalidRequest for a ticket that no router of this cluster has signed."""
        if request.HasField("kv_transfer_params"):
            raise InvalidRequest("kv_transfer_params is given, must be what the first half answered: a ticket")
        if not request.HasField("kv_transfer_params_json"):
            return None
        text = request.kv_transfer_params_json
        if len(text) > MAX_TRANSFER_PARAMS_BYTES:
            raise InvalidRequest(
                f"kv_transfer_params_json has {len(text)} characters, the limit is {MAX_TRANSFER_PARAMS_BYTES}"
            )
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"kv_transfer_params_json is not JSON: {error}") from error
        ticket = given.get(TICKET_KEY) if isinstance(given, dict) else None
        if ticket is None:
            return None
        try:
            return self._tickets.read(base64.b64decode(ticket, validate=True))
        except (TypeError, binascii.Error) as error:
            raise InvalidRequest(f"{TICKET_KEY} in kv_transfer_params_json is not base64: {error}") from error

    def _check(self, ticket: Ticket, asked: tandem_pb2.GenerateRequest, caller: Caller) -> None:
        if asked.WhichOneof("input") != "token_ids" or (ticket.asked, ticket.tenant) != (_digest(asked), caller.tenant):
            raise InvalidRequest("the ticket is of another prompt, or of another tenant")

    # --- what a gateway asks before it sends requests ------------------------------------------------------------------

    async def HealthCheck(self, request: vllm.HealthCheckRequest, context: Context) -> vllm.HealthCheckResponse:
        ready = self._front.ready
        return vllm.HealthCheckResponse(healthy=ready, message="" if ready else "no worker can serve a request now")

    async def GetModelInfo(self, request: vllm.GetModelInfoRequest, context: Context) -> vllm.GetModelInfoResponse:
        max_len = self._front.cluster().max_model_len
        return vllm.GetModelInfoResponse(
            model_path=self._front.model,
            is_generation=True,
            max_context_length=max_len,
            vocab_size=self._tokenizer.vocab_size,
            served_model_name=self._front.model,
            tokenizer_path=self._front.model,
            eos_token_ids=sorted(self._tokenizer.eos_token_ids),
            bos_token_id=self._tokenizer.bos_token_id or 0,
            max_req_input_len=max_len,
        )

    async def GetServerInfo(self, request: vllm.GetServerInfoRequest, context: Context) -> vllm.GetServerInfoResponse:
        cluster = self._front.cluster()
        return vllm.GetServerInfoResponse(
            active_requests=cluster.num_active_requests,
            last_receive_timestamp=datetime.now(UTC).timestamp(),
            uptime_seconds=now_s() - self._started_s,
            server_type="vllm-grpc",
            kv_connector=CONNECTOR,
            kv_role="kv_both",
            data_parallel_size=1,
            block_size=cluster.block_size,
            pairing_protocol=cluster.kv_format,
        )

    async def GetLoads(self, request: vllm.GetLoadsRequest, context: Context) -> vllm.GetLoadsResponse:
        cluster = self._front.cluster()
        workers = [process for process in cluster.processes if process.role in ("prefill", "decode")]
        num_tokens = cluster.block_size * sum(worker.num_blocks for worker in workers)
        used = cluster.block_size * sum(
            worker.num_blocks - worker.free_blocks - worker.cached_blocks for worker in workers
        )
        running = sum(worker.num_running for worker in workers)
        waiting = cluster.num_waiting_requests + sum(worker.num_waiting for worker in workers)
        load = vllm.SchedulerLoad(
            num_running_reqs=running,
            num_waiting_reqs=waiting,
            num_total_reqs=running + waiting,
            num_used_tokens=min(used, 2**31 - 1),
            max_total_num_tokens=min(num_tokens, 2**31 - 1),
            token_usage=used / num_tokens if num_tokens else 0.0,
        )
        return vllm.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(), version=version("tandem"), dp_rank_count=1, loads=[load]
        )

    async def GetTokenizer(self, request: smg.GetTokenizerRequest, context: Context) -> None:
        try:
            if self._archive is None:
                self._archive = await asyncio.to_thread(self._tokenizer_archive)
        except ModelError as error:
            await abort(context, error)
        await write_all(context, _chunks(self._archive), self._front.client_patience_s)

    def _tokenizer_archive(self) -> bytes:
        return _zipped(tokenizer_files(resolve_model(self._model_path)))


async def _chunks(data: bytes) -> AsyncIterator[smg.GetTokenizerChunk]:
    """The archive in pieces; the last one has its digest."""
    for start in range(0, len(data), _CHUNK_BYTES):
        is_last = start + _CHUNK_BYTES >= len(data)
        digest = hashlib.sha256(data).hexdigest() if is_last else ""
        yield smg.GetTokenizerChunk(data=data[start : start + _CHUNK_BYTES], sha256=digest)


def _digest(asked: tandem_pb2.GenerateRequest) -> bytes:
    return digest_of(tokens_as_bytes(asked.token_ids.ids), _ANY_SAMPLING, 1, ())
