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

// One slice's place in a barrier: how often it has arrived. In a cache line of its own, so that a meeting of two costs one
// transfer between their cores; a common counter would cost three.
struct alignas(64) Arrivals {
  std::atomic<int64_t> count{0};
};

// Slices [from, to) of `total` arrive for the `generation`-th time, and wait for all others.
inline __attribute__((always_inline)) void meet(Arrivals* slices, int64_t from, int64_t to, int64_t total,
                                                int64_t generation) {
  for (int64_t s = from; s < to; ++s) slices[s].count.store(generation, std::memory_order_release);
  for (int64_t s = 0; s < total; ++s)
    // Threads meet within a microsecond when each has a core. When they do not, a spinner must give its core away: with 4
    // teams on 2 cores, yielding took 13 µs a step and spinning 861.
    for (int64_t spins = 0; slices[s].count.load(std::memory_order_acquire) < generation; ++spins) {
      if (spins < 128) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        sched_yield();
      }
    }
}

}  // namespace

}  // namespace fusedrnn::cpu
