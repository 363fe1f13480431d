// Copies of many blocks in one call, with their checksums on the way if the caller wants them.
#include <algorithm>

#include "xxh3.h"

namespace tandem {
namespace {

constexpr int64_t kStreamed = 8 << 20;  // bytes of a call from which on stores go past the caches

// Past the caches: the target of so large a copy has left them before it is read, and fetching its old lines to overwrite them
// would cost half as much again.
void stream(char* to, const char* from, int64_t bytes) {
  int64_t i = 0;
#if TANDEM_AVX512 || TANDEM_AVX2
  constexpr int kVectors = 4, kBytes = kVectors * (int)sizeof(__m256i);
  i = std::min((int64_t)(-(uintptr_t)to & (sizeof(__m256i) - 1)), bytes);
  std::memcpy(to, from, (size_t)i);
  for (; i + kBytes <= bytes; i += kBytes) {
    __m256i v[kVectors];
    for (int j = 0; j < kVectors; j++) v[j] = _mm256_loadu_si256((const __m256i*)(from + i) + j);
    for (int j = 0; j < kVectors; j++) _mm256_stream_si256((__m256i*)(to + i) + j, v[j]);
  }
#endif
  std::memcpy(to + i, from + i, (size_t)(bytes - i));
}

uint64_t copy_and_hash(char* to, const char* from, int64_t bytes, bool large) {
  const bool aligned = ((uintptr_t)to & (xxh3::kStripe - 1)) == 0;
  return large && aligned ? xxh3::pass<xxh3::Keep::kStream>(from, to, bytes) : xxh3::pass<xxh3::Keep::kStore>(from, to, bytes);
}

}  // namespace
}  // namespace tandem

extern "C" {

// Copies `num` blocks of `bytes` bytes, from source + source_ids[i] * source_stride to target + target_ids[i] * target_stride. No
// target overlaps a source or another target. `checksums` [num] gets their XXH3-64, for blocks of at least 241 bytes, or is null.
__attribute__((visibility("default"))) void tandem_copy_blocks(const char* source, int64_t source_stride, const int64_t* source_ids,
                                                               char* target, int64_t target_stride, const int64_t* target_ids,
                                                               int64_t num, int64_t bytes, uint64_t* checksums) {
  const bool large = num * bytes >= tandem::kStreamed;
  for (int64_t i = 0; i < num; i++) {
    const char* from = source + source_ids[i] * source_stride;
    char* to = target + target_ids[i] * target_stride;
    if (checksums) {
      checksums[i] = tandem::copy_and_hash(to, from, bytes, large);
    } else if (large) {
      tandem::stream(to, from, bytes);
    } else {
      std::memcpy(to, from, (size_t)bytes);
    }
  }
#if TANDEM_AVX512 || TANDEM_AVX2
  if (large) _mm_sfence();  // whoever is told of the copies sees them
#endif
}

// The XXH3-64 of `num` blocks of `bytes` bytes, at least 241, at memory + ids[i] * stride.
__attribute__((visibility("default"))) void tandem_checksum_blocks(const char* memory, int64_t stride, const int64_t* ids, int64_t num,
                                                                   int64_t bytes, uint64_t* checksums) {
  for (int64_t i = 0; i < num; i++) {
    checksums[i] = tandem::xxh3::pass<tandem::xxh3::Keep::kNothing>(memory + ids[i] * stride, nullptr, bytes);
  }
}

}  // extern "C"
