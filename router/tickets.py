"""Tickets: with one and the tokens it has, a client goes on with its answer on any router of the cluster.

Owns what a ticket says and its signature. A ticket keeps the promise that the answer stays the same: it fixes the request, the
seed and the numerics it began with, so that nobody mixes two answers. It opens nothing: whoever may resume may also ask anew.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated

import msgspec
from msgspec import Meta

from protos.control import Count, Digest, Name, Sampling
from protos.metadata import MAX_TENANT_CHARS
from tandem.errors import InvalidRequest

MAX_TICKET_BYTES = 1024
_MAC_BYTES = 32
_VERSION = 1


class Ticket(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """`asked` is `digest_of` the request. `root` is that of the keys of the workers that were there when it was accepted, empty
    if there were none: it stands for the weights and the numerics, and has no tenant's salt."""

    version: int = _VERSION
    request_id: Name
    resume_no: Count
    asked: Digest
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    root: Annotated[bytes, Meta(max_length=16)]
    tenant: Annotated[str, Meta(max_length=MAX_TENANT_CHARS)]


_decoder = msgspec.msgpack.Decoder(Ticket)


def digest_of(prompt: bytes, sampling: Sampling, n: int, stop: tuple[str, ...]) -> bytes:
    """Of all that decides an answer but the seed: `prompt` are the tokens' bytes."""
    parameters = msgspec.msgpack.encode((msgspec.structs.replace(sampling, seed=0), n, stop))
    return hashlib.sha256(hashlib.sha256(prompt).digest() + parameters).digest()


class Tickets:
    """Signs and reads tickets with a `secret` that all routers of a cluster share."""

    def __init__(self, secret: bytes) -> None:
        self._key = hashlib.sha256(b"tandem/ticket/1" + secret).digest()

    def sign(self, ticket: Ticket) -> bytes:
        data = msgspec.msgpack.encode(ticket)
        return self._mac(data) + data

    def read(self, signed: bytes) -> Ticket:
        """Raises InvalidRequest for one that no router with this secret has made."""
        if len(signed) > MAX_TICKET_BYTES:
            raise InvalidRequest(f"the ticket has {len(signed)} bytes, the limit is {MAX_TICKET_BYTES}")
        mac, data = signed[:_MAC_BYTES], signed[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(data)):
            raise InvalidRequest("the ticket is not of this cluster, or was changed: ask again without it")
        try:
            ticket = _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:  # msgspec lets the second one through
            raise InvalidRequest(f"the ticket can't be read: {error}") from error
        if ticket.version != _VERSION:
            raise InvalidRequest(f"the ticket has version {ticket.version}, this router reads {_VERSION}")
        return ticket

    def _mac(self, data: bytes) -> bytes:
        return hmac.digest(self._key, data, "sha256")
