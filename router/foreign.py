"""What a worker of another system calls its blocks, in our keys.

Owns the names that one such worker uses: its hash → our key, for blocks that it said to hold. Only full-attention blocks that
their tokens alone determine get a key; all others are counted and left out. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvpool.keys import Key, chain_keys, tokens_as_bytes
from protos.foreign_events import Cleared, ForeignEvent, Removed, Stored
from protos.kv_events import AllBlocksCleared, BlockHash, BlockRemoved, BlockStored, Event

MAX_NAMES = 1_000_000


@dataclass(frozen=True, slots=True)
class ForeignBatch:
    """What one publication of another system's worker carries."""

    events: Sequence[ForeignEvent]


class ForeignNames:
    """Translates the events of one worker whose blocks have `block_size` tokens; `root` is the key before a first block."""

    def __init__(self, root: Key, block_size: int, max_names: int = MAX_NAMES) -> None:
        self.root = root
        self.block_size = block_size
        self._max_names = max_names
        self._keys: dict[BlockHash, Key] = {}
        self.num_rejected = 0
        """Events of which nothing, or not all, could be translated."""

    def __len__(self) -> int:
        return len(self._keys)

    def clear(self) -> None:
        """The worker holds nothing any more."""
        self._keys.clear()

    def translate(self, events: Sequence[ForeignEvent]) -> list[Event]:
        """What they say, as our own events would. Takes note of the names."""
        ours: list[Event] = []
        for event in events:
            match event:
                case Stored():
                    ours += self._stored(event)
                case Removed(block_hashes=hashes, medium=medium, group_idx=group):
                    keys = [key for item in hashes if not group and (key := self._keys.pop(item, None)) is not None]
                    self.num_rejected += len(keys) < len(hashes)
                    ours += [BlockRemoved(list(keys), medium)] if keys else []
                case Cleared():
                    self.clear()
                    ours.append(AllBlocksCleared())
        return ours

    def _stored(self, event: Stored) -> list[Event]:
        """Nothing, if the event isn't whole, if its parent has no key, or if more than tokens decides its content."""
        parent = self.root if event.parent_block_hash is None else self._keys.get(event.parent_block_hash)
        plain = event.lora_id is None and event.lora_name is None and not any(event.extra_keys or ())
        whole = (
            event.block_size == self.block_size and len(event.token_ids) == len(event.block_hashes) * self.block_size
        )
        room = len(self._keys) + len(event.block_hashes) <= self._max_names
        if parent is None or not plain or not whole or not room or event.group_idx:
            self.num_rejected += 1
            return []
        keys = chain_keys(parent, tokens_as_bytes(event.token_ids), self.block_size)
        self._keys.update(zip(event.block_hashes, keys, strict=True))
        return [BlockStored(list(keys), parent, [], self.block_size, None, event.medium)]
