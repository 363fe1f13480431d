"""`tandem keys`, and how other commands show their credentials."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
import yaml
from typer.testing import CliRunner, Result

from router.keyring import TenantRules, digest_of
from router.keys_file import KeysFile
from tandem.cli.main import app
from tandem.errors import InvalidRequest, PermissionDenied, TandemError, Unauthenticated
from tests.router.fake_cluster import Router, wait_for


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def tandem(*arguments: str, env: dict[str, str] | None = None) -> Result:
    """What the command did; an error that it would say is raised."""
    result = CliRunner().invoke(app, list(arguments), env=env, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_a_key_is_printed_once_and_kept_as_a_digest(keys_file: Path) -> None:
    key = tandem("keys", "add", "ci", "--tenant", "acme", "-f", str(keys_file)).stdout.strip()
    (entry,) = KeysFile(keys_file).read().keys
    assert (entry.name, entry.tenant, entry.role, entry.sha256) == ("ci", "acme", "client", digest_of(key))
    assert key not in keys_file.read_text()
    assert stat.S_IMODE(keys_file.stat().st_mode) == 0o600
    listed = tandem("keys", "list", "-f", str(keys_file), "--json").stdout
    assert json.loads(listed)["name"] == "ci"
    assert digest_of(key) not in listed
    tandem("keys", "remove", "ci", "-f", str(keys_file))
    assert KeysFile(keys_file).read().keys == ()


def test_a_tenants_rules_are_changed_one_by_one_and_outlive_its_keys(keys_file: Path) -> None:
    file = str(keys_file)
    tandem("keys", "tenant", "acme", "--requests-per-minute", "60", "-f", file)
    tandem("keys", "tenant", "acme", "--shared", "--max-concurrent", "4", "-f", file)
    tandem("keys", "add", "ci", "--tenant", "acme", "--role", "admin", "-f", file)
    (row,) = map(json.loads, tandem("keys", "list", "-f", file, "--json").stdout.splitlines())
    assert row == {
        "name": "ci",
        "tenant": "acme",
        "role": "admin",
        "shared": True,
        "generation": 0,
        "requests_per_minute": 60,
        "tokens_per_minute": 0,
        "max_concurrent": 4,
    }
    table = tandem("keys", "list", "-f", file).stdout
    assert "acme" in table
    assert "60" in table
    tandem("keys", "tenant", "acme", "--not-shared", "--requests-per-minute", "0", "-f", file)
    assert KeysFile(keys_file).read().rules("acme").max_concurrent == 4
    assert not KeysFile(keys_file).read().rules("acme").shared
    for _ in range(2):
        tandem("keys", "tenant", "acme", "--forget-cache", "-f", file)
    assert KeysFile(keys_file).read().rules("acme") == TenantRules(generation=2, max_concurrent=4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["add", "ci", "--tenant", "a b"], "tenant 'a b'"),
        (["add", "ci", "--tenant", "acme", "--role", "root"], "'root'"),
        (["remove", "ci"], "no key named 'ci'"),
        (["tenant", ".."], "tenant '..'"),
    ],
)
def test_what_can_not_be_is_said_and_no_file_is_left(keys_file: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        tandem("keys", *arguments, "-f", str(keys_file))
    assert not keys_file.exists()


def test_without_a_file_it_says_what_to_set(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("cluster: other\n")
    with pytest.raises(TandemError, match=r"no router\.keys_file in this configuration: set it, or give --file"):
        tandem("keys", "list", "-c", str(config))


@pytest.fixture
def served(tmp_path: Path, keys_file: Path) -> Iterator[tuple[Router, Path]]:
    """A router with keys and TLS, and the configuration of whoever runs it."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    tandem("keys", "add", "first", "--tenant", "acme", "-f", str(keys_file))
    settings = {
        "keys_file": str(keys_file),
        "secret_file": str(tmp_path / "secret"),
        "tls": {"cert": str(tmp_path / "server.pem"), "key": str(tmp_path / "server.pem")},
    }
    router = Router(router=settings)
    router.add("decode-0", "decode")
    config = tmp_path / "config.yaml"
    values = {"run_dir": str(tmp_path / "run"), "router": settings | {"grpc_port": router.server.grpc_port}}
    config.write_text(yaml.safe_dump(values))
    yield router, config
    router.close()


def is_audited(*arguments: str) -> bool:
    """Whether the router told what it found, which may be wrong of others on this machine."""
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    return "every process' heartbeat is fresh" in result.stdout


def test_commands_carry_a_key_and_believe_the_authority_that_they_are_given(
    served: tuple[Router, Path], keys_file: Path, tmp_path: Path
) -> None:
    router, config = served
    target = ["--target", f"127.0.0.1:{router.server.grpc_port}"]
    trust = ["--tls-ca", str(tmp_path / "ca.pem")]
    client = tandem("keys", "add", "cli", "--tenant", "acme", "-c", str(config)).stdout.strip()
    admin = tandem("keys", "add", "ops", "--tenant", "us", "--role", "admin", "-c", str(config)).stdout.strip()

    def is_known(key: str) -> bool:
        try:
            return bool(tandem(*trust, "--api-key", key, "status", *target))
        except Unauthenticated:
            return False

    wait_for(lambda: is_known(admin))
    env = {"TANDEM_API_KEY": client, "TANDEM_TLS_CA": str(tmp_path / "ca.pem")}
    asked = ["generate", "--raw", "hello", "--max-tokens", "3", *target]
    assert len(tandem(*asked, env=env).stdout.strip()) == 3
    assert "completed" in tandem("explain", *target, env=env).stdout
    with pytest.raises(PermissionDenied, match="Audit needs a key of the role admin"):
        tandem("audit", *target, env=env)
    assert is_audited(*trust, "--api-key", admin, "audit", *target)


def test_who_runs_the_cluster_needs_no_key_where_its_secret_is_and_sends_none_elsewhere(
    served: tuple[Router, Path], tmp_path: Path
) -> None:
    router, config = served
    trust = ["--tls-ca", str(tmp_path / "ca.pem")]
    assert is_audited(*trust, "audit", "-c", str(config))
    with pytest.raises(Unauthenticated):
        tandem(*trust, "status", "--target", f"127.0.0.1:{router.server.grpc_port}")
    with pytest.raises(InvalidRequest, match=r"router\.tls is set: name the authority"):
        tandem("status", "-c", str(config))
