// A team of threads that stays together for a whole layer: one parallel region for all time steps, and a spin
// barrier between them.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

namespace fusedrnn::cpu {

// The threads come from the caller's pool. It may hand several consecutive slices of [0, n) to one thread (a
// nested call gets all of them), so a barrier counts slices, never threads. run must give every thread its
// whole range in one call and run the ranges at the same time; where a pool cannot promise that (tasks in a
// queue), threads must be 1.
struct Threads {
  int64_t count;
  void (*run)(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context);

  template <class F>
  void parallel(int64_t n, const F& f) const {
    if (n <= 1 || count <= 1) {
      if (n > 0) f(0, n);
      return;
    }
    run(
        n, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }
};

namespace {

class Barrier {
 public:
  // Waits until all `total` slices have arrived; `arriving` of them come with this call. `generation` is the
  // caller's own count.
  void wait(int64_t arriving, int64_t total, int64_t& generation) {
    if (arriving == total) return;
    generation += total;
    arrived_.fetch_add(arriving, std::memory_order_acq_rel);
    // Threads meet within a microsecond when each has a core. When they do not, a spinner must give its core
    // away: with 4 teams on 2 cores, yielding took 13 µs a step and spinning 861.
    for (int64_t spins = 0; arrived_.load(std::memory_order_acquire) < generation; ++spins) {
      if (spins < 128) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

 private:
  alignas(64) std::atomic<int64_t> arrived_{0};
};

}  // namespace

}  // namespace fusedrnn::cpu
