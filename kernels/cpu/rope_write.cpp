// RoPE of a step's queries and keys, and the write of its keys and values into their slots of the arena.
#include "abi.h"
#include "simd.h"

namespace tandem {
namespace {

TANDEM_INLINE void put(void* to, int32_t dtype, int64_t at, vf value) {
  if (dtype == TANDEM_BF16)
    store_bf16((uint16_t*)to + at, value);
  else
    store((float*)to + at, value);
}

}  // namespace

void rope_write(const tandem_rope_write& a, const tandem_step& step, Share share) {
  const int64_t dim = a.head_dim, half = dim / 2, heads = a.num_heads, kv_heads = a.num_kv_heads;
  int64_t first, last;
  share.split(step.rows, &first, &last);
  for (int64_t r = first; r < last; r++) {
    const float* row = a.qkv + r * a.stride;
    const float* cos = a.cos + step.positions[r] * dim;
    const float* sin = a.sin + step.positions[r] * dim;
    const int64_t slot = step.slots[r] / a.block_size * a.block_stride + a.layer_offset + step.slots[r] % a.block_size * dim;
    for (int64_t h = 0; h < heads + kv_heads; h++) {
      const float* x = row + h * dim;
      for (int64_t i = 0; i < dim; i += kLanes) {
        const int64_t other = i < half ? i + half : i - half;
        // Product and sum round separately.
        const vf value = load(x + i) * load(cos + i) + load(x + other) * load(sin + i);
        if (h < heads)
          put(a.q, a.dtype, (r * heads + h) * dim + i, value * splat(a.scale));
        else
          put(a.arena, a.dtype, slot + (h - heads) * a.block_size * dim + i, value);
      }
    }
    for (int64_t h = 0; h < kv_heads; h++)
      for (int64_t i = 0; i < dim; i += kLanes)
        put(a.arena, a.dtype, slot + a.value_offset + h * a.block_size * dim + i, load(row + (heads + kv_heads + h) * dim + i));
  }
}

void select_rows(const tandem_select& a, const tandem_step& step, Share share) {
  if (share.index) return;
  const int64_t y_bytes = a.y_stride * (a.y_dtype == TANDEM_BF16 ? 2 : 4);
  for (int64_t i = 0; i < step.num_logits; i++) {
    const int64_t from = step.logit_rows[i];
    if (from == i) continue;
    std::memcpy(a.x + i * a.x_stride, a.x + from * a.x_stride, a.x_stride * 4);
    std::memcpy((char*)a.y + i * y_bytes, (char*)a.y + from * y_bytes, y_bytes);
  }
}

}  // namespace tandem
