// Which processes hold which blocks: key -> a set of (process, tier), for tens of millions of keys.
//
// Keys that exactly the same places hold share one set; where neighbours of a chain do, which is the rule, a query compares one
// number a block. When a process goes, the sets it is in are replaced, not the keys in them: those follow their set's `forward`
// when they are next touched, and a sweep of some keys with every change brings the rest.
//
// Keys are digests, so their bytes serve as hashes. The table is cut into segments that grow one by one: no call is long.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <unordered_set>
#include <utility>
#include <vector>

namespace {

constexpr int kKeyBytes = 16;
constexpr uint32_t kTiers = 3;  // in the order in which their bytes are preferred
constexpr uint32_t kTierBits = 2, kTierMask = (1u << kTierBits) - 1;
constexpr uint32_t kMaxProcesses = 1u << 16;
constexpr uint32_t kNone = UINT32_MAX;
constexpr int kSegmentBits = 10;
constexpr uint32_t kChunk = 1u << 14;  // nodes of one allocation
constexpr uint32_t kSwept = 32;  // keys that a change brings up to date
constexpr uint32_t kSweptForRoom = kChunk;  // and one that finds no room
constexpr size_t kAhead = 16;  // keys of a query or a change whose memory is asked for before it is read

struct Key {
  uint64_t low, high;
  bool operator==(const Key& other) const { return low == other.low && high == other.high; }
};

Key key_of(const char* bytes) {
  Key key;
  std::memcpy(&key, bytes, sizeof key);
  return key;
}

// One key. Older and newer neighbours make the list from the key that came first to the one that came last.
struct Node {
  Key key;
  uint32_t set, older, newer;
};

struct Slot {
  uint32_t node = kNone, tag = 0;
};

// Open addressing with linear probing; a hole is closed at once.
struct Segment {
  std::unique_ptr<Slot[]> slots;
  uint32_t mask = 0, used = 0;
};

// Places that hold some keys together: `process << kTierBits | tier`, sorted. `num_refs` counts nodes and forwards that name
// it, `num_keys` the keys that are held so.
struct Set {
  std::vector<uint32_t> places;
  uint64_t hash = 0;
  uint32_t num_refs = 0, num_keys = 0, forward = kNone;
};

// From one set to another by a place more or less. Sets that are gone are in none: their numbers come back.
struct Change {
  uint32_t from = kNone, place = kNone, to = kNone;
  bool is(uint32_t set, uint32_t other) const { return set == from && other == place; }
};

uint64_t hash_of(const std::vector<uint32_t>& places) {
  uint64_t hash = 0x9E3779B97F4A7C15ull + places.size();
  for (uint32_t place : places) {
    hash ^= place;
    hash *= 0xFF51AFD7ED558CCDull;
    hash ^= hash >> 32;
  }
  return hash;
}

class Map {
 public:
  explicit Map(uint64_t max_keys) : max_keys_(max_keys), segments_(1u << kSegmentBits), known_(16, Hash{&sets_}, Same{&sets_}) {
    sets_.emplace_back();  // 0: nobody. Never freed.
  }

  uint64_t num_keys() const { return num_nodes_ - sets_[0].num_keys; }
  uint64_t num_nodes() const { return num_nodes_; }
  uint64_t num_sets() const { return num_sets_; }
  uint64_t num_entries() const { return num_entries_; }

  uint64_t num_held(uint32_t place) const { return place < held_.size() ? held_[place] : 0; }

  // The keys that the place holds, XORed, and how many. Looks at every key, and changes nothing.
  std::pair<uint64_t, Key> digest(uint32_t place) {
    std::vector<char> has(sets_.size());
    for (size_t id = 0; id < sets_.size(); id++) {
      const std::vector<uint32_t>& places = sets_[id].places;
      has[id] = sets_[id].forward == kNone && std::binary_search(places.begin(), places.end(), place);
    }
    uint64_t num = 0;
    Key all{0, 0};
    for (uint32_t index = oldest_; index != kNone; index = node(index).newer) {
      uint32_t id = node(index).set;
      while (sets_[id].forward != kNone) id = sets_[id].forward;
      if (!has[id]) continue;
      num++;
      all.low ^= node(index).key.low;
      all.high ^= node(index).key.high;
    }
    return {num, all};
  }

  // Whether the place held it not yet.
  bool add(uint32_t place, Key key) {
    sweep();
    if (held_.size() <= place) held_.resize(place + 1);
    uint32_t index = find(key);
    if (index != kNone && settled(index) == 0) {  // nobody held it any more: it comes anew
      erase(index);
      index = kNone;
    }
    if (index == kNone) {
      if (num_nodes_ >= max_keys_) sweep(kSweptForRoom);
      while (num_nodes_ >= max_keys_) drop_oldest();
      index = insert(key);
    }
    const uint32_t before = settled(index);
    if (added_.is(before, place)) {
      move(index, before, added_.to);
    } else {
      const std::vector<uint32_t>& places = sets_[before].places;
      auto at = std::lower_bound(places.begin(), places.end(), place);
      if (at != places.end() && *at == place) return false;
      scratch_.assign(places.begin(), at);
      scratch_.push_back(place);
      scratch_.insert(scratch_.end(), at, places.end());
      const uint32_t after = interned();
      added_ = Change{before, place, after};
      move(index, before, after);
    }
    held_[place]++;
    num_entries_++;
    return true;
  }

  // Whether the place held it.
  bool remove(uint32_t place, Key key) {
    sweep();
    const uint32_t index = find(key);
    if (index == kNone) return false;
    const uint32_t before = settled(index);
    if (!removed_.is(before, place)) {
      if (!without(before, place)) return false;
      removed_ = Change{before, place, interned()};
    }
    move(index, before, removed_.to);
    if (node(index).set == 0) erase(index);
    held_[place]--;
    num_entries_--;
    return true;
  }

  // The place holds nothing any more.
  void clear(uint32_t place) {
    if (place >= held_.size() || !held_[place]) return;
    added_ = removed_ = Change{};
    for (uint32_t id = 1; id < sets_.size(); id++) {
      if (!sets_[id].num_keys || !without(id, place)) continue;
      const uint32_t after = interned();
      known_.erase(id);
      Set& from = sets_[id];
      Set& to = sets_[after];
      num_sets_ -= !after || to.num_keys;
      num_entries_ -= from.num_keys;
      to.num_keys += from.num_keys;
      to.num_refs++;
      from.num_keys = 0;
      from.forward = after;
      std::vector<uint32_t>().swap(from.places);
      left_to_sweep_ = num_allocated_;
    }
    held_[place] = 0;
  }

  // Asks for the memory that the keys some places after `keys[0]` need.
  void prefetch(const Key* keys, size_t num) {
    if (kAhead < num) prefetch_slot(keys[kAhead]);
    if (kAhead / 2 < num) prefetch_node(keys[kAhead / 2]);
  }

  // For each process that holds the first key: how many leading keys it holds, by the first of its tiers that has each. `counts`
  // is [num_processes, kTiers], zero before; processes past it are left out. Returns the longest hit; `found` says whose there are.
  uint32_t longest(const Key* keys, uint32_t num, int32_t* counts, uint32_t num_processes) {
    alive_.clear();
    found_.clear();
    for (uint32_t i = 0; i < std::min(num, (uint32_t)kAhead); i++) prefetch_slot(keys[i]);
    uint32_t current = kNone, first = 0, i = 0;
    for (; i < num; i++) {
      prefetch(keys + i, num - i);
      const uint32_t index = find(keys[i]);
      const uint32_t here = index == kNone ? 0 : settled(index);
      if (here == current) continue;
      if (current != kNone) count(i - first, counts, num_processes);
      if (!narrow(here, current == kNone)) return i;
      if (current == kNone) {
        for (const Alive& alive : alive_) found_.push_back(alive.process);
      }
      current = here, first = i;
    }
    if (current != kNone) count(i - first, counts, num_processes);
    return i;
  }

  // The processes that hold the first key of the last query.
  const std::vector<uint32_t>& found() const { return found_; }

  uint64_t num_bytes() const {
    uint64_t bytes = chunks_.size() * kChunk * sizeof(Node) + sets_.capacity() * sizeof(Set) + held_.capacity() * 8;
    for (const Segment& segment : segments_) bytes += segment.slots ? (segment.mask + 1) * sizeof(Slot) : 0;
    for (const Set& set : sets_) bytes += set.places.capacity() * sizeof(uint32_t);
    return bytes + known_.size() * 24 + known_.bucket_count() * sizeof(void*);
  }

  // Whether counts and links agree with each other.
  bool sound() {
    std::vector<uint64_t> held(held_.size());
    std::vector<uint32_t> refs(sets_.size()), keys(sets_.size());
    uint64_t entries = 0, nodes = 0, sets = 0;
    for (uint32_t index = oldest_; index != kNone; index = node(index).newer, nodes++) {
      if (find(node(index).key) != index) return false;
      refs[node(index).set]++;
      uint32_t id = node(index).set;
      while (sets_[id].forward != kNone) id = sets_[id].forward;
      keys[id]++;
      entries += sets_[id].places.size();
      for (uint32_t place : sets_[id].places) held[place]++;
    }
    for (uint32_t id = 0; id < sets_.size(); id++) {
      if (sets_[id].forward != kNone) refs[sets_[id].forward]++;
      sets += id && sets_[id].num_keys;
    }
    for (uint32_t id = 1; id < sets_.size(); id++) {
      if (refs[id] != sets_[id].num_refs || keys[id] != sets_[id].num_keys) return false;
    }
    return held == held_ && entries == num_entries_ && nodes == num_nodes_ && sets == num_sets_ && keys[0] == sets_[0].num_keys;
  }

 private:
  struct Hash {
    const std::vector<Set>* sets;
    size_t operator()(uint32_t id) const { return (size_t)(*sets)[id].hash; }
  };
  struct Same {
    const std::vector<Set>* sets;
    bool operator()(uint32_t a, uint32_t b) const { return (*sets)[a].places == (*sets)[b].places; }
  };

  Node& node(uint32_t index) { return chunks_[index / kChunk][index % kChunk]; }

  Segment& segment(Key key) { return segments_[key.high >> (64 - kSegmentBits)]; }
  static uint32_t tag_of(Key key) { return (uint32_t)(key.low >> 32); }

  uint32_t find(Key key) {
    const Segment& at = segment(key);
    if (!at.used) return kNone;
    const uint32_t tag = tag_of(key);
    for (uint32_t i = (uint32_t)key.low & at.mask;; i = (i + 1) & at.mask) {
      const Slot slot = at.slots[i];
      if (slot.node == kNone) return kNone;
      if (slot.tag == tag && node(slot.node).key == key) return slot.node;
    }
  }

  void prefetch_slot(Key key) {
    const Segment& at = segment(key);
    if (at.used) __builtin_prefetch(&at.slots[(uint32_t)key.low & at.mask]);
  }

  void prefetch_node(Key key) {
    const Segment& at = segment(key);
    if (!at.used) return;
    const Slot slot = at.slots[(uint32_t)key.low & at.mask];
    if (slot.node != kNone) __builtin_prefetch(&node(slot.node));
  }

  void place_slot(Segment& at, Slot slot, Key key) {
    uint32_t i = (uint32_t)key.low & at.mask;
    while (at.slots[i].node != kNone) i = (i + 1) & at.mask;
    at.slots[i] = slot;
  }

  uint32_t insert(Key key) {
    Segment& at = segment(key);
    if (!at.slots || 3 * (at.used + 1) > 2 * (at.mask + 1)) grow(at);
    if (free_.empty()) add_chunk();
    const uint32_t index = free_.back();
    free_.pop_back();
    place_slot(at, Slot{index, tag_of(key)}, key);
    at.used++;
    node(index) = Node{key, 0, newest_, kNone};
    (newest_ == kNone ? oldest_ : node(newest_).newer) = index;
    newest_ = index;
    num_nodes_++;
    sets_[0].num_keys++;
    return index;
  }

  void grow(Segment& at) {
    const uint32_t size = at.slots ? 2 * (at.mask + 1) : 16;
    Segment larger;
    larger.slots.reset(new Slot[size]);
    larger.mask = size - 1;
    larger.used = at.used;
    for (uint32_t i = 0; at.slots && i <= at.mask; i++) {
      if (at.slots[i].node != kNone) place_slot(larger, at.slots[i], node(at.slots[i].node).key);
    }
    at = std::move(larger);
  }

  void add_chunk() {
    free_.reserve(free_.size() + kChunk);
    chunks_.emplace_back(new Node[kChunk]);
    for (uint32_t i = kChunk; i > 0; i--) free_.push_back(num_allocated_ + i - 1);
    num_allocated_ += kChunk;
    for (uint32_t i = 0; i < kChunk; i++) chunks_.back()[i].set = kNone;
  }

  // Of a node that nobody holds.
  void erase(uint32_t index) {
    const Node gone = node(index);
    Segment& at = segment(gone.key);
    uint32_t hole = (uint32_t)gone.key.low & at.mask;
    while (at.slots[hole].node != index) hole = (hole + 1) & at.mask;
    for (uint32_t i = hole;;) {
      i = (i + 1) & at.mask;
      if (at.slots[i].node == kNone) break;
      const uint32_t home = (uint32_t)node(at.slots[i].node).key.low & at.mask;
      if (((i - home) & at.mask) >= ((i - hole) & at.mask)) {
        at.slots[hole] = at.slots[i];
        hole = i;
      }
    }
    at.slots[hole] = Slot{};
    at.used--;
    (gone.older == kNone ? oldest_ : node(gone.older).newer) = gone.newer;
    (gone.newer == kNone ? newest_ : node(gone.newer).older) = gone.older;
    node(index).set = kNone;
    free_.push_back(index);
    num_nodes_--;
    sets_[0].num_keys--;
  }

  void drop_oldest() {
    const uint32_t index = oldest_, set = settled(index);
    for (uint32_t place : sets_[set].places) held_[place]--;
    num_entries_ -= sets_[set].places.size();
    move(index, set, 0);
    erase(index);
  }

  // The set that a node's keys are held by now.
  uint32_t settled(uint32_t index) {
    const uint32_t old = node(index).set;
    if (sets_[old].forward == kNone) return old;
    uint32_t id = old;
    while (sets_[id].forward != kNone) id = sets_[id].forward;
    node(index).set = id;
    sets_[id].num_refs++;
    release(old);
    return id;
  }

  void move(uint32_t index, uint32_t from, uint32_t to) {
    sets_[from].num_keys--;
    if (from && !sets_[from].num_keys) retire(from);
    if (to && !sets_[to].num_keys) num_sets_++;
    sets_[to].num_keys++;
    sets_[to].num_refs++;
    node(index).set = to;
    release(from);
  }

  // Nobody holds anything so any more.
  void retire(uint32_t id) {
    known_.erase(id);
    num_sets_--;
    for (Change* last : {&added_, &removed_}) {
      if (id == last->from || id == last->to) *last = Change{};
    }
  }

  void release(uint32_t id) {
    while (id != kNone && id && --sets_[id].num_refs == 0) {
      const uint32_t forward = sets_[id].forward;
      std::vector<uint32_t>().swap(sets_[id].places);
      sets_[id].forward = kNone;
      free_sets_.push_back(id);
      id = forward;
    }
  }

  // `scratch_`: the set's places but this one. False if it isn't among them.
  bool without(uint32_t id, uint32_t place) {
    const std::vector<uint32_t>& places = sets_[id].places;
    auto at = std::lower_bound(places.begin(), places.end(), place);
    if (at == places.end() || *at != place) return false;
    scratch_.assign(places.begin(), at);
    scratch_.insert(scratch_.end(), at + 1, places.end());
    return true;
  }

  // The set of the places in `scratch_`.
  uint32_t interned() {
    if (scratch_.empty()) return 0;
    uint32_t id;
    if (free_sets_.empty()) {
      id = (uint32_t)sets_.size();
      sets_.emplace_back();
      free_sets_.reserve(sets_.capacity());
    } else {
      id = free_sets_.back();
      free_sets_.pop_back();
    }
    Set& set = sets_[id];
    set.places = scratch_;
    set.hash = hash_of(scratch_);
    const auto [found, fresh] = known_.insert(id);
    if (fresh) return id;
    const uint32_t other = *found;
    std::vector<uint32_t>().swap(set.places);
    free_sets_.push_back(id);
    return other;
  }

  void sweep(uint32_t most = kSwept) {
    for (uint32_t i = 0; i < most && left_to_sweep_; i++) {
      left_to_sweep_--;
      if (node(left_to_sweep_).set == kNone) continue;
      if (settled(left_to_sweep_) == 0) erase(left_to_sweep_);
    }
  }

  // Those alive that have a place in `here`; false if nobody is.
  bool narrow(uint32_t here, bool first) {
    const std::vector<uint32_t>& places = sets_[here].places;
    next_.clear();
    size_t at = 0;
    for (size_t i = 0; i < places.size();) {
      const uint32_t process = places[i] >> kTierBits, tier = places[i] & kTierMask;
      while (i < places.size() && places[i] >> kTierBits == process) i++;
      if (!first) {
        while (at < alive_.size() && alive_[at].process < process) at++;
        if (at == alive_.size()) break;
        if (alive_[at].process != process) continue;
      }
      next_.push_back(Alive{process, tier});
    }
    alive_.swap(next_);
    return !alive_.empty();
  }

  void count(uint32_t num, int32_t* counts, uint32_t num_processes) {
    for (const Alive& alive : alive_) {
      if (alive.process < num_processes) counts[alive.process * kTiers + alive.tier] += (int32_t)num;
    }
  }

  struct Alive {
    uint32_t process, tier;
  };

  uint64_t max_keys_, num_nodes_ = 0, num_sets_ = 0, num_entries_ = 0;
  std::vector<Segment> segments_;
  std::vector<std::unique_ptr<Node[]>> chunks_;
  std::vector<uint32_t> free_, free_sets_;
  std::vector<Set> sets_;
  std::unordered_set<uint32_t, Hash, Same> known_;
  std::vector<uint64_t> held_;
  std::vector<uint32_t> scratch_, found_;
  std::vector<Alive> alive_, next_;
  uint32_t oldest_ = kNone, newest_ = kNone, num_allocated_ = 0, left_to_sweep_ = 0;
  Change added_, removed_;  // the last ones: a chain's neighbours mostly change alike
};

// --- the Python type ----------------------------------------------------------------------------------------------------------

struct BlockMap {
  PyObject_HEAD
  Map* map;
  std::vector<Key>* keys;
  uint64_t num_ignored;
};

template <class Do>
PyObject* guarded(Do&& what) {
  try {
    return what();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// The keys of a list or tuple into `self->keys`; of what is no key, `num_ignored` of them, if that may be. False with an exception.
bool take_keys(BlockMap* self, PyObject* given, bool only_keys) {
  PyObject* items = PySequence_Fast(given, "keys must be a list or tuple");
  if (!items) return false;
  const Py_ssize_t num = PySequence_Fast_GET_SIZE(items);
  self->keys->clear();
  self->keys->reserve((size_t)num);
  for (Py_ssize_t i = 0; i < num; i++) {
    PyObject* item = PySequence_Fast_GET_ITEM(items, i);
    if (PyBytes_Check(item) && PyBytes_GET_SIZE(item) == kKeyBytes) {
      self->keys->push_back(key_of(PyBytes_AS_STRING(item)));
    } else if (only_keys) {
      PyErr_Format(PyExc_ValueError, "%R is no key of %d bytes", item, kKeyBytes);
      Py_DECREF(items);
      return false;
    } else {
      self->num_ignored++;
    }
  }
  Py_DECREF(items);
  return true;
}

bool is_place(unsigned int process, unsigned int tier) {
  if (process < kMaxProcesses && tier < kTiers) return true;
  PyErr_Format(PyExc_ValueError, "process %u, tier %u: must be below %u and %u", process, tier, kMaxProcesses, kTiers);
  return false;
}

PyObject* block_map_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"max_keys", nullptr};
  unsigned long long max_keys;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "K", const_cast<char**>(names), &max_keys)) return nullptr;
  if (max_keys < 1 || max_keys >= kNone) {
    PyErr_Format(PyExc_ValueError, "max_keys is %llu, must be within 1 to %u", max_keys, kNone - 1);
    return nullptr;
  }
  BlockMap* self = (BlockMap*)type->tp_alloc(type, 0);
  if (!self) return nullptr;
  return guarded([&]() -> PyObject* {
    self->map = new Map(max_keys);
    self->keys = new std::vector<Key>();
    return (PyObject*)self;
  });
}

void block_map_dealloc(BlockMap* self) {
  delete self->map;
  delete self->keys;
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free((PyObject*)self);
  Py_DECREF(type);
}

template <bool kAdd>
PyObject* change(BlockMap* self, PyObject* args) {
  unsigned int process, tier;
  PyObject* given;
  if (!PyArg_ParseTuple(args, "IIO", &process, &tier, &given) || !is_place(process, tier)) return nullptr;
  return guarded([&]() -> PyObject* {
    if (!take_keys(self, given, false)) return nullptr;
    const uint32_t place = process << kTierBits | tier;
    const std::vector<Key>& keys = *self->keys;
    unsigned long num = 0;
    for (size_t i = 0; i < keys.size(); i++) {
      self->map->prefetch(keys.data() + i, keys.size() - i);
      num += kAdd ? self->map->add(place, keys[i]) : self->map->remove(place, keys[i]);
    }
    return PyLong_FromUnsignedLong(num);
  });
}

PyObject* clear(BlockMap* self, PyObject* args) {
  unsigned int process;
  if (!PyArg_ParseTuple(args, "I", &process) || !is_place(process, 0)) return nullptr;
  return guarded([&]() -> PyObject* {
    for (uint32_t tier = 0; tier < kTiers; tier++) self->map->clear(process << kTierBits | tier);
    Py_RETURN_NONE;
  });
}

PyObject* longest(BlockMap* self, PyObject* args) {
  PyObject* given;
  Py_buffer counts;
  if (!PyArg_ParseTuple(args, "Ow*", &given, &counts)) return nullptr;
  PyObject* result = nullptr;
  if (counts.len % (Py_ssize_t)(kTiers * sizeof(int32_t))) {
    PyErr_Format(PyExc_ValueError, "counts has %zd bytes, must be int32 [num_processes, %u]", counts.len, kTiers);
  } else {
    result = guarded([&]() -> PyObject* {
      if (!take_keys(self, given, true)) return nullptr;
      std::memset(counts.buf, 0, (size_t)counts.len);
      const uint32_t num_processes = (uint32_t)((size_t)counts.len / (kTiers * sizeof(int32_t)));
      const uint32_t num = (uint32_t)self->keys->size();
      const uint32_t longest = self->map->longest(self->keys->data(), num, (int32_t*)counts.buf, num_processes);
      const std::vector<uint32_t>& processes = self->map->found();
      PyObject* found = PyList_New((Py_ssize_t)processes.size());
      for (size_t i = 0; found && i < processes.size(); i++) {
        PyObject* process = PyLong_FromUnsignedLong(processes[i]);
        if (!process) Py_CLEAR(found);
        if (found) PyList_SET_ITEM(found, (Py_ssize_t)i, process);
      }
      return found ? Py_BuildValue("(NI)", found, longest) : nullptr;
    });
  }
  PyBuffer_Release(&counts);
  return result;
}

PyObject* num_held(BlockMap* self, PyObject* args) {
  unsigned int process;
  if (!PyArg_ParseTuple(args, "I", &process) || !is_place(process, 0)) return nullptr;
  uint64_t num = 0;
  for (uint32_t tier = 0; tier < kTiers; tier++) num += self->map->num_held(process << kTierBits | tier);
  return PyLong_FromUnsignedLongLong(num);
}

PyObject* digest(BlockMap* self, PyObject* args) {
  unsigned int process, tier;
  if (!PyArg_ParseTuple(args, "II", &process, &tier) || !is_place(process, tier)) return nullptr;
  return guarded([&]() -> PyObject* {
    const std::pair<uint64_t, Key> found = self->map->digest(process << kTierBits | tier);
    return Py_BuildValue("Ky#", (unsigned long long)found.first, (const char*)&found.second, (Py_ssize_t)kKeyBytes);
  });
}

PyObject* sound(BlockMap* self, PyObject*) {
  return guarded([&]() -> PyObject* { return PyBool_FromLong(self->map->sound()); });
}

Py_ssize_t length(BlockMap* self) { return (Py_ssize_t)self->map->num_keys(); }
PyObject* get_entries(BlockMap* self, void*) { return PyLong_FromUnsignedLongLong(self->map->num_entries()); }
PyObject* get_sets(BlockMap* self, void*) { return PyLong_FromUnsignedLongLong(self->map->num_sets()); }
PyObject* get_bytes(BlockMap* self, void*) { return PyLong_FromUnsignedLongLong(self->map->num_bytes()); }
PyObject* get_ignored(BlockMap* self, void*) { return PyLong_FromUnsignedLongLong(self->num_ignored); }

PyMethodDef methods[] = {
    {"add", (PyCFunction)change<true>, METH_VARARGS, nullptr},
    {"remove", (PyCFunction)change<false>, METH_VARARGS, nullptr},
    {"clear", (PyCFunction)clear, METH_VARARGS, nullptr},
    {"longest", (PyCFunction)longest, METH_VARARGS, nullptr},
    {"num_held", (PyCFunction)num_held, METH_VARARGS, nullptr},
    {"digest", (PyCFunction)digest, METH_VARARGS, nullptr},
    {"sound", (PyCFunction)sound, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef attributes[] = {
    {"num_entries", (getter)get_entries, nullptr, nullptr, nullptr},
    {"num_place_sets", (getter)get_sets, nullptr, nullptr, nullptr},
    {"num_bytes", (getter)get_bytes, nullptr, nullptr, nullptr},
    {"num_ignored", (getter)get_ignored, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, (void*)block_map_new}, {Py_tp_dealloc, (void*)block_map_dealloc}, {Py_tp_methods, methods},
    {Py_tp_getset, attributes},        {Py_sq_length, (void*)length},             {0, nullptr},
};

PyType_Spec spec = {"router._block_map.BlockMap", sizeof(BlockMap), 0, Py_TPFLAGS_DEFAULT, slots};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_block_map", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__block_map() {
  PyObject* made = PyModule_Create(&module);
  if (!made) return nullptr;
  PyObject* type = PyType_FromSpec(&spec);
  if (!type || PyModule_AddObject(made, "BlockMap", type) < 0) {
    Py_XDECREF(type);
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}
