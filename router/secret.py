"""The secret that all routers of a cluster share, and what is derived from it.

Owns the file it is in. Whoever can read it can sign resume tickets, name any tenant's KV blocks and run the cluster: it is
readable by its owner alone.
"""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

from tandem.config import Config
from tandem.errors import ConfigError

MIN_BYTES = 16
MAX_BYTES = 4096
SALT_BYTES = 16


def read_secret(path: Path) -> bytes:
    """What is in the file. Raises ConfigError if it can't be read, or is too short to be a secret."""
    try:
        with path.open("rb") as file:
            secret = file.read(MAX_BYTES).strip()
    except OSError as error:
        raise ConfigError(f"router.secret_file: {path} can't be read: {error.strerror}") from error
    if len(secret) < MIN_BYTES:
        raise ConfigError(f"router.secret_file: {path} has {len(secret)} bytes, must be at least {MIN_BYTES}")
    return secret


def shared_secret(path: Path) -> bytes:
    """As `read_secret`; the file is made if there is none. Of several who make it at once all get the same."""
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            mine = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
            descriptor = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_hex(32).encode())
            try:
                os.link(mine, path)  # unlike a rename, it never replaces what another one made
            except FileExistsError:
                pass
            finally:
                mine.unlink()
        except OSError as error:
            raise ConfigError(f"router.secret_file: {path} can't be made: {error.strerror}") from error
    return read_secret(path)


def secret_path(config: Config) -> Path:
    """Where the routers of this configuration have it."""
    return Path(config.router.secret_file or config.run_path / "router.secret").expanduser()


def tenant_salt(secret: bytes, tenant: str, generation: int = 0) -> bytes:
    """What makes a tenant's KV blocks its own: the same at every router, and nobody can tell it who doesn't know the secret.
    Another `generation` is another salt."""
    return hmac.digest(secret, f"tandem/tenant-salt/1/{generation}/{tenant}".encode(), "sha256")[:SALT_BYTES]


def operator_key(secret: bytes) -> str:
    """The API key of the role admin that whoever may read the secret has: with it `tandem serve` looks after its routers."""
    return "tdm_operator_" + hmac.digest(secret, b"tandem/operator/1", "sha256").hex()
