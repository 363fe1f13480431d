// Copies of many blocks in one call, with their checksums on the way if the caller wants them.
#include <algorithm>
#include <vector>

#include "xxh3.h"

namespace tandem {
namespace {

constexpr int64_t kStreamed = 2 << 20;  // bytes of a call from which on stores go past the caches

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

bool within(const int64_t* ids, int64_t num, int64_t num_blocks) {
  return std::all_of(ids, ids + num, [=](int64_t id) { return id >= 0 && id < num_blocks; });
}

bool twice(const int64_t* ids, int64_t num) {
  std::vector<int64_t> sorted(ids, ids + num);
  std::sort(sorted.begin(), sorted.end());
  return std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end();
}

// Blocks of one side: `num_blocks` of them at memory + i * stride.
struct Side {
  const char* memory;
  int64_t stride, num_blocks;
  const int64_t* ids;
};

bool overlap(const Side& source, const Side& target, int64_t num, int64_t bytes) {
  const char* source_end = source.memory + source.num_blocks * source.stride;
  const char* target_end = target.memory + target.num_blocks * target.stride;
  if (source_end <= target.memory || target_end <= source.memory) return false;
  std::vector<const char*> starts((size_t)num);
  for (int64_t i = 0; i < num; i++) starts[(size_t)i] = source.memory + source.ids[i] * source.stride;
  std::sort(starts.begin(), starts.end());
  return std::any_of(target.ids, target.ids + num, [&](int64_t id) {
    const char* begin = target.memory + id * target.stride;
    auto after = std::lower_bound(starts.begin(), starts.end(), begin + bytes);  // the first source that begins behind it
    return after != starts.begin() && *(after - 1) + bytes > begin;
  });
}

}  // namespace
}  // namespace tandem

extern "C" {

// Copies `num` blocks of `bytes` bytes, from source + source_ids[i] * source_stride to target + target_ids[i] * target_stride.
// `checksums` [num] gets their XXH3-64, for blocks of at least 241 bytes, or is null. Returns 0, with nothing written, for an id
// that isn't below its side's number of blocks, and if a target comes twice or overlaps a source.
__attribute__((visibility("default"))) int32_t tandem_copy_blocks(const char* source, int64_t source_stride, int64_t num_sources,
                                                                  const int64_t* source_ids, char* target, int64_t target_stride,
                                                                  int64_t num_targets, const int64_t* target_ids, int64_t num,
                                                                  int64_t bytes, uint64_t* checksums) {
  if (!tandem::within(source_ids, num, num_sources) || !tandem::within(target_ids, num, num_targets)) return 0;
  if (tandem::twice(target_ids, num)) return 0;
  const tandem::Side from_side{source, source_stride, num_sources, source_ids};
  const tandem::Side to_side{target, target_stride, num_targets, target_ids};
  if (bytes && tandem::overlap(from_side, to_side, num, bytes)) return 0;
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
  return 1;
}

// The XXH3-64 of `num` blocks of `bytes` bytes, at least 241, at memory + ids[i] * stride.
__attribute__((visibility("default"))) void tandem_checksum_blocks(const char* memory, int64_t stride, const int64_t* ids, int64_t num,
                                                                   int64_t bytes, uint64_t* checksums) {
  for (int64_t i = 0; i < num; i++) {
    checksums[i] = tandem::xxh3::pass<tandem::xxh3::Keep::kNothing>(memory + ids[i] * stride, nullptr, bytes);
  }
}

}  // extern "C"
