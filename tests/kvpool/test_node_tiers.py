"""How a pool node's tiers are made from its configuration, beside its loop."""

from __future__ import annotations

import gc
import select
from pathlib import Path

import pytest

from kvpool.block_pool import BlockPool
from kvpool.node_tiers import Memory, Opening
from tandem.config import Config, load_config
from tandem.errors import ConfigError
from tests.kvpool.named_blocks import ROOT, SIZE, key_of
from tests.kvpool.node_world import GROUP, SLAB


def config_of(directory: Path, **pool: object) -> Config:
    directory.mkdir(exist_ok=True)
    settings = {"host_bytes": 2**20, "disk": {"dirs": [str(directory)], "bytes": 2**20}, **pool}
    return load_config(None, {"pool": settings})


def next_victim(pool: BlockPool) -> str:
    """Of a block used three times and then one used once."""
    for name, uses in (("often", 3), ("late", 1)):
        blocks = pool.allocate(1)
        assert blocks is not None
        pool.publish(blocks[0], key_of(name), ROOT, SIZE, bytes(8))
        pool.release(blocks)
        for _ in range(uses - 1):
            pool.release(pool.match([key_of(name)]))
    [record] = pool.coldest(1)
    return record.key.decode().strip()


@pytest.mark.parametrize(("eviction", "victim"), [("lru", "often"), ("lfu", "late")])
def test_the_eviction_policy_is_that_of_both_tiers(tmp_path: Path, eviction: str, victim: str) -> None:
    memory = Memory.open(config_of(tmp_path / "disk", eviction=eviction), GROUP, SLAB)
    assert memory.disk is not None
    assert next_victim(memory.pool) == victim
    assert next_victim(memory.disk.pool) == victim
    memory.close()


def test_tiers_are_opened_beside_and_taken_when_they_are_ready(tmp_path: Path) -> None:
    opening = Opening(config_of(tmp_path / "disk"), GROUP, SLAB)
    assert select.select([opening], [], [], 10)[0]
    memory = opening.take()
    opening.close()
    assert memory.arena.num_blocks == 32
    memory.close()


def test_what_nobody_takes_is_given_up(tmp_path: Path) -> None:
    opening = Opening(config_of(tmp_path / "disk"), GROUP, SLAB)
    opening.close()
    opening.close()
    Memory.open(config_of(tmp_path / "disk"), GROUP, SLAB).close()  # nobody else has the directory


def test_what_can_not_be_opened_is_said_to_whoever_takes_it_and_leaves_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path / "disk")
    holder = Memory.open(config, GROUP, SLAB)
    opening = Opening(config, GROUP, SLAB)
    with pytest.raises(ConfigError, match="in use by another pool node"):
        opening.take()
    opening.close()
    holder.close()
    gc.collect()
    Memory.open(config, GROUP, SLAB).close()
