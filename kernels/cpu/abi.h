// The C ABI between the native kernels and their caller (structs.py): a step, and the operations of a model's program.
// Sizes and pointers only; the caller has checked every bound. All rows of a buffer are `stride` elements apart, a multiple of 32,
// and what lies between a row's width and its stride is zero; but for the logits, whose rows lie side by side.
#pragma once
#include <cstdint>

enum tandem_dtype : int32_t { TANDEM_F32 = 0, TANDEM_BF16 = 1 };
enum tandem_format : int32_t { TANDEM_W_F32 = 0, TANDEM_W_BF16 = 1, TANDEM_W_INT8 = 2, TANDEM_W_INT4 = 3 };
enum tandem_epilogue : int32_t { TANDEM_STORE = 0, TANDEM_ADD = 1, TANDEM_SILU_MUL = 2 };

struct tandem_span {
  int32_t first_row;  // of the step
  int32_t rows;       // tokens, at positions start … start + rows - 1
  int32_t start;
  int32_t reserved;
  const int32_t* block_table;
};

struct tandem_step {
  const int32_t* token_ids;   // [rows]
  const int32_t* positions;   // [rows]
  const int64_t* slots;       // [rows]: block_id * block_size + offset
  const int32_t* logit_rows;  // [num_logits], ascending
  const tandem_span* spans;
  float* logits;              // [num_logits, vocab_size]
  int32_t rows;
  int32_t num_logits;
  int32_t num_spans;
  int32_t reserved;
};

// A packed matrix: panels of 32 outputs, each a contiguous stream over the inputs (kernels/linear.py says how).
struct tandem_matrix {
  const void* panels;
  const float* bias;     // [32 * num_panels] or null
  int32_t format;
  int32_t in_features;   // padded to a multiple of 32
  int32_t num_panels;
  int32_t reserved;
};

struct tandem_embed {
  const tandem_matrix* table;
  float* x;
  int64_t stride;
};

struct tandem_rms_norm {
  const float* x;
  const float* weight;  // [stride], zero past the width
  void* out;
  int64_t stride;
  int32_t width;
  int32_t out_dtype;
  float eps;
  int32_t logit_rows;   // 1: over the step's logit rows
};

// Rows to signed bytes in groups of 32: x = scale * q.
struct tandem_quantize {
  const float* x;
  int8_t* q;        // [rows, stride]
  float* scales;    // [rows, stride / 32]
  int32_t* sums;    // [rows, stride / 32]: the sum of a group's q
  int64_t stride;
  int32_t logit_rows;
  int32_t reserved;
};

struct tandem_linear {
  const void* x;            // in the matrix's kind: f32, bf16, or int8 with scales and sums
  const float* scales;
  const int32_t* sums;
  void* out;                // null: the step's logits
  const tandem_matrix* matrix;
  int64_t x_stride;
  int64_t out_stride;
  int32_t width;            // outputs that are stored, of 32 * num_panels
  int32_t epilogue;
  int32_t out_dtype;
  int32_t logit_rows;
};

struct tandem_rope_write {
  const float* qkv;   // [rows, stride]: queries, keys, values
  const float* cos;   // [positions, head_dim]
  const float* sin;   // the same, its first half negated
  void* q;            // [rows, num_heads, head_dim]: rotated and scaled, in the arena's dtype
  void* arena;
  int64_t stride;
  int64_t block_stride;
  int64_t layer_offset;
  int64_t value_offset;
  float scale;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;
  int32_t dtype;
};

struct tandem_attention {
  const void* q;           // [rows, num_heads, head_dim], scaled, in the arena's dtype
  void* out;               // [rows, stride]
  const void* arena;
  void* workspace;         // 64-byte aligned
  int64_t workspace_bytes;
  int64_t stride;
  int64_t block_stride;    // elements from block to block
  int64_t layer_offset;    // elements from a block's begin to this layer's K
  int64_t value_offset;    // elements from K to V
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;
  int32_t dtype;
  int32_t out_dtype;
};

// From here on only the logit rows go on: row i of x and y becomes row logit_rows[i].
struct tandem_select {
  float* x;
  void* y;
  int64_t x_stride;
  int64_t y_stride;
  int32_t y_dtype;
  int32_t reserved;
};

enum tandem_kind : int32_t {
  TANDEM_EMBED = 0, TANDEM_RMS_NORM = 1, TANDEM_QUANTIZE = 2, TANDEM_LINEAR = 3,
  TANDEM_ROPE_WRITE = 4, TANDEM_ATTENTION = 5, TANDEM_SELECT = 6, TANDEM_NUM_KINDS = 7
};

struct tandem_op {
  int32_t kind;
  int32_t reserved;
  const void* arguments;
};

namespace tandem {

// Which part of an operation a thread does.
struct Share {
  int index;
  int count;
  // The part [first, last) of `total` items that is this thread's.
  void split(int64_t total, int64_t* first, int64_t* last) const {
    *first = total * index / count;
    *last = total * (index + 1) / count;
  }
};

void embed(const tandem_embed& a, const tandem_step& step, Share share);
void rms_norm(const tandem_rms_norm& a, const tandem_step& step, Share share);
void quantize(const tandem_quantize& a, const tandem_step& step, Share share);
void linear(const tandem_linear& a, const tandem_step& step, Share share);
void rope_write(const tandem_rope_write& a, const tandem_step& step, Share share);
void attention(const tandem_attention& a, const tandem_step& step, Share share);
void attention_merge(const tandem_attention& a, const tandem_step& step, Share share);
void select_rows(const tandem_select& a, const tandem_step& step, Share share);

}  // namespace tandem
