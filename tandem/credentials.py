"""What a client shows to routers, and by what it knows them: an API key, and TLS.

Owns the reading of a client's PEM files and the channel credentials made of them. It keeps nothing of what is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from protos.metadata import AUTHORIZATION
from tandem.errors import InvalidRequest

MAX_PEM_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files. `ca`: the authority of the routers' certificates; empty: those that gRPC brings. `cert` and `key`: what this
    client proves itself with, where routers ask for that."""

    ca: str = ""
    cert: str = ""
    key: str = ""

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Raises InvalidRequest for a file that can't be read, or a certificate without its key."""
        if bool(self.cert) != bool(self.key):
            raise InvalidRequest("a client's certificate needs its key, and the key its certificate")
        return grpc.ssl_channel_credentials(_pem(self.ca), _pem(self.key), _pem(self.cert))


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of one client. Without `tls` everything, the key too, crosses the network as it is."""

    api_key: str = ""
    tls: Tls | None = None

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with each call."""
        return ((AUTHORIZATION, f"Bearer {self.api_key}"),) if self.api_key else ()


def _pem(path: str) -> bytes | None:
    if not path:
        return None
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(MAX_PEM_BYTES + 1)
    except OSError as error:
        raise InvalidRequest(f"{path}: can't be read: {error.strerror}") from error
    if len(data) > MAX_PEM_BYTES or b"-----BEGIN " not in data:
        raise InvalidRequest(f"{path}: is not a PEM file of at most {MAX_PEM_BYTES} bytes")
    return data
