// Token embeddings out of the packed matrix that the output head multiplies with: one copy in memory serves both.
#include "abi.h"
#include "simd.h"

namespace tandem {
namespace {

constexpr int64_t kPanel = 32, kGroup = 32;

float half_at(const uint16_t* p) {
  uint16_t some[kLanes] = {*p};
  return load_half(some)[0];
}

void read_row(const tandem_matrix& m, int64_t row, float* out) {
  const int64_t column = row % kPanel, in = m.in_features;
  const char* panels = (const char*)m.panels;
  switch (m.format) {
    case TANDEM_W_F32: {
      const float* w = (const float*)panels + row / kPanel * in * kPanel + column;
      for (int64_t k = 0; k < in; k++) out[k] = w[k * kPanel];
      break;
    }
    case TANDEM_W_BF16: {
      const uint32_t* w = (const uint32_t*)panels + row / kPanel * in / 2 * kPanel + column;
      for (int64_t k = 0; k < in; k += 2) {
        const uint32_t pair = w[k / 2 * kPanel];
        out[k] = from_bf16((uint16_t)pair);
        out[k + 1] = from_bf16((uint16_t)(pair >> 16));
      }
      break;
    }
    case TANDEM_W_INT8: {
      const char* group = panels + row / kPanel * (in / kGroup) * (kPanel * 2 + kPanel * kGroup);
      for (int64_t g = 0; g < in / kGroup; g++, group += kPanel * 2 + kPanel * kGroup) {
        const float scale = half_at((const uint16_t*)group + column);
        const uint8_t* w = (const uint8_t*)(group + kPanel * 2) + column * 4;
        for (int64_t k = 0; k < kGroup; k++) out[g * kGroup + k] = scale * (float)(w[k / 4 * kPanel * 4 + k % 4] - 128);
      }
      break;
    }
    default: {
      const char* group = panels + row / kPanel * (in / kGroup) * (kPanel * 4 + kPanel * kGroup / 2);
      for (int64_t g = 0; g < in / kGroup; g++, group += kPanel * 4 + kPanel * kGroup / 2) {
        const float scale = half_at((const uint16_t*)group + column);
        const float minimum = half_at((const uint16_t*)group + kPanel + column);
        const uint8_t* w = (const uint8_t*)(group + kPanel * 4) + column * 4;
        for (int64_t k = 0; k < kGroup; k++) {
          const uint8_t both = w[k / 8 * kPanel * 4 + k % 4];
          out[g * kGroup + k] = scale * (float)(k % 8 < 4 ? both & 15 : both >> 4) + minimum;
        }
      }
    }
  }
}

}  // namespace

void embed(const tandem_embed& a, const tandem_step& step, Share share) {
  int64_t first, last;
  share.split(step.rows, &first, &last);
  for (int64_t r = first; r < last; r++) read_row(*a.table, step.token_ids[r], a.x + r * a.stride);
}

}  // namespace tandem
