// What a simulated tier holds: at most so many keys, least recently used first. `tandem/sim/cache.py` says what it does.
//
// A simulation has millions of keys in hundreds of these, so time goes into waiting for memory: what a chain's next keys need is
// asked for before it is read. Keys are digests, so their bytes serve as hashes.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

constexpr Py_ssize_t kKeyBytes = 16;
constexpr uint32_t kNone = UINT32_MAX;
constexpr size_t kAhead = 8;  // keys of a chain whose slots are asked for before they are read; half as many, whose nodes are

struct Key {
  uint64_t low, high;
  bool operator==(const Key& other) const { return low == other.low && high == other.high; }
};

Key key_of(PyObject* object) {
  Key key;
  std::memcpy(&key, PyBytes_AS_STRING(object), sizeof key);
  return key;
}

// One key. Older and newer neighbours make the list from the one that goes next to the one that was used last.
struct Node {
  Key key;
  PyObject* object = nullptr;  // owned
  uint32_t older = kNone, newer = kNone;
};

struct Slot {
  uint32_t node = kNone, tag = 0;
};

class Lru {
 public:
  Lru() : slots_(16) {}

  size_t size() const { return nodes_.size() - free_.size(); }

  uint32_t find(Key key) const {
    for (size_t i = home(key);; i = next(i)) {
      const Slot slot = slots_[i];
      if (slot.node == kNone || (slot.tag == tag_of(key) && nodes_[slot.node].key == key)) return slot.node;
    }
  }

  // `visit(position, node)` for each key, kNone for one that isn't here, in their order or the reverse, until it returns false.
  template <bool kReverse, class Visit>
  void find_each(const std::vector<Key>& keys, Visit&& visit) const {
    const size_t num = keys.size();
    const auto at = [num](size_t i) { return kReverse ? num - 1 - i : i; };
    for (size_t i = 0; i < std::min(num, kAhead); i++) prefetch_slot(keys[at(i)]);
    for (size_t i = 0; i < num; i++) {
      if (i + kAhead < num) prefetch_slot(keys[at(i + kAhead)]);
      if (i + kAhead / 2 < num) prefetch_node(keys[at(i + kAhead / 2)]);
      if (!visit(at(i), find(keys[at(i)]))) return;
    }
  }

  void touch(uint32_t index) {
    if (index == newest_) return;
    unlink(index);
    link(index);
  }

  // Takes over a reference.
  void insert(Key key, PyObject* object) {
    if (3 * (size() + 1) > 2 * slots_.size()) grow();
    uint32_t index = (uint32_t)nodes_.size();
    if (free_.empty()) {
      nodes_.emplace_back();
      free_.reserve(nodes_.capacity());
    } else {
      index = free_.back();
      free_.pop_back();
    }
    nodes_[index].key = key;
    nodes_[index].object = object;
    place(Slot{index, tag_of(key)}, key);
    link(index);
  }

  // Returns a reference.
  PyObject* pop_oldest() {
    const uint32_t index = oldest_;
    size_t hole = home(nodes_[index].key);
    while (slots_[hole].node != index) hole = next(hole);
    for (size_t i = next(hole); slots_[i].node != kNone; i = next(i)) {  // a hole is closed at once
      const size_t from = home(nodes_[slots_[i].node].key);
      if (((i - from) & mask()) < ((i - hole) & mask())) continue;
      slots_[hole] = slots_[i];
      hole = i;
    }
    slots_[hole] = Slot{};
    unlink(index);
    free_.push_back(index);
    PyObject* object = nodes_[index].object;
    nodes_[index].object = nullptr;
    if (oldest_ != kNone) prefetch_slot(nodes_[oldest_].key);
    return object;
  }

 private:
  static uint32_t tag_of(Key key) { return (uint32_t)(key.low >> 32); }
  size_t mask() const { return slots_.size() - 1; }
  size_t home(Key key) const { return (size_t)key.low & mask(); }
  size_t next(size_t slot) const { return (slot + 1) & mask(); }

  void prefetch_slot(Key key) const { __builtin_prefetch(&slots_[home(key)]); }

  void prefetch_node(Key key) const {
    const Slot slot = slots_[home(key)];
    if (slot.node != kNone) __builtin_prefetch(&nodes_[slot.node]);
  }

  void place(Slot slot, Key key) {
    size_t i = home(key);
    while (slots_[i].node != kNone) i = next(i);
    slots_[i] = slot;
  }

  void grow() {
    slots_.assign(2 * slots_.size(), Slot{});
    for (uint32_t index = oldest_; index != kNone; index = nodes_[index].newer) {
      place(Slot{index, tag_of(nodes_[index].key)}, nodes_[index].key);
    }
  }

  void link(uint32_t index) {
    nodes_[index].older = newest_;
    nodes_[index].newer = kNone;
    (newest_ == kNone ? oldest_ : nodes_[newest_].newer) = index;
    newest_ = index;
  }

  void unlink(uint32_t index) {
    const Node& node = nodes_[index];
    (node.older == kNone ? oldest_ : nodes_[node.older].newer) = node.newer;
    (node.newer == kNone ? newest_ : nodes_[node.newer].older) = node.older;
  }

  std::vector<Node> nodes_;
  std::vector<uint32_t> free_;
  std::vector<Slot> slots_;  // open addressing with linear probing; a power of two of them
  uint32_t oldest_ = kNone, newest_ = kNone;
};

// --- the Python type ----------------------------------------------------------------------------------------------------------

struct Cache {
  PyObject_HEAD
  Lru* held;
  std::vector<Key>* keys;
  Py_ssize_t capacity;
};

template <class Do>
auto guarded(Do&& what, decltype(what()) failed) -> decltype(what()) {
  try {
    return what();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
    return failed;
  }
}

bool is_key(PyObject* item) {
  if (PyBytes_Check(item) && PyBytes_GET_SIZE(item) == kKeyBytes) return true;
  PyErr_Format(PyExc_ValueError, "%R is no key of %zd bytes", item, kKeyBytes);
  return false;
}

// A list or tuple, its keys in `self->keys`; null with an exception.
PyObject* take_keys(Cache* self, PyObject* given) {
  PyObject* items = PySequence_Fast(given, "keys must be a list or tuple");
  if (!items) return nullptr;
  self->keys->clear();
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items); i++) {
    PyObject* item = PySequence_Fast_GET_ITEM(items, i);
    if (!is_key(item)) {
      Py_DECREF(items);
      return nullptr;
    }
    self->keys->push_back(key_of(item));
  }
  return items;
}

// Appends an owned reference; false with an exception.
bool append(PyObject* list, PyObject* item) {
  const bool appended = PyList_Append(list, item) == 0;
  Py_DECREF(item);
  return appended;
}

PyObject* shrink(Cache* self, PyObject*) {
  PyObject* gone = PyList_New(0);
  while (gone && (Py_ssize_t)self->held->size() > self->capacity) {
    if (!append(gone, self->held->pop_oldest())) Py_CLEAR(gone);
  }
  return gone;
}

PyObject* match(Cache* self, PyObject* given) {
  return guarded([&]() -> PyObject* {
    PyObject* items = take_keys(self, given);
    if (!items) return nullptr;
    Py_DECREF(items);
    std::vector<uint32_t> found;
    self->held->find_each<false>(*self->keys, [&](size_t, uint32_t index) {
      if (index != kNone) found.push_back(index);
      return index != kNone;
    });
    for (size_t i = found.size(); i-- > 0;) self->held->touch(found[i]);
    return PyLong_FromSize_t(found.size());
  }, nullptr);
}

PyObject* store(Cache* self, PyObject* given) {
  return guarded([&]() -> PyObject* {
    PyObject* items = take_keys(self, given);
    if (!items) return nullptr;
    PyObject* added = PyList_New(0);
    self->held->find_each<true>(*self->keys, [&](size_t at, uint32_t index) {
      if (index != kNone) {
        self->held->touch(index);
      } else {
        PyObject* item = PySequence_Fast_GET_ITEM(items, (Py_ssize_t)at);
        self->held->insert((*self->keys)[at], Py_NewRef(item));
        if (added && PyList_Append(added, item)) Py_CLEAR(added);
      }
      return added != nullptr;
    });
    Py_DECREF(items);
    if (added && PyList_Reverse(added)) Py_CLEAR(added);
    PyObject* gone = added ? shrink(self, nullptr) : nullptr;
    if (!gone) {
      Py_XDECREF(added);
      return nullptr;
    }
    return Py_BuildValue("(NN)", added, gone);
  }, nullptr);
}

PyObject* cache_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"capacity", nullptr};
  Py_ssize_t capacity;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "n", const_cast<char**>(names), &capacity)) return nullptr;
  Cache* self = (Cache*)type->tp_alloc(type, 0);
  if (!self) return nullptr;
  self->capacity = capacity;
  return guarded([&]() -> PyObject* {
    self->held = new Lru();
    self->keys = new std::vector<Key>();
    return (PyObject*)self;
  }, nullptr);
}

void cache_dealloc(Cache* self) {
  while (self->held && self->held->size()) Py_DECREF(self->held->pop_oldest());
  delete self->held;
  delete self->keys;
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free((PyObject*)self);
  Py_DECREF(type);
}

Py_ssize_t length(Cache* self) { return (Py_ssize_t)self->held->size(); }

int contains(Cache* self, PyObject* item) { return is_key(item) ? self->held->find(key_of(item)) != kNone : -1; }

PyMethodDef methods[] = {
    {"match", (PyCFunction)match, METH_O, nullptr},
    {"store", (PyCFunction)store, METH_O, nullptr},
    {"shrink", (PyCFunction)shrink, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyMemberDef members[] = {
    {"capacity", T_PYSSIZET, offsetof(Cache, capacity), 0, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, (void*)cache_new}, {Py_tp_dealloc, (void*)cache_dealloc}, {Py_tp_methods, methods},
    {Py_tp_members, members},      {Py_sq_length, (void*)length},         {Py_sq_contains, (void*)contains},
    {0, nullptr},
};

PyType_Spec spec = {"tandem.sim._chain_cache.Cache", sizeof(Cache), 0, Py_TPFLAGS_DEFAULT, slots};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_chain_cache", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__chain_cache() {
  PyObject* made = PyModule_Create(&module);
  if (!made) return nullptr;
  PyObject* type = PyType_FromSpec(&spec);
  if (!type || PyModule_AddObject(made, "Cache", type) < 0) {
    Py_XDECREF(type);
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}
