"""Causal attention of a step's rows over the paged KV of their sequences, with bits that depend on nothing else.

A row at position p attends to positions 0…p of its own sequence. The KV is cut into tiles of `TILE` positions, aligned at
multiples of `TILE`, whatever the chunk: each tile gives a maximum, a sum of exponentials and a weighted sum of V, and the
tiles are merged in position order. So a row meets the same operations on the same shapes in a chunk of one row as in one of
512 (flash-decoding with a fixed split). Two shapes of the same arithmetic:

- a chunk of several rows walks over its tiles: products of `[group * rows, head_dim]` by a tile;
- all one-row chunks run together: one product over every (sequence, tile, head).

A product has at least `MIN_ROWS` rows (BLAS reduces few rows in another order); a tile that a row doesn't see is an exact
no-op. Slots that no token has written may hold anything, NaN included: they are cleared in the gathered copy.

This is torch's form of it; the native one is cpu/attention.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import Span

TILE = 256
MIN_ROWS = 8
MAX_PAIRS = 8
"""(sequence, tile) pairs in one product: bounds the fp32 copy of the KV to what a core's cache holds."""
FLOOR = -1e30
"""Stands for the maximum of a tile that a row doesn't see: exp(-inf - FLOOR) is 0, where -inf - -inf would be NaN."""


@dataclass(frozen=True, slots=True)
class ChunkTile:
    """One tile of one chunk. Rows before `first` (in units of `group * rows`) don't see it at all."""

    block_ids: Tensor
    num_valid: int
    first: int
    mask: Tensor | None
    """[rows of the product - first, TILE]: 0 where seen, -inf elsewhere; None if all is seen."""


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    first_row: int
    rows: int
    product_rows: int
    tiles: tuple[ChunkTile, ...]


@dataclass(frozen=True, slots=True)
class DecodeWindow:
    """Consecutive tiles of a batch of one-row chunks. Its (sequence, tile) pairs are ordered by tile; those of its t-th tile are
    of the batch's first `counts[t]` sequences, so that nothing is padded to the longest."""

    counts: tuple[int, ...]
    pair_sequence: Tensor
    block_ids: Tensor
    mask: Tensor
    """[num_pairs, 1, 1, TILE]: 0 where seen, -inf elsewhere."""
    unwritten: Tensor
    """Rows of the gathered KV seen as [-1, head_dim] that no token has written."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """A batch of one-row chunks, those with the most tiles first: their rows of the step, and windows from position 0 on."""

    rows: Tensor
    windows: tuple[DecodeWindow, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What a step's attention needs besides the values; the same for all layers. Made by `plan_attention`."""

    num_rows: int
    chunks: tuple[ChunkPlan, ...]
    decodes: tuple[DecodePlan, ...]


def _tile_blocks(span: Span, tile: int, blocks_per_tile: int) -> Tensor:
    """The tile's blocks; past the end of the table its last one, whose content is cleared."""
    part = torch.from_numpy(span.block_ids[tile * blocks_per_tile : (tile + 1) * blocks_per_tile]).long()
    missing = blocks_per_tile - part.numel()
    return torch.cat((part, part[-1:].expand(missing))) if missing else part


def _plan_chunk(span: Span, group: int, block_size: int) -> ChunkPlan:
    product_rows = max(MIN_ROWS, group * span.rows)
    end = span.start + span.rows
    # Padding rows of the product sit at the last row's position: they see what it sees, and nobody reads them.
    positions = (span.start + torch.arange(product_rows) // group).clamp_(max=end - 1)
    tiles = []
    for tile in range(-(-end // TILE)):
        low = tile * TILE
        first = min(max(0, low - span.start) * group, product_rows - MIN_ROWS)
        mask = None
        if low + TILE - 1 > span.start or first < max(0, low - span.start) * group:
            hidden = (low + torch.arange(TILE))[None, :] > positions[first:, None]
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        blocks = _tile_blocks(span, tile, TILE // block_size)
        tiles.append(ChunkTile(blocks, min(TILE, end - low), first, mask))
    return ChunkPlan(span.first_row, span.rows, product_rows, tuple(tiles))


def _plan_window(spans: Sequence[Span], tiles: range, num_kv_heads: int, block_size: int) -> DecodeWindow:
    pairs = [(sequence, tile) for tile in tiles for sequence, span in enumerate(spans) if span.start // TILE >= tile]
    valid = torch.tensor([min(TILE, spans[sequence].start + 1 - tile * TILE) for sequence, tile in pairs])
    hidden = torch.arange(TILE)[None, :] >= valid[:, None]
    gathered = hidden[None, :, None, :].expand(2, len(pairs), num_kv_heads, TILE)
    return DecodeWindow(
        counts=tuple(sum(1 for _, other in pairs if other == tile) for tile in tiles),
        pair_sequence=torch.tensor([sequence for sequence, _ in pairs]),
        block_ids=torch.cat([_tile_blocks(spans[sequence], tile, TILE // block_size) for sequence, tile in pairs]),
        mask=torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None, :],
        unwritten=gathered.reshape(-1).nonzero().view(-1),
    )


def _plan_decodes(spans: Sequence[Span], num_kv_heads: int, block_size: int) -> DecodePlan:
    """`spans`: at most `MAX_PAIRS`, in order of falling tile counts."""
    windows: list[DecodeWindow] = []
    low, pairs = 0, 0
    num_tiles = spans[0].start // TILE + 1
    for tile in range(num_tiles):
        count = sum(1 for span in spans if span.start // TILE >= tile)
        if pairs + count > MAX_PAIRS:
            windows.append(_plan_window(spans, range(low, tile), num_kv_heads, block_size))
            low, pairs = tile, 0
        pairs += count
    windows.append(_plan_window(spans, range(low, num_tiles), num_kv_heads, block_size))
    return DecodePlan(torch.tensor([span.first_row for span in spans]), tuple(windows))


def plan_attention(spans: Sequence[Span], num_heads: int, num_kv_heads: int, block_size: int) -> AttentionPlan:
    """Cuts a step into products. `spans` cover rows 0…n-1 in order; `block_size` divides `TILE`."""
    num_rows = sum(span.rows for span in spans)
    group = num_heads // num_kv_heads
    chunks = tuple(_plan_chunk(span, group, block_size) for span in spans if span.rows > 1)
    singles = sorted((span for span in spans if span.rows == 1), key=lambda span: -(span.start // TILE))
    decodes = tuple(
        _plan_decodes(singles[first : first + MAX_PAIRS], num_kv_heads, block_size)
        for first in range(0, len(singles), MAX_PAIRS)
    )
    return AttentionPlan(num_rows, chunks, decodes)


def _gather(arena: Tensor, layer: int, block_ids: Tensor) -> Tensor:
    """→ a private fp32 copy [2, num_tiles, num_kv_heads, TILE, head_dim] of those blocks' KV of `layer`."""
    num_blocks, num_layers, _, num_kv_heads, block_size, head_dim = arena.shape
    slabs = arena.view(num_blocks * num_layers, 2, num_kv_heads, block_size, head_dim)
    found = slabs.index_select(0, block_ids * num_layers + layer)
    per_tile = TILE // block_size
    tiles = block_ids.numel() // per_tile
    parts = found.view(tiles, per_tile, 2, num_kv_heads, block_size, head_dim).permute(2, 0, 3, 1, 4, 5)
    out = torch.empty(parts.shape, dtype=torch.float32).copy_(parts)
    return out.view(2, tiles, num_kv_heads, TILE, head_dim)


def _tile_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """scores: [..., TILE], overwritten by exp(scores - maximum) → maximum and sum, [..., 1]."""
    peak = scores.amax(-1, keepdim=True).clamp_(min=FLOOR)
    scores.sub_(peak).exp_()
    return peak, scores.sum(-1, keepdim=True)


def _merge(into: tuple[Tensor, Tensor, Tensor], tile: tuple[Tensor, Tensor, Tensor]) -> None:
    """Adds a later tile's (maximum, sum, weighted V) to the running ones, in place. Each product and sum rounds by itself."""
    peak, total, value = into
    new = torch.maximum(peak, tile[0])
    keep = torch.sub(peak, new).exp_()
    take = torch.sub(tile[0], new).exp_()
    total.mul_(keep).add_(tile[1].mul_(take))
    value.mul_(keep).add_(tile[2].mul_(take))
    peak.copy_(new)


def _attend_chunk(q: Tensor, arena: Tensor, layer: int, plan: ChunkPlan, out: Tensor) -> None:
    num_kv_heads, head_dim = arena.shape[3], arena.shape[5]
    group = q.shape[1] // num_kv_heads
    used = group * plan.rows
    rows = slice(plan.first_row, plan.first_row + plan.rows)
    queries = torch.zeros((num_kv_heads, plan.product_rows, head_dim))
    queries[:, :used].view(num_kv_heads, plan.rows, group, head_dim).copy_(
        q[rows].view(plan.rows, num_kv_heads, group, head_dim).transpose(0, 1)
    )
    running: tuple[Tensor, Tensor, Tensor] | None = None
    for tile in plan.tiles:
        kv = _gather(arena, layer, tile.block_ids)
        if tile.num_valid < TILE:
            kv[..., tile.num_valid :, :] = 0
        scores = torch.bmm(queries[:, tile.first :], kv[0, 0].transpose(1, 2))
        if tile.mask is not None:
            scores.add_(tile.mask)
        peak, total = _tile_softmax(scores)
        found = peak, total, torch.bmm(scores, kv[1, 0])
        if running is None:
            running = found
        else:
            _merge((running[0][:, tile.first :], running[1][:, tile.first :], running[2][:, tile.first :]), found)
    assert running is not None
    value = running[2].div_(running[1])[:, :used].view(num_kv_heads, plan.rows, group, head_dim)
    out[rows].view(plan.rows, num_kv_heads, group, head_dim).copy_(value.transpose(0, 1))


def _attend_window(queries: Tensor, group: int, arena: Tensor, layer: int, window: DecodeWindow) -> list[Tensor]:
    """→ maximum, sum and weighted V of every pair: [num_pairs, num_kv_heads, group, 1 or head_dim]."""
    num_kv_heads, head_dim = arena.shape[3], arena.shape[5]
    pairs = window.pair_sequence.numel()
    product_rows = queries.shape[2]
    kv = _gather(arena, layer, window.block_ids)
    kv.view(-1, head_dim).index_fill_(0, window.unwritten, 0)
    keys, values = kv.view(2, pairs * num_kv_heads, TILE, head_dim).unbind(0)
    picked = queries.index_select(0, window.pair_sequence).view(-1, product_rows, head_dim)
    scores = torch.bmm(picked, keys.transpose(1, 2)).view(pairs, num_kv_heads, product_rows, TILE)
    # The product's padding rows stay as they are: finite, and nobody reads what comes of them.
    seen = scores[:, :, :group]
    peak, total = _tile_softmax(seen.add_(window.mask))
    value = torch.bmm(scores.view(-1, product_rows, TILE), values)
    return [peak, total, value.view(pairs, num_kv_heads, product_rows, head_dim)[:, :, :group]]


def _attend_decodes(q: Tensor, arena: Tensor, layer: int, plan: DecodePlan, out: Tensor) -> None:
    num_kv_heads, head_dim = arena.shape[3], arena.shape[5]
    group = q.shape[1] // num_kv_heads
    sequences = plan.rows.numel()
    queries = torch.zeros((sequences, num_kv_heads, max(MIN_ROWS, group), head_dim))
    queries[:, :, :group] = q.index_select(0, plan.rows).view(sequences, num_kv_heads, group, head_dim)
    running: tuple[Tensor, Tensor, Tensor] | None = None
    for window in plan.windows:
        parts = _attend_window(queries, group, arena, layer, window)
        first = 0
        for count in window.counts:
            peak, total, value = (part[first : first + count] for part in parts)
            first += count
            if running is None:
                running = peak, total, value
            else:
                _merge((running[0][:count], running[1][:count], running[2][:count]), (peak, total, value))
    assert running is not None
    result = running[2].div_(running[1])
    out.index_copy_(0, plan.rows, result.reshape(sequences, -1).to(out.dtype))


def paged_attention_ref(q: Tensor, arena: Tensor, layer: int, spans: Sequence[Span]) -> Tensor:
    """The textbook form, for tests: q: [num_rows, num_heads, head_dim] fp32, already scaled → fp32 of the same shape."""
    num_kv_heads, block_size = arena.shape[3], arena.shape[4]
    group = q.shape[1] // num_kv_heads
    out = torch.zeros_like(q)
    for span in spans:
        for row in range(span.rows):
            length = span.start + row + 1
            blocks = arena[torch.from_numpy(span.block_ids[: -(-length // block_size)]).long(), layer].float()
            k, v = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length].repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,htd->ht", q[span.first_row + row], k)
            out[span.first_row + row] = torch.einsum("ht,htd->hd", scores.softmax(-1), v)
    return out


def paged_attention(q: Tensor, arena: Tensor, layer: int, plan: AttentionPlan, dtype: torch.dtype) -> Tensor:
    """q: [num_rows or more, num_heads, head_dim] fp32, already scaled; arena: [num_blocks, num_layers, 2, num_kv_heads,
    block_size, head_dim], contiguous, holding the KV of this step's tokens too → [as q, num_heads * head_dim] in `dtype`.
    Rows past the plan's (padding) are 0."""
    out = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=dtype)
    if q.shape[0] > plan.num_rows:
        out[plan.num_rows :] = 0
    for chunk in plan.chunks:
        _attend_chunk(q, arena, layer, chunk, out)
    for decode in plan.decodes:
        _attend_decodes(q, arena, layer, decode, out)
    return out
