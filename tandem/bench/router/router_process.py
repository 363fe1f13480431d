"""The router of the end-to-end bench: the real server in a process of its own, on one core, with nothing added but its bench's
questions. They are answered on another thread, which does nothing meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import time
from pathlib import Path

from router.server import RouterServer
from tandem.bench.peers import Failed, Ready, answer
from tandem.bench.report import percentile
from tandem.bench.router.children import Open, Opened, Tokenize, Tokenized, Use, Used, requests
from tandem.bench.router.texts import texts
from tandem.config import load_config
from tandem.errors import TandemError
from tandem.model_files import resolve_model
from tandem.tokenizer.tokenizer import Tokenizer, load_tokenizer

_START_S = 30.0


def main() -> None:
    """Serves until stdin ends."""
    answer(Ready("tandem"))
    server: RouterServer | None = None
    stop = threading.Event()
    thread: threading.Thread | None = None
    tokenizer: Tokenizer | None = None
    for request in requests(Open | Tokenize | Use):
        try:
            match request:
                case Open():
                    os.sched_setaffinity(0, {request.core})
                    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
                        path = Path(folder) / "config.yaml"
                        path.write_text(request.config, encoding="utf-8")
                        config = load_config(path)
                    tokenizer = load_tokenizer(resolve_model(config.model.path))
                    server = RouterServer(config, tokenizer, drain_s=0.0)
                    thread = threading.Thread(target=_serve, args=(server, stop), name="router")
                    thread.start()
                    if not server.started.wait(_START_S):
                        raise TandemError(f"the router has not started for {_START_S:g} s")
                    answer(Opened(server.grpc_port, server.control_port, server.model))
                case Tokenize(seed=seed):
                    assert tokenizer is not None, "nothing was opened"
                    answer(_tokenized(tokenizer, texts(seed)))
                case Use():
                    answer(Used(time.process_time()))
        except TandemError as error:
            answer(Failed(str(error)))
    stop.set()
    if thread is not None:
        thread.join()


def _serve(server: RouterServer, stop: threading.Event) -> None:
    asyncio.run(server.serve(stop))


def _tokenized(tokenizer: Tokenizer, prompts: list[str]) -> Tokenized:
    took_s = []
    for prompt in prompts:
        began_s = time.perf_counter()
        tokenizer.encode_prompt(prompt)
        took_s.append(time.perf_counter() - began_s)
    return Tokenized(len(prompts) / sum(took_s), percentile(took_s, 50))


if __name__ == "__main__":
    main()
