"""The file for `ray up` is what Ray's own launcher takes, and names what `tandem up` asks for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.config import load_config

RAY = Path(__file__).parents[2] / "deploy" / "ray"


@pytest.fixture
def launched() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((RAY / "cluster.yaml").read_text(encoding="utf-8"))
    return found


def prepared(values: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does before it asks the provider for anything: defaults filled in, then its schema and its own checks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what importing Ray's launcher warns of is Ray's
        from ray.autoscaler._private.util import prepare_config, validate_config

        config: dict[str, Any] = prepare_config(values)
        validate_config(config)
    return config


def test_ray_takes_it(launched: dict[str, Any]) -> None:
    config = prepared(launched)
    assert set(config["available_node_types"]) == {"head", "prefill", "decode"}
    assert config["head_node_type"] == "head"


@pytest.mark.parametrize("broken", ["unknown key", "head", "minimum"])
def test_ray_notices_what_is_wrong(launched: dict[str, Any], broken: str) -> None:
    if broken == "unknown key":
        launched["available_node_types"]["prefill"]["min_worker"] = 1
    elif broken == "head":
        launched["head_node_type"] = "nobody"
    else:
        launched["available_node_types"]["prefill"]["min_workers"] = 99
    with pytest.raises(Exception, match="min_worker|head_node_type|max_workers|nobody"):
        prepared(launched)


def test_each_group_has_what_its_role_needs(launched: dict[str, Any]) -> None:
    config = load_config(RAY / "tandem.yaml")
    groups = launched["available_node_types"]
    for role in ("prefill", "decode"):
        needs = config.ray.needs(role)
        assert needs
        able = [
            name for name, group in groups.items() if all(group["resources"].get(n, 0) >= v for n, v in needs.items())
        ]
        assert able == [role]


def test_the_head_keeps_its_state_and_nobody_joins_without_the_secret(launched: dict[str, Any]) -> None:
    head = " ".join(launched["head_start_ray_commands"])
    assert "RAY_gcs_storage=rocksdb RAY_gcs_storage_path=" in head
    for commands in (head, " ".join(launched["worker_start_ray_commands"])):
        assert "RAY_AUTH_MODE=token" in commands
        assert "ray start" in commands
    assert "~/.ray/auth_token" in launched["file_mounts"]


def test_the_example_is_read() -> None:
    assert load_config(RAY.parent / "config" / "example.yaml").decode.replicas == 2
