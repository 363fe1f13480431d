"""The clients of the end-to-end bench: gRPC calls of one process, on one event loop.

Owns what is called and what is timed. Every error of a call is a result.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from itertools import count
from typing import Any, cast

import grpc
import grpc.aio
import msgspec
import numpy as np
from numpy.typing import NDArray

from protos import tandem_pb2, tandem_pb2_grpc
from tandem.bench.peers import Failed, Ready, answer
from tandem.bench.report import percentile
from tandem.bench.router.children import (
    Answered,
    Ask,
    Begin,
    Begun,
    Connect,
    Connected,
    Heard,
    Listen,
    ToClients,
    delays_s,
    requests,
)
from tandem.bench.router.texts import texts
from tandem.clock import now_s
from tandem.errors import TandemError

_CHANNELS = 4
_CALL_S = 60.0
_BEGIN_S = 30.0
_MAX_ERRORS = 5
_decoder: msgspec.json.Decoder[ToClients] = msgspec.json.Decoder(ToClients)
_ENDLESS = 32_768


class Clients:
    """Calls one router."""

    def __init__(self, port: int) -> None:
        # Channels that are alike share a connection unless they are told not to.
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) for _ in range(_CHANNELS)]
        self._stubs: list[Any] = [tandem_pb2_grpc.TandemStub(cast("grpc.Channel", own)) for own in self._channels]
        self._calls: list[Any] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._ears = _Ears(0)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def ask(self, clients: int, seconds: float, prompts: Sequence[str]) -> Answered:
        """Loops that ask for one token, one request after the other each, until `seconds` have passed."""
        sampling = tandem_pb2.SamplingParams(max_tokens=1)
        numbers = count()
        ttft_s: list[float] = []
        errors: list[str] = []
        ends_s = now_s() + seconds

        async def loop() -> None:
            while now_s() < ends_s:
                number = next(numbers)
                prompt = prompts[number % len(prompts)]
                request = tandem_pb2.GenerateRequest(prompt=prompt, sampling=sampling)
                began_s = now_s()
                first_s = None
                try:
                    async for response in self._stubs[number % _CHANNELS].Generate(request, timeout=_CALL_S):
                        if first_s is None and response.HasField("chunk"):
                            first_s = now_s()
                except grpc.aio.AioRpcError as error:
                    errors.append(f"{error.code()}: {error.details()}")
                    return
                if first_s is None:
                    errors.append("an answer without a token")
                    return
                ttft_s.append(first_s - began_s)

        began_s = now_s()
        await asyncio.gather(*(loop() for _ in range(clients)))
        took_s = now_s() - began_s
        p50_s = percentile(ttft_s, 50) if ttft_s else 0.0
        return Answered(len(ttft_s) / took_s, p50_s, len(ttft_s), errors[:_MAX_ERRORS])

    async def begin(self, streams: int) -> None:
        """Opens streams that never end by themselves, and waits until each has a token."""
        ears = self._ears = _Ears(streams)
        self._calls = [self._open(number) for number in range(streams)]
        self._tasks = [asyncio.create_task(ears.hear(call)) for call in self._calls]
        try:
            async with asyncio.timeout(_BEGIN_S):
                await ears.all_begun.wait()
        except TimeoutError as error:
            await self._end()
            raise TandemError(
                f"of {streams} streams {ears.num_begun} have begun after {_BEGIN_S:g} s; errors: {ears.errors[:1]}"
            ) from error

    async def listen(self, listen: Listen) -> Heard:
        """What the streams get between the end of `warm_s` and that of `seconds`. Ends them."""
        await asyncio.sleep(listen.warm_s)
        self._ears.counting = True
        began_s = now_s()
        await asyncio.sleep(listen.seconds)
        self._ears.counting = False
        took_s = now_s() - began_s
        await self._end()
        return self._ears.found(took_s, listen.vocab_size)

    async def _end(self) -> None:
        self._ears.ending = True
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._tasks)

    def _open(self, number: int) -> Any:
        prompt = f"{number}. Once upon a time there was a stream without an end."
        sampling = tandem_pb2.SamplingParams(max_tokens=_ENDLESS, ignore_eos=True)
        request = tandem_pb2.GenerateRequest(prompt=prompt, sampling=sampling)
        return self._stubs[number % _CHANNELS].Generate(request, timeout=_CALL_S)


class _Ears:
    """What all streams got: of each chunk its ids, which tell when they were sent, and when it came."""

    def __init__(self, streams: int) -> None:
        self.num_begun = 0
        self.all_begun = asyncio.Event()
        self.counting = self.ending = False
        self.errors: list[str] = []
        self._counts: list[int] = []
        self._streams = streams
        self._ids: list[NDArray[np.int64]] = []
        self._times_s: list[float] = []

    async def hear(self, call: Any) -> None:
        number, begun = len(self._counts), False
        self._counts.append(0)
        try:
            async for response in call:
                time_s = now_s()
                ids = response.chunk.token_ids
                if not ids:
                    continue
                if not begun:
                    begun = True
                    self.num_begun += 1
                    if self.num_begun == self._streams:
                        self.all_begun.set()
                if self.counting:
                    self._counts[number] += len(ids)
                    self._ids.append(np.array(ids, dtype=np.int64))
                    self._times_s.append(time_s)
            self._failed("it ended by itself")
        except asyncio.CancelledError:
            self._failed("it was cancelled")
        except grpc.aio.AioRpcError as error:
            self._failed(f"{error.code()}: {error.details()}")

    def _failed(self, why: str) -> None:
        if not self.ending:
            self.errors.append(f"a stream: {why}")

    def found(self, took_s: float, vocab_size: int) -> Heard:
        if not self._ids:
            raise TandemError(f"no stream got a token for {took_s:.1f} s; errors: {self.errors[:1]}")
        if silent := self._counts.count(0):
            self.errors.append(f"{silent} streams got nothing for {took_s:.1f} s")
        lengths = np.array([len(ids) for ids in self._ids])
        times_s = np.repeat(np.array(self._times_s), lengths)
        p50_s, p99_s = np.percentile(delays_s(np.concatenate(self._ids), times_s, vocab_size), (50, 99))
        return Heard(
            tokens_per_s=sum(self._counts) / took_s,
            delay_p50_s=float(p50_s),
            delay_p99_s=float(p99_s),
            chunk_tokens=float(lengths.mean()),
            errors=self.errors[:_MAX_ERRORS],
        )


def main() -> None:
    """Asks until stdin ends."""
    answer(Ready("clients"))
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    clients: Clients | None = None
    for request in requests(_decoder):
        try:
            match request:
                case Connect():
                    os.sched_setaffinity(0, request.cores)
                    clients = loop.run_until_complete(_connected(request.port))
                    answer(Connected())
                case Ask() as ask:
                    assert clients is not None, "nothing is connected"
                    answer(loop.run_until_complete(clients.ask(ask.clients, ask.seconds, texts(ask.seed))))
                case Begin(streams=streams):
                    assert clients is not None, "nothing is connected"
                    loop.run_until_complete(clients.begin(streams))
                    answer(Begun())
                case Listen() as listen:
                    assert clients is not None, "nothing is connected"
                    answer(loop.run_until_complete(clients.listen(listen)))
        except TandemError as error:
            answer(Failed(str(error)))
    if clients is not None:
        loop.run_until_complete(clients.close())


async def _connected(port: int) -> Clients:
    return Clients(port)


if __name__ == "__main__":
    main()
