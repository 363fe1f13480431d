"""API keys, and the tenants that they speak for: what a keys file says.

Owns the format, its bounds and its checks; the file is `router/keys_file.py`'s. It holds digests of keys, never keys: a key has
256 random bits, so that its SHA-256 tells nothing of it. Pure.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated, Literal

import msgspec
import yaml
from msgspec import Meta

from protos.metadata import MAX_TENANT_CHARS
from tandem.errors import ConfigError, InvalidRequest

MAX_KEYS = 1024
"""Each call is compared with all of them."""
MAX_TENANTS = 1024
MAX_FILE_BYTES = 2**20
MAX_KEY_CHARS = 128
KEY_PREFIX = "tdm_"
"""By it, people and scanners know a key that lies where it shouldn't."""
_KEY_BYTES = 32
_HEADER = (
    "# API keys of Tandem, as SHA-256 digests. `tandem keys` writes this file; routers read it again when it changes.\n"
)

Role = Literal["client", "admin"]
Label = Annotated[str, Meta(pattern=rf"^[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_TENANT_CHARS - 1}}}\Z")]
Limit = Annotated[int, Meta(ge=0, le=10**12)]


class TenantRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a tenant may: 0 is no limit. Each router counts for itself."""

    shared: bool = False
    """It uses the prefix cache that all shared tenants have together, instead of one of its own."""
    generation: Limit = 0
    """Of its salt: when it changes, nothing that was cached for it is found any more."""
    requests_per_minute: Limit = 0
    tokens_per_minute: Limit = 0
    """Of prompts and answers together."""
    max_concurrent: Limit = 0
    """Requests at a time."""


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who has the key of this digest: `name` is for people, `tenant` is whom it speaks for."""

    name: Label
    tenant: Label
    role: Role
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Keyring(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of a keys file. A tenant without rules of its own has the default ones."""

    keys: Annotated[tuple[ApiKey, ...], Meta(max_length=MAX_KEYS)] = ()
    tenants: Annotated[dict[Label, TenantRules], Meta(max_length=MAX_TENANTS)] = {}

    def rules(self, tenant: str) -> TenantRules:
        return self.tenants.get(tenant, TenantRules())

    def with_key(self, key: ApiKey) -> Keyring:
        """Raises InvalidRequest if the name is taken, or there are too many."""
        if any(other.name == key.name for other in self.keys):
            raise InvalidRequest(f"there is a key named {key.name!r} already: remove it first, or choose another name")
        if len(self.keys) >= MAX_KEYS:
            raise InvalidRequest(f"there are {len(self.keys)} keys, the limit is {MAX_KEYS}")
        return msgspec.structs.replace(self, keys=(*self.keys, key))

    def without_key(self, name: str) -> Keyring:
        """Raises InvalidRequest if there is none of this name."""
        left = tuple(key for key in self.keys if key.name != name)
        if len(left) == len(self.keys):
            names = ", ".join(sorted(key.name for key in self.keys)) or "none"
            raise InvalidRequest(f"there is no key named {name!r}; there are: {names}")
        return msgspec.structs.replace(self, keys=left)

    def with_rules(self, tenant: str, rules: TenantRules) -> Keyring:
        """Raises InvalidRequest for a name that no tenant can have."""
        try:
            msgspec.convert(tenant, Label)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"tenant {tenant!r}: {error}") from error
        return msgspec.structs.replace(self, tenants=self.tenants | {tenant: rules})


def new_key() -> str:
    """A key that nobody has. It is shown once and kept nowhere."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def digest_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def api_key(name: str, tenant: str, role: str, key: str) -> ApiKey:
    """The entry of `key`. Raises InvalidRequest for a name, tenant or role that there can't be."""
    entry = {"name": name, "tenant": tenant, "role": role, "sha256": digest_of(key)}
    try:
        return msgspec.convert(entry, ApiKey)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"key {name!r} of tenant {tenant!r}: {error}") from error


def parse_keyring(data: bytes, where: str) -> Keyring:
    """What a keys file says. Raises ConfigError, which begins with `where`."""
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{where} has more than {MAX_FILE_BYTES} bytes")
    try:
        said = yaml.safe_load(data)
        keyring = msgspec.convert({} if said is None else said, Keyring)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a number of thousands of digits
        raise ConfigError(f"{where} is not valid YAML: {error}") from error
    for what, values in (
        ("name", [key.name for key in keyring.keys]),
        ("sha256", [key.sha256 for key in keyring.keys]),
    ):
        if double := next((value for value in values if values.count(value) > 1), None):
            raise ConfigError(f"{where}: two keys have the {what} {double!r}")
    return keyring


def dump_keyring(keyring: Keyring) -> bytes:
    """As `parse_keyring` reads it."""
    return (_HEADER + yaml.safe_dump(msgspec.to_builtins(keyring), sort_keys=False)).encode()
