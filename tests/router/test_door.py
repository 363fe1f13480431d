"""The router's door with API keys, over real sockets and with the real client: who gets in, as whom, and what they may."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc

from kvpool.keys import root_key
from protos import tandem_pb2 as pb
from protos.control import Dispatch
from protos.metadata import TENANT
from protos.rich_errors import STATUS_DETAILS, error_of
from router.keyring import TenantRules, api_key
from router.keys_file import KeysFile
from router.operator import operator_credentials
from router.secret import tenant_salt
from router.server import RouterServer
from tandem.client import AsyncClient, Client
from tandem.config import load_config
from tandem.credentials import Credentials
from tandem.errors import ConfigError, InvalidRequest, Overloaded, PermissionDenied, Unauthenticated
from tests.router.fake_cluster import GROUP, LONG, ROOT, ByteTokenizer, FakeWorker, Router, collect, reference, wait_for
from tests.system.harness import free_port

SECRET = b"a secret of the routers"
KEYS = {
    "acme": ("acme", "client"),
    "bolt": ("bolt", "client"),
    "common": ("common", "client"),
    "ops": ("acme", "admin"),
}


def key_of(name: str) -> str:
    return f"tdm_of-{name}"


class Door:
    """A router with keys, one decode worker, and clients with their keys."""

    def __init__(
        self, make_router: Callable[..., Router], folder: Path, secret: Path | None = None, **router: Any
    ) -> None:
        self._clients: dict[str, Client] = {}
        self.file = KeysFile(folder / "keys.yaml")
        for name, (tenant, role) in KEYS.items():
            entry = api_key(name, tenant, role, key_of(name))
            self.file.update(lambda keyring, entry=entry: keyring.with_key(entry))
        self.set_rules("common", shared=True)
        secret = secret or folder / "secret"
        secret.write_bytes(SECRET)
        settings = {"keys_file": str(self.file.path), "secret_file": str(secret), **router}
        self.router = make_router(router=settings, drain_s=0.1)
        self.target = f"127.0.0.1:{self.router.server.grpc_port}"
        self.decode: FakeWorker = self.router.add("decode-0", "decode")

    def set_rules(self, tenant: str, **rules: Any) -> None:
        self.file.update(lambda keyring: keyring.with_rules(tenant, TenantRules(**rules)))

    def client(self, name: str) -> Client:
        return Client(self.target, credentials=Credentials(key_of(name)))

    def ask(self, name: str, prompt: str = LONG, **options: Any) -> list[pb.GenerateResponse]:
        if name not in self._clients:
            self._clients[name] = self.client(name)
        return list(self._clients[name].generate(prompt, pb.SamplingParams(max_tokens=5), timeout_s=20, **options))

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def roots(self) -> list[bytes]:
        return [dispatch.root for dispatch in self.decode.seen(Dispatch)]


@pytest.fixture
def door(make_router: Callable[..., Router], tmp_path: Path) -> Iterator[Door]:
    door = Door(make_router, tmp_path)
    yield door
    door.close()


def salted(tenant: str) -> bytes:
    return root_key(
        model_fingerprint=GROUP.model_fingerprint,
        kv_format=GROUP.kv_format,
        numerics_class=GROUP.numerics_class,
        tenant_salt=tenant_salt(SECRET, tenant),
    )


def text_of(events: list[pb.GenerateResponse]) -> str:
    return "".join(event.chunk.text for event in events)


def test_who_has_a_key_is_answered_and_nobody_else(door: Door) -> None:
    assert text_of(door.ask("acme")) == reference(LONG, 5)
    for credentials in (Credentials(), Credentials("tdm_of-nobody")):
        with Client(door.target, credentials=credentials) as client:
            for call in (
                lambda client=client: list(client.generate(LONG, timeout_s=20)),
                client.cluster,
                client.explain,
                client.audit,
            ):
                with pytest.raises(Unauthenticated):
                    call()
    assert len(door.decode.seen(Dispatch)) == 1


def test_the_asynchronous_client_carries_its_key(door: Door) -> None:
    async def ask() -> tuple[str, str]:
        async with AsyncClient(door.target, credentials=Credentials(key_of("acme"))) as client:
            events = [event async for event in client.generate(LONG, pb.SamplingParams(max_tokens=5), timeout_s=20)]
            return text_of(events), (await client.explain()).outcome

    assert asyncio.run(ask()) == (reference(LONG, 5), "completed")


def test_refusals_have_their_status_and_code(door: Door) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        collect(door.router.ask())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    details = dict(caught.value.trailing_metadata())[STATUS_DETAILS]
    assert isinstance(error_of(details), Unauthenticated)
    with pytest.raises(grpc.RpcError) as caught:
        door.router.stub.Audit(pb.AuditRequest(), timeout=10, metadata=(("authorization", f"Bearer {key_of('acme')}"),))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_health_and_reflection_are_open(door: Door) -> None:
    health = health_pb2_grpc.HealthStub(door.router.channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    wait_for(lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=10).status == serving)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflection_pb2_grpc.ServerReflectionStub(door.router.channel).ServerReflectionInfo(
        iter([asked]), timeout=10
    )
    assert "tandem.v1.Tandem" in {service.name for service in answer.list_services_response.service}


def test_a_call_that_does_not_exist_tells_nobody_so_without_a_key(door: Door) -> None:
    def status(metadata: tuple[tuple[str, str], ...]) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as caught:
            door.router.channel.unary_unary("/tandem.v2.Later/Call")(b"", timeout=10, metadata=metadata)
        return caught.value.code()

    assert status(()) is grpc.StatusCode.UNAUTHENTICATED
    assert status((("authorization", f"Bearer {key_of('acme')}"),)) is grpc.StatusCode.UNIMPLEMENTED


def test_a_gateways_service_is_behind_the_gate_and_ends_its_own_tenants_requests_alone(door: Door) -> None:
    engine = vllm_engine_pb2_grpc.VllmEngineStub(door.router.channel)
    acme, bolt = ((("authorization", f"Bearer {key_of(name)}"),) for name in ("acme", "bolt"))
    with pytest.raises(grpc.RpcError) as caught:
        engine.GetModelInfo(vllm.GetModelInfoRequest(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    door.decode.step_s = 0.01
    asked = vllm.GenerateRequest(
        request_id="theirs",
        tokenized=vllm.TokenizedInput(input_ids=list(LONG.encode())),
        sampling_params=vllm.SamplingParams(top_p=1.0, n=1, max_tokens=10_000),
        stream=True,
    )
    call = engine.Generate(asked, timeout=60, metadata=acme)
    next(call)
    engine.Abort(vllm.AbortRequest(request_ids=["theirs"]), timeout=10, metadata=bolt)
    assert next(call), "another tenant's abort ended it"
    engine.Abort(vllm.AbortRequest(request_ids=["theirs"]), timeout=10, metadata=acme)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.CANCELLED


def test_only_an_admin_audits(door: Door) -> None:
    with door.client("acme") as client, pytest.raises(PermissionDenied, match="Audit needs a key of the role admin"):
        client.audit()
    with door.client("ops") as client:
        assert client.audit().checks


def test_a_client_is_explained_its_own_requests_alone(door: Door) -> None:
    first = door.ask("acme")[0].accepted.request_id
    door.ask("bolt")
    with door.client("acme") as client:
        assert client.explain().request_id == first
    with door.client("bolt") as client:
        with pytest.raises(InvalidRequest, match="not among the last 1 that"):
            client.explain(first)
        assert client.explain().request_id != first
    with door.client("ops") as client:
        assert client.explain(first).request_id == first


def test_the_tenant_is_that_of_the_key_whatever_the_call_claims(door: Door) -> None:
    door.ask("acme", tenant="bolt")
    door.ask("bolt", tenant="acme")
    assert [summary.tenant for summary in door.router.server.core.journal.recent] == ["acme", "bolt"]
    assert door.roots() == [salted("acme"), salted("bolt")]


def test_tenants_have_roots_of_their_own_and_shared_ones_have_that_without_a_salt(door: Door) -> None:
    for name in ("acme", "ops", "bolt", "common"):
        door.ask(name)
    assert door.roots() == [salted("acme"), salted("acme"), salted("bolt"), ROOT]
    assert len({salted("acme"), salted("bolt"), ROOT}) == 3


def test_an_answer_goes_on_at_another_router_with_the_key_and_from_the_tenants_own_blocks(
    make_router: Callable[..., Router], tmp_path: Path
) -> None:
    doors = [Door(make_router, tmp_path / name, secret=tmp_path / "secret") for name in ("one", "two")]
    for one in doors:
        one.decode.step_s = 0.03
    with Client(",".join(one.target for one in doors), credentials=Credentials(key_of("acme"))) as client:
        stream = client.generate(LONG, pb.SamplingParams(max_tokens=60), timeout_s=60)
        events = []
        for event in stream:
            events.append(event)
            if event.chunk.position >= 10 and stream.num_resumes == 0:
                doors[client._preferred].router.stop.set()
    assert stream.num_resumes == 1
    assert text_of(events) == reference(LONG, 60)
    assert events[-1].completed.exact
    assert [one.roots() for one in doors] == [[salted("acme")]] * 2


def test_a_tenants_cache_can_be_forgotten_and_its_answers_stay_exact(door: Door) -> None:
    events = door.ask("acme")
    access = door.router.server.access
    before = access.caller(f"Bearer {key_of('acme')}", "").salt
    door.set_rules("acme", generation=1)
    wait_for(lambda: access.caller(f"Bearer {key_of('acme')}", "").salt != before)
    request = pb.GenerateRequest(prompt=LONG, sampling=pb.SamplingParams(max_tokens=5))
    request.resume.ticket = events[0].accepted.ticket
    request.resume.samples.add(token_ids=events[1].chunk.token_ids[:2])
    metadata = (("authorization", f"Bearer {key_of('acme')}"),)
    resumed = list(door.router.stub.Generate(request, timeout=20, metadata=metadata))
    assert resumed[-1].completed.exact
    first, second = door.roots()
    assert first == salted("acme") != second


def test_without_keys_roots_have_no_salt_and_tenants_are_as_claimed(router: Router) -> None:
    decode = router.add("decode-0", "decode")
    metadata = ((TENANT, "acme"), ("authorization", "Bearer tdm_of-bolt"))
    request = pb.GenerateRequest(prompt=LONG, sampling=pb.SamplingParams(max_tokens=2))
    collect(router.stub.Generate(request, timeout=20, metadata=metadata))
    assert [dispatch.root for dispatch in decode.seen(Dispatch)] == [ROOT]
    assert router.server.core.journal.recent[0].tenant == "acme"
    assert router.stub.Audit(pb.AuditRequest(), timeout=20).checks


def test_an_idempotency_key_is_the_tenants(door: Door) -> None:
    first, second = (door.ask(name, idempotency_key="one")[0].accepted.request_id for name in ("acme", "bolt"))
    assert first != second
    assert door.ask("acme", idempotency_key="one")[0].accepted.request_id == first


def test_a_ticket_is_of_one_tenant_and_a_resumed_answer_is_still_exact(door: Door) -> None:
    events = door.ask("acme")
    request = pb.GenerateRequest(prompt=LONG, sampling=pb.SamplingParams(max_tokens=5))
    request.resume.ticket = events[0].accepted.ticket
    had = [token for event in events for token in event.chunk.token_ids][:2]
    request.resume.samples.add(token_ids=had)

    def resume(name: str) -> Any:
        metadata = (("authorization", f"Bearer {key_of(name)}"),)
        return list(door.router.stub.Generate(request, timeout=20, metadata=metadata))

    with pytest.raises(grpc.RpcError) as caught:
        resume("bolt")
    assert "another tenant" in caught.value.details()
    again = resume("acme")
    assert again[-1].completed.exact
    assert again[-1].completed.resume_no == 1
    assert text_of(again) == reference(LONG, 5)[len(had) :]
    assert door.roots() == [salted("acme")] * 2


def test_keys_are_taken_up_and_given_back_without_a_restart(door: Door) -> None:
    with Client(door.target, credentials=Credentials("tdm_of-later")) as later, door.client("acme") as gone:
        with pytest.raises(Unauthenticated):
            later.cluster()
        door.file.update(lambda ring: ring.with_key(api_key("later", "acme", "client", "tdm_of-later")))
        wait_for(lambda: is_let_in(later))
        door.file.update(lambda ring: ring.without_key("acme"))
        wait_for(lambda: not is_let_in(gone))
        assert is_let_in(later)
        before = door.file.path.read_bytes()
        door.file.path.write_text("keys: [")
        door.file.path.write_bytes(before)
        assert is_let_in(later)


def test_a_wrong_keys_file_changes_nothing_and_is_said(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    door.file.path.write_text("keys: [")
    wait_for(lambda: "the API keys stay as they were" in caplog.text)
    with door.client("acme") as client:
        assert is_let_in(client)
    door.file.path.unlink()
    wait_for(lambda: "doesn't exist" in caplog.text)
    with door.client("acme") as client:
        assert is_let_in(client)


def is_let_in(client: Client) -> bool:
    try:
        client.cluster()
    except Unauthenticated:
        return False
    return True


def test_a_keys_file_that_is_not_there_ends_the_router(tmp_path: Path) -> None:
    values = {"router": {"keys_file": str(tmp_path / "none.yaml")}, "model": {"path": "m"}, "run_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match="router.keys_file: .*doesn't exist: make it with `tandem keys add`"):
        RouterServer(load_config(None, values), ByteTokenizer())  # type: ignore[arg-type]


def test_whoever_may_read_the_secret_runs_the_cluster(door: Door, tmp_path: Path) -> None:
    config = door.router.server._config
    credentials = operator_credentials(config, Credentials())
    with Client(door.target, credentials=credentials) as client:
        assert client.audit().checks
    assert operator_credentials(config, Credentials("own")).api_key == "own"
    (tmp_path / "secret").unlink()
    assert operator_credentials(config, Credentials()) == Credentials()


def get(url: str, key: str = "") -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, f"{error.headers['WWW-Authenticate']} {error.read().decode()}"


def test_http_asks_for_keys_too_and_the_admin_port_for_those_of_admins(
    make_router: Callable[..., Router], tmp_path: Path
) -> None:
    ports = free_port(), free_port()
    door = Door(make_router, tmp_path, http_port=ports[0], admin_port=ports[1])
    client, admin = (f"http://127.0.0.1:{port}" for port in ports)
    for url in (client, admin):
        wait_for(lambda url=url: get(f"{url}/health")[0] == 200)
        assert get(f"{url}/nothing")[0] == 401
    assert get(f"{client}/v1/models")[0] == 401
    status, body = get(f"{client}/v1/models", "tdm_of-nobody")
    assert status == 401
    assert body.startswith("Bearer ")
    assert "authentication_error" in body
    assert get(f"{client}/v1/models", key_of("acme"))[0] == 200
    assert get(f"{admin}/metrics")[0] == 401
    status, body = get(f"{admin}/metrics", key_of("acme"))
    assert status == 403
    assert "permission_error" in body
    assert get(f"{admin}/metrics", key_of("ops"))[0] == 200
    for url in (client, admin):
        assert get(f"{url}/")[0] == get(f"{url}/page/main.js")[0] == 200, "the live page's files, which ask for a key"
        assert get(f"{url}/live")[0] == 401
        assert get(f"{url}/live", key_of("acme"))[0] == 403
    asked = {"model": "fake", "prompt": LONG, "max_tokens": 5}
    stranger = openai.OpenAI(base_url=f"{client}/v1", api_key="none", max_retries=0, timeout=60.0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.completions.create(**asked)
    with openai.OpenAI(base_url=f"{client}/v1", api_key=key_of("acme"), max_retries=0, timeout=60.0) as known:
        assert known.completions.create(**asked).choices[0].text == reference(LONG, 5)
    assert door.roots() == [salted("acme")]


def test_a_tenants_quota_is_kept_and_the_client_told_when_to_come_back(door: Door) -> None:
    door.set_rules("acme", requests_per_minute=1)
    door.set_rules("bolt", tokens_per_minute=60)
    wait_for(lambda: door.router.server.access.caller(f"Bearer {key_of('bolt')}", "").rules.tokens_per_minute > 0)
    door.ask("acme")
    with pytest.raises(Overloaded, match="tenant 'acme' has used its 1 requests a minute") as caught:
        door.ask("acme")
    assert 0.0 < caught.value.retry_after_s <= 60.0
    door.ask("bolt")
    debt_tokens = len(LONG) + 5 - 60
    with pytest.raises(Overloaded, match="tenant 'bolt' has used its 60 tokens a minute") as caught:
        door.ask("bolt")
    assert debt_tokens - 60.0 < caught.value.retry_after_s <= debt_tokens + 1.0
    for _ in range(4):
        door.ask("common")


def test_a_place_is_given_back_when_the_client_leaves(door: Door) -> None:
    door.set_rules("acme", max_concurrent=1)
    wait_for(lambda: door.router.server.access.caller(f"Bearer {key_of('acme')}", "").rules.max_concurrent == 1)
    door.decode.step_s = 0.05
    with door.client("acme") as client:
        stream = client.generate(LONG, pb.SamplingParams(max_tokens=1000), timeout_s=60)
        events = iter(stream)
        next(events)
        with pytest.raises(Overloaded, match="has 1 requests at a time, the limit is 1"):
            door.ask("acme")
        events.close()

    def is_served() -> bool:
        try:
            return bool(door.ask("acme"))
        except Overloaded:
            return False

    wait_for(is_served)


def test_who_asks_for_more_than_its_share_waits_behind_itself(door: Door) -> None:
    """The line's shares are by the tenant of the key: claims of another one change nothing."""
    submitted: list[str] = []
    submit = door.router.server.core.submit

    def watched(request: Any, now_s: float) -> Any:
        submitted.append(request.tenant)
        return submit(request, now_s)

    door.router.server.core.submit = watched  # type: ignore[method-assign]
    door.ask("acme", tenant="somebody")
    door.ask("bolt", tenant="somebody")
    assert submitted == ["acme", "bolt"]
