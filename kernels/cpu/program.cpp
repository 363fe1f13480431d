// Runs a step: a model's operations one after the other, each shared between the threads of a team. A team's helpers sleep
// between steps; within one they wait for each other by spinning, because waking a thread costs more than most operations.
#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>

#include "abi.h"
#include "simd.h"

namespace tandem {
namespace {

constexpr int kSpins = 20000;

double now_s() {
  timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

void relax(int& spins) {
  if (++spins < kSpins) {
#if TANDEM_AVX512 || TANDEM_AVX2
    _mm_pause();
#endif
  } else {
    sched_yield();  // somebody else needs this core
  }
}

struct Job {
  const tandem_op* ops;
  const tandem_step* step;
  double* seconds;
  int64_t num_ops;
};

class Team {
 public:
  explicit Team(int count) : count_(count) {
    pthread_mutex_init(&lock_, nullptr);
    pthread_cond_init(&wake_, nullptr);
    try {
      for (int i = 1; i < count; i++) helpers_[i] = std::thread([this, i] { help(i); });
    } catch (const std::system_error&) {
      whole_ = false;  // the system gives no more threads
    }
  }
  bool whole() const { return whole_; }
  ~Team() {
    pthread_mutex_lock(&lock_);
    ending_ = true;
    pthread_cond_broadcast(&wake_);
    pthread_mutex_unlock(&lock_);
    for (int i = 1; i < count_; i++)
      if (helpers_[i].joinable()) helpers_[i].join();
    pthread_cond_destroy(&wake_);
    pthread_mutex_destroy(&lock_);
  }
  void run(const Job& job) {
    if (count_ > 1) {
      pthread_mutex_lock(&lock_);
      job_ = job;
      number_++;
      pthread_cond_broadcast(&wake_);
      pthread_mutex_unlock(&lock_);
    }
    work(job, 0);
  }
  // Helper i runs on cores[i - 1] from now on; false if the system refuses.
  bool pin(const int32_t* cores) {
    bool done = true;
    for (int i = 1; i < count_; i++) {
      cpu_set_t* const set = CPU_ALLOC(cores[i - 1] + 1);
      const size_t bytes = CPU_ALLOC_SIZE(cores[i - 1] + 1);
      if (!set) return false;
      CPU_ZERO_S(bytes, set);
      CPU_SET_S(cores[i - 1], bytes, set);
      done = !pthread_setaffinity_np(helpers_[i].native_handle(), bytes, set) && done;
      CPU_FREE(set);
    }
    return done;
  }
  static constexpr int kMost = 256;

 private:
  void help(int index) {
    int64_t done = 0;
    for (;;) {
      pthread_mutex_lock(&lock_);
      while (number_ == done && !ending_) pthread_cond_wait(&wake_, &lock_);
      const bool ending = ending_;
      done = number_;
      const Job job = job_;
      pthread_mutex_unlock(&lock_);
      if (ending) return;
      work(job, index);
    }
  }
  void meet() {
    if (count_ == 1) return;
    const int64_t turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn;) relax(spins);
  }
  void work(const Job& job, int index) {
    const Share share = {index, count_};
    const tandem_step& step = *job.step;
    double before = index == 0 ? now_s() : 0;
    for (int64_t i = 0; i < job.num_ops; i++) {
      const tandem_op& op = job.ops[i];
      const void* a = op.arguments;
      switch (op.kind) {
        case TANDEM_EMBED: embed(*(const tandem_embed*)a, step, share); break;
        case TANDEM_RMS_NORM: rms_norm(*(const tandem_rms_norm*)a, step, share); break;
        case TANDEM_QUANTIZE: quantize(*(const tandem_quantize*)a, step, share); break;
        case TANDEM_LINEAR: linear(*(const tandem_linear*)a, step, share); break;
        case TANDEM_ROPE_WRITE: rope_write(*(const tandem_rope_write*)a, step, share); break;
        case TANDEM_SELECT: select_rows(*(const tandem_select*)a, step, share); break;
        case TANDEM_ATTENTION:
          attention(*(const tandem_attention*)a, step, share);
          if (count_ > 1) {
            meet();
            attention_merge(*(const tandem_attention*)a, step, share);
          }
          break;
      }
      meet();
      if (index == 0) {
        const double after = now_s();
        job.seconds[op.kind] += after - before;
        before = after;
      }
    }
  }

  const int count_;
  std::thread helpers_[kMost];
  pthread_mutex_t lock_;
  pthread_cond_t wake_;
  Job job_ = {};
  int64_t number_ = 0;
  bool ending_ = false;
  bool whole_ = true;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> turn_{0};
};

}  // namespace
}  // namespace tandem

#define TANDEM_EXPORT __attribute__((visibility("default")))

extern "C" {

// A team of 1 to 256 threads, the caller's included; null if the system doesn't give so many.
TANDEM_EXPORT void* tandem_team_new(int32_t count) {
  auto* const team = new (std::nothrow) tandem::Team(count);
  if (!team || team->whole()) return team;
  delete team;
  return nullptr;
}

TANDEM_EXPORT void tandem_team_free(void* team) { delete (tandem::Team*)team; }

// Pins the team's threads but the caller's to those cores, one each. Returns whether that was possible.
TANDEM_EXPORT int32_t tandem_team_pin(void* team, const int32_t* cores) { return ((tandem::Team*)team)->pin(cores); }

// Runs the operations for one step; adds to seconds[kind] what they took. Not reentrant for one team.
TANDEM_EXPORT void tandem_run(void* team, const tandem_op* ops, int64_t num_ops, const tandem_step* step, double* seconds) {
  ((tandem::Team*)team)->run({ops, step, seconds, num_ops});
}

// 2: compiled for AVX-512 BF16 and VNNI; 1: for AVX2, FMA and F16C; 0: for any processor of this kind.
TANDEM_EXPORT int32_t tandem_level() {
#if TANDEM_AVX512
  return 2;
#elif TANDEM_AVX2
  return 1;
#else
  return 0;
#endif
}

TANDEM_EXPORT const char* tandem_build() { return TANDEM_SOURCES " " __VERSION__; }

}  // extern "C"
