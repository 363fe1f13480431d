"""What tests of pool nodes as processes share: one process to fork them from, and a world for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kvpool.node_world import World, Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


@pytest.fixture
def world(tmp_path: Path, zygote: Zygote) -> Iterator[World]:
    with World(tmp_path, zygote) as world:
        yield world
