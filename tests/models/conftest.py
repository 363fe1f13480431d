from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import tiny_models


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of the variant "gqa"."""
    return tiny_models.save(tiny_models.build("llama", {}), tmp_path_factory.mktemp("tiny"))
