"""Routers that tests of the shell start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.router.fake_cluster import Router


@pytest.fixture
def make_router() -> Iterator[Callable[..., Router]]:
    """Starts routers, and stops them whatever the test did."""
    running: list[Router] = []

    def make(**options: Any) -> Router:
        running.append(Router(**options))
        return running[-1]

    yield make
    for router in running:
        router.close()


@pytest.fixture
def router(make_router: Callable[..., Router]) -> Router:
    return make_router()
