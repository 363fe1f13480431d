"""The ucx transport: blocks between machines by UCX, over RDMA where both ends have it, else over TCP.

Owns the bounce region and the turns that the source (`ucx_source`) and the channels (`ucx_channel`) get; one thread calls
`poll`, and nothing happens outside it. A channel has a UCX worker of its own, for three reasons: UCX matches tags across a
worker, so nobody else's message can be taken for a block; UCX progresses a worker as a whole, so a turn of one channel stays
bounded; and only the end of the worker, with all its sockets and queue pairs, proves that nothing can write into its memory
any more. The library is `ucxx`, used synchronously (its progress thread made less than a third of the rate). A worker's epoll
descriptor is armed before a poll leaves it, so `fileno` wakes for every event.

Bytes never land in the arena. A read is cut into messages (`ucx_frames`); each is received into a slot of the bounce region
and, while it is warm in the cache, copied on and hashed by one native call. So an abort is always quiet for the arena. The
slots of an aborted read are quarantined instead: until their messages came after all, or the channel is closed and
its worker is gone. A peer that lets a whole share of the region be quarantined has stopped answering, and its channel closes.
Slots whose end can't be proven are retired; when that is half of the region, the transport switches itself off.

UCX trusts its peers: who can connect to our ports and speaks its inner protocol is inside the trust domain, and nothing is
encrypted. It also keeps some 3 KiB of every connection that broke, until the transport is closed: the binding never closes
an endpoint after an error.
"""

from __future__ import annotations

import logging
import re
import select

from kernels.cpu import Native
from kvpool.arena import Arena
from kvpool.transport import ucx_frames as frames
from kvpool.transport.base import POLL_BYTES, ReadResult
from kvpool.transport.ucx_channel import UcxChannel
from kvpool.transport.ucx_library import Ucx, load, shared_context
from kvpool.transport.ucx_slots import Slots
from kvpool.transport.ucx_source import UcxSource
from protos.control import Source
from tandem.errors import TransportError

log = logging.getLogger(__name__)

BOUNCE_BYTES = 32 * 1024 * 1024
"""Of receives on their way, quarantined ones too, over all channels."""

MIN_SHARES = 4
"""One channel never holds more than one of so many parts of the bounce region: a stopped peer leaves room for the others."""

_ENDPOINT = re.compile(r"ucx://([^/:]{1,253}):(\d{1,5})/([0-9a-f]{32})")
_ROUNDS = 4
"""Of one station, before the others get their turn."""


class UcxTransport:
    """Serves `arena` to others by UCX, and reaches theirs. Keeps the `Transport` contract.

    `host` is where others reach this machine. Raises TransportError where UCX can't be loaded or can't listen.
    """

    name = "ucx"

    def __init__(self, arena: Arena, epoch: bytes, host: str, native: Native | None) -> None:
        self.ucx: Ucx = load()
        self.arena = arena
        self.native = native
        self._off = ""
        self._ended: list[ReadResult] = []
        self._channels: dict[int, UcxChannel] = {}
        self._awake: dict[int, None] = {}
        self._waiting: dict[UcxChannel, None] = {}
        try:
            self.context = shared_context()
            self._source = UcxSource(self.ucx, self.context, arena, epoch, host, native)
        except Exception as error:
            raise TransportError(f"ucx is off: {error}") from error
        self.slots = Slots(arena.slab_bytes, BOUNCE_BYTES, self.ucx.array)
        self._share = self._fair_share()
        self._epoll = select.epoll()
        self._epoll.register(self._source.fd, select.EPOLLIN)
        self.wake(self._source.fd)

    @property
    def endpoint(self) -> str:
        return self._source.endpoint

    @property
    def busy(self) -> bool:
        return bool(self._awake or self._ended)

    @property
    def num_readers(self) -> int:
        return self._source.num_readers

    @property
    def share(self) -> int:
        """Bounce slots that one channel may hold now."""
        return self._share

    def fileno(self) -> int:
        return self._epoll.fileno()

    def reaches(self, source: Source) -> bool:
        return not self._off and _ENDPOINT.fullmatch(source.endpoints.ucx) is not None

    def connect(self, source: Source) -> UcxChannel:
        if self._off:
            raise TransportError(self._off)
        parts = _ENDPOINT.fullmatch(source.endpoints.ucx)
        if parts is None or not 0 < int(parts[2]) < 65_536 or len(source.epoch) != frames.EPOCH_BYTES:
            endpoint = source.endpoints.ucx
            raise TransportError(f"{source.process}: ucx endpoint {endpoint[:40]!r} is not ucx://host:port/secret")
        try:
            channel = UcxChannel(self, source, parts[1], int(parts[2]), bytes.fromhex(parts[3]))
        except Exception as error:
            raise TransportError(f"{source.process}: can't connect to {parts[1]}:{parts[2]}: {error}") from error
        self._channels[channel.fd] = channel
        self._epoll.register(channel.fd, select.EPOLLIN)
        self.wake(channel.fd)
        return channel

    def poll(self) -> list[ReadResult]:
        if not self._off:
            for fd, _ in self._epoll.poll(0):
                self.wake(fd)
        self._share = self._fair_share()
        num_bytes = 0
        for fd in list(self._awake):
            num_bytes += self._turn(fd)
            if num_bytes >= POLL_BYTES:
                break
        for channel in [channel for channel in self._channels.values() if channel.overdue]:
            channel.close_because("no answer to the first frame")
        while self._waiting and self.slots.num_free:
            channel = next(iter(self._waiting))
            if channel.ask():
                self.wake(channel.fd)
            else:
                del self._waiting[channel]
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        if self._epoll.closed:
            return
        self._shut("closed by us")
        self._epoll.close()

    def wake(self, fd: int) -> None:
        """The next poll gives a turn to whoever has that descriptor."""
        self._awake.setdefault(fd)

    def take_slot(self, channel: UcxChannel) -> int | None:
        """A free slot of the bounce region, first come, first served; None if it has to wait."""
        slot = self.slots.take() if next(iter(self._waiting), channel) is channel else None
        if slot is None:
            self._waiting.setdefault(channel)
        else:
            self._waiting.pop(channel, None)
        return slot

    def end(self, result: ReadResult) -> None:
        """The next poll returns it."""
        self._ended.append(result)

    def forget(self, read_id: int) -> None:
        """The next poll does not return it."""
        self._ended = [result for result in self._ended if result.read_id != read_id]

    def contain(self, channel: UcxChannel) -> None:
        """Closes channels until what is quarantined leaves room for the others: first `channel`, then the worst."""
        if channel.overdue:
            channel.close_because("no answer to the first frame")
        if channel.num_quarantined >= self.share:
            channel.close_because(f"{channel.num_quarantined} messages of reads that were given up never came")
        while sum(other.num_quarantined for other in self._channels.values()) > self.slots.num_slots // 2:
            worst = max(self._channels.values(), key=lambda other: other.num_quarantined)
            worst.close_because(f"{worst.num_quarantined} messages of reads that were given up never came")

    def closed(self, channel: UcxChannel, slots: list[int]) -> None:
        """A channel ended, and its worker should have; `slots` are what it held of the bounce region."""
        self._awake.pop(channel.fd, None)
        self._waiting.pop(channel, None)
        del self._channels[channel.fd]
        try:
            # The kernel forgets a descriptor together with its last file: if it knows this one, the worker is there.
            self._epoll.unregister(channel.fd)
        except OSError:
            for slot in slots:
                self.slots.give(slot)
            return
        for _ in slots:
            self.slots.retire()
        if self.slots.num_retired > self.slots.num_slots // 2:
            num_bytes = self.slots.num_retired * self.slots.slot_bytes
            self._switch_off(f"late messages may still write into {num_bytes} bytes of the bounce region")

    def _fair_share(self) -> int:
        num_slots = self.slots.num_slots - self.slots.num_retired
        num_active = sum(channel.active for channel in self._channels.values())
        # Two, so that the next message is on its way while one is copied on.
        return max(num_slots // max(MIN_SHARES, num_active), 2 if 2 * num_active <= num_slots else 1)

    def _turn(self, fd: int) -> int:
        """One turn of whoever has that descriptor; the bytes moved. It sleeps when nothing happened, until `fd` wakes it."""
        channel = self._channels.get(fd)
        station = self._source if channel is None else channel
        del self._awake[fd]  # and back to the end of the line
        num_bytes, broken, idle = 0, "", False
        try:
            for _ in range(_ROUNDS):
                moved = station.work()
                num_bytes += moved or 0
                idle = moved is None and not station.lingers()
                if idle:
                    break
            if not idle or not station.arm():
                self.wake(fd)
        except Exception as error:
            broken = str(error) or type(error).__name__
        if channel is None:
            if broken:
                self._switch_off(broken)
        elif broken or channel.broken:
            channel.close_because(broken or channel.broken)
        return num_bytes

    def _switch_off(self, why: str) -> None:
        if self._off:
            return
        log.error("ucx is off: %s", why)
        self._shut(why)

    def _shut(self, why: str) -> None:
        self._off = self._off or f"ucx is off: {why}"
        for channel in list(self._channels.values()):
            channel.close_because(self._off)
        self._awake.clear()
        self._source.close()
