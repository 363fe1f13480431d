"""One incarnation of a worker that a pool node follows: its event sockets, what it holds, and what is still to get from it.

Owns the sockets; the caller polls them. Frames that are no publication are dropped and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import msgspec
import zmq

from kvpool.follower import EventFollower
from kvpool.keeper import Keeper
from kvpool.keys import Key, digest_of
from protos import kv_events
from protos.control import FollowedHoldings, Source
from tandem.curve import Keyring
from tandem.errors import ProtocolError
from tandem.zmq_io import bounded_socket, received

log = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]


class FollowedWorker:
    """Raises zmq.ZMQError for endpoints that are none, ProtocolError for those whose key `keys` don't trust."""

    def __init__(
        self, context: zmq.Context[Socket], source: Source, has: Callable[[Key], bool], keys: Keyring | None = None
    ) -> None:
        self.source = source
        self.follower = EventFollower(source.epoch)
        self.keeper = Keeper(self.follower, has)
        self.events = bounded_socket(context, zmq.SUB)
        self.replay = bounded_socket(context, zmq.DEALER)
        self.num_undecodable = 0
        try:
            for socket in self.sockets():
                if keys is not None:
                    keys.dial(socket, source.process, source.endpoints.key)
            self.events.subscribe(kv_events.TOPIC)
            self.events.connect(source.endpoints.events)
            self.replay.connect(source.endpoints.replay)
        except (zmq.ZMQError, ProtocolError):
            self.close()
            raise

    def sockets(self) -> tuple[Socket, Socket]:
        return self.events, self.replay

    def hear(self, socket: Socket, now_s: float) -> None:
        """Takes in what waits on one of its sockets."""
        if socket.closed:
            return
        for seq, payload in self._publications(socket):
            if socket is self.events:
                self.follower.on_live(seq, self._decoded(payload), now_s)
            elif seq < 0:
                self.follower.on_replay_end(now_s)
            else:
                self.follower.on_replay(seq, self._decoded(payload), now_s)
        self.keeper.take_in()

    def tick(self, now_s: float) -> float:
        """Asks for what is missing; when to call again."""
        start_seq = self.follower.ask(now_s)
        if start_seq is not None:
            try:
                self.replay.send_multipart([b"", kv_events.encode_seq(start_seq)], zmq.NOBLOCK)
            except zmq.Again:
                pass  # the worker doesn't take messages now; the follower asks again
        return self.follower.next_ask_s()

    def holdings(self) -> FollowedHoldings:
        """What this worker is taken to hold, for an audit."""
        keys, source = self.follower.announced, self.source
        return FollowedHoldings(source.process, source.epoch, self.follower.seq, len(keys), digest_of(keys))

    def close(self) -> None:
        self.events.close()
        self.replay.close()

    def _publications(self, socket: Socket) -> Iterator[tuple[int, bytes]]:
        for frames in received(socket):
            try:
                _, seq_frame, payload = frames
                seq = kv_events.decode_seq(seq_frame)
            except ValueError as error:
                self._drop_frame(error)
                continue
            yield seq, payload

    def _decoded(self, payload: bytes) -> kv_events.EventBatch | None:
        try:
            return kv_events.decode_batch(payload)
        except (msgspec.DecodeError, ValueError) as error:
            self._drop_frame(error)
            return None

    def _drop_frame(self, error: Exception) -> None:
        self.num_undecodable += 1
        log.warning("dropped an event frame of %s: %s", self.source.process, error)
