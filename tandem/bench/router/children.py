"""What the processes of the end-to-end bench are told and answer: JSON lines over stdin and stdout (tandem/bench/peers.py).

Owns the messages and how a child reads them; what they lead to is the children's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from tandem.bench.peers import Peer

START_S = 60.0
ANSWER_S = 120.0


class Open(Struct, tag="open", tag_field="t"):
    """→ router: serve this configuration (YAML) on that core."""

    config: str
    core: int


class Opened(Struct, tag="opened", tag_field="t"):
    """Router →."""

    grpc_port: int
    control_port: int
    model: str


class Tokenize(Struct, tag="tokenize", tag_field="t"):
    """→ router: tokenise the texts of that seed, one after the other, with nothing else to do."""

    seed: int


class Tokenized(Struct, tag="tokenized", tag_field="t"):
    """Router →. The rate is that of a core, `p50_s` what passed for one text."""

    texts_per_s: Annotated[float, Meta(gt=0)]
    p50_s: float


class Use(Struct, tag="use", tag_field="t"):
    """→ router: how long has it computed so far?"""


class Used(Struct, tag="used", tag_field="t"):
    """Router →. Seconds of its core."""

    cpu_s: float


class Join(Struct, tag="join", tag_field="t"):
    """→ fake workers: these many, at that router."""

    control_port: int
    prefills: int
    decodes: int
    cores: list[int]


class Joined(Struct, tag="joined", tag_field="t"):
    """Fake workers →: all of them are welcome."""


class Pace(Struct, tag="pace", tag_field="t"):
    """→ fake workers: from now on a stream gets a frame of so many tokens each `step_s`; 0: as soon as the one before the last is
    acknowledged."""

    frame_tokens: int
    step_s: float


class Paced(Struct, tag="paced", tag_field="t"):
    """Fake workers →."""


class Connect(Struct, tag="connect", tag_field="t"):
    """→ clients: this router, from these cores."""

    port: int
    cores: list[int]


class Connected(Struct, tag="connected", tag_field="t"):
    """Clients →."""


class Ask(Struct, tag="ask", tag_field="t"):
    """→ clients: so many at a time send texts of that seed, one after the other, for answers of one token."""

    clients: int
    seconds: float
    seed: int


class Answered(Struct, tag="answered", tag_field="t"):
    """Clients →. `ttft_p50_s` is from the call to the token."""

    requests_per_s: float
    ttft_p50_s: float
    num_requests: int
    errors: list[str]


class Begin(Struct, tag="begin", tag_field="t"):
    """→ clients: open so many streams without an end, and wait until each has a token."""

    streams: int


class Begun(Struct, tag="begun", tag_field="t"):
    """Clients →."""


class Listen(Struct, tag="listen", tag_field="t"):
    """→ clients: after `warm_s` count for `seconds`, then end the streams. Token ids tell when they were sent (`sent_at`), modulo
    `vocab_size`."""

    warm_s: float
    seconds: float
    vocab_size: int


class Heard(Struct, tag="heard", tag_field="t"):
    """Clients →. `delay_*` is from a worker's send to the client's receipt of a token, `chunk_tokens` how many came at once."""

    tokens_per_s: float
    delay_p50_s: float
    delay_p99_s: float
    chunk_tokens: float
    errors: list[str]


TICK_S = 1e-4
"""A token id tells its time in so much."""


def sent_at(time_s: float, vocab_size: int) -> int:
    """The token id of that time."""
    return int(time_s / TICK_S) % vocab_size


def delays_s(token_ids: NDArray[np.int64], times_s: NDArray[np.float64], vocab_size: int) -> NDArray[np.float64]:
    """How long before `times_s` those tokens were sent, if that is less than `vocab_size * TICK_S`."""
    return (times_s / TICK_S - token_ids) % vocab_size * TICK_S


ToRouter = Open | Tokenize | Use
ToWorkers = Join | Pace
ToClients = Connect | Ask | Begin | Listen

_Request = TypeVar("_Request", bound=Struct)


def requests(decoder: msgspec.json.Decoder[_Request]) -> Iterator[_Request]:
    """In a child: what the parent says, until it closes the line."""
    for line in sys.stdin.buffer:
        yield decoder.decode(line)


def child(name: str, module: str) -> Peer:
    """A process that runs `module`."""
    command = [sys.executable, "-m", f"tandem.bench.router.{module}"]
    return Peer(name, command, start_s=START_S, answer_s=ANSWER_S, advice="", begins="started")
