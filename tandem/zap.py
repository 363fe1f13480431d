"""Answers libzmq's question whether a connection may be (ZAP, RFC 27), by the list of keys that are let in.

Owns the one socket of a context that these questions come to. Its caller polls it in the loop that it has anyway. Nothing
comes here but for a peer that holds the secret of the public key it shows, so garbage costs libzmq a few bytes and us nothing.
"""

from __future__ import annotations

import logging

import zmq
from zmq.utils import z85

from tandem.clock import now_s
from tandem.curve import DOORS, AllowList
from tandem.zmq_io import received

log = logging.getLogger(__name__)

ENDPOINT = "inproc://zeromq.zap.01"
VERSION = b"1.0"
LOG_PERIOD_S = 1.0


class Zap:
    """Answers for all guarded sockets of `context`; there before the first of them, and closed with the context, since its
    name is free again only a moment after it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: AllowList) -> None:
        self._allowed = allowed
        self._log_again_s = 0.0
        self.num_refused = 0
        self.socket = context.socket(zmq.ROUTER)
        """To be polled; `handle` when it is readable."""
        self.socket.linger = 0
        self.socket.bind(ENDPOINT)

    def handle(self) -> None:
        """Answers what waits."""
        for frames in received(self.socket):
            self.answer(frames)

    def answer(self, frames: list[bytes]) -> None:
        """Answers one question: `[asker, b"", version, number, domain, address, identity, mechanism, key]`."""
        if len(frames) < 8:
            return
        asker, _, version, number, domain, address, _, mechanism, *credentials = frames
        door = domain.decode("ascii", "replace")
        key = z85.encode(credentials[0]).decode() if [len(c) for c in credentials] == [32] else ""
        member = self._allowed.member(key) if version == VERSION and mechanism == b"CURVE" else None
        if member is not None and any(door == name and member.role in roles for name, roles in DOORS.items()):
            verdict = [b"200", b"OK", key.encode()]
        else:
            self._refuse(door, address, f"a {member.role}'s" if member is not None else "not on the list", key)
            verdict = [b"400", b"not let in", b""]
        try:
            self.socket.send_multipart([asker, b"", VERSION, number, *verdict, b""], zmq.NOBLOCK)
        except zmq.ZMQError:
            pass  # whoever asked is gone

    def close(self) -> None:
        self.socket.close()

    def _refuse(self, door: str, address: bytes, why: str, key: str) -> None:
        self.num_refused += 1
        if now_s() >= self._log_again_s:
            self._log_again_s = now_s() + LOG_PERIOD_S
            log.warning(
                "refused a connection from %s to %s (%d so far): the key %r is %s",
                address[:64].decode("ascii", "replace"), door, self.num_refused, key, why,
            )  # fmt: skip
