// The cost of every worker for one request, in one pass, and from whom to fetch: what `router/policy/weigh.py` and `sources.py` say
// in numpy, some ten times faster. Their formulas, their order of operations and their names; `tests/router/test_weigh.py` holds
// the two together.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

// Rows of the fleet's table (`router/fleet.py`).
enum Column {
  kTouchedAt, kSequences, kContext, kFreeBlocks, kMaxRunning, kBase, kToken, kPair, kSequence, kContextPrice, kStepTokens,
  kFetchRate, kSendsUntil, kOutstanding, kUncomputed, kDiskRate, kNumColumns
};
constexpr int kSlots = 8, kTiers = 3, kMaxPlaces = 8;

// Rows of the result.
enum Out { kCost, kQueue, kFetch, kCompute, kOthers, kHit, kLocal, kStream, kDelay, kRoom, kNumOut };

struct Request {
  double num_tokens, block_size, slab_bytes, answer_tokens, num_samples, num_blocks, due_s, tpot_s, now_s;
};

struct Terms {
  double fetch_setup_s, handover_s, short_suffix_tokens, queue, fetch, others, stream, tpot, room;
};

struct Fleet {
  const double* table;
  const double* due;
  const double* work;
  const float* rates;
  const uint8_t* reachable;
  const int64_t* homes;
  int64_t size;

  double at(int column, int64_t number) const { return table[column * size + number]; }

  double rate(int64_t sink, int64_t source) const {
    const double measured = rates[sink * size + source];
    return measured > 0 ? measured : at(kFetchRate, sink);
  }
};

struct Place {
  int64_t number;
  double blocks, disk_blocks;
};

double blocks_at(const int32_t* counts, int64_t rows, int64_t number) {
  if (number >= rows) return 0;
  const int32_t* tiers = counts + number * kTiers;
  return (double)tiers[0] + tiers[1] + tiers[2];
}

// Prefill at one worker: its best option. `here` if it is a decode worker.
void prefill_at(const Fleet& fleet, const Request& request, const Terms& terms, double each_per_s, double busy, int64_t number,
                bool here, double local, const Place* places, int num_places, double* out, int64_t n, int64_t i) {
  double before_s = 0, all_s = 0;
  int behind = 0;
  for (int slot = 0; slot < kSlots; slot++) {
    const double work = fleet.work[slot * fleet.size + number];
    const bool first = fleet.due[slot * fleet.size + number] <= request.due_s;
    all_s += work;
    if (first) before_s += work;
    behind += work > 0 && !first;
  }
  const double passed_s = request.now_s - fleet.at(kTouchedAt, number);
  double queue_s = std::max(before_s - passed_s, 0.0);
  if (!(all_s > passed_s)) behind = 0;
  const double generating = fleet.at(kSequences, number);
  double step_s = fleet.at(kBase, number);
  if (here) step_s += generating * fleet.at(kSequence, number) + fleet.at(kContext, number) * fleet.at(kContextPrice, number);
  // Where streams go on, a step runs already: half of it is still to come.
  if (here && generating > 0) queue_s = std::max(queue_s, step_s / 2);
  const double token_s = fleet.at(kToken, number), pair_s = fleet.at(kPair, number);
  const double step_tokens = fleet.at(kStepTokens, number);

  double best = INFINITY;
  for (int option = 0; option <= num_places; option++) {
    double blocks = local, fetch_s = 0;
    if (option) {
      const Place& place = places[option - 1];
      const double extra = place.blocks - local;
      if (extra <= 0 || !fleet.reachable[place.number]) continue;
      blocks = place.blocks;
      fetch_s = std::max(fleet.at(kSendsUntil, place.number) - request.now_s, 0.0) +
                extra * request.slab_bytes / fleet.rate(number, place.number);
      fetch_s += terms.fetch_setup_s + place.disk_blocks * request.slab_bytes / fleet.at(kDiskRate, place.number);
    }
    const double hit = std::min(blocks * request.block_size, request.num_tokens - 1.0);
    const double suffix = request.num_tokens - hit;
    const double compute_s = std::ceil(suffix / step_tokens) * step_s + suffix * (token_s + pair_s * (hit + (suffix + 1.0) / 2));
    const double ready_s = std::max(terms.queue * queue_s, terms.fetch * fetch_s) + compute_s;
    double followers = each_per_s * (ready_s - compute_s / 2) / (1.0 - busy) + behind;
    if (here) followers += std::max(generating, std::max(1.0 - terms.short_suffix_tokens / suffix, 0.0));
    const double others_s = terms.others * followers * compute_s;
    if (ready_s + others_s < best) {
      best = ready_s + others_s;
      out[kCost * n + i] = best;
      out[kFetch * n + i] = fetch_s;
      out[kCompute * n + i] = compute_s;
      out[kOthers * n + i] = others_s;
      out[kHit * n + i] = hit;
    }
  }
  out[kQueue * n + i] = queue_s;
  out[kLocal * n + i] = local;
}

// The stream at one decode worker.
void decode_at(const Fleet& fleet, const Request& request, const Terms& terms, int64_t number, double* out, int64_t n, int64_t i) {
  const double sequences = fleet.at(kSequences, number), context = fleet.at(kContext, number);
  const double own_context = request.num_samples * (request.num_tokens + request.answer_tokens / 2);
  const double longer_s = request.num_samples * fleet.at(kSequence, number) + own_context * fleet.at(kContextPrice, number);
  const double before_s =
      fleet.at(kBase, number) + sequences * fleet.at(kSequence, number) + context * fleet.at(kContextPrice, number);
  const double step_s = before_s + longer_s;
  const double num_steps = request.answer_tokens / request.num_samples;
  double others_s = sequences * (num_steps * terms.others) * longer_s;
  if (request.tpot_s > 0)
    others_s += (sequences + request.num_samples) * (num_steps * terms.tpot) * std::max(step_s - request.tpot_s, 0.0);
  const double lacking = request.num_blocks - fleet.at(kFreeBlocks, number);
  const double crowded = sequences + request.num_samples - fleet.at(kMaxRunning, number);
  double room_s = 0;
  if (sequences > 0 && (lacking > 0 || crowded > 0)) {
    const double held = std::max(context / request.block_size, 1.0);
    room_s = std::max(std::max(lacking / held, crowded / std::max(sequences, 1.0)), 0.0) * (num_steps * before_s) * terms.room;
  }
  out[kStream * n + i] = terms.stream * num_steps * step_s;
  out[kDelay * n + i] = others_s;
  out[kRoom * n + i] = room_s;
}

// One of the smallest, by a number drawn in [0, 1) if there are several.
struct Cheapest {
  double best = INFINITY;
  std::vector<int64_t> found;

  void see(double cost, int64_t at) {
    if (cost <= best * (1 + 1e-9)) {
      if (cost < best * (1 - 1e-9)) found.clear();
      best = std::min(best, cost);
      found.push_back(at);
    }
  }
  int64_t pick(double drawn, int64_t otherwise) const {
    if (found.empty()) return otherwise;  // no cost is a number
    return found[std::min((size_t)(drawn * (double)found.size()), found.size() - 1)];
  }
};

struct Buffers {
  Py_buffer views[10];
  int num = 0;
  ~Buffers() {
    for (int i = 0; i < num; i++) PyBuffer_Release(&views[i]);
  }
  // The next buffer, of at least `bytes`.
  void* take(PyObject* object, size_t bytes, bool writable = false) {
    if (PyObject_GetBuffer(object, &views[num], (writable ? PyBUF_WRITABLE : 0) | PyBUF_C_CONTIGUOUS)) return nullptr;
    num++;
    if ((size_t)views[num - 1].len < bytes) {
      PyErr_Format(PyExc_ValueError, "array %d has %zd bytes, must have %zu", num, views[num - 1].len, bytes);
      return nullptr;
    }
    return views[num - 1].buf;
  }
};

PyObject* weigh(PyObject*, PyObject* args) {
  PyObject *table, *due, *work, *rates, *reachable, *homes, *workers, *counts, *holders, *out;
  Py_ssize_t num_prefills;
  int max_places, max_prefills;
  Request request;
  Terms terms;
  double per_s, busy, drawn, drawn_too;
  if (!PyArg_ParseTuple(args, "(OOOOOO)OnOO!O(ddddddddd)(ddddddddd)ddddii", &table, &due, &work, &rates, &reachable, &homes, &workers,
                        &num_prefills, &counts, &PyList_Type, &holders, &out, &request.num_tokens, &request.block_size,
                        &request.slab_bytes, &request.answer_tokens, &request.num_samples, &request.num_blocks, &request.due_s,
                        &request.tpot_s, &request.now_s, &terms.fetch_setup_s, &terms.handover_s, &terms.short_suffix_tokens,
                        &terms.queue, &terms.fetch, &terms.others, &terms.stream, &terms.tpot, &terms.room, &per_s, &busy, &drawn,
                        &drawn_too, &max_places, &max_prefills))
    return nullptr;
  Buffers buffers;
  Fleet fleet;
  const int64_t* numbers = (const int64_t*)buffers.take(workers, 0);
  if (!numbers) return nullptr;
  const int64_t n = buffers.views[0].len / 8;
  if (!(fleet.homes = (const int64_t*)buffers.take(homes, 8))) return nullptr;
  const size_t size = (size_t)(fleet.size = buffers.views[1].len / 8);
  if (!(fleet.table = (const double*)buffers.take(table, size * kNumColumns * 8))) return nullptr;
  if (!(fleet.due = (const double*)buffers.take(due, size * kSlots * 8))) return nullptr;
  if (!(fleet.work = (const double*)buffers.take(work, size * kSlots * 8))) return nullptr;
  if (!(fleet.rates = (const float*)buffers.take(rates, size * size * 4))) return nullptr;
  if (!(fleet.reachable = (const uint8_t*)buffers.take(reachable, size))) return nullptr;
  const int32_t* hits = (const int32_t*)buffers.take(counts, 0);
  if (!hits) return nullptr;
  const int64_t rows = buffers.views[7].len / (kTiers * 4);
  double* result = (double*)buffers.take(out, (size_t)n * kNumOut * 8, true);
  if (!result) return nullptr;
  if (num_prefills < 0 || num_prefills >= n || max_places < 0 || max_places >= kMaxPlaces || max_prefills < 1) {
    PyErr_Format(PyExc_ValueError, "%zd prefill workers of %lld, %d places", num_prefills, (long long)n, max_places);
    return nullptr;
  }
  for (int64_t i = 0; i < n; i++)
    if (numbers[i] < 0 || numbers[i] >= fleet.size) {
      PyErr_Format(PyExc_ValueError, "worker %lld, must be below %lld", (long long)numbers[i], (long long)fleet.size);
      return nullptr;
    }

  // Who holds most; of those who hold as much, who is free to send soonest.
  std::vector<Place> best;
  const Py_ssize_t num_holders = PyList_GET_SIZE(holders);
  std::vector<std::pair<std::pair<double, double>, int64_t>> order;
  for (Py_ssize_t i = 0; i < num_holders; i++) {
    const long long number = PyLong_AsLongLong(PyList_GET_ITEM(holders, i));
    if (number == -1 && PyErr_Occurred()) return nullptr;
    if (number < 0 || number >= fleet.size || number >= rows) continue;
    const double blocks = fleet.reachable[number] ? blocks_at(hits, rows, number) : 0.0;
    order.push_back({{-blocks, std::max(fleet.at(kSendsUntil, number) - request.now_s, 0.0)}, number});
  }
  const size_t num_best = std::min(order.size(), (size_t)max_places);
  std::partial_sort(order.begin(), order.begin() + (long)num_best, order.end());
  for (size_t i = 0; i < num_best; i++) {
    const int64_t number = order[i].second;
    best.push_back({number, blocks_at(hits, rows, number), (double)hits[number * kTiers + 2]});
  }

  Place places[kMaxPlaces];
  Cheapest here;
  for (int64_t i = 0; i < n; i++) {
    const int64_t number = numbers[i];
    int num_places = 0;
    if (num_holders) {
      const int64_t home = fleet.homes[number];
      if (home >= 0 && home < rows && home < fleet.size)
        places[num_places++] = {home, blocks_at(hits, rows, home), (double)hits[home * kTiers + 2]};
      for (const Place& place : best) places[num_places++] = place;
    }
    const bool decodes = i >= num_prefills;
    const double local = num_holders ? blocks_at(hits, rows, number) : 0.0;
    prefill_at(fleet, request, terms, per_s, busy, number, decodes, local, places, num_places, result, n, i);
    if (decodes) {
      decode_at(fleet, request, terms, number, result, n, i);
      here.see(result[kCost * n + i] + result[kStream * n + i] + result[kDelay * n + i] + result[kRoom * n + i], i);
    }
  }
  if (!num_prefills) return Py_BuildValue("(LdLLd)", (long long)here.pick(drawn, num_prefills), here.best, -1LL, -1LL, INFINITY);

  // The best few prefill workers with each decode worker. Ties among them are broken by where the search begins.
  std::vector<std::pair<double, int64_t>> few;
  const int64_t shift = (int64_t)(drawn_too * (double)num_prefills);
  for (int64_t i = 0; i < num_prefills; i++)
    few.push_back({result[kCost * n + i], (i - shift + num_prefills) % num_prefills});
  const size_t num_few = std::min(few.size(), (size_t)max_prefills);
  std::partial_sort(few.begin(), few.begin() + (long)num_few, few.end());
  Cheapest pair;
  const double num_blocks = std::ceil(request.num_tokens / request.block_size);
  for (size_t k = 0; k < num_few; k++) {
    const int64_t p = (few[k].second + shift) % num_prefills;
    for (int64_t i = num_prefills; i < n; i++) {
      const double missing = std::max(num_blocks - result[kLocal * n + i], 0.0);
      const double late_s = missing * request.slab_bytes / fleet.rate(numbers[i], numbers[p]) - result[kCompute * n + p];
      const double decode_s = result[kStream * n + i] + result[kDelay * n + i] + result[kRoom * n + i];
      pair.see(std::max(late_s, 0.0) + (result[kCost * n + p] + decode_s + terms.handover_s), p * n + i);
    }
  }
  const int64_t at = pair.pick(drawn, num_prefills);
  return Py_BuildValue("(LdLLd)", (long long)here.pick(drawn, num_prefills), here.best, (long long)(at / n), (long long)(at % n), pair.best);
}

// Numbers of a list or tuple; false with an exception.
bool take_numbers(PyObject* given, std::vector<int64_t>& numbers) {
  PyObject* items = PySequence_Fast(given, "numbers must be a list or tuple");
  if (!items) return false;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items); i++) {
    numbers.push_back(PyLong_AsLongLong(PySequence_Fast_GET_ITEM(items, i)));
    if (numbers.back() == -1 && PyErr_Occurred()) break;
  }
  Py_DECREF(items);
  return !PyErr_Occurred();
}

PyObject* sources(PyObject*, PyObject* args) {
  PyObject *counts, *holders, *reachable, *but;
  long more_than;
  Py_ssize_t most;
  if (!PyArg_ParseTuple(args, "OOOlOn", &counts, &holders, &reachable, &more_than, &but, &most)) return nullptr;
  Buffers buffers;
  const int32_t* hits = (const int32_t*)buffers.take(counts, 0);
  const uint8_t* reached = hits ? (const uint8_t*)buffers.take(reachable, 0) : nullptr;
  std::vector<int64_t> numbers, left_out;
  if (!reached || !take_numbers(holders, numbers) || !take_numbers(but, left_out)) return nullptr;
  const int64_t rows = std::min(buffers.views[0].len / (Py_ssize_t)(kTiers * sizeof(int32_t)), buffers.views[1].len);

  // Most blocks first; then the fewest in slower tiers; then in the order of the holders.
  struct Source {
    int64_t number, blocks, slowness;
  };
  std::vector<Source> found;
  for (const int64_t number : numbers) {
    if (number < 0 || number >= rows) {
      PyErr_Format(PyExc_ValueError, "holder %lld, must be below %lld", (long long)number, (long long)rows);
      return nullptr;
    }
    const int32_t* tiers = hits + number * kTiers;
    const int64_t blocks = (int64_t)tiers[0] + tiers[1] + tiers[2];
    if (blocks <= more_than || !reached[number]) continue;
    if (std::find(left_out.begin(), left_out.end(), number) != left_out.end()) continue;
    found.push_back({number, blocks, tiers[1] + 2 * (int64_t)tiers[2]});
  }
  std::stable_sort(found.begin(), found.end(), [](const Source& a, const Source& b) {
    return a.blocks != b.blocks ? a.blocks > b.blocks : a.slowness < b.slowness;
  });
  const Py_ssize_t num = std::min((Py_ssize_t)found.size(), most);
  PyObject* list = PyList_New(num);
  for (Py_ssize_t i = 0; list && i < num; i++) {
    const Source& source = found[(size_t)i];
    const int32_t* tiers = hits + source.number * kTiers;
    PyObject* one = Py_BuildValue("(LiL)", (long long)source.number, tiers[2] ? 2 : tiers[1] ? 1 : 0, (long long)source.blocks);
    if (!one) Py_CLEAR(list);
    if (list) PyList_SET_ITEM(list, i, one);
  }
  return list;
}

PyMethodDef methods[] = {
    {"weigh", weigh, METH_VARARGS, "See router/_weigh.pyi."},
    {"sources", sources, METH_VARARGS, "See router/_weigh.pyi."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_weigh", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__weigh() { return PyModule_Create(&module); }
