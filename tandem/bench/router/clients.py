"""The clients of the end-to-end bench: gRPC calls of one process, on one event loop.

Owns what is called and what is timed. Every error of a call is a result.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from itertools import count
from typing import Any

import grpc
import grpc.aio
import numpy as np

from protos import tandem_pb2, tandem_pb2_grpc
from tandem.bench.peers import Failed, Ready, answer
from tandem.bench.report import percentile
from tandem.bench.router.children import (
    TICK_S,
    Answered,
    Ask,
    Connect,
    Connected,
    Heard,
    Listen,
    requests,
)
from tandem.bench.router.texts import texts
from tandem.clock import now_s
from tandem.errors import TandemError

_CHANNELS = 4
_CALL_S = 60.0
_BEGIN_S = 30.0
_MAX_ERRORS = 5
_ENDLESS = 32_768
_ENDS = grpc.RpcError


class Clients:
    """Calls one router."""

    def __init__(self, port: int) -> None:
        # Channels that are alike share a connection unless they are told not to.
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) for _ in range(_CHANNELS)]
        self._stubs: list[Any] = [tandem_pb2_grpc.TandemStub(channel) for channel in self._channels]

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
                except _ENDS as error:
                    errors.append(str(error.code()) if isinstance(error, grpc.aio.AioRpcError) else str(error))
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

    async def listen(self, listen: Listen) -> Heard:
        """Streams that never end by themselves; what comes between the end of `warm_s` and that of `seconds` counts."""
        heard = _Ears(listen)
        calls = [self._open(number) for number in range(listen.streams)]
        tasks = [asyncio.create_task(heard.hear(call)) for call in calls]
        try:
            async with asyncio.timeout(_BEGIN_S):
                await heard.all_begun.wait()
            await asyncio.sleep(listen.warm_s)
            began_s = heard.begin()
            await asyncio.sleep(listen.seconds)
            took_s = heard.end() - began_s
        except TimeoutError as error:
            raise TandemError(
                f"of {listen.streams} streams {heard.num_begun} have begun after {_BEGIN_S:g} s; {heard.errors[:1]}"
            ) from error
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*tasks)
        return heard.found(took_s)

    def _open(self, number: int) -> Any:
        prompt = f"{number}. Once upon a time there was a stream without an end."
        sampling = tandem_pb2.SamplingParams(max_tokens=_ENDLESS, ignore_eos=True)
        request = tandem_pb2.GenerateRequest(prompt=prompt, sampling=sampling)
        return self._stubs[number % _CHANNELS].Generate(request, timeout=_CALL_S)


class _Ears:
    """What all streams got. Delays are kept per chunk, with how many tokens each holds for."""

    def __init__(self, listen: Listen) -> None:
        self._streams = listen.streams
        self._vocab_size = listen.vocab_size
        self.num_begun = 0
        self.all_begun = asyncio.Event()
        self.errors: list[str] = []
        self._counts = [0] * listen.streams
        self._num_heard = 0
        self._ids: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        self._times_s: list[float] = []
        self._counting = False

    def begin(self) -> float:
        self._counting = True
        return now_s()

    def end(self) -> float:
        self._counting = False
        return now_s()

    async def hear(self, call: Any) -> None:
        number, begun = self._num_heard, False
        self._num_heard += 1
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
                if self._counting:
                    self._counts[number] += len(ids)
                    self._ids.append(np.array(ids, dtype=np.int64))
                    self._times_s.append(time_s)
            if not self._counting:
                return
            self.errors.append("a stream ended by itself")
        except asyncio.CancelledError:
            if self._counting:
                self.errors.append("a stream was cancelled")
        except _ENDS as error:
            self.errors.append(str(error.code()) if isinstance(error, grpc.aio.AioRpcError) else str(error))

    def found(self, took_s: float) -> Heard:
        if not self._ids:
            raise TandemError(f"no stream got a token for {took_s:.1f} s; errors: {self.errors[:1]}")
        lengths = np.array([len(ids) for ids in self._ids])
        ticks = np.repeat((np.array(self._times_s) / TICK_S).astype(np.int64), lengths)
        delays_s = (ticks - np.concatenate(self._ids)) % self._vocab_size * TICK_S
        p50_s, p99_s = np.percentile(delays_s, (50, 99))
        return Heard(
            tokens_per_s=sum(self._counts) / took_s,
            delay_p50_s=float(p50_s),
            delay_p99_s=float(p99_s),
            chunk_tokens=float(lengths.mean()),
            least_tokens=min(self._counts),
            errors=self.errors[:_MAX_ERRORS],
        )


def main() -> None:
    """Asks until stdin ends."""
    answer(Ready("clients"))
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    clients: Clients | None = None
    for request in requests(Connect | Ask | Listen):
        try:
            match request:
                case Connect():
                    os.sched_setaffinity(0, request.cores)
                    clients = loop.run_until_complete(_connected(request.port))
                    answer(Connected())
                case Ask() as ask:
                    assert clients is not None, "nothing is connected"
                    answer(loop.run_until_complete(clients.ask(ask.clients, ask.seconds, texts(ask.seed))))
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
