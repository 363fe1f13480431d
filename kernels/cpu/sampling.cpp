// One token for each row of logits: the best one, or one drawn with probability softmax(logits / temperature) among those that
// top-k, top-p and min-p leave; and log-probabilities. What kernels/sampling.py does with numpy, one row after the other.
//
// A draw is the argmax of weight / noise. Noise e = -log(u) is at least 1 - u, so weight / (1 - u) bounds a score from above: that
// bound, coarse but safe and in powers of two, is all that most tokens cost, and a dozen in a vocabulary are scored exactly.
// Whatever decides a result is computed by the same operations in every variant.
#include <algorithm>
#include <cstdlib>
#include <functional>

#include "math64.h"
#include "philox.h"

// As kernels/sampling.py lays it out.
struct tandem_draw {
  const float* logits;  // drawn from
  const float* raw;     // log-probabilities are of these
  double temperature;   // 0: the best token
  double top_p;         // 1: off
  double min_p;         // 0: off
  uint64_t seed;
  uint64_t sample_index;
  uint64_t position;
  int64_t top_k;         // 0: off
  int64_t num_logprobs;  // -1: none
};

namespace tandem {
namespace {

constexpr float kLargest = 3.40282346638528859812e+38f;
constexpr double kLeastWeight = 0x1p-1022;
constexpr float kSlack = 1.0f / 64;  // the bound's rounding errors are less than a thousandth of that
constexpr int kWide = 16;
constexpr int kBuckets = 512;
constexpr int64_t kFew = 128;
constexpr uint32_t kAllLanes = (1u << kLanes) - 1;
constexpr int64_t kDense = 32;  // from one in so many tokens on, looking at the noise of all is faster

// NaN counts as -inf, +inf as the largest number.
TANDEM_INLINE float clean(float x) { return x > -__builtin_inff() ? (x < kLargest ? x : kLargest) : -__builtin_inff(); }

// Keys order tokens: by value, equal values by descending id. x is clean.
TANDEM_INLINE uint64_t key_of(float x, int64_t token_id) {
  const float plain = x + 0.0f;  // -0 equals 0
  uint32_t bits;
  std::memcpy(&bits, &plain, sizeof bits);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (uint64_t)bits << 32 | (0xffffffffu - (uint32_t)token_id);
}
TANDEM_INLINE float value_of(uint64_t key) {
  uint32_t bits = (uint32_t)(key >> 32);
  bits = bits >> 31 ? bits & 0x7fffffffu : ~bits;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
TANDEM_INLINE int64_t id_of(uint64_t key) { return (int64_t)(0xffffffffu - (uint32_t)key); }

// Bit i: whether a[i] > b[i]; never for NaN.
TANDEM_INLINE uint32_t greater_mask(vf a, vf b) {
#if TANDEM_AVX512
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif TANDEM_AVX2
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; i++) mask |= (uint32_t)(a[i] > b[i]) << i;
  return mask;
#endif
}

// Bit i: whether a[i] == b[i].
TANDEM_INLINE uint32_t equal_mask(vf a, vf b) {
#if TANDEM_AVX512
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
#elif TANDEM_AVX2
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_EQ_OQ));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; i++) mask |= (uint32_t)(a[i] == b[i]) << i;
  return mask;
#endif
}

// Bit i of kLanes: whether p[i] >= limit.
TANDEM_INLINE uint32_t least_mask(const double* p, double limit) {
#if TANDEM_AVX512
  const __m512d least = _mm512_set1_pd(limit);
  return (uint32_t)_mm512_cmp_pd_mask(_mm512_loadu_pd(p), least, _CMP_GE_OQ) |
         (uint32_t)_mm512_cmp_pd_mask(_mm512_loadu_pd(p + 8), least, _CMP_GE_OQ) << 8;
#elif TANDEM_AVX2
  const __m256d least = _mm256_set1_pd(limit);
  return (uint32_t)(_mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(p), least, _CMP_GE_OQ)) |
                    _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(p + 4), least, _CMP_GE_OQ)) << 4);
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; i++) mask |= (uint32_t)(p[i] >= limit) << i;
  return mask;
#endif
}

// kLanes of n values from i on, -inf past the last.
TANDEM_INLINE vf load_padded(const float* x, int64_t i, int64_t n) {
  if (i + kLanes <= n) return load(x + i);
  vf v;
  for (int j = 0; j < kLanes; j++) v[j] = i + j < n ? x[i + j] : -__builtin_inff();
  return v;
}

struct Item {
  uint64_t key;
  double weight;
};

// Memory for one row of a vocabulary; a thread keeps its own.
class Workspace {
 public:
  Workspace() = default;
  ~Workspace() { std::free(memory_); }
  bool reserve(int64_t vocab) {
    const size_t size = (size_t)vocab + 64;
    if (size <= size_) return true;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, size * (sizeof(Item) + sizeof(double) + sizeof(float) + sizeof(int32_t)))) return false;
    std::free(memory_);
    memory_ = memory;
    size_ = size;
    items = (Item*)memory;
    weights = (double*)(items + size);
    values = (float*)(weights + size);
    ids = (int32_t*)(values + size);
    return true;
  }
  uint64_t* keys() { return (uint64_t*)items; }  // for `greatest`
  Item* items;
  double* weights;
  float* values;
  int32_t* ids;

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

struct Best {
  float value;  // clean; -inf: there is nothing to draw
  int64_t token_id;
};

Best best_of(const float* x, int64_t vocab) {
  const vf lowest = splat(-__builtin_inff());
  vf four[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + 4 * kLanes <= vocab; i += 4 * kLanes)
    for (int j = 0; j < 4; j++) {
      const vf v = load(x + i + j * kLanes);
      four[j] = v > four[j] ? v : four[j];
    }
  float most = -__builtin_inff();
  for (int j = 0; j < 4; j++)
    for (int lane = 0; lane < kLanes; lane++) most = four[j][lane] > most ? four[j][lane] : most;
  for (; i < vocab; i++) most = x[i] > most ? x[i] : most;
  if (most == -__builtin_inff()) return {most, 0};
  most = clean(most);
  const vf target = splat(most);
  for (i = 0; i + kLanes <= vocab; i += kLanes) {
    const vf v = load(x + i);
    if (const uint32_t found = greater_mask(v, target) | equal_mask(v, target)) return {most, i + __builtin_ctz(found)};
  }
  while (!(x[i] >= most)) i++;
  return {most, i};
}

// The key of the `count` greatest tokens' last one, 1 <= count <= vocab; those keys are then the first `count` of `keys`, in no
// order. `keys` has room for vocab + kLanes.
uint64_t greatest(const float* x, int64_t vocab, int64_t count, uint64_t* keys) {
  const int64_t room = std::min(vocab, std::max(4 * count, count + 1024));
  const auto keep = [&](int64_t n) { std::nth_element(keys, keys + count - 1, keys + n, std::greater<uint64_t>()); };
  int64_t n = 0;
  for (; n < room; n++) keys[n] = key_of(clean(x[n]), n);
  keep(n);
  n = count;
  float least = value_of(keys[count - 1]);
  int64_t i = room;
  // Of equal values the earlier ones win, so only greater ones displace any.
  const auto take = [&](int64_t token_id) { keys[n++] = key_of(clean(x[token_id]), token_id); };
  for (; i + kLanes <= vocab; i += kLanes) {
    for (uint32_t mask = greater_mask(load(x + i), splat(least)); mask; mask &= mask - 1) take(i + __builtin_ctz(mask));
    if (n > room - kLanes && n > count) {
      keep(n);
      n = count;
      least = value_of(keys[count - 1]);
    }
  }
  for (; i < vocab; i++)
    if (x[i] > least) take(i);
  keep(n);
  return keys[count - 1];
}

// exp((x - best) * rate), 0 where that is below exp(-708), and for -inf.
TANDEM_INLINE double weight_of(float x, double best, double rate) {
  const double power = ((double)x - best) * rate;
  return power > kExpLowest ? exp64(power < 0.0 ? power : 0.0) : 0.0;
}

// The weights of n values, clean or not, and their sum, which is one of kWide sums; writes up to kWide - 1 zeros more.
double weigh(const float* x, int64_t n, double best, double rate, double* weights) {
  constexpr int kHalf = kLanes / 2, kParts = kWide / kHalf;
  typedef float vhalf __attribute__((vector_size(kHalf * 4)));
  const vd zero = {}, lowest = zero + kExpLowest;
  vd totals[kParts] = {};
  for (int64_t i = 0; i < n; i += kWide) {
    float padded[kWide];
    const float* part = x + i;
    if (i + kWide > n) {
      for (int j = 0; j < kWide; j++) padded[j] = i + j < n ? part[j] : -__builtin_inff();
      part = padded;
    }
    for (int j = 0; j < kParts; j++) {
      vhalf values;
      std::memcpy(&values, part + j * kHalf, sizeof values);
      vd power = (__builtin_convertvector(values, vd) - best) * rate;
      power = power > lowest ? power : lowest;  // of NaN, too
      power = power < zero ? power : zero;      // +inf counts as the best
      const vd weight = power > lowest ? exp64(power) : zero;
      std::memcpy(weights + i + j * kHalf, &weight, sizeof weight);
      totals[j] += weight;
    }
  }
  double sum = 0;
  for (int j = 0; j < kParts; j++)
    for (int lane = 0; lane < kHalf; lane++) sum += totals[j][lane];
  return sum;
}

// The candidates of a draw, in the order of ids. `ids` null: value i is token i's.
struct Candidates {
  const float* values;
  const int32_t* ids;
  const double* weights;  // and zeros up to a multiple of kWide
  int64_t count;

  int64_t id(int64_t i) const { return ids ? ids[i] : i; }
  Item item(int64_t i) const { return {key_of(clean(values[i]), id(i)), weights[i]}; }
};

// The key of the item at which the weights, added to `before` from the greatest key on, reach `target`; the least one if they never
// do. The items are in the order of ids, and are left in another.
uint64_t reach(Item* items, int64_t n, double before, double target) {
  for (;;) {
    uint64_t most = 0, last = ~0ull;
    for (int64_t i = 0; i < n; i++) {
      most = std::max(most, items[i].key);
      last = std::min(last, items[i].key);
    }
    const double high = value_of(most), range = high - (double)value_of(last);
    if (n <= kFew || range == 0) {
      // Equal values are sorted already.
      if (range != 0) std::sort(items, items + n, [](const Item& a, const Item& b) { return a.key > b.key; });
      for (int64_t i = 0; i < n; i++) {
        before += items[i].weight;
        if (before >= target) return items[i].key;
      }
      return last;
    }
    // By distance from the greatest into buckets; the target lies in one of them, which is all that is looked at next.
    const double scale = (kBuckets - 0.5) / range;
    const auto bucket_of = [&](const Item& item) { return (int)((high - (double)value_of(item.key)) * scale); };
    double sums[kBuckets] = {};
    for (int64_t i = 0; i < n; i++) sums[bucket_of(items[i])] += items[i].weight;
    int bucket = 0;
    for (; bucket < kBuckets && before + sums[bucket] < target; bucket++) before += sums[bucket];
    if (bucket == kBuckets) return last;  // two orders of summation round differently
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++)
      if (bucket_of(items[i]) == bucket) items[kept++] = items[i];
    n = kept;
  }
}

// The key of the last token of the nucleus, the fewest of the greatest candidates that together have `top_p` of all `total` weight;
// 0 if those are all. As in `reach`, which ends the search: buckets first, without touching the candidates.
uint64_t nucleus(const Candidates& all, float best, double rate, double top_p, double total, Item* items) {
  // Tokens so far down that all together weigh less than half of what top-p leaves out are never in it: the last bucket.
  const double out = 1.0 - top_p;
  const double depth = out > 1e-9 ? -log64(std::max(0.5 * out * total / (double)all.count, kLeastWeight)) : -kExpLowest;
  const vf scale = splat((float)std::min(kBuckets * rate / depth, 1e30)), high = splat(best);
  const vf zero = {}, farthest = splat(kLargest), beyond = splat((float)kBuckets);
  // A last bucket for each lane, or adding to it would be what all wait for.
  const vf far = beyond + to_float(lanes());
  const auto buckets_of = [&](int64_t i) {
    vf gap = high - load_padded(all.values, i, all.count);
    gap = gap < farthest ? gap : farthest;  // of NaN, too
    const vf place = (gap > zero ? gap : zero) * scale;
    return __builtin_convertvector(place < beyond ? place : far, vi);
  };
  double sums[kBuckets + kLanes] = {};
  for (int64_t i = 0; i < all.count; i += kLanes) {
    int32_t buckets[kLanes];
    const vi found = buckets_of(i);
    if (!greater_mask(beyond, to_float(found))) continue;
    std::memcpy(buckets, &found, sizeof buckets);
    for (int j = 0; j < kLanes; j++) sums[buckets[j]] += all.weights[i + j];
  }
  const double target = top_p * total;
  double before = 0;
  int bucket = 0;
  for (; bucket < kBuckets && before + sums[bucket] < target; bucket++) before += sums[bucket];
  if (bucket == kBuckets) return 0;
  int64_t n = 0;
  for (int64_t i = 0; i < all.count; i += kLanes) {
    const vi found = buckets_of(i);
    uint32_t mask = equal_mask(to_float(found), splat((float)bucket));
    if (all.count - i < kLanes) mask &= (1u << (all.count - i)) - 1;  // past the end of the row nothing may be read
    for (; mask; mask &= mask - 1) {
      items[n] = all.item(i + __builtin_ctz(mask));
      n += items[n].weight > 0;
    }
  }
  return reach(items, n, before, target);
}

// A draw under way: the best score so far.
struct Race {
  Philox noise;
  double score;
  int64_t token_id;

  // For ascending ids.
  TANDEM_INLINE_MEMBER void enter(int64_t id, double weight) {
    const double u_bits = from_bits(noise.word(id) >> 12 | 0x3ff0000000000000u);
    const double u = (u_bits - 1.0) + 0x1p-53;
    if (weight < score * (1.0 - u) * (1.0 - 1e-12)) return;
    const double mine = weight / -log64(u);
    if (mine > score || (mine == score && id < token_id)) {
      score = mine;
      token_id = id;
    }
  }
};

// Draws among the tokens whose keys are at least `floor` and whose weights are at least `least`, looking at every token's noise.
int64_t draw_dense(const float* x, int64_t vocab, Best best, double rate, uint64_t floor, double least, Race race) {
  const auto consider = [&](int64_t id) {
    const float value = clean(x[id]);
    if (key_of(value, id) < floor) return;
    const double weight = weight_of(value, best.value, rate);
    if (weight >= least) race.enter(id, weight);
  };
  consider(best.token_id);
  // In powers of two, where log2(y) is at least y's exponent plus its fraction: a token can only win if its distance from the best
  // value, less that of 1 - u, is more than that of the best score. Finite distances make bounds that are never NaN.
  const vf factor = splat((float)std::min(rate * 0x1.71547652b82fep+0, 1e30));
  const vf high = splat(best.value), farthest = splat(-kLargest), zero = {};
  const auto limit = [&] { return (float)((double)bits_of(race.score) * 0x1p-52 - 1023.0) - kSlack - 127.0f; };
  vf least_bound = splat(limit());
  uint32_t words[kPhiloxBatch];
  float padded[kPhiloxBatch];
  for (int64_t first = 0; first < vocab; first += kPhiloxBatch) {
    const float* part = x + first;
    if (vocab - first < kPhiloxBatch) {
      for (int i = 0; i < kPhiloxBatch; i++) padded[i] = first + i < vocab ? part[i] : -__builtin_inff();
      part = padded;
    }
    race.noise.upper_halves(first, words);
    for (int i = 0; i < kPhiloxBatch; i += kLanes) {
      const vf below = load(part + i) - high;
      const vf distance = max(below < zero ? below : zero, farthest);
      const vf rest = to_float((vi)(~load_u(words + i) >> 1)) * splat(0x1p-31f) + splat(0x1p-53f);
      const vf bound = distance * factor - to_float((vi)rest) * splat(0x1p-23f);
      uint32_t mask = greater_mask(bound, least_bound);
      if (__builtin_expect(mask != 0, 0)) {
        for (; mask; mask &= mask - 1)
          if (first + i + __builtin_ctz(mask) < vocab) consider(first + i + __builtin_ctz(mask));
        least_bound = splat(limit());
      }
    }
  }
  return race.token_id;
}

int64_t draw(const tandem_draw& a, int64_t vocab, Best best, Workspace& space) {
  const float* x = a.logits;
  // Beyond these the weights are the same: all 1, or the best one's alone.
  const double rate = 1.0 / std::min(std::max(a.temperature, 1e-60), 1e60);
  const double least = std::max(a.min_p, kLeastWeight);
  const Race race = {{a.seed, a.sample_index, a.position}, 0.0, best.token_id};
  const bool few = a.top_k > 0 && a.top_k < vocab;
  if (!few && a.top_p >= 1 && a.min_p <= 0) return draw_dense(x, vocab, best, rate, 0, least, race);

  uint64_t floor = 0;
  Candidates all = {x, nullptr, space.weights, vocab};
  if (few) {
    floor = greatest(x, vocab, a.top_k, space.keys());
    const vf last = splat(value_of(floor));
    int64_t n = 0;
    for (int64_t i = 0; i < vocab; i += kLanes)
      for (uint32_t mask = ~greater_mask(last, load_padded(x, i, vocab)) & kAllLanes; mask; mask &= mask - 1) {
        const int64_t id = i + __builtin_ctz(mask);
        if (id >= vocab || key_of(clean(x[id]), id) < floor) continue;
        space.values[n] = clean(x[id]);
        space.ids[n++] = (int32_t)id;
      }
    all = {space.values, space.ids, space.weights, n};
  }
  const double total = weigh(all.values, all.count, best.value, rate, space.weights);
  if (a.top_p < 1) floor = std::max(floor, nucleus(all, best.value, rate, a.top_p, total, space.items));

  const vf last = splat(floor ? value_of(floor) : -__builtin_inff());
  int64_t count = 0;
  for (int64_t i = 0; i < all.count; i += kLanes) {
    uint32_t mask = ~greater_mask(last, load_padded(all.values, i, all.count)) & least_mask(all.weights + i, least);
    for (; mask; mask &= mask - 1) {
      const Item item = all.item(i + __builtin_ctz(mask));
      space.items[count] = item;
      count += item.key >= floor;
    }
    if (count > vocab / kDense) return draw_dense(x, vocab, best, rate, floor, least, race);
  }
  Race list = race;
  for (int64_t i = 0; i < count; i++) list.enter(id_of(space.items[i].key), space.items[i].weight);
  return list.token_id;
}

// Of the token, and of the `count` best, the best first; -inf and nothing if the row has nothing.
void log_probabilities(const float* x, int64_t vocab, int64_t token_id, int64_t count, Workspace& space, double* logprob,
                       int64_t* best_ids, double* best_logprobs) {
  const double highest = best_of(x, vocab).value;
  if (highest == -__builtin_inf()) {
    *logprob = highest;
    return;
  }
  const double total = highest + log64(weigh(x, vocab, highest, 1.0, space.weights));
  *logprob = (double)clean(x[token_id]) - total;
  if (count == 0) return;
  uint64_t* keys = space.keys();
  greatest(x, vocab, count, keys);
  std::sort(keys, keys + count, std::greater<uint64_t>());
  for (int64_t i = 0; i < count; i++) {
    best_ids[i] = id_of(keys[i]);
    best_logprobs[i] = (double)value_of(keys[i]) - total;
  }
}

}  // namespace
}  // namespace tandem

extern "C" {

// Draws for `num` rows of `vocab` logits. Results of row i: token_ids[i], logprobs[i] and, for as many as it asks for but at most
// `vocab`, best_ids[i * most …] and best_logprobs[i * most …]. Returns 0, or 1 if memory ran out.
__attribute__((visibility("default"))) int32_t tandem_sample(const tandem_draw* draws, int64_t num, int64_t vocab,
                                                             int64_t* token_ids, double* logprobs, int64_t* best_ids,
                                                             double* best_logprobs, int64_t most) {
  using namespace tandem;
  static thread_local Workspace space;
  if (!space.reserve(vocab)) return 1;
  for (int64_t i = 0; i < num; i++) {
    const tandem_draw& a = draws[i];
    const Best best = best_of(a.logits, vocab);
    if (best.value == -__builtin_inff()) {
      token_ids[i] = best_of(a.raw, vocab).token_id;
    } else {
      token_ids[i] = a.temperature == 0 ? best.token_id : draw(a, vocab, best, space);
    }
    if (a.num_logprobs >= 0)
      log_probabilities(a.raw, vocab, token_ids[i], std::min(a.num_logprobs, vocab), space, logprobs + i, best_ids + i * most,
                        best_logprobs + i * most);
  }
  return 0;
}

}  // extern "C"
