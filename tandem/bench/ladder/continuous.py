"""The rungs of the product's engine in this process: paged KV, continuous batches, chunked prefill, prefix caching.

Owns how an engine is fed so that a technique it always has shows nothing, without an option of the product: an engine that is
given one prompt a step cuts none, and prompts of different tenants share no prefix.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from kvpool.keys import Key, root_key, tokens_as_bytes
from protos.control import Dispatch, Failed, Fence, Sampling, Tokens
from tandem.bench.ladder.kv_meter import KVMeter, slots
from tandem.bench.ladder.workload import Playback, Request, Run
from tandem.clock import now_s
from tandem.engine.build import EngineParts
from tandem.engine.engine import Engine
from tandem.engine.sequence import Sequence as Seq
from tandem.engine.sequence import State
from tandem.errors import error_from_code

_DEADLINE_S = 3600.0


def continuous(parts: EngineParts, requests: Sequence[Request], *, whole_prompts: bool, share_prefixes: bool) -> Run:
    """Runs the requests through an idle engine; a request is dispatched when it has arrived and the next step has room for it.

    `whole_prompts`: there is room when no prompt is unfinished, so that each prompt is one step's work (the engine's step must
    hold the longest prompt and a token for each running sequence). Else there is room when the unfinished prompts don't fill
    a step. Without `share_prefixes` every request has a tenant salt of its own. Raises the TandemError of a request that is
    refused.
    """
    engine = parts.engine
    parts.pool.clear_cached()
    playback, meter = Playback(requests), KVMeter()
    room_tokens = 1 if whole_prompts else parts.limits.max_step_tokens
    running: dict[Fence, Request] = {}
    while not playback.is_done:
        if engine.is_idle:
            playback.wait()
        while _unfinished_tokens(engine) < room_tokens and (arrived := playback.take(1)):
            dispatch = _dispatch(arrived[0], _root(parts, arrived[0].number, share_prefixes))
            running[dispatch.fence] = arrived[0]
            engine.on_dispatch(0, dispatch, now_s())
        observed = _Observed(engine, parts.layout.block_size)
        output = engine.step(observed.began_s, observed.clock)
        observed.note(meter)
        for _, reply in output.replies:
            match reply:
                case Failed(code=code, message=message):
                    raise error_from_code(code, message)
                case Tokens():
                    playback.draw(running[reply.fence], reply.token_ids)
    parts.pool.check()
    return playback.run(meter.wasted)


class _Observed:
    """What one step reserves and writes: block tables as the computation finds them, tokens as it leaves them.

    The engine reads its clock when the computation begins; nothing is allocated after that, and what ends is released only
    after it.
    """

    def __init__(self, engine: Engine, block_size: int) -> None:
        self._engine = engine
        self._block_size = block_size
        self._held: list[tuple[Seq, list[int]]] | None = None
        self.began_s = now_s()

    @property
    def clock(self) -> Callable[[], float]:
        return self._read

    def _read(self) -> float:
        if self._held is None:
            self._held = [(sequence, list(sequence.block_table)) for sequence in self._engine.scheduler.holding]
        return now_s()

    def note(self, meter: KVMeter) -> None:
        """Adds the step, which is over, to `meter`."""
        tables = [(table, _tokens_with_kv(sequence)) for sequence, table in self._held or ()]
        meter.add(now_s() - self.began_s, *slots(tables, self._block_size))


def _tokens_with_kv(sequence: Seq) -> int:
    # The last token of an answer is drawn and never computed.
    return sequence.num_tokens - 1 if sequence.state is State.FINISHED else sequence.num_computed_tokens


def _unfinished_tokens(engine: Engine) -> int:
    """Tokens of prompts that are still to be computed."""
    scheduler = engine.scheduler
    missing = [sequence.num_missing_tokens for sequence in (*scheduler.waiting, *scheduler.holding)]
    return sum(number for number in missing if number > 1)


def _root(parts: EngineParts, number: int, share_prefixes: bool) -> Key:
    group = parts.group
    return root_key(
        model_fingerprint=group.model_fingerprint,
        kv_format=group.kv_format,
        numerics_class=group.numerics_class,
        tenant_salt=b"" if share_prefixes else number.to_bytes(16, "little"),
    )


def _dispatch(request: Request, root: Key) -> Dispatch:
    return Dispatch(
        fence=Fence(f"ladder-{secrets.token_hex(8)}", 0, "decode", 0),
        root=root,
        token_ids=tokens_as_bytes(request.prompt),
        num_prompt_tokens=len(request.prompt),
        sampling=Sampling(max_tokens=request.num_answer_tokens),
        n=1,
        sources=[],
        deadline_s=_DEADLINE_S,
        prefill_here=True,
    )
