// Products with weights as they are, by dot products: where all weights are used only a few times, packing would cost more than the
// products.
#pragma once

#include "gemm.h"

namespace fusedrnn::cpu {
namespace {

// Of every four numbers of a and b two, from the first or the third on: one of each in turn, or those of a and then those of b.
template <int from, class T, int N, int... lane>
FUSEDRNN_INLINE vec<T, N> in_turn(vec<T, N> a, vec<T, N> b, std::integer_sequence<int, lane...>) {
  return vec<T, N>(__builtin_shufflevector(a.v, b.v, (lane / 4 * 4 + from + lane % 4 / 2 + lane % 2 * N)...));
}
template <int from, class T, int N, int... lane>
FUSEDRNN_INLINE vec<T, N> by_twos(vec<T, N> a, vec<T, N> b, std::integer_sequence<int, lane...>) {
  return vec<T, N>(__builtin_shufflevector(a.v, b.v, (lane / 4 * 4 + from + lane % 2 + lane % 4 / 2 * N)...));
}

template <class T, int N>
FUSEDRNN_INLINE void store_sum_of_fours(vec<T, N> v, T* sums) {
  if constexpr (N > 4)
    store_sum_of_fours(add_halves(v, std::make_integer_sequence<int, N / 2>()), sums);
  else
    v.store(sums);
}

// The sums of the numbers in each of J vecs, stored side by side.
template <class T, int N, int J>
FUSEDRNN_INLINE void sums_of(vec<T, N> (&v)[J], T* sums) {
  if constexpr (J % 4) {
    static_assert(J == N);
    transpose<N / 2>(v);
    vec<T, N> total = v[0];
#pragma GCC unroll 8
    for (int i = 1; i < J; ++i) total = total + v[i];
    total.store(sums);
  } else {
    constexpr std::make_integer_sequence<int, N> lanes;
    const auto both = [&](vec<T, N> a, vec<T, N> b)
                          __attribute__((always_inline)) { return in_turn<0>(a, b, lanes) + in_turn<2>(a, b, lanes); };
#pragma GCC unroll 2
    for (int j = 0; j < J; j += 4) {
      const vec<T, N> one = both(v[j], v[j + 1]), other = both(v[j + 2], v[j + 3]);
      store_sum_of_fours(by_twos<0>(one, other, lanes) + by_twos<2>(one, other, lanes), sums + j);
    }
  }
}

// Weights read as they are: dot products of rows of A with rows [unit, unit + count) of a row-major [*, K] matrix. Where both are
// bfloat16, the processor multiplies them in pairs.
template <class S, class Stored, class Given = S>
struct Dots {
  using Weight = Stored;
  static constexpr bool pairs = !std::is_same_v<Given, S>;

  const Stored* W;
  const Given* A;
  int64_t K, lda;
};

// C[row*ldc + j] += a row of A · row j of W, for MB rows and J units; of several Dots, the sum. What it adds for units beyond
// `count` is of no use. Brings the row of W that is `ahead` of the first into the second-level cache, as tiles do.
template <class V, class S, class D, int MB, int J, size_t terms>
__attribute__((noinline)) void dot_tile(const std::array<D, terms>& dots, int64_t row, int64_t unit, int64_t count,
                                        S* C, int64_t ldc, int64_t ahead) {
  using Stored = typename D::Weight;
  constexpr int N = V::size;
  V sum[MB][J];
#pragma GCC unroll 8
  for (int b = 0; b < MB; ++b)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sum[b][j] = V(S(0));
  for (const D& d : dots) {
    const auto* A = d.A + row * d.lda;
    const Stored* W[J];
    for (int j = 0; j < J; ++j) W[j] = d.W + std::min(unit + j, count - 1) * d.K;
    const int64_t lda = d.lda;
    const Stored* next = W[0] + ahead * d.K;
    const auto step = [&](int64_t k, int width) __attribute__((always_inline)) {
      if constexpr (always_asks<V> && MB > 2) __builtin_prefetch(next + k, 0, 2);
      V a[MB];
#pragma GCC unroll 8
      for (int b = 0; b < MB; ++b) a[b] = load<V>(A + b * lda + k, width);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) {
        const V w = load<V>(W[j] + k, width);
#pragma GCC unroll 8
        for (int b = 0; b < MB; ++b) sum[b][j] = w * a[b] + sum[b][j];
      }
    };
    int64_t k = 0;
    if constexpr (D::pairs) {
      const auto step_of_pairs = [&](auto pairs) __attribute__((always_inline)) {
        if constexpr (MB > 2) __builtin_prefetch(next + k, 0, 2);
        V a[MB];
#pragma GCC unroll 8
        for (int b = 0; b < MB; ++b) a[b] = pairs(A + b * lda + k);
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) {
          const V w = pairs(W[j] + k);
#pragma GCC unroll 8
          for (int b = 0; b < MB; ++b) sum[b][j] = add_pairs(sum[b][j], w, a[b]);
        }
      };
      for (; k + 2 * N <= d.K; k += 2 * N) step_of_pairs([](const auto* p) { return as_pairs<V>(p); });
      const int left = static_cast<int>(d.K - k);
      if (left) step_of_pairs([&](const auto* p) { return as_pairs<V>(p, left); });
      continue;
    } else if constexpr (std::is_same_v<Stored, bfloat16>)
      for (; k + 2 * N <= d.K; k += 2 * N) {
        EvenOdd<V> a[MB];
#pragma GCC unroll 8
        for (int b = 0; b < MB; ++b)
          a[b] = pairs_of(V::load(A + b * lda + k), V::load(A + b * lda + k + N), std::make_integer_sequence<int, N>());
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) {
          const EvenOdd<V> w = load_pairs<V>(W[j] + k);
#pragma GCC unroll 8
          for (int b = 0; b < MB; ++b) sum[b][j] = w.odd * a[b].odd + (w.even * a[b].even + sum[b][j]);
        }
      }
    for (; k + N <= d.K; k += N) step(k, N);
    if (k < d.K) step(k, static_cast<int>(d.K - k));
  }
#pragma GCC unroll 8
  for (int b = 0; b < MB; ++b) {
    S sums[J], *to = C + (row + b) * ldc + unit;
    sums_of(sum[b], sums);
    for (int j = 0; j < J; ++j) to[j] += sums[j];
  }
}

template <class V, class S, class D, int J, size_t terms, int... MB>
constexpr auto dot_table(std::integer_sequence<int, MB...>) {
  return std::array{&dot_tile<V, S, D, MB + 1, J, terms>...};
}

// All rows of A, and `count` <= N units. A lone row takes more units at a time, for enough sums to overlap. Of W a row `next` from
// the first is the first that the next call needs.
template <class V, class S, class D, size_t terms>
__attribute__((noinline)) void multiply_unpacked(const std::array<D, terms>& dots, int64_t count, int64_t rows, S* C,
                                                 int64_t ldc, int64_t next) {
  constexpr int N = V::size, J = std::min(N, 4), many = std::min(N, 8), most = tile_rows(J, sizeof(V));
  static constexpr auto tiles = dot_table<V, S, D, J, terms>(std::make_integer_sequence<int, most>());
  if (rows == 1) {
    for (int64_t unit = 0; unit < count; unit += many) dot_tile<V, S, D, 1, many>(dots, 0, unit, count, C, ldc, 0);
    return;
  }
  // Beside tiles of six rows one of two or three would be half empty (8, 9 and 15 rows: 1.04 to 1.1 times as fast in even ones; with
  // other rests 0.92 to 1.07, mostly 1.0, with AVX2 0.93 to 1.0).
  const int64_t rest = rows % most, parts = (rows + most - 1) / most;
  const int64_t height = always_asks<V> && (rest == 2 || rest == 3) ? (rows + parts - 1) / parts : most;
  for (int64_t unit = 0; unit < count; unit += J) {
    const int64_t next_unit = (unit + J < count ? unit + J : next) - unit;
    for (int64_t row = 0, i = 0; row < rows; row += height, ++i)
      tiles[std::min<int64_t>(height, rows - row) - 1](dots, row, unit, count, C, ldc, i < J ? next_unit + i : 0);
  }
}

}  // namespace
}  // namespace fusedrnn::cpu
