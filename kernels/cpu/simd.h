// One vocabulary of vectors for every instruction set that this file is compiled for: AVX-512 with BF16 and VNNI, AVX2 with FMA,
// and what the compiler makes of plain vectors. Every function works lane by lane; nothing depends on how many rows there are.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define TANDEM_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define TANDEM_AVX2 1
#include <immintrin.h>
#endif

namespace tandem {

#if TANDEM_AVX512
constexpr int kLanes = 16;
#elif TANDEM_AVX2
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

#define TANDEM_INLINE static inline __attribute__((always_inline))
#define TANDEM_INLINE_MEMBER inline __attribute__((always_inline))

TANDEM_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
TANDEM_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
TANDEM_INLINE vu load_u(const void* p) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
TANDEM_INLINE void store_u(void* p, vu v) { std::memcpy(p, &v, sizeof v); }
TANDEM_INLINE uint32_t dword(const void* p) {
  uint32_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
TANDEM_INLINE vf splat(float x) { return x - vf{}; }
TANDEM_INLINE vu splat_u(uint32_t x) { return x - vu{}; }
TANDEM_INLINE vi splat_i(int32_t x) { return x - vi{}; }
TANDEM_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
TANDEM_INLINE vi lanes() {
  vi v;
  for (int i = 0; i < kLanes; i++) v[i] = i;
  return v;
}

// a * b + c, rounded once where the processor can.
TANDEM_INLINE vf fma(vf a, vf b, vf c) {
#if TANDEM_AVX512
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif TANDEM_AVX2
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The greater one of each lane; of NaN and a number the number b.
TANDEM_INLINE vf max(vf a, vf b) {
#if TANDEM_AVX512
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif TANDEM_AVX2
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// bf16

TANDEM_INLINE vf load_bf16(const uint16_t* p) {
#if TANDEM_AVX512
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif TANDEM_AVX2
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
// Pairs of bf16, the first in the low half: out[i] of one[i] and two[i], for 2 * kLanes of them.
TANDEM_INLINE void pair_bf16(const uint16_t* one, const uint16_t* two, uint32_t* out) {
#if TANDEM_AVX512
  const __m512i a = _mm512_loadu_si512(one), b = _mm512_loadu_si512(two);
  const __m512i step = _mm512_set1_epi32(0x00010001), first = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, first, b));
  _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(a, _mm512_add_epi16(first, _mm512_slli_epi16(step, 4)), b));
#elif TANDEM_AVX2
  for (int i = 0; i < 16; i += 8) {
    const __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(one + i)));
    const __m256i b = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(two + i)));
    _mm256_storeu_si256((__m256i*)(out + i), _mm256_or_si256(a, _mm256_slli_epi32(b, 16)));
  }
#else
  for (int i = 0; i < 2 * kLanes; i++) out[i] = (uint32_t)one[i] | (uint32_t)two[i] << 16;
#endif
}
TANDEM_INLINE float from_bf16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
// Rounded to nearest even; NaN stays NaN.
TANDEM_INLINE void store_bf16(uint16_t* p, vf x) {
#if TANDEM_AVX512
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu result = x == x ? rounded : (bits >> 16) | 0x40;
  const vh h = __builtin_convertvector(result, vh);
  std::memcpy(p, &h, sizeof h);
#endif
}

// acc + w.low * x.low + w.high * x.high, the pairs of bf16 in a lane's dword. AVX-512 BF16 rounds as VDPBF16PS does.
TANDEM_INLINE vf dot2(vf acc, vu w, vu x) {
#if TANDEM_AVX512
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#else
  acc = fma((vf)(w << 16), (vf)(x << 16), acc);
  return fma((vf)(w & 0xffff0000u), (vf)(x & 0xffff0000u), acc);
#endif
}

// Integers

// acc + the sum of the products of a lane's four unsigned bytes of w with its four signed bytes of x. Exact.
TANDEM_INLINE vi dot4(vi acc, vu w, vu x) {
#if TANDEM_AVX512
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif TANDEM_AVX2
  // Not vpmaddubsw, which saturates: even and odd bytes as 16-bit numbers.
  const __m256i low = _mm256_set1_epi32(0x00ff00ff);
  const __m256i w_even = _mm256_and_si256((__m256i)w, low), w_odd = _mm256_srli_epi16((__m256i)w, 8);
  const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8), x_odd = _mm256_srai_epi16((__m256i)x, 8);
  return acc + (vi)_mm256_madd_epi16(w_even, x_even) + (vi)_mm256_madd_epi16(w_odd, x_odd);
#else
  for (int byte = 0; byte < 4; byte++)
    acc += (vi)((w >> (8 * byte)) & 0xff) * ((vi)(x << (24 - 8 * byte)) >> 24);
  return acc;
#endif
}

TANDEM_INLINE int32_t int_sum(vi v) {
#if TANDEM_AVX512
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t part[kLanes], all = 0;
  std::memcpy(part, &v, sizeof part);
  for (int i = 0; i < kLanes; i++) all += part[i];
  return all;
#endif
}

// The low bytes of integers in -128 … 127.
TANDEM_INLINE void store_bytes(int8_t* p, vi v) {
#if TANDEM_AVX512
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#else
  typedef int8_t bytes __attribute__((vector_size(kLanes)));
  const bytes narrow = __builtin_convertvector(v, bytes);
  std::memcpy(p, &narrow, sizeof narrow);
#endif
}

// kLanes IEEE halves.
TANDEM_INLINE vf load_half(const uint16_t* p) {
#if TANDEM_AVX512
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif TANDEM_AVX2
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vh h;
  std::memcpy(&h, p, sizeof h);
  const vu wide = __builtin_convertvector(h, vu);
  const vu sign = (wide & 0x8000) << 16, rest = wide & 0x7fff;
  // A scaled denormal of fp32 becomes the right number; infinities and NaN keep their exponent.
  const vf value = (vf)(rest << 13) * splat(0x1p112f);
  return (vf)((rest >= splat_u(0x7c00) ? (vu)((rest << 13) | 0x7f800000u) : (vu)value) | sign);
#endif
}

// Reductions, in one order.

TANDEM_INLINE float sum(vf v) {
  float part[kLanes];
  std::memcpy(part, &v, sizeof part);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; i++) part[i] += part[i + width];
  return part[0];
}
TANDEM_INLINE float largest(vf v) {
#if TANDEM_AVX512
  return _mm512_reduce_max_ps((__m512)v);
#elif TANDEM_AVX2
  __m128 half = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
#else
  float part[kLanes];
  std::memcpy(part, &v, sizeof part);
  float best = part[0];
  for (int i = 1; i < kLanes; i++) best = part[i] > best ? part[i] : best;
  return best;
#endif
}

// 2^x for x <= 0 with 2^0 == 1: 2^n * p(f), |f| <= 1/2; p interpolates at Chebyshev nodes, relative error < 2e-7. 0 where the
// result would be less than a denormal, without AVX-512 below 2^-126.5.
TANDEM_INLINE vf exp2_neg(vf x) {
#if TANDEM_AVX512
  x = max(x, splat(-150.0f));
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = max(x, splat(-127.0f));  // where the exponent's bits are 0: 2^n is 0
  // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
  const vf n = (x + splat(12582912.0f)) - splat(12582912.0f);
#endif
  const vf f = x - n;
  vf p = splat(1.5461447765e-04f);
  p = fma(p, f, splat(1.3390866807e-03f));
  p = fma(p, f, splat(9.6180569381e-03f));
  p = fma(p, f, splat(5.5503569543e-02f));
  p = fma(p, f, splat(2.4022650719e-01f));
  p = fma(p, f, splat(6.9314718246e-01f));
  p = fma(p, f, splat(1.0f));
#if TANDEM_AVX512
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
#endif
}

// e^x for x <= 0 with e^0 == 1.
TANDEM_INLINE vf exp_neg(vf x) { return exp2_neg(x * splat(1.44269504088896341f)); }

}  // namespace tandem
