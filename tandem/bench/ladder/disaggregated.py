"""The top rung: the same requests through a real cluster, over its public API, each sent when it arrives.

Owns the clients, and what can be seen of the decode worker's memory from outside. Starts no cluster.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kvpool.keys import KEY_BYTES, prompt_keys
from protos import tandem_pb2 as pb
from tandem.bench.ladder.kv_meter import KVMeter, slots
from tandem.bench.ladder.workload import Answer, Request, Run
from tandem.client import Client
from tandem.clock import now_s
from tandem.errors import TandemError

_POLL_S = 0.05
_SETTLE_S = 5.0
_TIMEOUT_S = 600.0


def disaggregated(target: str, requests: Sequence[Request]) -> Run:
    """Runs the requests against the cluster at `target`, from this process. Raises the TandemError of any that fails.

    `wasted` is the decode workers': slots that they report as not allocatable, against tokens whose KV the streams prove to be
    there (prompt and answer so far, from the first token on). Reports lag by a heartbeat at both ends of the run alike, so
    the sums over the whole run agree.
    """
    with Client(target) as client:
        streams = Streams(client, requests)
        meter = _Memory(client, streams)
        watching = threading.Thread(target=meter.watch, name="memory", daemon=True)
        watching.start()
        try:
            with ThreadPoolExecutor(max_workers=len(requests), thread_name_prefix="client") as pool:
                for done in [pool.submit(streams.ask, request) for request in requests]:
                    done.result()
        finally:
            meter.end()
            watching.join()
    return Run(tuple(requests), tuple(streams.answers[request.number] for request in requests), meter.wasted)


class Streams:
    """All requests and their answers so far. Each answer has one thread that writes it."""

    def __init__(self, client: Client, requests: Sequence[Request]) -> None:
        self._client = client
        self._began_s = now_s()
        self._requests = {request.number: request for request in requests}
        self._stop = threading.Event()
        self.answers = {request.number: Answer() for request in requests}

    def ask(self, request: Request) -> None:
        """Sends the request when its time comes and takes the whole answer."""
        if self._stop.wait(max(0.0, request.arrival_s - (now_s() - self._began_s))):
            return
        answer = self.answers[request.number]
        sampling = pb.SamplingParams(max_tokens=request.num_answer_tokens, ignore_eos=True)
        try:
            for event in self._client.generate(request.prompt, sampling, timeout_s=_TIMEOUT_S):
                elapsed_s = now_s() - self._began_s
                answer.times_s.extend([elapsed_s] * len(event.chunk.token_ids))
                answer.token_ids.extend(event.chunk.token_ids)
            if len(answer.token_ids) != request.num_answer_tokens:
                raise TandemError(f"an answer has {len(answer.token_ids)} of {request.num_answer_tokens} tokens")
        except BaseException:
            self._stop.set()  # what hasn't been sent yet is of no use any more
            raise

    def slots(self, block_size: int) -> int:
        """Slots that the sequences which decode now need for the KV they have; what they share counts once."""
        sequences = []
        for number, answer in self.answers.items():
            request = self._requests[number]
            count = len(answer.token_ids)
            if 0 < count < request.num_answer_tokens:
                tokens = [*request.prompt, *answer.token_ids[: count - 1]]
                keys = prompt_keys(bytes(KEY_BYTES), tokens, block_size)
                table = [*keys.full, *([(number, "tail")] if keys.partial else [])]
                sequences.append((table, len(tokens)))
        return slots(sequences, block_size)[1]


class _Memory:
    """Watches the decode workers' blocks while the streams run, and until they are free again."""

    def __init__(self, client: Client, streams: Streams) -> None:
        self._client = client
        self._streams = streams
        self._ended = threading.Event()
        self._meter = KVMeter()

    @property
    def wasted(self) -> float | None:
        return self._meter.wasted

    def end(self) -> None:
        """The streams are over."""
        self._ended.set()

    def watch(self) -> None:
        """Polls until the end, then until nothing is reserved, but no longer than some seconds."""
        last_s = now_s()
        deadline_s = None
        while True:
            self._ended.wait(_POLL_S)
            try:
                cluster = self._client.cluster()
            except TandemError:
                return  # the streams say what is wrong
            time_s = now_s()
            reserved = sum(
                process.num_blocks - process.free_blocks for process in cluster.processes if process.role == "decode"
            )
            used = self._streams.slots(cluster.block_size)
            self._meter.add(time_s - last_s, reserved * cluster.block_size, used)
            last_s = time_s
            if self._ended.is_set():
                deadline_s = deadline_s or time_s + _SETTLE_S
                if not reserved or time_s > deadline_s:
                    return
