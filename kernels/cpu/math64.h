// exp and log in float64 for the sampler. Not libm's, which differ from processor to processor: sums and products in a fixed order
// and never an FMA, so that every variant, scalar or vector, computes the same bits.
#pragma once
#include "simd.h"

namespace tandem {

typedef double vd __attribute__((vector_size(kLanes * 4)));
typedef uint64_t vw __attribute__((vector_size(kLanes * 4)));

TANDEM_INLINE uint64_t bits_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
TANDEM_INLINE double from_bits(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
TANDEM_INLINE vw bits_of(vd x) { return (vw)x; }
TANDEM_INLINE vd from_bits(vw bits) { return (vd)bits; }

constexpr double kLn2High = 0x1.62e42feep-1;  // its product with an exponent is exact
constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
constexpr double kExpLowest = -708.0;

// exp for kExpLowest <= x <= 0, of a double or of vd: 2^n * p(r), |r| <= ln(2) / 2, Taylor's polynomial of degree 13 (remainder
// 5e-18), relative error < 4e-16; exp64(0) == 1.
template <class T>
TANDEM_INLINE T exp64(T x) {
  const T shifted = x * 0x1.71547652b82fep+0 + 0x1.8p52;  // the nearest integer, in the low bits
  const T n = shifted - 0x1.8p52;
  const T r = (x - n * kLn2High) - n * kLn2Low;
  T p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return from_bits(bits_of(p) + (bits_of(shifted) << 52));
}

// log of a normal number: 2 * atanh(f / (2 + f)) of the fraction in [sqrt(1/2), sqrt(2)), the series up to the power of 21
// (remainder 6e-19); relative error < 1e-15.
TANDEM_INLINE double log64(double x) {
  const uint64_t bits = bits_of(x);
  double n = (double)((int64_t)(bits >> 52) - 1023);
  double m = from_bits((bits & 0x000fffffffffffffu) | 0x3ff0000000000000u);
  if (m > 0x1.6a09e667f3bcdp+0) {
    m *= 0.5;
    n += 1.0;
  }
  const double f = m - 1.0, s = f / (2.0 + f), z = s * s;
  double p = z * (1.0 / 21.0) + 1.0 / 19.0;
  p = p * z + 1.0 / 17.0;
  p = p * z + 1.0 / 15.0;
  p = p * z + 1.0 / 13.0;
  p = p * z + 1.0 / 11.0;
  p = p * z + 1.0 / 9.0;
  p = p * z + 1.0 / 7.0;
  p = p * z + 1.0 / 5.0;
  p = p * z + 1.0 / 3.0;
  return n * kLn2High + (n * kLn2Low + 2.0 * (s + s * z * p));
}

}  // namespace tandem
