"""What the benchmarks' tests pack of tiny models goes to a folder of the test run, not into the developer's cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def cache_of_its_own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For this process and its children. Not where the real model is run: it lies in the real cache and is expensive to pack."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.module.__name__.endswith("test_runs"):
            patch.setenv("TANDEM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
