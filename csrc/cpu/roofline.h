// What this processor can do at most, for comparison: multiplications and additions from registers, and weights from a cache.
#pragma once

#include "memory.h"
#include "simd.h"
#include "team.h"
#include "tiles.h"

namespace fusedrnn::cpu {
namespace {

// Fused multiply-adds of all threads, n vecs in each; returns the number of floating-point operations.
template <int bytes>
double multiply_add(int64_t n, const Threads& threads) {
  using V = vec<float, bytes / sizeof(float)>;
  constexpr int chains = bytes == 64 ? 24 : 12;  // as many accumulators as the products have
  std::atomic<float> seen{0.0f};
  threads.parallel(threads.count, [&](int64_t begin, int64_t end) {
    V sum[chains];
    const V a(0.5f + 0.1f * static_cast<float>(begin)), b(0.25f);
    for (int i = 0; i < chains; ++i) sum[i] = V(static_cast<float>(i));
    for (int64_t k = 0; k < n * (end - begin); k += chains)
#pragma GCC unroll 24
      for (int i = 0; i < chains; ++i) sum[i] = sum[i] * a + b;
    for (int i = 1; i < chains; ++i) sum[0] = sum[0] + sum[i];
    seen = sum[0].v[0];
  });
  return 2.0 * V::size * static_cast<double>(n) * threads.count;
}

// Products of tiles: n by every thread, four sums in turn, or as many dot products. Of zeros, with which tiles take a fifth less
// time than with other numbers (Emerald Rapids).
template <Pairs pairs>
double multiply_tiles_of_zeros(int64_t n, const Threads& threads) {
  std::atomic<float> seen{0.0f};
  threads.parallel(threads.count, [&](int64_t begin, int64_t end) {
    const TileRegisters registers(pairs == Pairs::tiles);  // which sets all to zero
    if constexpr (pairs == Pairs::tiles)
      for (int64_t k = 0; k < n * (end - begin); k += 4) {
        multiply_tile<0, 4, 6>();
        multiply_tile<1, 4, 7>();
        multiply_tile<2, 5, 6>();
        multiply_tile<3, 5, 7>();
      }
    if constexpr (pairs == Pairs::dots) {
      using V = vec<float, 16>;
      constexpr int chains = 16;
      V sum[chains];
      const V zero(0.0f);
      for (V& s : sum) s = zero;
      for (int64_t k = 0; k < 256 / chains * n * (end - begin); ++k)
#pragma GCC unroll 16
        for (V& s : sum) s = add_pairs(s, zero, zero);
      for (int i = 1; i < chains; ++i) sum[0] = sum[0] + sum[i];
      seen = sum[0].v[0];
    }
  });
  return 2.0 * 16 * 16 * 32 * static_cast<double>(n) * threads.count;
}

// Reads `count` numbers `repeats` times, every thread its part: from a cache, where they fit one.
template <int bytes>
void read_all(const float* memory, int64_t count, int64_t repeats, const Threads& threads) {
  using V = vec<float, bytes / sizeof(float)>;
  std::atomic<float> seen{0.0f};
  threads.parallel(threads.count, [&](int64_t begin, int64_t end) {
    const int64_t first = count * begin / threads.count, last = count * end / threads.count;
    V sum[8];
    for (V& s : sum) s = V(0.0f);
    for (int64_t r = 0; r < repeats; ++r)
      for (int64_t i = first; i + 8 * V::size <= last; i += 8 * V::size)
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) sum[j] = sum[j] + V::load(memory + i + j * V::size);
    for (int j = 1; j < 8; ++j) sum[0] = sum[0] + sum[j];
    seen = sum[0].v[0];
  });
}

}  // namespace
}  // namespace fusedrnn::cpu
