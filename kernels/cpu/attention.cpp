// Paged causal attention for bf16 KV: one pass over the KV in tiles of 64 positions from position 0, online softmax.
//
// Every row's arithmetic is the same whatever other rows are computed with it and however many there are:
//   scores   s[t] = sum over pairs of dimensions i = 0, 1, … of dpbf16(s[t], q pair i, k[t] pair i), in this order
//   softmax  per tile: m' = max(m, s), p = exp(s - m'), l and the value are scaled by exp(m - m')
//   values   value += p[t] * v[t], t in order, one fused multiply-add each
// A masked position has p = 0, which changes no bit of l or value; exp(0) is exactly 1, so a tile that only others see is an
// exact no-op. Memory that no token has written is never multiplied.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.h"
#include "vector.h"

namespace {

constexpr int kTile = 64;      // positions
constexpr int kGroups = kTile / 16;
constexpr int kRowTile = 6;    // query rows in registers: 6 * 4 accumulators + 4 operands of 32 registers

// 16 rows of 16 dwords, in place.
TARGET inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

template <int D>
struct Tile {
  alignas(64) uint32_t keys[D / 2][kTile];  // pairs of dimensions, transposed: keys[i][t]
  alignas(64) float values[kTile][D];
};

// Brings 64 positions of one KV head into the core's cache; positions from `valid` on are zero.
template <int D>
TARGET void load_tile(const uint16_t* const* rows_k, const uint16_t* const* rows_v, int valid, Tile<D>& tile) {
  for (int group = 0; group < kGroups; group++) {
    for (int part = 0; part < D / 32; part++) {
      __m512i r[16];
      for (int i = 0; i < 16; i++) {
        const int t = group * 16 + i;
        r[i] = t < valid ? _mm512_loadu_si512(rows_k[t] + part * 32) : _mm512_setzero_si512();
      }
      transpose16(r);
      for (int i = 0; i < 16; i++) _mm512_store_si512(&tile.keys[part * 16 + i][group * 16], r[i]);
    }
  }
  for (int t = 0; t < kTile; t++) {
    for (int part = 0; part < D / 16; part++) {
      __m512i v = _mm512_setzero_si512();
      if (t < valid) v = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(rows_v[t] + part * 16))), 16);
      _mm512_store_ps(&tile.values[t][part * 16], _mm512_castsi512_ps(v));
    }
  }
}

template <int D>
struct Row {  // one query row of one head, with its running softmax
  alignas(64) uint32_t q[D / 2];
  alignas(64) float value[D];
  alignas(64) float total[16];
  float peak;
  int position;
};

// R rows meet one tile whose first position is `low`.
template <int D, int R>
TARGET void meet(Row<D>* rows, const Tile<D>& tile, int low) {
  alignas(64) float p[R][kTile];
  __m512 s[R][kGroups];
  for (int r = 0; r < R; r++)
    for (int g = 0; g < kGroups; g++) s[r][g] = _mm512_setzero_ps();
  for (int i = 0; i < D / 2; i++) {
    __m512bh k[kGroups];
    for (int g = 0; g < kGroups; g++) k[g] = (__m512bh)_mm512_load_si512(&tile.keys[i][g * 16]);
    for (int r = 0; r < R; r++) {
      const __m512bh q = (__m512bh)_mm512_set1_epi32((int)rows[r].q[i]);
      for (int g = 0; g < kGroups; g++) s[r][g] = _mm512_dpbf16_ps(s[r][g], q, k[g]);
    }
  }
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 minus_inf = _mm512_set1_ps(-INFINITY);
  for (int r = 0; r < R; r++) {
    Row<D>& row = rows[r];
    __m512 best = minus_inf;
    for (int g = 0; g < kGroups; g++) {
      const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(low + g * 16));
      const __mmask16 seen = _mm512_cmple_epi32_mask(at, _mm512_set1_epi32(row.position));
      s[r][g] = _mm512_mask_mov_ps(minus_inf, seen, s[r][g]);
      best = _mm512_max_ps(best, s[r][g]);
    }
    const float peak = std::fmax(row.peak, _mm512_reduce_max_ps(best));
    const __m512 top = _mm512_set1_ps(peak);
    // The first tile has nothing to scale: exp(-inf) of the exp above would not be 0.
    const __m512 keep = row.peak == -INFINITY ? _mm512_setzero_ps() : exp_ps(_mm512_sub_ps(_mm512_set1_ps(row.peak), top));
    __m512 total = _mm512_mul_ps(_mm512_load_ps(row.total), keep);
    for (int g = 0; g < kGroups; g++) {
      const __mmask16 seen = _mm512_cmp_ps_mask(s[r][g], minus_inf, _CMP_NEQ_UQ);
      const __m512 e = _mm512_maskz_mov_ps(seen, exp_ps(_mm512_sub_ps(s[r][g], top)));
      _mm512_store_ps(&p[r][g * 16], e);
      total = _mm512_add_ps(total, e);
    }
    _mm512_store_ps(row.total, total);
    row.peak = peak;
    for (int d = 0; d < D; d += 16)
      _mm512_store_ps(&row.value[d], _mm512_mul_ps(_mm512_load_ps(&row.value[d]), keep));
  }
  for (int d = 0; d < D; d += 64) {
    constexpr int kParts = D < 64 ? D / 16 : 4;
    __m512 value[R][kParts];
    for (int r = 0; r < R; r++)
      for (int part = 0; part < kParts; part++) value[r][part] = _mm512_load_ps(&rows[r].value[d + part * 16]);
    for (int t = 0; t < kTile; t++) {
      __m512 v[kParts];
      for (int part = 0; part < kParts; part++) v[part] = _mm512_load_ps(&tile.values[t][d + part * 16]);
      for (int r = 0; r < R; r++) {
        const __m512 weight = _mm512_set1_ps(p[r][t]);
        for (int part = 0; part < kParts; part++) value[r][part] = _mm512_fmadd_ps(weight, v[part], value[r][part]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int part = 0; part < kParts; part++) _mm512_store_ps(&rows[r].value[d + part * 16], value[r][part]);
  }
}

template <int D>
TARGET void meet_some(Row<D>* rows, int count, const Tile<D>& tile, int low) {
  while (count >= kRowTile) {
    meet<D, kRowTile>(rows, tile, low);
    rows += kRowTile;
    count -= kRowTile;
  }
  switch (count) {
    case 5: meet<D, 5>(rows, tile, low); break;
    case 4: meet<D, 4>(rows, tile, low); break;
    case 3: meet<D, 3>(rows, tile, low); break;
    case 2: meet<D, 2>(rows, tile, low); break;
    case 1: meet<D, 1>(rows, tile, low); break;
    default: break;
  }
}

// Where the K and V of up to 64 positions from `low` on lie, and a hint to fetch them. Returns how many there are.
template <int D>
TARGET int find_rows(const tandem_attention& a, const tandem_span& span, int head, int low, int end,
                     const uint16_t** rows_k, const uint16_t** rows_v) {
  const int valid = end - low < kTile ? end - low : kTile;
  for (int t = 0; t < valid; t++) {
    const int position = low + t;
    const int64_t block = span.block_table[position / a.block_size];
    const uint16_t* base =
        a.arena + block * a.block_stride + a.layer_offset + ((int64_t)head * a.block_size + position % a.block_size) * D;
    rows_k[t] = base;
    rows_v[t] = base + a.value_offset;
    for (int d = 0; d < D; d += 32) {
      _mm_prefetch((const char*)(rows_k[t] + d), _MM_HINT_T0);
      _mm_prefetch((const char*)(rows_v[t] + d), _MM_HINT_T0);
    }
  }
  return valid;
}

// One span: `rows` tokens of one sequence, one KV head at a time.
template <int D>
TARGET void attend_span(const tandem_attention& a, const tandem_span& span, Row<D>* rows) {
  const int group = a.num_heads / a.num_kv_heads;
  const int count = span.rows * group;
  const int end = span.start + span.rows;
  const uint16_t* rows_k[2][kTile];
  const uint16_t* rows_v[2][kTile];
  static thread_local Tile<D> tile;
  for (int head = 0; head < a.num_kv_heads; head++) {
    for (int r = 0; r < count; r++) {
      Row<D>& row = rows[r];
      const int token = r / group;
      const int query_head = head * group + r % group;
      const float* q = a.q + ((int64_t)(span.first_row + token) * a.num_heads + query_head) * D;
      uint16_t half[D];
      for (int d = 0; d < D; d++) half[d] = to_bf16(q[d]);
      std::memcpy(row.q, half, sizeof half);
      std::memset(row.value, 0, sizeof row.value);
      std::memset(row.total, 0, sizeof row.total);
      row.peak = -INFINITY;
      row.position = span.start + token;
    }
    int valid = find_rows<D>(a, span, head, 0, end, rows_k[0], rows_v[0]);
    for (int low = 0, turn = 0; low < end; low += kTile, turn ^= 1) {
      const int next = find_rows<D>(a, span, head, low + kTile, end, rows_k[turn ^ 1], rows_v[turn ^ 1]);
      load_tile<D>(rows_k[turn], rows_v[turn], valid, tile);
      valid = next;
      const int first = low > span.start ? (low - span.start) * group : 0;
      meet_some<D>(rows + first, count - first, tile, low);
    }
    for (int r = 0; r < count; r++) {
      const Row<D>& row = rows[r];
      const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_load_ps(row.total)));
      uint16_t* out = a.out + ((int64_t)(span.first_row + r / group) * a.num_heads + head * group + r % group) * D;
      for (int d = 0; d < D; d += 16) {
        const __m512 value = _mm512_mul_ps(_mm512_load_ps(&row.value[d]), inverse);
        _mm256_storeu_si256((__m256i*)(out + d), (__m256i)_mm512_cvtneps_pbh(value));
      }
    }
  }
}

template <int D>
int run(const tandem_attention& a) {
  int most = 0;
  for (int i = 0; i < a.num_spans; i++) most = a.spans[i].rows > most ? a.spans[i].rows : most;
  Row<D>* rows = (Row<D>*)a.workspace;
  if ((int64_t)most * (a.num_heads / a.num_kv_heads) * (int64_t)sizeof(Row<D>) > a.workspace_bytes) return TANDEM_WORKSPACE;
  for (int i = 0; i < a.num_spans; i++) attend_span<D>(a, a.spans[i], rows);
  return TANDEM_OK;
}

}  // namespace

extern "C" int tandem_attention_avx512(const tandem_attention* a) {
  switch (a->head_dim) {
    case 32: return run<32>(*a);
    case 64: return run<64>(*a);
    case 128: return run<128>(*a);
    case 256: return run<256>(*a);
    default: return TANDEM_UNSUPPORTED;
  }
}
