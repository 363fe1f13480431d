// The small operations of a layer, each in one pass: residual + RMSNorm, RoPE + KV write, SwiGLU. Each row is computed by
// itself, in one order, whatever rows come with it.
#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "common.h"
#include "vector.h"

// x += delta (bf16, may be null); out = x / rms(x) * weight, rounded to bf16. `hidden` is a multiple of 16.
extern "C" TARGET int tandem_add_rms_norm_avx512(float* x, const uint16_t* delta, const float* weight, uint16_t* out,
                                                 int64_t rows, int64_t hidden, float eps) {
  if (hidden % 16) return TANDEM_UNSUPPORTED;
  for (int64_t r = 0; r < rows; r++) {
    float* row = x + r * hidden;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < hidden; i += 16) {
      __m512 value = _mm512_loadu_ps(row + i);
      if (delta) {
        value = _mm512_add_ps(value, load_bf16(delta + r * hidden + i));
        _mm512_storeu_ps(row + i, value);
      }
      squares = _mm512_fmadd_ps(value, value, squares);
    }
    const float scale = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / (float)hidden + eps);
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < hidden; i += 16)
      store_bf16(out + r * hidden + i,
                 _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(row + i), factor), _mm512_loadu_ps(weight + i)));
  }
  return TANDEM_OK;
}

// out = silu(gate) * up, in fp32, rounded once. gate_up: [rows, 2 * width], gate first; `width` is a multiple of 16.
extern "C" TARGET int tandem_silu_mul_avx512(const uint16_t* gate_up, uint16_t* out, int64_t rows, int64_t width) {
  if (width % 16) return TANDEM_UNSUPPORTED;
  const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
  for (int64_t r = 0; r < rows; r++) {
    const uint16_t* gate = gate_up + r * 2 * width;
    for (int64_t i = 0; i < width; i += 16) {
      const __m512 g = load_bf16(gate + i);
      const __m512 e = exp_ps(_mm512_min_ps(g, _mm512_sub_ps(zero, g)));  // exp(-|g|)
      // 1 / (1 + exp(-g)), from the side that can't overflow
      const __mmask16 negative = _mm512_cmp_ps_mask(g, zero, _CMP_LT_OQ);
      const __m512 sigmoid = _mm512_div_ps(_mm512_mask_mov_ps(one, negative, e), _mm512_add_ps(one, e));
      store_bf16(out + r * width + i, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid), load_bf16(gate + width + i)));
    }
  }
  return TANDEM_OK;
}

// Rotates q and k, writes k and v into the arena and leaves the scaled q in fp32.
extern "C" TARGET int tandem_rope_write_avx512(const tandem_rope* a) {
  const int dim = a->head_dim, half = dim / 2;
  if (dim % 32) return TANDEM_UNSUPPORTED;
  const int heads = a->num_heads, kv_heads = a->num_kv_heads;
  const int64_t width = (int64_t)(heads + 2 * kv_heads) * dim;
  const __m512 scale = _mm512_set1_ps(a->scale);
  for (int32_t r = 0; r < a->rows; r++) {
    const uint16_t* row = a->qkv + r * width;
    const float* cos = a->cos + a->positions[r] * dim;
    const float* sin = a->sin + a->positions[r] * dim;
    uint16_t* slot = a->arena + a->slots[r] / a->block_size * a->block_stride + a->layer_offset +
                     a->slots[r] % a->block_size * dim;
    for (int h = 0; h < heads + kv_heads; h++) {
      const uint16_t* x = row + (int64_t)h * dim;
      for (int i = 0; i < dim; i += 16) {
        const int other = i < half ? i + half : i - half;
        const __m512 value = _mm512_add_ps(_mm512_mul_ps(load_bf16(x + i), _mm512_loadu_ps(cos + i)),
                                           _mm512_mul_ps(load_bf16(x + other), _mm512_loadu_ps(sin + i)));
        if (h < heads)
          _mm512_storeu_ps(a->q + ((int64_t)r * heads + h) * dim + i, _mm512_mul_ps(value, scale));
        else
          store_bf16(slot + (int64_t)(h - heads) * a->block_size * dim + i, value);
      }
    }
    for (int h = 0; h < kv_heads; h++) {
      const uint16_t* v = row + (int64_t)(heads + kv_heads + h) * dim;
      uint16_t* to = slot + a->value_offset + (int64_t)h * a->block_size * dim;
      for (int i = 0; i < dim; i += 16) _mm256_storeu_si256((__m256i*)(to + i), _mm256_loadu_si256((const __m256i*)(v + i)));
    }
  }
  return TANDEM_OK;
}

extern "C" int tandem_has_avx512_bf16() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16");
}

extern "C" const char* tandem_build() { return TANDEM_SOURCES " " __VERSION__; }
