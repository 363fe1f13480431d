"""The source's side of the ucx transport: a listener, and what its readers ask for.

Owns the worker that listens and the endpoints of readers. Only reads the arena, and every location is checked against it
first. Blocks that are large, or lie next to each other, are sent from where they are; others are gathered into one
message by one native call. A source never waits: a reader that doesn't take what it asked for holds its own sends only.

A listener is never destroyed but used again by the next transport of this process: UCX 1.21 crashes when somebody is just
knocking at one that goes away (its asynchronous thread calls the freed listener). A new secret keeps old readers out.

The binding listens on every interface of the machine (it takes no address); `host` is what others are told. What admits a
reader is the secret in the endpoint, which only our own processes hear.
"""

from __future__ import annotations

import ctypes
import hmac
import logging
import secrets
from collections import OrderedDict, deque
from typing import Any

import numpy as np

from kernels.block_copy import copy_blocks
from kernels.cpu import Native
from kvpool.arena import Arena
from kvpool.transport import ucx_frames as frames
from kvpool.transport.ucx_library import Ucx, comes_soon
from kvpool.transport.ucx_slots import Slots
from tandem.errors import TransportError

log = logging.getLogger(__name__)

STAGING_BYTES = 16 * 1024 * 1024
"""Gathered messages on their way, of all readers."""

SENDING_BYTES = 4 * 1024 * 1024
"""While so much is on its way to a reader, its next ask waits: enough to cover the handshakes, and what was gathered still lies
in a cache when it is sent."""

MAX_SENDS = 64
"""Messages to one reader on their way, however small."""

MAX_READERS = 4096
MAX_STRANGERS = 64
"""Connections that have not said hello, or were refused and have not left; the oldest goes when there are more."""

WORK_BYTES = 4 * 1024 * 1024
"""Of answers, before the channels of this process get their turn."""

_PROGRESS = 64
"""Calls into UCX before anything else gets its turn; each moves some hundred KiB at most."""


class _Listening:
    """A worker that listens, and the knocks that nobody opened yet. It stays until the process ends."""

    def __init__(self, ucx: Ucx, context: Any) -> None:
        self.knocks: list[int] = []
        self.worker = ucx.api.UCXWorker(context)
        self.worker.init_blocking_progress_mode()
        self.listener = ucx.api.UCXListener.create(self.worker, 0, self.knocks.append)
        # Not even the interpreter's end may free it: the listener has all the rest.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.listener))


_idle: list[_Listening] = []
"""Of closed transports."""


class _Reader:
    """One connection. `greeted` once its hello was right, `refused` once anything was wrong."""

    __slots__ = ("endpoint", "frame", "greeted", "num_bytes", "receive", "refused", "sends", "tag", "tag_base")

    def __init__(self, endpoint: Any, tag: int) -> None:
        self.endpoint = endpoint
        self.tag = tag
        self.tag_base = 0
        self.frame = np.zeros(frames.FRAME_BYTES, dtype=np.uint8)
        self.receive: Any = None
        self.sends: deque[tuple[Any, Any, int | None]] = deque()
        """Request, what it reads, and the staging slot that it holds."""
        self.num_bytes = 0
        """Of `sends`."""
        self.greeted = False
        self.refused = False


class UcxSource:
    """Serves one arena. One descriptor to poll (`fd`); `work` when it is readable, until `arm`."""

    def __init__(self, ucx: Ucx, context: Any, arena: Arena, epoch: bytes, host: str, native: Native | None) -> None:
        self._ucx = ucx
        self._arena = arena
        self._epoch = epoch
        self._native = native
        self._secret = secrets.token_bytes(frames.SECRET_BYTES)
        self._readers: OrderedDict[int, _Reader] = OrderedDict()
        self._staging: Slots | None = None
        self._listening = _idle.pop() if _idle else _Listening(ucx, context)
        self._closed = False
        self._worker = self._listening.worker
        self.fd: int = self._worker.epoll_file_descriptor
        self.endpoint = f"ucx://{host}:{self._listening.listener.port}/{self._secret.hex()}"

    @property
    def num_readers(self) -> int:
        return sum(reader.greeted and not reader.refused for reader in self._readers.values())

    def work(self) -> int | None:
        """Goes on for a bounded time; the bytes that it began to send, or None if nothing at all happened."""
        moved = False
        for _ in range(_PROGRESS):
            if not self._worker.progress_once():
                break
            moved = True
        while self._listening.knocks:
            moved = True
            self._accept(self._listening.knocks.pop(0))
        for reader in list(self._readers.values()):
            while reader.sends and reader.sends[0][0].completed:
                moved = True
                self._sent(reader)
            if not reader.endpoint.alive:
                moved = True
                self._drop(reader)
        num_bytes = 0
        hearing = list(self._readers.values())
        while hearing and num_bytes < WORK_BYTES:  # one frame each and round: nobody waits for another's long read
            answers = [(reader, self._hear(reader)) for reader in hearing]
            hearing = [reader for reader, sent in answers if sent is not None]
            num_bytes += sum(sent or 0 for _, sent in answers)
            moved = moved or bool(hearing)
        return num_bytes if moved else None

    def lingers(self) -> bool:
        """Whether something more came within a moment; False at once if nothing is on its way."""
        return any(reader.sends for reader in self._readers.values()) and comes_soon(self._worker)

    def arm(self) -> bool:
        """Makes `fd` readable at the next event. False if there is something already."""
        return bool(self._worker.arm())

    def close(self) -> None:
        """Ends every connection. Idempotent."""
        if self._closed:
            return
        self._closed = True
        while self._readers:
            self._drop(next(iter(self._readers.values())))
        _idle.append(self._listening)

    def _accept(self, request: int) -> None:
        try:
            endpoint = self._listening.listener.create_endpoint_from_conn_request(request, True)
        except Exception as error:
            log.warning("a reader could not be let in: %s", error)
            return
        reader = _Reader(endpoint, secrets.randbits(64))
        self._readers[reader.tag] = reader
        strangers = [other for other in self._readers.values() if other.refused or not other.greeted]
        if len(strangers) > MAX_STRANGERS or len(self._readers) > MAX_READERS:
            self._drop(strangers[0])
        if reader.tag in self._readers:
            self._listen(reader)
            self._send(reader, frames.pack_greeting(reader.tag), frames.GREETING_TAG)

    def _listen(self, reader: _Reader) -> None:
        reader.receive = self._worker.tag_recv(self._ucx.array(reader.frame), self._ucx.api.UCXXTag(reader.tag))

    def _send(self, reader: _Reader, data: Any, tag: int, slot: int | None = None) -> None:
        buffer = data if isinstance(data, self._ucx.array) else self._ucx.array(data)
        request = reader.endpoint.tag_send(buffer, self._ucx.api.UCXXTag(tag))
        reader.sends.append((request, buffer, slot))
        reader.num_bytes += buffer.nbytes

    def _sent(self, reader: _Reader) -> None:
        _, buffer, slot = reader.sends.popleft()
        reader.num_bytes -= buffer.nbytes
        if slot is not None:
            assert self._staging is not None
            self._staging.give(slot)

    def _hear(self, reader: _Reader) -> int | None:
        """Answers one frame, if there is one; the bytes of the answer, or None if none came or it has to wait."""
        ready = reader.tag in self._readers and not reader.refused and reader.receive.completed
        if not ready or len(reader.sends) >= MAX_SENDS or reader.num_bytes >= SENDING_BYTES:
            return None
        try:
            reader.receive.check_error()
            frame = frames.unpack_frame(reader.frame)
            if isinstance(frame, frames.Hello):
                self._greet(reader, frame)
                num_bytes: int | None = 0
            else:
                num_bytes = self._answer(reader, frame)
            if num_bytes is not None:
                self._listen(reader)
            return num_bytes
        except TransportError as error:
            log.warning("refused a reader of the arena: %s", error)
            reader.refused = True
            self._send(reader, frames.pack_reply(frames.Reply(0, str(error))), self._reply_tag(reader))
            return 0
        except Exception as error:
            log.warning("dropped a reader of the arena: %s", error)
            self._drop(reader)
            return 0

    def _reply_tag(self, reader: _Reader) -> int:
        return frames.tag_of(reader.tag_base, frames.REPLY_SEQ)

    def _greet(self, reader: _Reader, hello: frames.Hello) -> None:
        reader.tag_base = hello.tag_base
        if not hmac.compare_digest(hello.secret, self._secret):
            raise TransportError("another secret")
        if hello.epoch != self._epoch:
            raise TransportError(f"epoch {self._epoch.hex()}, expected {hello.epoch.hex()}")
        if hello.slab_bytes != self._arena.slab_bytes:
            raise TransportError(f"slabs of {self._arena.slab_bytes} bytes, the reader's have {hello.slab_bytes}")
        reader.greeted = True
        self._send(reader, frames.pack_reply(frames.Reply(self._arena.num_blocks)), self._reply_tag(reader))

    def _answer(self, reader: _Reader, ask: frames.Ask) -> int | None:
        arena, num = self._arena, len(ask.locations)
        if not reader.greeted:
            raise TransportError("an ask before a hello")
        if num > frames.blocks_per_message(arena.slab_bytes):
            limit = frames.blocks_per_message(arena.slab_bytes)
            raise TransportError(f"{num} blocks in an ask, the limit is {limit} of {arena.slab_bytes} bytes")
        if ask.locations.max() >= arena.num_blocks:
            raise TransportError(f"location {ask.locations.max()} is not in an arena of {arena.num_blocks} blocks")
        tag = frames.tag_of(reader.tag_base, ask.seq)
        first = int(ask.locations[0])
        if num == 1 or bool((np.diff(ask.locations) == 1).all()):
            self._send(reader, arena.array[first : first + num], tag)
        else:
            if self._staging is None:
                self._staging = Slots(arena.slab_bytes, STAGING_BYTES, self._ucx.array)
            slot = self._staging.take()
            if slot is None:
                return None
            ids = ask.locations.astype(np.int64)
            copy_blocks(self._native, arena.array, ids, self._staging.blocks[slot], self._staging.indices[:num])
            self._send(reader, self._staging.buffer(slot, num), tag, slot)
        return num * arena.slab_bytes

    def _drop(self, reader: _Reader) -> None:
        """Ends a connection; what it still said is thrown away."""
        del self._readers[reader.tag]
        reader.endpoint.close_blocking()
        self._worker.progress()  # after an error UCX cancels sends only here
        while reader.sends:
            self._sent(reader)
        while reader.receive is not None and reader.receive.completed:
            self._listen(reader)
        reader.receive = None
