"""Who asks: what a client's credentials make it.

Owns the callers. Every edge (gRPC, HTTP) turns what came with a call into a `Caller` here, and nothing further in reads
credentials. Pure.

Without keys, whoever reaches a port may do everything, as any tenant. With keys, who has none is nobody; the tenant is that of
the key, whatever a call claims; and each tenant has a salt, which goes into the names of its KV blocks: none finds another's.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from protos.metadata import MAX_TENANT_CHARS
from router.keyring import MAX_KEY_CHARS, Keyring, TenantRules, digest_of
from router.secret import operator_key, tenant_salt
from tandem.errors import PermissionDenied, Unauthenticated

_UNLIMITED = TenantRules()


@dataclass(frozen=True, slots=True)
class Caller:
    """One who asks. `tenant` shares fairly with others and reads its own answers alone; `is_admin` may change the cluster."""

    tenant: str = ""
    is_admin: bool = True
    salt: bytes = b""
    """In the names of its KV blocks; empty: it shares those that have none."""
    rules: TenantRules = _UNLIMITED

    def check_admin(self, what: str) -> None:
        """Raises PermissionDenied unless it may run the cluster."""
        if not self.is_admin:
            raise PermissionDenied(f"{what} needs a key of the role admin")

    def sees(self, tenant: str) -> bool:
        """Whether it may look at requests of that tenant."""
        return self.is_admin or tenant == self.tenant


class Access:
    """Turns credentials into callers. `secret` is that of the routers; `keyring` None: there are no keys."""

    def __init__(self, secret: bytes = b"", keyring: Keyring | None = None) -> None:
        self._secret = secret
        self._callers: list[tuple[str, Caller]] | None = None
        if keyring is not None:
            self.use(keyring)

    @property
    def needs_key(self) -> bool:
        """Whether nobody may ask without one."""
        return self._callers is not None

    def use(self, keyring: Keyring) -> None:
        """These keys, and no others, are good from now on. Calls that run go on."""
        callers = [(digest_of(operator_key(self._secret)), Caller())]
        for key in keyring.keys:
            rules = keyring.rules(key.tenant)
            salt = b"" if rules.shared else tenant_salt(self._secret, key.tenant, rules.generation)
            callers.append((key.sha256, Caller(key.tenant, key.role == "admin", salt, rules)))
        self._callers = callers

    def caller(self, authorization: str, tenant: str) -> Caller:
        """The caller with this `Authorization` header (empty: none), which claims to be `tenant` (empty: nobody). Raises
        Unauthenticated if keys are needed and this is none."""
        if self._callers is None:
            return Caller(tenant[:MAX_TENANT_CHARS])
        scheme, _, key = authorization.strip().partition(" ")
        if not key or scheme.lower() != "bearer":
            raise Unauthenticated("this router needs an API key: send `Authorization: Bearer KEY`")
        found = None
        if len(key) <= MAX_KEY_CHARS:
            digest = digest_of(key.strip())
            for known, caller in self._callers:  # all of them: how long it takes tells nothing
                if hmac.compare_digest(digest, known):
                    found = caller
        if found is None:
            raise Unauthenticated("nobody here knows this API key: it was removed, or is of another cluster")
        return found
