// The keys of a chain of blocks in one call: SHA-256 of each block after the key before it (design: kvpool/keys.py).
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace {

constexpr Py_ssize_t kKeyBytes = 16, kTokenBytes = 4, kCountBytes = 2;
constexpr size_t kPart = 64;  // bytes that SHA-256 takes at a time

alignas(64) constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
constexpr uint32_t kStart[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

uint32_t rotated(uint32_t x, int by) { return x >> by | x << (32 - by); }

// FIPS 180-4, section 6.2.2, as it is written there.
void compress_portable(uint32_t* state, const unsigned char* data, size_t parts) {
  for (; parts; parts--, data += kPart) {
    uint32_t w[64];
    for (int i = 0; i < 16; i++) w[i] = (uint32_t)data[4 * i] << 24 | data[4 * i + 1] << 16 | data[4 * i + 2] << 8 | data[4 * i + 3];
    for (int i = 16; i < 64; i++) {
      const uint32_t s0 = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3;
      const uint32_t s1 = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10;
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3], e = state[4], f = state[5], g = state[6], h = state[7];
    for (int i = 0; i < 64; i++) {
      const uint32_t t1 = h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
      const uint32_t t2 = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d, state[4] += e, state[5] += f, state[6] += g, state[7] += h;
  }
}

#if defined(__x86_64__)
bool has_sha() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1) && __builtin_cpu_supports("sse4.1");
}

// The same with the processor's instructions, four rounds a step. State is kept as they want it: ABEF and CDGH.
__attribute__((target("sha,sse4.1,ssse3"))) void compress_sha(uint32_t* state, const unsigned char* data, size_t parts) {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bll, 0x0405060700010203ll);
  const __m128i dcba = _mm_loadu_si128((const __m128i*)state), hgfe = _mm_loadu_si128((const __m128i*)(state + 4));
  const __m128i badc = _mm_shuffle_epi32(dcba, 0xB1), efgh = _mm_shuffle_epi32(hgfe, 0x1B);
  __m128i abef = _mm_alignr_epi8(badc, efgh, 8), cdgh = _mm_blend_epi16(efgh, badc, 0xF0);
  for (; parts; parts--, data += kPart) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i w[4];
    for (int i = 0; i < 4; i++) w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(data + 16 * i)), swap);
    for (int i = 0; i < 16; i++) {
      const __m128i sum = _mm_add_epi32(w[i & 3], _mm_load_si128((const __m128i*)(kRound + 4 * i)));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0E));
      if (i < 12) {  // the words of four rounds that follow in four steps
        const __m128i last = w[(i + 3) & 3];
        const __m128i mixed = _mm_add_epi32(_mm_sha256msg1_epu32(w[i & 3], w[(i + 1) & 3]), _mm_alignr_epi8(last, w[(i + 2) & 3], 4));
        w[i & 3] = _mm_sha256msg2_epu32(mixed, last);
      }
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  const __m128i feba = _mm_shuffle_epi32(abef, 0x1B), dchg = _mm_shuffle_epi32(cdgh, 0xB1);
  _mm_storeu_si128((__m128i*)state, _mm_blend_epi16(feba, dchg, 0xF0));
  _mm_storeu_si128((__m128i*)(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}
#else
bool has_sha() { return false; }
void compress_sha(uint32_t*, const unsigned char*, size_t) {}
#endif

bool use_sha;

// The first 16 bytes of the digest of `num` bytes at `data`, which has room for the padding (72 bytes more at most).
void digest(unsigned char* data, size_t num, unsigned char* key) {
  uint32_t state[8];
  std::memcpy(state, kStart, sizeof state);
  const size_t parts = (num + 9 + kPart - 1) / kPart;
  std::memset(data + num, 0, parts * kPart - num);
  data[num] = 0x80;
  for (int i = 0; i < 8; i++) data[parts * kPart - 1 - i] = (unsigned char)((uint64_t)num * 8 >> 8 * i);
  (use_sha ? compress_sha : compress_portable)(state, data, parts);
  for (int i = 0; i < kKeyBytes; i++) key[i] = (unsigned char)(state[i / 4] >> (24 - 8 * (i % 4)));
}

// chain_keys(parent, tokens, block_size) -> list of the keys of all blocks of `tokens`, u32 little-endian, the last one partial if
// they are no whole number of blocks.
PyObject* chain_keys(PyObject*, PyObject* args) {
  const char *parent, *tokens;
  Py_ssize_t parent_bytes, tokens_bytes, block_size;
  if (!PyArg_ParseTuple(args, "y#y#n", &parent, &parent_bytes, &tokens, &tokens_bytes, &block_size)) return nullptr;
  if (parent_bytes != kKeyBytes || tokens_bytes % kTokenBytes || block_size < 1 || block_size > UINT16_MAX) {
    PyErr_Format(PyExc_ValueError, "a parent of %zd bytes, tokens of %zd, blocks of %zd", parent_bytes, tokens_bytes, block_size);
    return nullptr;
  }
  const Py_ssize_t step = block_size * kTokenBytes, num = (tokens_bytes + step - 1) / step;
  std::vector<unsigned char> message;
  try {
    message.resize((size_t)(kKeyBytes + kCountBytes + step) + 72);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
  PyObject* keys = PyList_New(num);
  if (!keys) return nullptr;
  std::memcpy(message.data(), parent, kKeyBytes);
  for (Py_ssize_t i = 0; i < num; i++) {
    const Py_ssize_t bytes = std::min(step, tokens_bytes - i * step), count = bytes / kTokenBytes;
    message[kKeyBytes] = (unsigned char)count;
    message[kKeyBytes + 1] = (unsigned char)(count >> 8);
    std::memcpy(&message[kKeyBytes + kCountBytes], tokens + i * step, (size_t)bytes);
    unsigned char key[kKeyBytes];
    digest(message.data(), (size_t)(kKeyBytes + kCountBytes + bytes), key);
    PyObject* item = PyBytes_FromStringAndSize((const char*)key, kKeyBytes);
    if (!item) {
      Py_DECREF(keys);
      return nullptr;
    }
    PyList_SET_ITEM(keys, i, item);
    std::memcpy(message.data(), key, kKeyBytes);
  }
  return keys;
}

// use_instructions(bool) -> bool: whether the processor's instructions for SHA-256 are used from now on, where it has them.
PyObject* use_instructions(PyObject*, PyObject* wanted) {
  const int want = PyObject_IsTrue(wanted);
  if (want < 0) return nullptr;
  use_sha = want && has_sha();
  return PyBool_FromLong(use_sha);
}

PyMethodDef functions[] = {
    {"chain_keys", chain_keys, METH_VARARGS, nullptr},
    {"use_instructions", use_instructions, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_chain_keys", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__chain_keys() {
  use_sha = has_sha();
  return PyModule_Create(&module);
}
