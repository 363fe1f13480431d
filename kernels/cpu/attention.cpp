// Paged causal attention (flash-attention with a fixed split): one pass over the KV, in tiles of 64 positions from position 0,
// online softmax; splits of 512 positions are computed by themselves and merged in order of position.
//
// Every row's arithmetic is the same whatever other rows are computed with it, however many there are and however the work is
// shared between threads:
//   scores   s[t] = sum over the dimensions of q * k[t], in their order (pairs of them for bf16)
//   softmax  per tile: m' = max(m, s), p = 2^(s - m'), l and the value are scaled by 2^(m - m'); log2(e) is in the queries' scale
//   values   value += p[t] * v[t], in order of t (pairs of them for bf16, p rounded to bf16)
// A masked position has p = 0, which changes no bit of l or value (its V is finite); 2^0 is exactly 1, so a tile that only others see is an
// exact no-op. Memory that no token has written is never multiplied.
#include <type_traits>

#include "abi.h"
#include "simd.h"

namespace tandem {
namespace {

constexpr int kTile = 64;    // positions
constexpr int kSplit = 512;  // positions
constexpr int kNarrow = 4;   // rows up to which a chunk's splits may be shared between threads
constexpr int kLoadCost = 12;
constexpr int kBlockRows = 192;  // rows of one head that meet a tile while it is in the nearest cache
#if TANDEM_AVX512
constexpr int kRowTile = 6;  // query rows in registers: 6 * 4 sums + 4 operands of 32
constexpr int kVecs = 4;
#else
constexpr int kRowTile = 4;
constexpr int kVecs = 2;
#endif

#if TANDEM_AVX512
TANDEM_INLINE void transpose(vu m[16]) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; i++) r[i] = (__m512i)m[i];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    m[i] = (vu)_mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    m[i + 8] = (vu)_mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    m[i + 4] = (vu)_mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    m[i + 12] = (vu)_mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#elif TANDEM_AVX2
TANDEM_INLINE void transpose(vu m[8]) {
  __m256i t[8], r[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_epi32((__m256i)m[2 * i], (__m256i)m[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32((__m256i)m[2 * i], (__m256i)m[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    m[i] = (vu)_mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    m[i + 4] = (vu)_mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
}
#else
TANDEM_INLINE void transpose(vu m[kLanes]) {
  for (int i = 0; i < kLanes; i++)
    for (int j = i + 1; j < kLanes; j++) {
      const uint32_t kept = m[i][j];
      m[i][j] = m[j][i];
      m[j][i] = kept;
    }
}
#endif

// The greatest number up to `most` of which `all` is a multiple.
constexpr int parts_of(int all, int most) { return most < 2 || all % most == 0 ? most : parts_of(all, most - 1); }

// 64 positions of one KV head, as the products read them.
template <class T, int D>
struct Tile {
  static constexpr bool kPairs = std::is_same<T, uint16_t>::value;
  static constexpr int kWords = kPairs ? D / 2 : D;         // dwords of a row of K
  static constexpr int kSteps = kPairs ? kTile / 2 : kTile;  // positions, or pairs of them
  alignas(64) uint32_t keys[kWords][kTile];
  alignas(64) uint32_t values[kSteps][D];
};

template <class T, int D>
struct Row {  // one query row of one head, with its running softmax within a split
  alignas(64) uint32_t q[Tile<T, D>::kWords];
  alignas(64) float value[D];
  alignas(64) float lanes[kLanes];
  float peak;
  int32_t position;

  void clear() {
    std::memset(value, 0, sizeof value);
    std::memset(lanes, 0, sizeof lanes);
    peak = -INFINITY;
  }
};

template <int D>
struct Part {  // a softmax over some positions: its maximum, its sum, its weighted values
  alignas(64) float value[D];
  float total;
  float peak;
};

template <int D>
void clear(Part<D>& part) {
  std::memset(part.value, 0, sizeof part.value);
  part.total = 0;
  part.peak = -INFINITY;
}

// Adds a later split to an earlier sum.
template <int D>
void merge(Part<D>& sum, const float* value, float total, float peak) {
  if (peak == -INFINITY) return;
  const float top = sum.peak > peak ? sum.peak : peak;
  const vf keep = sum.peak == -INFINITY ? vf{} : exp2_neg(splat(sum.peak - top));
  const vf take = exp2_neg(splat(peak - top));
  for (int d = 0; d < D; d += kLanes) store(&sum.value[d], load(&sum.value[d]) * keep + load(value + d) * take);
  sum.total = sum.total * keep[0] + total * take[0];
  sum.peak = top;
}

// Where the K of the positions of a tile begins, for head 0. Past the last of `valid` positions: where some other one does.
template <class T>
struct Places {
  const T* rows[kTile];
  int valid;
};

template <class T>
void find(const tandem_attention& a, const tandem_span& span, int low, int end, Places<T>& places) {
  places.valid = end - low < kTile ? end - low : kTile;
  int block = low / a.block_size, offset = low % a.block_size;
  for (int t = 0; t < places.valid; block++, offset = 0) {
    const T* base = (const T*)a.arena + span.block_table[block] * a.block_stride + a.layer_offset;
    for (; offset < a.block_size && t < places.valid; offset++, t++) places.rows[t] = base + (int64_t)offset * a.head_dim;
  }
  for (int t = places.valid; t < kTile; t++) places.rows[t] = places.rows[0];
}

// The KV of one head in a tile.
template <class T>
struct Slice {
  const T* const* rows;
  int64_t key, value;  // offsets from a row's begin
};

// Brings a tile of one head into the nearest cache; positions past the valid ones are zero.
template <class T, int D>
void load_tile(const Places<T>& places, int64_t key, int64_t value, Tile<T, D>& tile) {
  alignas(64) static const T zeros[D] = {};
  const int valid = places.valid;
  for (int t0 = 0; t0 < kTile; t0 += kLanes) {
    for (int word = 0; word < Tile<T, D>::kWords; word += kLanes) {
      vu m[kLanes];
      for (int i = 0; i < kLanes; i++) m[i] = load_u((const uint32_t*)(places.rows[t0 + i] + key) + word);
      if (t0 + kLanes > valid)
        for (int i = 0; i < kLanes; i++)
          if (t0 + i >= valid) m[i] = vu{};
      transpose(m);
      for (int i = 0; i < kLanes; i++) store_u(&tile.keys[word + i][t0], m[i]);
    }
  }
  for (int t = 0; t < kTile; t += 2) {
    const T* one = t < valid ? places.rows[t] + value : zeros;
    const T* two = t + 1 < valid ? places.rows[t + 1] + value : zeros;
    if constexpr (Tile<T, D>::kPairs) {
      for (int d = 0; d < D; d += 2 * kLanes) pair_bf16(one + d, two + d, &tile.values[t / 2][d]);
    } else {
      for (int d = 0; d < D; d += kLanes) {
        store_u(&tile.values[t][d], load_u(one + d));
        store_u(&tile.values[t + 1][d], load_u(two + d));
      }
    }
  }
}

// acc + w * x: pairs of bf16 or single floats, in dwords.
template <class T>
TANDEM_INLINE vf times(vf acc, vu w, vu x) {
  if constexpr (std::is_same<T, uint16_t>::value)
    return dot2(acc, w, x);
  else
    return fma((vf)w, (vf)x, acc);
}

// From R rows' scores at the positions of a tile, `low` the first, to their weights: p[r][t], or pairs of them. The rows' sums and
// values are scaled to their new maxima.
template <class T, int D, int R>
TANDEM_INLINE void weigh(Row<T, D>* rows, float (*s)[kTile], int low, uint32_t (*p)[Tile<T, D>::kSteps]) {
  constexpr int kGroups = kTile / kLanes;
  const vi lane = lanes();
  const vf minus_inf = splat(-INFINITY);
  const bool all_seen = low + kTile - 1 <= rows[0].position;  // later rows see as much
  float peaks[R];
  float scales[(R + kLanes - 1) / kLanes * kLanes] = {};
  for (int r = 0; r < R; r++) {
    vf best = minus_inf;
    for (int g = 0; g < kGroups; g++) {
      vf value = load(&s[r][g * kLanes]);
      if (!all_seen) {
        value = lane + splat_i(low + g * kLanes) <= splat_i(rows[r].position) ? value : minus_inf;
        store(&s[r][g * kLanes], value);
      }
      best = max(value, best);
    }
    const float here = largest(best);
    peaks[r] = rows[r].peak > here ? rows[r].peak : here;
    scales[r] = rows[r].peak - peaks[r];
  }
  // Before the first tile the peak is -inf and what is scaled is 0.
  for (int r = 0; r < R; r += kLanes) store(&scales[r], exp2_neg(load(&scales[r])));
  for (int r = 0; r < R; r++) {
    Row<T, D>& row = rows[r];
    const vf keep = splat(scales[r]), peak = splat(peaks[r]);
    for (int d = 0; d < D; d += kLanes) store(&row.value[d], load(&row.value[d]) * keep);
    vf total = load(row.lanes) * keep;
    for (int g = 0; g < kGroups; g++) {
      const vf score = load(&s[r][g * kLanes]);
      vf e = exp2_neg(score - peak);
      if (!all_seen) e = score != minus_inf ? e : vf{};
      if constexpr (Tile<T, D>::kPairs)
        store_bf16((uint16_t*)p[r] + g * kLanes, e);
      else
        store((float*)p[r] + g * kLanes, e);
      total += e;
    }
    store(row.lanes, total);
    row.peak = peaks[r];
  }
}

// R rows meet one tile whose first position is `low`.
template <class T, int D, int R>
void meet(Row<T, D>* rows, const Tile<T, D>& tile, int low) {
  constexpr int kGroups = kTile / kLanes;
  alignas(64) float s[R][kTile];
  alignas(64) uint32_t p[R][Tile<T, D>::kSteps];
  for (int g = 0; g < kGroups; g += kVecs) {
    vf sums[R][kVecs] = {};
    for (int i = 0; i < Tile<T, D>::kWords; i++) {
      vu k[kVecs];
      for (int v = 0; v < kVecs; v++) k[v] = load_u(&tile.keys[i][(g + v) * kLanes]);
      for (int r = 0; r < R; r++) {
        const vu q = splat_u(rows[r].q[i]);
        for (int v = 0; v < kVecs; v++) sums[r][v] = times<T>(sums[r][v], k[v], q);
      }
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < kVecs; v++) store(&s[r][(g + v) * kLanes], sums[r][v]);
  }
  weigh<T, D, R>(rows, s, low, p);
  constexpr int kParts = parts_of(D / kLanes, kVecs);
  for (int d = 0; d < D; d += kParts * kLanes) {
    vf value[R][kParts];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < kParts; v++) value[r][v] = load(&rows[r].value[d + v * kLanes]);
    for (int t = 0; t < Tile<T, D>::kSteps; t++) {
      vu w[kParts];
      for (int v = 0; v < kParts; v++) w[v] = load_u(&tile.values[t][d + v * kLanes]);
      for (int r = 0; r < R; r++) {
        const vu weight = splat_u(p[r][t]);
        for (int v = 0; v < kParts; v++) value[r][v] = times<T>(value[r][v], w[v], weight);
      }
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < kParts; v++) store(&rows[r].value[d + v * kLanes], value[r][v]);
  }
}

// The same, for so few rows that a tile is met once: straight from the KV, without a copy of it. Bit for bit what `meet` does.
template <class T, int D, int R>
void meet_once(Row<T, D>* rows, Slice<T> now, Slice<T> next, int valid, int low) {
  alignas(64) static const T zeros[D] = {};
  alignas(64) float s[R][kTile];
  alignas(64) uint32_t p[R][Tile<T, D>::kSteps];
  for (int t0 = 0; t0 < kTile; t0 += kLanes) {
    vf sums[R] = {};
    for (int word = 0; word < Tile<T, D>::kWords; word += kLanes) {
      vu k[kLanes];
      for (int i = 0; i < kLanes; i++) {
        __builtin_prefetch((const uint32_t*)(next.rows[t0 + i] + next.key) + word);
        k[i] = load_u((const uint32_t*)(now.rows[t0 + i] + now.key) + word);
      }
      if (t0 + kLanes > valid)
        for (int i = 0; i < kLanes; i++)
          if (t0 + i >= valid) k[i] = vu{};
      transpose(k);
      for (int i = 0; i < kLanes; i++)
        for (int r = 0; r < R; r++) sums[r] = times<T>(sums[r], k[i], splat_u(rows[r].q[word + i]));
    }
    for (int r = 0; r < R; r++) store(&s[r][t0], sums[r]);
  }
  weigh<T, D, R>(rows, s, low, p);
  constexpr int kStep = Tile<T, D>::kPairs ? 2 : 1;  // positions
  constexpr int kParts = Tile<T, D>::kPairs ? 2 * parts_of(D / kLanes / 2, kVecs / 2) : parts_of(D / kLanes, kVecs);
  for (int d = 0; d < D; d += kParts * kLanes) {
    vf value[R][kParts];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < kParts; v++) value[r][v] = load(&rows[r].value[d + v * kLanes]);
    for (int t = 0; t < kTile; t += kStep) {
      for (int i = 0; i < kStep; i++)
        for (size_t at = 0; at < kParts * kLanes * 4 / kStep; at += 64)
          __builtin_prefetch((const char*)(next.rows[t + i] + next.value + d) + at);
      const T* one = (t < valid ? now.rows[t] + now.value : zeros) + d;
      vu w[kParts];
      if constexpr (Tile<T, D>::kPairs) {
        const T* two = (t + 1 < valid ? now.rows[t + 1] + now.value : zeros) + d;
        for (int v = 0; v < kParts; v += 2) pair_bf16(one + v * kLanes, two + v * kLanes, (uint32_t*)&w[v]);
      } else {
        for (int v = 0; v < kParts; v++) w[v] = load_u((const uint32_t*)one + v * kLanes);
      }
      for (int r = 0; r < R; r++) {
        const vu weight = splat_u(p[r][t / kStep]);
        for (int v = 0; v < kParts; v++) value[r][v] = times<T>(value[r][v], w[v], weight);
      }
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < kParts; v++) store(&rows[r].value[d + v * kLanes], value[r][v]);
  }
}

// Chooses the form for `count` rows, at most R.
template <class T, int D, int R>
struct Meet {
  static void tile(int count, Row<T, D>* rows, const Tile<T, D>& tile, int low) {
    count == R ? meet<T, D, R>(rows, tile, low) : Meet<T, D, R - 1>::tile(count, rows, tile, low);
  }
  static void once(int count, Row<T, D>* rows, Slice<T> now, Slice<T> next, int valid, int low) {
    count == R ? meet_once<T, D, R>(rows, now, next, valid, low) : Meet<T, D, R - 1>::once(count, rows, now, next, valid, low);
  }
};
template <class T, int D>
struct Meet<T, D, 0> {
  static void tile(int, Row<T, D>*, const Tile<T, D>&, int) {}
  static void once(int, Row<T, D>*, Slice<T>, Slice<T>, int, int) {}
};

// Tokens [first, last) of a span, KV heads [head, head_end): their rows are [head][token][query of the group].
template <class T, int D>
struct Work {
  const tandem_attention& a;
  const tandem_span& span;
  int first, last, head, head_end;
  const tandem_span* following;  // whose KV will be read next, by this thread or another; or null
  int group() const { return a.num_heads / a.num_kv_heads; }
  int rows_per_head() const { return (last - first) * group(); }
  int num_rows() const { return rows_per_head() * (head_end - head); }
  // Calls visit(row, row of the step, query head) for all rows in order.
  template <class Visit>
  TANDEM_INLINE_MEMBER void for_rows(Visit visit) const {
    int row = 0;
    for (int kv = head; kv < head_end; kv++)
      for (int token = first; token < last; token++)
        for (int q = 0; q < group(); q++) visit(row++, (int64_t)span.first_row + token, (int64_t)kv * group() + q);
  }
};

template <class T, int D>
void begin(const Work<T, D>& work, Row<T, D>* rows) {
  work.for_rows([&](int row, int64_t step_row, int64_t head) {
    std::memcpy(rows[row].q, (const T*)work.a.q + (step_row * work.a.num_heads + head) * D, D * sizeof(T));
    rows[row].position = work.span.start + (int)(step_row - work.span.first_row);
  });
}

// The rows meet the positions [low, high) of one split.
template <class T, int D>
void attend(const Work<T, D>& work, Row<T, D>* rows, int low, int high, Tile<T, D>& tile) {
  const int start = work.span.start + work.first, end = work.span.start + work.last;
  if (high > end) high = end;
  const int count = work.rows_per_head();
  const int64_t head_size = (int64_t)work.a.block_size * D;
  Places<T> places[2];
  find(work.a, work.span, low, end, places[0]);
  for (int turn = 0; low < high; low += kTile, turn ^= 1) {
    const Places<T>&now = places[turn], &next = places[turn ^ 1];
    if (low + kTile < end)
      find(work.a, work.span, low + kTile, end, places[turn ^ 1]);
    else if (work.following)
      find(work.a, *work.following, 0, work.following->start + 1, places[turn ^ 1]);
    else
      places[turn ^ 1] = now;
    const int skip = low > start ? (low - start) * work.group() : 0;
    for (int head = work.head; head < work.head_end; head++) {
      const Slice<T> slice = {now.rows, head * head_size, head * head_size + work.a.value_offset};
      Row<T, D>* first = rows + (head - work.head) * count + skip;
      int left = count - skip;
      if (left <= kRowTile) {
        Slice<T> soon = {now.rows, slice.key + head_size, slice.value + head_size};
        if (head + 1 == work.head_end) soon = {next.rows, work.head * head_size, work.head * head_size + work.a.value_offset};
        Meet<T, D, kRowTile>::once(left, first, slice, soon, now.valid, low);
        continue;
      }
      load_tile<T, D>(now, slice.key, slice.value, tile);
      for (; left > kRowTile; left -= kRowTile, first += kRowTile) meet<T, D, kRowTile>(first, tile, low);
      Meet<T, D, kRowTile>::tile(left, first, tile, low);
    }
  }
}

template <int D>
void finish(const tandem_attention& a, int64_t step_row, int64_t head, const Part<D>& sum) {
  const vf inverse = splat(1.0f / sum.total);
  const int64_t at = step_row * a.stride + head * D;
  for (int d = 0; d < D; d += kLanes) {
    const vf value = load(&sum.value[d]) * inverse;
    if (a.out_dtype == TANDEM_BF16)
      store_bf16((uint16_t*)a.out + at + d, value);
    else
      store((float*)a.out + at + d, value);
  }
}

// All splits, one after the other.
template <class T, int D>
void attend_whole(const Work<T, D>& work, Row<T, D>* rows, Part<D>* sums, Tile<T, D>& tile) {
  const int end = work.span.start + work.last, count = work.num_rows();
  begin(work, rows);
  for (int r = 0; r < count; r++) clear(sums[r]);
  for (int low = 0; low < end; low += kSplit) {
    for (int r = 0; r < count; r++) rows[r].clear();
    attend(work, rows, low, low + kSplit, tile);
    for (int r = 0; r < count; r++) merge(sums[r], rows[r].value, sum(load(rows[r].lanes)), rows[r].peak);
  }
  work.for_rows([&](int row, int64_t step_row, int64_t head) { finish(work.a, step_row, head, sums[row]); });
}

inline int num_splits(const tandem_span& span) { return (span.start + span.rows + kSplit - 1) / kSplit; }
inline bool is_narrow(const tandem_span& span) { return span.rows <= kNarrow; }

// What a thread needs for itself.
template <class T, int D>
struct Scratch {
  static constexpr int most(const tandem_attention& a) {
    const int narrow = kNarrow * a.num_heads, wide = kBlockRows + a.num_heads / a.num_kv_heads;
    return narrow > wide ? narrow : wide;
  }
  static int64_t bytes(const tandem_attention& a) {
    return (int64_t)sizeof(Tile<T, D>) + most(a) * (int64_t)(sizeof(Row<T, D>) + sizeof(Part<D>));
  }
  Tile<T, D>* tile;
  Row<T, D>* rows;
  Part<D>* sums;
  Scratch(const tandem_attention& a, int index) {
    char* at = (char*)a.workspace + index * bytes(a);
    tile = (Tile<T, D>*)at;
    rows = (Row<T, D>*)(at + sizeof(Tile<T, D>));
    sums = (Part<D>*)(at + sizeof(Tile<T, D>) + most(a) * sizeof(Row<T, D>));
  }
};

// Where the splits of narrow chunks leave their parts when several threads share them; null if there is no room, or one thread.
template <class T, int D>
Part<D>* shared_parts(const tandem_attention& a, const tandem_step& step, int threads) {
  if (threads == 1) return nullptr;
  int64_t parts = 0;
  for (int i = 0; i < step.num_spans; i++)
    if (is_narrow(step.spans[i])) parts += (int64_t)num_splits(step.spans[i]) * step.spans[i].rows * a.num_heads;
  const int64_t used = threads * Scratch<T, D>::bytes(a);
  if (used + parts * (int64_t)sizeof(Part<D>) > a.workspace_bytes) return nullptr;
  return (Part<D>*)((char*)a.workspace + used);
}

// What one thread computes at a time: a block of rows of one head over all splits, or a narrow chunk over all of them (`parts` is
// null) or over the one that begins at `low`.
template <class T, int D>
struct Item {
  Work<T, D> work;
  int low;
  Part<D>* parts;
  int num_positions() const {
    const int end = work.span.start + work.last;
    return parts && low + kSplit < end ? kSplit : end - low;
  }
  // About how long it takes, in times that one row meets one tile; to load a tile takes kLoadCost of them.
  int64_t cost() const {
    const int tiles = (num_positions() + kTile - 1) / kTile;
    return (int64_t)tiles * (work.head_end - work.head) * (kLoadCost + work.rows_per_head());
  }
};

// Calls visit(item) for every item of the step, in an order that all threads agree on.
template <class T, int D, class Visit>
void for_items(const tandem_attention& a, const tandem_step& step, Part<D>* parts, Visit visit) {
  const int group = a.num_heads / a.num_kv_heads;
  const int block = group < kBlockRows ? kBlockRows / group : 1;  // tokens
  for (int i = 0; i < step.num_spans; i++) {
    const tandem_span& span = step.spans[i];
    const tandem_span* following = i + 1 < step.num_spans ? &span + 1 : nullptr;
    if (!is_narrow(span)) {
      for (int first = 0; first < span.rows; first += block)
        for (int head = 0; head < a.num_kv_heads; head++) {
          const int last = first + block < span.rows ? first + block : span.rows;
          visit(Item<T, D>{{a, span, first, last, head, head + 1, nullptr}, 0, nullptr});
        }
      continue;
    }
    const Work<T, D> work = {a, span, 0, span.rows, 0, a.num_kv_heads, following};
    if (!parts) {
      visit(Item<T, D>{work, 0, nullptr});
    } else {
      for (int split = 0; split < num_splits(span); split++, parts += work.num_rows())
        visit(Item<T, D>{work, split * kSplit, parts});
    }
  }
}

template <class T, int D>
void run_item(const Item<T, D>& item, const Scratch<T, D>& mine) {
  const Work<T, D>& work = item.work;
  if (!item.parts) return attend_whole<T, D>(work, mine.rows, mine.sums, *mine.tile);
  begin(work, mine.rows);
  for (int r = 0; r < work.num_rows(); r++) mine.rows[r].clear();
  attend(work, mine.rows, item.low, item.low + kSplit, *mine.tile);
  for (int r = 0; r < work.num_rows(); r++) {
    std::memcpy(item.parts[r].value, mine.rows[r].value, sizeof item.parts[r].value);
    item.parts[r].total = sum(load(mine.rows[r].lanes));
    item.parts[r].peak = mine.rows[r].peak;
  }
}

// Each thread computes a run of items that takes about as long as the others'.
template <class T, int D>
void run(const tandem_attention& a, const tandem_step& step, Share share) {
  const Scratch<T, D> mine(a, share.index);
  Part<D>* parts = shared_parts<T, D>(a, step, share.count);
  int64_t total = 0, at = 0;
  for_items<T, D>(a, step, parts, [&](const Item<T, D>& item) { total += item.cost(); });
  const int64_t first = total * share.index / share.count, last = total * (share.index + 1) / share.count;
  for_items<T, D>(a, step, parts, [&](const Item<T, D>& item) {
    const int64_t cost = item.cost(), middle = at + cost / 2;
    at += cost;
    if (first <= middle && middle < last) run_item(item, mine);
  });
}

template <class T, int D>
void run_merge(const tandem_attention& a, const tandem_step& step, Share share) {
  Part<D>* parts = shared_parts<T, D>(a, step, share.count);
  if (!parts) return;
  for (int i = 0; i < step.num_spans; i++) {
    const tandem_span& span = step.spans[i];
    if (!is_narrow(span)) continue;
    const Work<T, D> work = {a, span, 0, span.rows, 0, a.num_kv_heads, nullptr};
    const int count = work.num_rows(), splits = num_splits(span);
    work.for_rows([&](int row, int64_t step_row, int64_t head) {
      if (row % share.count != share.index) return;
      Part<D> sum;
      clear(sum);
      for (int split = 0; split < splits; split++) {
        const Part<D>& part = parts[split * count + row];
        merge(sum, part.value, part.total, part.peak);
      }
      finish(a, step_row, head, sum);
    });
    parts += (int64_t)splits * count;
  }
}

enum Phase { kAttend, kMerge };

template <class T, int D>
void phase(Phase which, const tandem_attention& a, const tandem_step& step, Share share) {
  if (which == kAttend)
    run<T, D>(a, step, share);
  else
    run_merge<T, D>(a, step, share);
}

template <class T>
void pick(Phase which, const tandem_attention& a, const tandem_step& step, Share share) {
  switch (a.head_dim) {
    case 32: return phase<T, 32>(which, a, step, share);
    case 64: return phase<T, 64>(which, a, step, share);
    case 96: return phase<T, 96>(which, a, step, share);
    case 128: return phase<T, 128>(which, a, step, share);
    case 256: return phase<T, 256>(which, a, step, share);
  }
}

}  // namespace

void attention(const tandem_attention& a, const tandem_step& step, Share share) {
  a.dtype == TANDEM_BF16 ? pick<uint16_t>(kAttend, a, step, share) : pick<float>(kAttend, a, step, share);
}

void attention_merge(const tandem_attention& a, const tandem_step& step, Share share) {
  a.dtype == TANDEM_BF16 ? pick<uint16_t>(kMerge, a, step, share) : pick<float>(kMerge, a, step, share);
}

}  // namespace tandem
