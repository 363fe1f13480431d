"""How large a simulated cluster is, and what its requests are like. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from tandem.config import Config, load_config


@dataclass(frozen=True, slots=True)
class Shape:
    """Small enough that rooms run out. Seconds are virtual."""

    num_prefill: int = 3
    num_decode: int = 3
    num_pools: int = 2
    num_routers: int = 2
    worker_blocks: int = 112
    pool_blocks: int = 512
    max_running: int = 16
    max_step_tokens: int = 64
    max_model_len: int = 64
    recompute_limit_tokens: int = 8
    requests_per_s: float = 50.0
    prompt_tokens: tuple[int, int] = (13, 19)
    answer_tokens: tuple[int, int] = (12, 20)
    requests_per_fault: int = 50
    deadline_s: float = 120.0
    """Of a request that has no short one: to reach it is to wait for ever."""
    rest_s: float = 150.0
    """Everything comes to rest in so long after all is well: longer than any deadline."""


@lru_cache
def config(num_routers: int) -> Config:
    """What every process of a simulated cluster is configured with."""
    return load_config(
        None,
        {
            "router": {"replicas": num_routers},
            "pool": {"replicas": 1},
            "transfer": {"lease_s": 2.0, "grace_s": 1.0, "hold_s": 5.0, "fetch_timeout_s": 5.0},
        },
    )
