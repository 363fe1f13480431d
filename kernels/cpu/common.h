// The C ABI between kernels/cpu/*.cpp and its ctypes caller. Sizes and pointers only; the caller has checked every bound.
#pragma once
#include <cstdint>

enum { TANDEM_OK = 0, TANDEM_UNSUPPORTED = 1, TANDEM_WORKSPACE = 2 };

struct tandem_span {
  int32_t first_row;   // of the step
  int32_t rows;        // tokens, at positions start … start + rows - 1
  int32_t start;
  int32_t reserved;
  const int32_t* block_table;
};

struct tandem_attention {
  const float* q;          // [rows, num_heads, head_dim], scaled
  uint16_t* out;           // [rows, num_heads, head_dim] bf16
  const uint16_t* arena;   // bf16
  int64_t block_stride;    // elements from block to block
  int64_t layer_offset;    // elements from a block's begin to this layer's K
  int64_t value_offset;    // elements from K to V
  const tandem_span* spans;
  void* workspace;         // 64-byte aligned
  int64_t workspace_bytes;
  int32_t num_spans;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;
  int32_t reserved;
};

struct tandem_rope {
  const uint16_t* qkv;    // [rows, (num_heads + 2 * num_kv_heads) * head_dim] bf16
  const float* cos;       // [positions, head_dim]
  const float* sin;       // the same, its first half negated
  const int64_t* positions;  // [rows]
  const int64_t* slots;      // [rows]: block_id * block_size + offset
  float* q;               // [rows, num_heads, head_dim]: rotated and scaled
  uint16_t* arena;
  int64_t block_stride;
  int64_t layer_offset;
  int64_t value_offset;
  float scale;
  int32_t rows;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;
};
