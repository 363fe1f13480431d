"""The router of the end-to-end bench: the real server in a process of its own, on one core, with nothing added but its bench's
questions. They are read on another thread, which does nothing meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import msgspec

from router.server import RouterServer
from tandem.bench.peers import Failed, Ready, answer
from tandem.bench.report import percentile
from tandem.bench.router.children import Open, Opened, Tokenize, Tokenized, ToRouter, Use, Used, requests
from tandem.bench.router.texts import texts
from tandem.config import Config, load_config
from tandem.errors import TandemError
from tandem.model_files import resolve_model
from tandem.tokenizer.tokenizer import Tokenizer, load_tokenizer

_START_S = 30.0
_decoder: msgspec.json.Decoder[ToRouter] = msgspec.json.Decoder(ToRouter)


def main() -> None:
    """Serves until stdin ends."""
    answer(Ready("tandem"))
    opening = next(requests(_decoder), None)
    if not isinstance(opening, Open):
        return
    os.sched_setaffinity(0, {opening.core})
    try:
        config = _config(opening.config)
        tokenizer = load_tokenizer(resolve_model(config.model.path))
        asyncio.run(_serve(RouterServer(config, tokenizer, drain_s=0.0), tokenizer))
    except TandemError as error:
        answer(Failed(str(error)))


def _config(text: str) -> Config:
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path)


async def _serve(server: RouterServer, tokenizer: Tokenizer) -> None:
    stop = threading.Event()
    loop = asyncio.get_running_loop()

    def tokenize(prompts: Sequence[str], done: Future[Tokenized]) -> None:
        done.set_result(_tokenized(tokenizer, prompts))

    def listen() -> None:
        try:
            if not server.started.wait(_START_S):
                return
            answer(Opened(server.grpc_port, server.control_port, server.model))
            for request in requests(_decoder):
                if isinstance(request, Tokenize):
                    done: Future[Tokenized] = Future()
                    # On the thread that does it for requests.
                    loop.call_soon_threadsafe(tokenize, texts(request.seed), done)
                    answer(done.result())
                elif isinstance(request, Use):
                    answer(Used(time.process_time()))
        finally:
            stop.set()

    listener = threading.Thread(target=listen, name="questions", daemon=True)
    listener.start()
    await server.serve(stop)


def _tokenized(tokenizer: Tokenizer, prompts: Sequence[str]) -> Tokenized:
    took_s = []
    before_s = time.thread_time()
    for prompt in prompts:
        began_s = time.perf_counter()
        tokenizer.encode_prompt(prompt)
        took_s.append(time.perf_counter() - began_s)
    return Tokenized(len(prompts) / (time.thread_time() - before_s), percentile(took_s, 50))


if __name__ == "__main__":
    main()
