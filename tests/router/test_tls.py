"""TLS on the routers' gRPC and HTTP ports, with real clients: who is believed, who is let in, and a new certificate."""

from __future__ import annotations

import asyncio
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

from protos import tandem_pb2 as pb
from router.tls import ServerTls
from tandem.client import AsyncClient, Client
from tandem.config import RouterTlsConfig, load_config
from tandem.credentials import Credentials, Tls
from tandem.errors import ConfigError, InvalidRequest, RouterLost
from tests.router.fake_cluster import LONG, Router, reference, wait_for
from tests.system.harness import free_port


class Authority:
    """A certificate authority and its files in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._ca = trustme.CA()
        self.folder = folder
        self.ca = str(folder / "ca.pem")
        self._ca.cert_pem.write_to_path(self.ca)

    def issue(self, name: str, identity: str = "127.0.0.1") -> tuple[str, str]:
        """The files of a certificate and its key; those of before are replaced."""
        issued = self._ca.issue_cert(identity)
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        cert.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return str(cert), str(key)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


class Served:
    """A router with TLS on gRPC and HTTP, and one decode worker."""

    def __init__(self, make_router: Callable[..., Router], authority: Authority, ca: str = "") -> None:
        cert, key = authority.issue("server")
        self.http_port = free_port()
        tls = {"cert": cert, "key": key, "ca": ca}
        self.router = make_router(router={"http_port": self.http_port, "tls": tls})
        self.target = f"127.0.0.1:{self.router.server.grpc_port}"
        self.router.add("decode-0", "decode")

    def text(self, tls: Tls | None, patience_s: float = 0.5) -> str:
        with Client(self.target, credentials=Credentials(tls=tls), patience_s=patience_s) as client:
            events = client.generate(LONG, pb.SamplingParams(max_tokens=3), timeout_s=20)
            return "".join(event.chunk.text for event in events)

    def http_status(self, context: ssl.SSLContext) -> int:
        with urllib.request.urlopen(
            f"https://127.0.0.1:{self.http_port}/health", timeout=10, context=context
        ) as answer:
            return int(answer.status)


def context_of(authority: Authority, *cert: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.ca)
    if cert:
        context.load_cert_chain(*cert)
    return context


def test_who_believes_the_authority_is_served_on_both_ports(
    make_router: Callable[..., Router], authority: Authority
) -> None:
    served = Served(make_router, authority)
    assert served.text(Tls(authority.ca)) == reference(LONG, 3)
    assert served.http_status(context_of(authority)) == 200

    async def ask() -> str:
        async with AsyncClient(served.target, credentials=Credentials(tls=Tls(authority.ca))) as client:
            return (await client.cluster()).model

    assert asyncio.run(ask()) == "fake"


def test_who_does_not_believe_it_or_speaks_plainly_gets_nothing(
    make_router: Callable[..., Router], authority: Authority, tmp_path: Path
) -> None:
    served = Served(make_router, authority)
    other = Authority(tmp_path / "other")
    for tls in (None, Tls(other.ca), Tls()):
        with pytest.raises(RouterLost):
            served.text(tls)
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        served.http_status(context_of(other))
    with socket.create_connection(("127.0.0.1", served.http_port), timeout=10) as plain:
        plain.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert b"HTTP" not in plain.recv(1000)
    assert served.text(Tls(authority.ca)) == reference(LONG, 3)


def test_old_versions_of_tls_are_refused(make_router: Callable[..., Router], authority: Authority) -> None:
    served = Served(make_router, authority)
    old = context_of(authority)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    for port in (served.http_port, served.router.server.grpc_port):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain, pytest.raises((ssl.SSLError, OSError)):
            old.wrap_socket(plain, server_hostname="127.0.0.1")


def test_with_an_authority_of_clients_only_those_with_its_certificate_come_in(
    make_router: Callable[..., Router], authority: Authority, tmp_path: Path
) -> None:
    clients, others = Authority(tmp_path / "clients"), Authority(tmp_path / "others")
    served = Served(make_router, authority, ca=clients.ca)
    known, unknown = clients.issue("client", "somebody@example.org"), others.issue("client", "somebody@example.org")
    assert served.text(Tls(authority.ca, *known)) == reference(LONG, 3)
    assert served.http_status(context_of(authority, *known)) == 200
    for certificate in ((), unknown):
        with pytest.raises(RouterLost):
            served.text(Tls(authority.ca, *certificate))
        with pytest.raises((urllib.error.URLError, OSError)):
            served.http_status(context_of(authority, *certificate))


def test_a_new_certificate_is_taken_up_without_a_restart_and_a_wrong_one_is_not(
    make_router: Callable[..., Router], authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(make_router, authority)

    def shown() -> set[str]:
        ports = (served.http_port, served.router.server.grpc_port)
        return {ssl.get_server_certificate(("127.0.0.1", port), timeout=10) for port in ports}

    (before,) = shown()
    authority.issue("server")
    wait_for(lambda: len(shown()) == 1 and before not in shown())
    (after,) = shown()
    Path(authority.folder / "server.key").write_text("nonsense")
    wait_for(lambda: "the certificate stays as it was: router.tls" in caplog.text)
    assert shown() == {after}
    assert served.text(Tls(authority.ca)) == reference(LONG, 3)


@pytest.mark.parametrize("missing", ["cert", "key", "ca"])
def test_files_that_can_not_be_used_are_named(authority: Authority, missing: str) -> None:
    cert, key = authority.issue("server")
    files = {"cert": cert, "key": key, "ca": authority.ca}
    ServerTls(RouterTlsConfig(**files))
    Path(files[missing]).write_text("nonsense")
    with pytest.raises(ConfigError, match=f"router.tls: .*{files[missing]}.* can't be used"):
        ServerTls(RouterTlsConfig(**files))
    Path(files[missing]).unlink()
    with pytest.raises(ConfigError, match=f"router.tls: {files[missing]} can't be read"):
        ServerTls(RouterTlsConfig(**files))


@pytest.mark.parametrize("tls", [{"cert": "c"}, {"key": "k"}, {"ca": "a"}])
def test_half_a_configuration_of_tls_is_refused(tls: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="router.tls needs cert and key"):
        load_config(None, {"router": {"tls": tls}})


def test_a_clients_files_are_named_when_they_are_wrong(tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    for tls, words in (
        (Tls(str(tmp_path / "none.pem")), "none.pem: can't be read"),
        (Tls(str(nonsense)), "is not a PEM file"),
        (Tls(cert="c"), "needs its key"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            Client("127.0.0.1:1", credentials=Credentials(tls=tls))


@pytest.mark.parametrize(
    ("host", "more", "is_refused"),
    [
        ("127.0.0.1", {}, False),
        ("127.8.8.8", {}, False),
        ("::1", {}, False),
        ("localhost", {}, False),
        ("0.0.0.0", {}, True),
        ("::", {}, True),
        ("192.0.2.1", {}, True),
        ("router.example.org", {}, True),
        ("localhost.example.org", {}, True),
        ("", {}, True),
        ("0.0.0.0", {"keys_file": "keys.yaml"}, False),
        ("0.0.0.0", {"allow_anonymous": True}, False),
        ("0.0.0.0", {"tls": {"cert": "c", "key": "k", "ca": "a"}}, True),
    ],
)
def test_a_door_that_is_open_to_others_needs_keys_unless_that_is_meant(
    host: str, more: dict[str, Any], is_refused: bool
) -> None:
    values = {"router": {"host": host} | more, "control": {"allow_plain": True}}
    if not is_refused:
        assert load_config(None, values).router.host == host
        return
    with pytest.raises(ConfigError, match="not loopback.*`tandem keys add`.*router.allow_anonymous: true"):
        load_config(None, values)
