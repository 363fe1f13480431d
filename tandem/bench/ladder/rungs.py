"""The rungs of the ladder, lowest first: each adds one technique to those below it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rung:
    """`name` begins its metrics, `title` is what people read. `bounded_waste`: the bound of paging is asked of it."""

    name: str
    title: str
    bounded_waste: bool = False


NO_CACHE = Rung("no_kv_cache", "no KV cache")
CACHE = Rung("kv_cache", "KV cache, one sequence at a time")
STATIC = Rung("static_batches", "static batches, reserved contiguous KV")
PAGED = Rung("paged_kv", "paged KV, continuous batches", bounded_waste=True)
CHUNKED = Rung("chunked_prefill", "chunked prefill")
PREFIX = Rung("prefix_caching", "prefix caching")
DISAGGREGATED = Rung("disaggregated", "disaggregated, prefill and decode workers")
