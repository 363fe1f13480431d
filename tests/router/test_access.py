"""Who a caller is, by what came with the call."""

from __future__ import annotations

import pytest

from router import access as module
from router.access import Access, Caller
from router.keyring import Keyring, TenantRules, api_key
from router.secret import operator_key, tenant_salt
from tandem.errors import PermissionDenied, Unauthenticated

SECRET = b"s" * 32
KEYRING = (
    Keyring()
    .with_key(api_key("a", "acme", "client", "tdm_a"))
    .with_key(api_key("b", "bolt", "client", "tdm_b"))
    .with_key(api_key("ops", "acme", "admin", "tdm_ops"))
    .with_key(api_key("c", "common", "client", "tdm_c"))
    .with_rules("common", TenantRules(shared=True))
    .with_rules("acme", TenantRules(requests_per_minute=60))
)


def test_without_keys_whoever_asks_is_who_it_says() -> None:
    access = Access()
    assert not access.needs_key
    assert access.caller("", "") == Caller()
    assert access.caller("Bearer nonsense", "x" * 200) == Caller("x" * 128)
    assert access.caller("", "acme").salt == b""


def test_the_key_says_who_asks_whatever_the_call_claims() -> None:
    access = Access(SECRET, KEYRING)
    found = access.caller("Bearer tdm_a", "bolt")
    assert (found.tenant, found.is_admin, found.rules.requests_per_minute) == ("acme", False, 60)
    assert access.caller("bearer  tdm_a ", "").tenant == "acme"
    assert access.caller("Bearer tdm_ops", "").is_admin
    operator = access.caller(f"Bearer {operator_key(SECRET)}", "acme")
    assert (operator.tenant, operator.is_admin, operator.salt) == ("", True, b"")


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "tdm_a",
        "Basic tdm_a",
        "Bearer tdm_x",
        "Bearer tdm_aa",
        "Bearer " + "x" * 10**6,
        "Bearer \udcff",
    ],
)
def test_nobody_else_is_let_in(authorization: str) -> None:
    with pytest.raises(Unauthenticated):
        Access(SECRET, KEYRING).caller(authorization, "acme")


def test_an_operators_key_of_another_secret_is_none() -> None:
    with pytest.raises(Unauthenticated):
        Access(SECRET, KEYRING).caller(f"Bearer {operator_key(b't' * 32)}", "")


def test_each_tenant_has_a_salt_that_all_routers_agree_on_and_shared_ones_have_none() -> None:
    access, other = Access(SECRET, KEYRING), Access(SECRET, KEYRING)
    salts = {key: access.caller(f"Bearer tdm_{key}", "").salt for key in ("a", "b", "ops", "c")}
    assert salts == {key: other.caller(f"Bearer tdm_{key}", "").salt for key in salts}
    assert salts["a"] == salts["ops"] != salts["b"]
    assert {len(salts["a"]), len(salts["b"])} == {16}
    assert salts["c"] == b""
    assert Access(b"t" * 32, KEYRING).caller("Bearer tdm_a", "").salt != salts["a"]
    assert tenant_salt(SECRET, "acme") == salts["a"]
    access.use(KEYRING.with_rules("acme", TenantRules(generation=1)))
    assert access.caller("Bearer tdm_a", "").salt == tenant_salt(SECRET, "acme", 1) != salts["a"]
    assert access.caller("Bearer tdm_b", "").salt == salts["b"]


def test_keys_that_are_taken_up_replace_those_of_before() -> None:
    access = Access(SECRET, KEYRING)
    access.use(KEYRING.without_key("a"))
    with pytest.raises(Unauthenticated, match="removed"):
        access.caller("Bearer tdm_a", "")
    assert access.caller("Bearer tdm_b", "").tenant == "bolt"
    access.use(Keyring())
    with pytest.raises(Unauthenticated):
        access.caller("", "")


def test_every_known_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def compare(one: str, other: str) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr(module.hmac, "compare_digest", compare)
    access = Access(SECRET, KEYRING)
    access.caller("Bearer tdm_a", "")
    first = list(compared)
    compared.clear()
    with pytest.raises(Unauthenticated):
        access.caller("Bearer tdm_x", "")
    assert first == compared
    assert len(first) == 1 + len(KEYRING.keys)


def test_a_client_may_not_run_the_cluster_and_sees_its_own_requests_alone() -> None:
    client, admin = Caller("acme", is_admin=False), Caller("acme")
    with pytest.raises(PermissionDenied, match="Audit needs a key of the role admin"):
        client.check_admin("Audit")
    admin.check_admin("Audit")
    assert client.sees("acme")
    assert not client.sees("bolt")
    assert not client.sees("")
    assert admin.sees("bolt")
