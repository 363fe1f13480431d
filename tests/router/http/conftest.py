"""A router with an HTTP port, and the client that people have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from protos.control import Tokens
from tests.router.fake_cluster import Router
from tests.system.harness import free_port


class HttpRouter(Router):
    """A router with fake workers that listens for HTTP clients."""

    def __init__(self, **options: Any) -> None:
        self.http_port = free_port()
        router = {"http_port": self.http_port} | options.pop("router", {})
        super().__init__(router=router, **options)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"


@pytest.fixture
def make_http_router() -> Iterator[Callable[..., HttpRouter]]:
    """Starts routers, and stops them whatever the test did."""
    running: list[HttpRouter] = []

    def make(**options: Any) -> HttpRouter:
        running.append(HttpRouter(**options))
        return running[-1]

    yield make
    for router in running:
        router.close()


@pytest.fixture
def router(make_http_router: Callable[..., HttpRouter]) -> HttpRouter:
    return make_http_router()


@pytest.fixture
def client(router: HttpRouter) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0, timeout=60.0) as client:
        yield client


def saying(*texts: str) -> Callable[[Tokens], list[Tokens]]:
    """What makes a fake worker say `texts`, sample by sample, a byte a token."""

    def tamper(message: Tokens) -> list[Tokens]:
        said = texts[message.index % len(texts)].encode()
        if message.position >= len(said):
            return []
        reason = "stop" if message.position == len(said) - 1 else None
        token_ids = [said[message.position]]
        return [Tokens(message.fence, message.index, message.position, token_ids, message.logprobs, reason)]

    return tamper
