// XXH3-64 of long inputs, seed 0 (Yann Collet; doc/xxhash_spec.md of xxHash), written so that its loop can also store what it
// reads: a copy and its checksum cost one pass over the memory. Inputs of up to 240 bytes are hashed in another way by XXH3 and
// are not taken here.
#pragma once
#include "simd.h"

namespace tandem {
namespace xxh3 {

constexpr int64_t kShortest = 241;
constexpr int kStripe = 64, kStripesPerBlock = 16, kSecretBytes = 192;
constexpr int64_t kAhead = 8192;  // bytes: further than the hardware looks, over page borders (25 GB/s without, 32 with it, cold pages of 4 KiB)

constexpr uint64_t kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F, kPrime64_3 = 0x165667B19E3779F9,
                   kPrime64_4 = 0x85EBCA77C2B2AE63, kPrime64_5 = 0x27D4EB2F165667C5;

alignas(64) constexpr uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f,
    0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
    0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

TANDEM_INLINE uint64_t read64(const void* p) {
  uint64_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// What a pass does with the bytes besides hashing them: nothing, store them, or store them past the caches (64-byte aligned target).
enum class Keep { kNothing, kStore, kStream };

// Eight sums of 64 bits. Vectors hold them in their lanes' order.
struct Sums {
#if TANDEM_AVX512
  __m512i v;
#elif TANDEM_AVX2
  __m256i v[2];
#else
  uint64_t v[8];
#endif

  TANDEM_INLINE_MEMBER void begin() {
    const uint64_t first[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3, kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
    std::memcpy(&v, first, sizeof first);
  }

  template <Keep kKeep>
  TANDEM_INLINE_MEMBER void stripe(const char* from, char* to, const uint8_t* secret) {
#if TANDEM_AVX512
    const __m512i data = _mm512_loadu_si512(from);
    if (kKeep == Keep::kStore) _mm512_storeu_si512(to, data);
    if (kKeep == Keep::kStream) _mm512_stream_si512((__m512i*)to, data);
    const __m512i key = _mm512_xor_si512(data, _mm512_loadu_si512(secret));
    const __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
    v = _mm512_add_epi64(v, _mm512_add_epi64(product, _mm512_shuffle_epi32(data, _MM_PERM_BADC)));
#elif TANDEM_AVX2
    for (int i = 0; i < 2; i++) {
      const __m256i data = _mm256_loadu_si256((const __m256i*)from + i);
      if (kKeep == Keep::kStore) _mm256_storeu_si256((__m256i*)to + i, data);
      if (kKeep == Keep::kStream) _mm256_stream_si256((__m256i*)to + i, data);
      const __m256i key = _mm256_xor_si256(data, _mm256_loadu_si256((const __m256i*)secret + i));
      const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
      v[i] = _mm256_add_epi64(v[i], _mm256_add_epi64(product, _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2))));
    }
#else
    uint64_t data[8];
    std::memcpy(data, from, sizeof data);
    if (kKeep != Keep::kNothing) std::memcpy(to, data, sizeof data);
    for (int i = 0; i < 8; i++) {
      const uint64_t key = data[i] ^ read64(secret + 8 * i);
      v[i ^ 1] += data[i];
      v[i] += (key & 0xFFFFFFFF) * (key >> 32);
    }
#endif
  }

  TANDEM_INLINE_MEMBER void scramble(const uint8_t* secret) {
    uint64_t sums[8];
    std::memcpy(sums, &v, sizeof sums);
    for (int i = 0; i < 8; i++) {
      sums[i] ^= sums[i] >> 47;
      sums[i] ^= read64(secret + 8 * i);
      sums[i] *= kPrime32_1;
    }
    std::memcpy(&v, sums, sizeof sums);
  }

  TANDEM_INLINE_MEMBER uint64_t merged(uint64_t bytes) const {
    uint64_t sums[8];
    std::memcpy(sums, &v, sizeof sums);
    uint64_t result = bytes * kPrime64_1;
    for (int i = 0; i < 8; i += 2) {
      const uint8_t* secret = kSecret + 11 + 8 * i;
      const __uint128_t product = (__uint128_t)(sums[i] ^ read64(secret)) * (sums[i + 1] ^ read64(secret + 8));
      result += (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    result ^= result >> 37;
    result *= 0x165667919E3779F9;
    return result ^ (result >> 32);
  }
};

// The checksum of the `bytes` (at least kShortest) at `from`, which go to `to` unless kKeep is kNothing. Each byte is read once, and
// what is hashed is what is stored, even if somebody changes `from` meanwhile.
template <Keep kKeep>
uint64_t pass(const char* from, char* to, int64_t bytes) {
  Sums sums;
  sums.begin();
  const int64_t stripes = (bytes - 1) / kStripe;
  const char* end = from + bytes;
  int64_t left = stripes;
  for (; left >= kStripesPerBlock; left -= kStripesPerBlock) {
    for (int i = 0; i < kStripesPerBlock; i++, from += kStripe, to += kStripe) {
      __builtin_prefetch(from + kAhead);
      sums.stripe<kKeep>(from, to, kSecret + 8 * i);
    }
    sums.scramble(kSecret + kSecretBytes - kStripe);
  }
  for (int i = 0; i < left; i++, from += kStripe, to += kStripe) sums.stripe<kKeep>(from, to, kSecret + 8 * i);
  const int64_t rest = end - from;  // 1 … 64
  const char* last = end;
  if (kKeep != Keep::kNothing) {
    std::memcpy(to, from, (size_t)rest);
    last = to + rest;
  }
  sums.stripe<Keep::kNothing>(last - kStripe, nullptr, kSecret + kSecretBytes - kStripe - 7);
  return sums.merged((uint64_t)bytes);
}

}  // namespace xxh3
}  // namespace tandem
