"""Names of KV blocks: a block is named by what determines its content (design §1).

Owns the derivation of roots and keys and nothing else. Pure functions of their arguments: no process, no clock, no
Python `hash()`. The router imports this module and nothing else of `kvpool`.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

KEY_BYTES = 16
OWNER_BYTES = 8
_ROOT_LABEL = b"tandem/kv/1"

Key = bytes
"""16 bytes. `(key, group, shard)` is the full name of a stored block; the router only needs keys."""


@dataclass(frozen=True, slots=True)
class PromptKeys:
    """Keys of a token sequence: one per full block, and one for the last partial block if there is one.

    The partial key is for the hand-over alone: it never enters an index or the DISK tier.
    """

    full: tuple[Key, ...]
    partial: Key | None


def root_key(
    *,
    model_fingerprint: bytes,
    kv_format: str,
    numerics_class: bytes,
    adapter: bytes = b"",
    tenant_salt: bytes = b"",
) -> Key:
    """The key before the first block: everything but tokens that decides the bits of KV. Every field is length-prefixed."""
    digest = hashlib.sha256()
    for field in (_ROOT_LABEL, model_fingerprint, kv_format.encode(), numerics_class, adapter, tenant_salt):
        digest.update(struct.pack("<I", len(field)))
        digest.update(field)
    return digest.digest()[:KEY_BYTES]


def owner_of(root: Key) -> bytes:
    """The begin of a root: whose block it is, as far as quotas care (one for each tenant, adapter and model)."""
    return root[:OWNER_BYTES]


NO_KEYS = bytes(KEY_BYTES)


def digest_of(keys: Iterable[Key]) -> bytes:
    """All of `keys`, each there once and in whatever order, XORed: keys are digests, so sets that differ hardly ever agree."""
    digest = 0
    for key in keys:
        digest ^= int.from_bytes(key, "big")
    return digest.to_bytes(KEY_BYTES, "big")


def tokens_as_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as unsigned 32-bit little-endian: the form that is hashed and that travels."""
    return array("I", tokens).tobytes()


def tokens_from_bytes(data: bytes) -> list[int]:
    """Inverse of `tokens_as_bytes`. Raises ValueError if `data` is not a whole number of tokens."""
    if len(data) % 4:
        raise ValueError(f"token bytes have length {len(data)}, not a multiple of 4")
    out = array("I")
    out.frombytes(data)
    return out.tolist()


def block_key(parent: Key, tokens: Sequence[int] | bytes, extra: bytes = b"") -> Key:
    """The key of a block that holds `tokens` (ids, or their `tokens_as_bytes`) after the block named `parent`."""
    data = tokens if isinstance(tokens, bytes) else tokens_as_bytes(tokens)
    return hashlib.sha256(parent + struct.pack("<H", len(data) // 4) + data + extra).digest()[:KEY_BYTES]


def chain_keys_ref(parent: Key, tokens: bytes, block_size: int) -> list[Key]:
    """The keys of all blocks of `tokens` (`tokens_as_bytes`) after the block named `parent`; the last one is partial if they are
    no whole number of blocks."""
    step = 4 * block_size
    keys: list[Key] = []
    for first in range(0, len(tokens), step):
        parent = block_key(parent, tokens[first : first + step])
        keys.append(parent)
    return keys


def _native_chain_keys() -> Callable[[Key, bytes, int], list[Key]] | None:
    try:
        from kvpool._chain_keys import chain_keys
    except ImportError:  # not built: no compiler was there
        return None
    return chain_keys


chain_keys = _native_chain_keys() or chain_keys_ref
"""`chain_keys_ref`, natively where that was built."""


def prompt_keys(root: Key, tokens: Sequence[int] | bytes, block_size: int) -> PromptKeys:
    """Keys of every block of `tokens` (ids, or their `tokens_as_bytes`), in order; parents are full blocks only."""
    data = tokens if isinstance(tokens, bytes) else tokens_as_bytes(tokens)
    keys = chain_keys(root, data, block_size)
    partial = keys.pop() if len(data) % (4 * block_size) else None
    return PromptKeys(tuple(keys), partial)


class KeyChain:
    """The keys of a growing sequence: `extend` with tokens, read `keys` of the full blocks so far.

    `keys[i]` names block i; `partial_key()` names the block that is not full yet, or is None when there is none.
    """

    __slots__ = ("_block_size", "_pending", "keys", "root")

    def __init__(self, root: Key, block_size: int, tokens: Sequence[int] = ()) -> None:
        self.root = root
        self._block_size = block_size
        self._pending: list[int] = []
        self.keys: list[Key] = []
        self.extend(tokens)

    @property
    def num_tokens(self) -> int:
        return len(self.keys) * self._block_size + len(self._pending)

    def parent_of(self, index: int) -> Key:
        """The key before block `index`: the root for block 0."""
        return self.keys[index - 1] if index else self.root

    def extend(self, tokens: Sequence[int]) -> None:
        pending = self._pending
        pending.extend(tokens)
        size = self._block_size
        if full := len(pending) - len(pending) % size:
            self.keys += chain_keys(self.parent_of(len(self.keys)), tokens_as_bytes(pending[:full]), size)
            del pending[:full]

    def partial_key(self) -> Key | None:
        return block_key(self.parent_of(len(self.keys)), self._pending) if self._pending else None
