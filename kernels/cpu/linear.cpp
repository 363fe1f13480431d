// Matrix products with packed weights. Every output is one sum over the inputs in their order, whatever rows come with it and
// however the work is cut: no bit depends on the batch.
//
// A panel holds 32 outputs as one contiguous stream. f32: [in][32]. bf16: [in / 2][32] pairs. int8 and int4: for each group of 32
// inputs its scales (and minima) as halves [32], then dwords of four inputs, unsigned: [8][32] of w + 128, or [4][32] of eight
// nibbles. The activations of a group are signed bytes with one scale: the sum of a group is an exact integer, and
//   int8  out += scale_x * scale_w * (sum(w * x) - 128 * sum(x))
//   int4  out += scale_x * (scale_w * sum(w * x) + minimum_w * sum(x))
// group after group.
#include "abi.h"
#include "simd.h"

namespace tandem {
namespace {

constexpr int kPanel = 32;
constexpr int kGroup = 32;
#if TANDEM_AVX512
constexpr int kRows = 12;                      // rows of a tile: 24 of 32 registers are sums
constexpr int kRowsInt = 6;
#else
constexpr int kRows = 4;
constexpr int kRowsInt = 2;
#endif
// Vectors of outputs in one tile: low tiles are wide, so that enough sums are under way to hide what one takes.
constexpr int vecs(int rows) { return rows <= 2 && kLanes < 16 ? 4 : 2; }
// How far ahead of a tile of so many rows its weights are asked for, in bytes. One row reads them as fast as memory gives them anyway.
constexpr int ahead(int rows) { return rows == 1 ? 0 : 8192; }
constexpr int64_t kTogetherBytes = 384 * 1024;  // panels that stay in a core's second cache while the rows pass by

// kVecs vectors of weights; asks for those that come kBytes later.
template <int kBytes, int kVecs>
TANDEM_INLINE void fetch(const uint32_t* w, vu (&weight)[kVecs]) {
  for (int v = 0; v < kVecs; v++) {
    if (kBytes) __builtin_prefetch((const char*)(w + v * kLanes) + kBytes);
    weight[v] = load_u(w + v * kLanes);
  }
}

struct Rows {  // the activations of a tile
  const void* x;
  const float* scales;
  const int32_t* sums;
  int64_t stride;  // elements
};

template <int F, int R>
struct Tile;

template <int R>
struct Tile<TANDEM_W_F32, R> {
  TANDEM_INLINE void run(const tandem_matrix& m, const char* panel, int column, const Rows& rows, float (*out)[kPanel]) {
    constexpr int kVecs = vecs(R);
    vf sums[R][kVecs] = {};
    const float* x = (const float*)rows.x;
    const float* w = (const float*)panel + column;
    for (int64_t k = 0; k < m.in_features; k++, w += kPanel) {
      vu weight[kVecs];
      fetch<ahead(R)>((const uint32_t*)w, weight);
      for (int r = 0; r < R; r++) {
        const vf value = splat(x[r * rows.stride + k]);
        for (int v = 0; v < kVecs; v++) sums[r][v] = fma((vf)weight[v], value, sums[r][v]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < kVecs; v++) store(&out[r][column + v * kLanes], sums[r][v]);
  }
};

template <int R>
struct Tile<TANDEM_W_BF16, R> {
  TANDEM_INLINE void run(const tandem_matrix& m, const char* panel, int column, const Rows& rows, float (*out)[kPanel]) {
    constexpr int kVecs = vecs(R);
    vf sums[R][kVecs] = {};
    const uint16_t* x = (const uint16_t*)rows.x;
    const uint32_t* w = (const uint32_t*)panel + column;
    for (int64_t k = 0; k < m.in_features; k += 2, w += kPanel) {
      vu weight[kVecs];
      fetch<ahead(R)>(w, weight);
      for (int r = 0; r < R; r++) {
        const vu value = splat_u(dword(x + r * rows.stride + k));
        for (int v = 0; v < kVecs; v++) sums[r][v] = dot2(sums[r][v], weight[v], value);
      }
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < kVecs; v++) store(&out[r][column + v * kLanes], sums[r][v]);
  }
};

template <int R>
struct Tile<TANDEM_W_INT8, R> {
  TANDEM_INLINE void run(const tandem_matrix& m, const char* panel, int column, const Rows& rows, float (*out)[kPanel]) {
    constexpr int kVecs = vecs(R);
    vf sums[R][kVecs] = {};
    const int8_t* x = (const int8_t*)rows.x;
    const int64_t groups = rows.stride / kGroup;
    for (int64_t g = 0; g < m.in_features / kGroup; g++, panel += kPanel * 2 + kPanel * kGroup) {
      const uint16_t* scales = (const uint16_t*)panel + column;
      const uint32_t* w = (const uint32_t*)(panel + kPanel * 2) + column;
      vi exact[R][kVecs];
      for (int r = 0; r < R; r++) {
        const vi start = splat_i(-128 * rows.sums[r * groups + g]);
        for (int v = 0; v < kVecs; v++) exact[r][v] = start;
      }
      for (int i = 0; i < kGroup / 4; i++) {
        vu weight[kVecs];
        fetch<ahead(R)>(w + i * kPanel, weight);
        for (int r = 0; r < R; r++) {
          const vu value = splat_u(dword(x + r * rows.stride + g * kGroup + i * 4));
          for (int v = 0; v < kVecs; v++) exact[r][v] = dot4(exact[r][v], weight[v], value);
        }
      }
      for (int v = 0; v < kVecs; v++) {
        const vf scale = load_half(scales + v * kLanes);
        for (int r = 0; r < R; r++)
          sums[r][v] = fma(to_float(exact[r][v]), scale * splat(rows.scales[r * groups + g]), sums[r][v]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < kVecs; v++) store(&out[r][column + v * kLanes], sums[r][v]);
  }
};

template <int R>
struct Tile<TANDEM_W_INT4, R> {
  TANDEM_INLINE void run(const tandem_matrix& m, const char* panel, int column, const Rows& rows, float (*out)[kPanel]) {
    constexpr int kVecs = vecs(R);
    vf sums[R][kVecs] = {};
    const int8_t* x = (const int8_t*)rows.x;
    const int64_t groups = rows.stride / kGroup;
    const vu nibbles = splat_u(0x0f0f0f0f);
    for (int64_t g = 0; g < m.in_features / kGroup; g++, panel += kPanel * 4 + kPanel * kGroup / 2) {
      const uint16_t* scales = (const uint16_t*)panel + column;
      const uint16_t* minima = scales + kPanel;
      const uint32_t* w = (const uint32_t*)(panel + kPanel * 4) + column;
      vi exact[R][kVecs] = {};
      for (int i = 0; i < kGroup / 8; i++) {
        vu both[kVecs], low[kVecs], high[kVecs];
        fetch<ahead(R)>(w + i * kPanel, both);
        for (int v = 0; v < kVecs; v++) {
          low[v] = both[v] & nibbles;
          high[v] = (both[v] >> 4) & nibbles;
        }
        for (int r = 0; r < R; r++) {
          const int8_t* values = x + r * rows.stride + g * kGroup + i * 8;
          const vu first = splat_u(dword(values)), second = splat_u(dword(values + 4));
          for (int v = 0; v < kVecs; v++) exact[r][v] = dot4(dot4(exact[r][v], low[v], first), high[v], second);
        }
      }
      for (int v = 0; v < kVecs; v++) {
        const vf scale = load_half(scales + v * kLanes), minimum = load_half(minima + v * kLanes);
        for (int r = 0; r < R; r++) {
          const float by = rows.scales[r * groups + g];
          sums[r][v] = fma(to_float(exact[r][v]), scale * splat(by), sums[r][v]);
          sums[r][v] = fma(minimum, splat(by * (float)rows.sums[r * groups + g]), sums[r][v]);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < kVecs; v++) store(&out[r][column + v * kLanes], sums[r][v]);
  }
};

constexpr int64_t panel_bytes(int format, int64_t in_features) {
  switch (format) {
    case TANDEM_W_F32: return in_features * kPanel * 4;
    case TANDEM_W_BF16: return in_features * kPanel * 2;
    case TANDEM_W_INT8: return in_features / kGroup * (kPanel * 2 + kPanel * kGroup);
    default: return in_features / kGroup * (kPanel * 4 + kPanel * kGroup / 2);
  }
}

constexpr int64_t value_bytes(int format) { return format == TANDEM_W_F32 ? 4 : format == TANDEM_W_BF16 ? 2 : 1; }

// out = silu(gate) * up of the panel's halves.
TANDEM_INLINE vf silu_mul(vf gate, vf up) {
  const vf e = exp_neg(max(gate, -gate) * splat(-1.0f));
  // 1 / (1 + exp(-g)), from the side that can't overflow
  const vf top = gate < vf{} ? e : splat(1.0f);
  return gate * (top / (splat(1.0f) + e)) * up;
}

TANDEM_INLINE void put(void* out, int32_t dtype, int64_t at, vf value) {
  if (dtype == TANDEM_BF16)
    store_bf16((uint16_t*)out + at, value);
  else
    store((float*)out + at, value);
}

void finish(const tandem_linear& a, void* out, int64_t panel, int64_t row, int rows, float (*sums)[kPanel]) {
  const tandem_matrix& m = *a.matrix;
  for (int r = 0; r < rows; r++) {
    const int64_t line = (row + r) * a.out_stride;
    if (m.bias)
      for (int c = 0; c < kPanel; c += kLanes) store(&sums[r][c], load(&sums[r][c]) + load(m.bias + panel * kPanel + c));
    if (a.epilogue == TANDEM_SILU_MUL) {
      const int64_t at = line + panel * (kPanel / 2);
      for (int c = 0; c < kPanel / 2; c += kLanes)
        put(out, a.out_dtype, at + c, silu_mul(load(&sums[r][c]), load(&sums[r][kPanel / 2 + c])));
    } else if (a.epilogue == TANDEM_ADD) {
      float* x = (float*)out + line + panel * kPanel;
      for (int c = 0; c < kPanel; c += kLanes) store(x + c, load(x + c) + load(&sums[r][c]));
    } else if ((panel + 1) * kPanel <= a.width) {
      for (int c = 0; c < kPanel; c += kLanes) put(out, a.out_dtype, line + panel * kPanel + c, load(&sums[r][c]));
    } else {
      for (int64_t c = 0; panel * kPanel + c < a.width; c++) {
        const int64_t at = line + panel * kPanel + c;
        if (a.out_dtype == TANDEM_F32) ((float*)out)[at] = sums[r][c];
      }
    }
  }
}

template <int F, int R>
void tile(const tandem_linear& a, void* out, const char* panel, int64_t index, int64_t row) {
  const int64_t groups = a.x_stride / kGroup;
  const Rows rows = {(const char*)a.x + row * a.x_stride * value_bytes(F), a.scales ? a.scales + row * groups : nullptr,
                     a.sums ? a.sums + row * groups : nullptr, a.x_stride};
  alignas(64) float sums[R][kPanel];
  for (int column = 0; column < kPanel; column += vecs(R) * kLanes) Tile<F, R>::run(*a.matrix, panel, column, rows, sums);
  finish(a, out, index, row, R, sums);
}

template <int F, int R>
struct Pick {
  static void run(int rows, const tandem_linear& a, void* out, const char* panel, int64_t index, int64_t row) {
    if (rows == R)
      tile<F, R>(a, out, panel, index, row);
    else
      Pick<F, R - 1>::run(rows, a, out, panel, index, row);
  }
};
template <int F>
struct Pick<F, 0> {
  static void run(int, const tandem_linear&, void*, const char*, int64_t, int64_t) {}
};

template <int F>
void product(const tandem_linear& a, void* out, int64_t rows, Share share) {
  constexpr int kMost = F == TANDEM_W_INT8 || F == TANDEM_W_INT4 ? kRowsInt : kRows;
  const tandem_matrix& m = *a.matrix;
  const int64_t bytes = panel_bytes(F, m.in_features);
  int64_t together = kTogetherBytes / bytes;
  together = together < 1 ? 1 : together;
  int64_t first, last;
  share.split(m.num_panels, &first, &last);
  // Tiles of nearly the same height: a low last one would use few registers.
  const int64_t tiles = (rows + kMost - 1) / kMost;
  for (int64_t begin = first; begin < last; begin += together) {
    const int64_t end = begin + together < last ? begin + together : last;
    for (int64_t i = 0; i < tiles; i++) {
      const int64_t from = rows * i / tiles, to = rows * (i + 1) / tiles;
      for (int64_t panel = begin; panel < end; panel++)
        Pick<F, kMost>::run((int)(to - from), a, out, (const char*)m.panels + panel * bytes, panel, from);
    }
  }
}

}  // namespace

void linear(const tandem_linear& a, const tandem_step& step, Share share) {
  const int64_t rows = a.logit_rows ? step.num_logits : step.rows;
  void* out = a.out ? a.out : step.logits;
  switch (a.matrix->format) {
    case TANDEM_W_F32: product<TANDEM_W_F32>(a, out, rows, share); break;
    case TANDEM_W_BF16: product<TANDEM_W_BF16>(a, out, rows, share); break;
    case TANDEM_W_INT8: product<TANDEM_W_INT8>(a, out, rows, share); break;
    default: product<TANDEM_W_INT4>(a, out, rows, share); break;
  }
}

}  // namespace tandem
