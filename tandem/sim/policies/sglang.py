"""SGLang's cache-aware router: sgl-project/sglang, `sgl-model-gateway/src/policies/cache_aware.rs` and `tree.rs` (formerly
`sgl-router`), as of 2026.

For prefill, from what it sent where (it takes no KV events):

    imbalanced     max(load) - min(load) > balance_abs  and  max(load) > balance_rel * min(load)      load: requests in flight
    imbalanced     -> the shortest queue
    else, if matched tokens / prompt tokens > cache_threshold  -> who was sent the longest matching prefix (last, if several were)
    else           -> the shortest queue (in older releases: who has the smallest tree)

Defaults are those of the launch command: 0.3, 64 and 1.5 (in older releases, and still where the policy is built without
arguments: 0.5, 32 and 1.1). Its tree is of characters and at most 2^26 of them a worker; here it is of blocks, and as many
tokens as that is at four characters a token. For decode it is `power_of_two`, as in the launch command's own example of
prefill/decode disaggregation (`--prefill-policy cache_aware --decode-policy power_of_two`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from kvpool.keys import Key
from router.fleet import OUTSTANDING, Numbers
from tandem.sim.policies.common import Seen, TwoPools


@dataclass(frozen=True, slots=True)
class SglangTerms:
    cache_threshold: float = 0.3
    """Part of the prompt that must match for the match to count."""
    balance_abs: float = 64.0
    balance_rel: float = 1.5
    max_tree_tokens: int = 2**26 // 4
    """Of each worker."""


class Sglang(TwoPools):
    """Remembers what it sent to whom."""

    def __init__(self, terms: SglangTerms | None = None) -> None:
        self._terms = terms or SglangTerms()
        self._tree = SentTree()

    def prefill_at(self, seen: Seen, numbers: Numbers) -> int:
        terms, ask, names = self._terms, seen.ask, seen.fleet.names
        loads = seen.column(OUTSTANDING, numbers)
        least, most = float(loads.min()), float(loads.max())
        chosen: int | None = None
        if not (most - least > terms.balance_abs and most > terms.balance_rel * least):
            num_blocks, name = self._tree.longest(ask.keys)
            if name is not None and num_blocks * ask.block_size > terms.cache_threshold * ask.num_tokens:
                chosen = seen.fleet.number(name)
                if chosen is None:
                    self._tree.forget(name)
                elif chosen not in numbers:
                    chosen = None
        if chosen is None:
            chosen = seen.fewest(numbers, loads)
        self._tree.insert(ask.keys, names[chosen], terms.max_tree_tokens // ask.block_size)
        return chosen

    def decode_at(self, seen: Seen, numbers: Numbers) -> int:
        return seen.better_of_two(numbers)


class SentTree:
    """Prefixes that were sent, and to whom. A key names its whole prefix, so the tree is flat. Each worker's least recently used
    keys leave first, leaves before what they follow."""

    def __init__(self) -> None:
        self._sent_to: dict[Key, dict[str, None]] = {}
        """By key: names, the last one it was sent to last."""
        self._keys: dict[str, OrderedDict[Key, None]] = {}
        """By name: keys, the least recently used first."""

    def __len__(self) -> int:
        """Keys of all workers."""
        return sum(len(keys) for keys in self._keys.values())

    def longest(self, keys: Sequence[Key]) -> tuple[int, str | None]:
        """How many leading keys were sent to anybody, and to whom the last of them was sent last."""
        names: dict[str, None] | None = None
        num = 0
        for key in keys:
            found = self._sent_to.get(key)
            if found is None:
                break
            names = found
            num += 1
        return num, next(reversed(names)) if names else None

    def insert(self, keys: Sequence[Key], name: str, capacity: int) -> None:
        """These were sent to it; it keeps at most `capacity`."""
        held = self._keys.setdefault(name, OrderedDict())
        for key in reversed(keys):
            held[key] = None
            held.move_to_end(key)
            names = self._sent_to.setdefault(key, {})
            names.pop(name, None)
            names[name] = None
        while len(held) > capacity:
            self._drop(held.popitem(last=False)[0], name)

    def forget(self, name: str) -> None:
        """The worker is gone."""
        for key in self._keys.pop(name, ()):
            self._drop(key, name)

    def _drop(self, key: Key, name: str) -> None:
        names = self._sent_to[key]
        del names[name]
        if not names:
            del self._sent_to[key]
