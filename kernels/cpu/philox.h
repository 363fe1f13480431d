// The noise words of kernels/noise.py: Philox4x64-10 with key (seed, sample index), counter (token id / 4 + 1, 0, position, 0).
#pragma once
#include "math64.h"

namespace tandem {

constexpr uint64_t kPhiloxM0 = 0xD2E7470EE14C6C93u, kPhiloxM1 = 0xCA5A826395121157u;
constexpr uint64_t kPhiloxW0 = 0x9E3779B97F4A7C15u, kPhiloxW1 = 0xBB67AE8584CAA73Bu;
constexpr int kPhiloxRounds = 10;
constexpr int kPhiloxBatch = 256;  // tokens

struct Philox {
  uint64_t seed, sample_index, position;

  void block(uint64_t counter, uint64_t out[4]) const {
    uint64_t c0 = counter, c1 = 0, c2 = position, c3 = 0, k0 = seed, k1 = sample_index;
    for (int round = 0; round < kPhiloxRounds; round++) {
      const unsigned __int128 left = (unsigned __int128)kPhiloxM0 * c0, right = (unsigned __int128)kPhiloxM1 * c2;
      c0 = (uint64_t)(right >> 64) ^ c1 ^ k0;
      c1 = (uint64_t)right;
      c2 = (uint64_t)(left >> 64) ^ c3 ^ k1;
      c3 = (uint64_t)left;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
  }

  // The word of one token.
  uint64_t word(int64_t token_id) const {
    uint64_t words[4];
    block((uint64_t)token_id / 4 + 1, words);
    return words[token_id % 4];
  }

  // The upper halves of the words of kPhiloxBatch tokens from `first` on, a multiple of 4.
  void upper_halves(int64_t first, uint32_t* out) const;
};

#if TANDEM_AVX512

typedef __m512i vq;
TANDEM_INLINE vq splat_q(uint64_t x) { return _mm512_set1_epi64((long long)x); }
TANDEM_INLINE vq upper(vq a) { return _mm512_srli_epi64(a, 32); }
// The lower 32 bits of `low`, the upper ones of `high`.
TANDEM_INLINE vq halves(vq low, vq high) { return _mm512_mask_blend_epi32(0xaaaa, low, high); }
TANDEM_INLINE vq xor3(vq a, vq b, vq c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

// x * m in 128 bits, from four products of halves.
TANDEM_INLINE void mul_wide(vq x, uint64_t m, vq* high, vq* low) {
  const vq m_low = splat_q(m & 0xffffffffu), m_high = splat_q(m >> 32), x_high = upper(x);
  const vq bottom = _mm512_mul_epu32(x, m_low);
  const vq one = _mm512_add_epi64(_mm512_mul_epu32(x_high, m_low), upper(bottom));
  const vq two = _mm512_add_epi64(_mm512_mul_epu32(x, m_high), halves(one, splat_q(0)));
  *high = _mm512_add_epi64(_mm512_mul_epu32(x_high, m_high), _mm512_add_epi64(upper(one), upper(two)));
  *low = halves(bottom, _mm512_slli_epi64(two, 32));
}

inline void Philox::upper_halves(int64_t first, uint32_t* out) const {
  constexpr int kStreams = 4;  // side by side, to hide the multiplications' latency
  // The first two rounds are the same for all counters but for two of their products.
  const unsigned __int128 right = (unsigned __int128)kPhiloxM1 * position;
  const unsigned __int128 left = (unsigned __int128)kPhiloxM0 * ((uint64_t)(right >> 64) ^ seed);
  const vq second0 = splat_q((uint64_t)right ^ (seed + kPhiloxW0));
  const vq second2 = splat_q((uint64_t)(left >> 64) ^ (sample_index + kPhiloxW1));
  vq counter = _mm512_add_epi64(splat_q((uint64_t)first / 4), _mm512_set_epi64(8, 7, 6, 5, 4, 3, 2, 1));
  for (int i = 0; i < kPhiloxBatch; i += 32 * kStreams) {
    vq c0[kStreams], c1[kStreams], c2[kStreams], c3[kStreams];
    for (int s = 0; s < kStreams; s++) {
      vq high, low;
      mul_wide(counter, kPhiloxM0, &high, &low);
      mul_wide(_mm512_xor_si512(high, splat_q(sample_index)), kPhiloxM1, &c0[s], &c1[s]);
      c0[s] = _mm512_xor_si512(c0[s], second0);
      c2[s] = _mm512_xor_si512(low, second2);
      c3[s] = splat_q((uint64_t)left);
      counter = _mm512_add_epi64(counter, splat_q(8));
    }
    uint64_t k0 = seed + kPhiloxW0, k1 = sample_index + kPhiloxW1;
    for (int round = 2; round < kPhiloxRounds; round++) {
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
      for (int s = 0; s < kStreams; s++) {
        vq left_high, left_low, right_high, right_low;
        mul_wide(c0[s], kPhiloxM0, &left_high, &left_low);
        mul_wide(c2[s], kPhiloxM1, &right_high, &right_low);
        c0[s] = xor3(right_high, c1[s], splat_q(k0));
        c1[s] = right_low;
        c2[s] = xor3(left_high, c3[s], splat_q(k1));
        c3[s] = left_low;
      }
    }
    for (int s = 0; s < kStreams; s++) {
      const vq front = halves(upper(c0[s]), c1[s]), back = halves(upper(c2[s]), c3[s]);
      const vq one = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), two = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
      _mm512_storeu_si512(out + i + 32 * s, _mm512_permutex2var_epi64(front, one, back));
      _mm512_storeu_si512(out + i + 32 * s + 16, _mm512_permutex2var_epi64(front, two, back));
    }
  }
}

#else

inline void Philox::upper_halves(int64_t first, uint32_t* out) const {
  for (int i = 0; i < kPhiloxBatch; i += 4) {
    uint64_t words[4];
    block((uint64_t)(first + i) / 4 + 1, words);
    for (int j = 0; j < 4; j++) out[i + j] = (uint32_t)(words[j] >> 32);
  }
}

#endif

}  // namespace tandem
