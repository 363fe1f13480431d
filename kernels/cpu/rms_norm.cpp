// RMSNorm (Zhang & Sennrich 2019) of rows in fp32, rounded once.
#include "abi.h"
#include "simd.h"

namespace tandem {

void rms_norm(const tandem_rms_norm& a, const tandem_step& step, Share share) {
  int64_t first, last;
  share.split(a.logit_rows ? step.num_logits : step.rows, &first, &last);
  for (int64_t r = first; r < last; r++) {
    const float* row = a.x + r * a.stride;
    vf squares = {};
    for (int64_t i = 0; i < a.stride; i += kLanes) squares = fma(load(row + i), load(row + i), squares);
    const vf factor = splat(1.0f / std::sqrt(sum(squares) / (float)a.width + a.eps));
    for (int64_t i = 0; i < a.stride; i += kLanes) {
      const vf value = load(row + i) * factor * load(a.weight + i);
      if (a.out_dtype == TANDEM_BF16)
        store_bf16((uint16_t*)a.out + r * a.stride + i, value);
      else
        store((float*)a.out + r * a.stride + i, value);
    }
  }
}

}  // namespace tandem
