"""What travels on a connection of the tcp transport: fixed binary frames and their bounds.

Owns the layout and the limits, for both sides; no sockets. Everything is big-endian. The sink speaks first:

    hello     magic 4s | version u16 | secret 16s | epoch 8s | slab_bytes u64              sink → source, once
    welcome   magic 4s | version u16 | epoch 8s | num_blocks u64 | slab_bytes u64          source → sink, once
    request   serial u64 | num u32 | num times: location u64                               sink → source
    answer    serial u64 | status u8 | num u32 | detail u64, then num slabs                source → sink, in the requests' order

A hello whose magic, version or secret is wrong gets no word. One whose epoch or slab size is not the source's gets the
welcome, by which the sink learns what is different, and then the end. `serial` counts the requests of a connection from 0. An
answer that is not OK has no slabs: `detail` is then the location that is outside the arena.

Unanswered requests of one connection are bounded: the sink holds further ones back, the source closes on more.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.errors import TransportError

TCP_VERSION = 1
SECRET_BYTES = 16
MAX_REQUESTS = 64
MAX_LOCATIONS = 65_536
"""In a request, and in all requests of a connection that wait for their answers."""

OK, OUTSIDE = 0, 1

_MAGIC = b"TKVT"
_HELLO = struct.Struct(">4sH16s8sQ")
_WELCOME = struct.Struct(">4sH8sQQ")
_REQUEST = struct.Struct(">QI")
_ANSWER = struct.Struct(">QBIQ")
_LOCATION_BYTES = 8

HELLO_BYTES = _HELLO.size
WELCOME_BYTES = _WELCOME.size
ANSWER_BYTES = _ANSWER.size


@dataclass(frozen=True, slots=True)
class Hello:
    """Who the sink wants to talk to, by which secret, and how large its own slabs are."""

    secret: bytes
    epoch: bytes
    slab_bytes: int

    def pack(self) -> bytes:
        return _HELLO.pack(_MAGIC, TCP_VERSION, self.secret, self.epoch, self.slab_bytes)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Hello:
        """Raises TransportError for another magic or version."""
        return cls(*_unpack(_HELLO, data))


@dataclass(frozen=True, slots=True)
class Welcome:
    """Who the source is, and its arena."""

    epoch: bytes
    num_blocks: int
    slab_bytes: int

    def pack(self) -> bytes:
        return _WELCOME.pack(_MAGIC, TCP_VERSION, self.epoch, self.num_blocks, self.slab_bytes)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Welcome:
        """Raises TransportError for another magic or version."""
        return cls(*_unpack(_WELCOME, data))


@dataclass(frozen=True, slots=True)
class Answer:
    """What is before the slabs of a request's answer."""

    serial: int
    status: int
    num: int
    detail: int = 0

    def pack(self) -> bytes:
        return _ANSWER.pack(self.serial, self.status, self.num, self.detail)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Answer:
        return cls(*_ANSWER.unpack(data))


def pack_request(serial: int, locations: NDArray[np.uint64]) -> bytes:
    """`locations`: `[num]`, at most MAX_LOCATIONS."""
    return _REQUEST.pack(serial, len(locations)) + locations.astype(">u8").tobytes()


class RequestReader:
    """Takes a stream of requests apart. It never keeps more than one request of MAX_LOCATIONS that is not complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._serial = 0

    def feed(self, data: bytes | memoryview) -> list[tuple[int, NDArray[np.uint64]]]:
        """The requests that `data` completes: serials and locations. Raises TransportError for what is not allowed."""
        self._buffer += data
        requests: list[tuple[int, NDArray[np.uint64]]] = []
        begin = 0
        while len(self._buffer) - begin >= _REQUEST.size:
            serial, num = _REQUEST.unpack_from(self._buffer, begin)
            if serial != self._serial:
                raise TransportError(f"request {serial}, expected {self._serial}")
            if num > MAX_LOCATIONS:
                raise TransportError(f"a request for {num} blocks, the limit is {MAX_LOCATIONS}")
            end = begin + _REQUEST.size + num * _LOCATION_BYTES
            if len(self._buffer) < end:
                break
            body = bytes(self._buffer[begin + _REQUEST.size : end])
            requests.append((serial, np.frombuffer(body, dtype=">u8").astype(np.uint64)))
            self._serial += 1
            begin = end
        del self._buffer[:begin]
        return requests


def _unpack(form: struct.Struct, data: bytes | bytearray | memoryview) -> list[Any]:
    """What follows magic and version in a frame that begins with them."""
    magic, version, *fields = form.unpack(data)
    if magic != _MAGIC or version != TCP_VERSION:
        raise TransportError(f"magic {magic!r} version {version}, ours is {_MAGIC!r} version {TCP_VERSION}")
    return fields
