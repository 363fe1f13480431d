// Rows to signed bytes: one scale a group of 32, the greatest magnitude becomes 127. A group is computed by itself. The scale of a
// group with an infinity or a NaN is NaN, so that what is wrong stays visible.
#include <cmath>

#include "abi.h"
#include "simd.h"

namespace tandem {

void quantize(const tandem_quantize& a, const tandem_step& step, Share share) {
  constexpr int64_t kGroup = 32;
  int64_t first, last;
  const int64_t groups = a.stride / kGroup;
  share.split((a.logit_rows ? step.num_logits : step.rows) * groups, &first, &last);
  for (int64_t g = first; g < last; g++) {
    const float* x = a.x + g * kGroup;
    vf best = {}, wrong = {};
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      best = max(max(load(x + i), -load(x + i)), best);
      wrong += load(x + i) - load(x + i);  // 0 of what is finite
    }
    const float most = largest(best);
    const bool finite = sum(wrong) == 0;
    const vf factor = splat(finite && most > 1e-30f ? 127.0f / most : 0.0f);
    int8_t* q = a.q + g * kGroup;
    vi total = {};
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
      const vi rounded = (vi)(load(x + i) * factor + splat(12582912.0f)) - splat_i(0x4b400000);
      total += rounded;
      store_bytes(q + i, rounded);
    }
    a.scales[g] = finite ? most / 127.0f : NAN;
    a.sums[g] = int_sum(total);
  }
}

}  // namespace tandem
