// The products of a recurrence: a few rows times all weights, again and again. Weights are packed once per call into
// output vectors: for each vec of N outputs, K vecs in a row. A register tile takes some rows and a few of these vectors. When all weights are used only a few times, packing would cost more than the products:
// then they are read as they are, by dot products.
#pragma once

#include <array>
#include <utility>

#include "simd.h"
#include "tuning.h"

namespace fusedrnn::cpu {
namespace {

// C[row*ldc + vector*c_stride] += sum over k of A[row*lda + k] * W[vector*w_stride + k*k_stride], for
// `vectors` × `rows` vecs. Where A is transposed, its element is A[k*lda + row].
template <class S>
struct Product {
  const S* W;
  int64_t w_stride, k_stride, vectors;
  const S* A;
  int64_t lda, K, rows;
  S* C;
  int64_t ldc, c_stride;
  bool fresh = false;  // C holds nothing yet: = in place of +=
};

template <class V, class S, int MB, int NV, bool transposed>
__attribute__((noinline)) void tile(const Product<S>& p, int64_t row, int64_t vector) {
  // A lone fused multiply-add waits four cycles for the one before: few accumulators are split over several k.
  constexpr int split = MB * NV >= 8 ? 1 : MB * NV >= 4 ? 2 : 4;
  const int64_t w_stride = p.w_stride, k_stride = p.k_stride, lda = p.lda;
  const S* W = p.W + vector * w_stride;
  const S* A = p.A + (transposed ? row : row * lda);
  S* C = p.C + row * p.ldc + vector * p.c_stride;
  if constexpr (transposed)  // such a C is a whole weight gradient, far from the core
    for (int b = 0; b < MB; ++b) __builtin_prefetch(C + b * p.ldc, 1);
  V sum[split][MB][NV];
  const auto broadcast = [&](int64_t k, int b) __attribute__((always_inline)) {
    return V(transposed ? A[k * lda + b] : A[b * lda + k]);
  };
  const auto weights = [&](int64_t k, int v) __attribute__((always_inline)) {
    return V::load(W + v * w_stride + k * k_stride);
  };
  // The smaller side of the tile stays in registers, beside one value of the other: with 12 accumulators that is 16.
  const auto step = [&](int64_t k, int s) __attribute__((always_inline)) {
    if constexpr (NV <= MB) {
      V w[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) w[v] = weights(k, v);
#pragma GCC unroll 16
      for (int b = 0; b < MB; ++b) {
        const V a = broadcast(k, b);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[s][b][v] = w[v] * a + sum[s][b][v];
      }
    } else {
      V a[MB];
#pragma GCC unroll 16
      for (int b = 0; b < MB; ++b) a[b] = broadcast(k, b);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const V w = weights(k, v);
#pragma GCC unroll 16
        for (int b = 0; b < MB; ++b) sum[s][b][v] = w * a[b] + sum[s][b][v];
      }
    }
  };
  // Blocks of k are summed by themselves and then added to C: one long chain would round every small product
  // at the size of the total.
  int64_t k = 0;
  do {
    const bool fresh = p.fresh && k == 0;
    const int64_t end = std::min(k + summation_block, p.K);
#pragma GCC unroll 4
    for (int s = 0; s < split; ++s)
#pragma GCC unroll 16
      for (int b = 0; b < MB; ++b)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[s][b][v] = V(S(0));
    for (; k + split <= end; k += split) {
#pragma GCC unroll 4
      for (int s = 0; s < split; ++s) step(k + s, s);
    }
    for (; k < end; ++k) step(k, 0);
#pragma GCC unroll 16
    for (int b = 0; b < MB; ++b)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        V total = sum[0][b][v];
#pragma GCC unroll 4
        for (int s = 1; s < split; ++s) total = total + sum[s][b][v];
        S* c = C + b * p.ldc + v * p.c_stride;
        (fresh ? total : V::load(c) + total).store(c);
      }
  } while (k < p.K);
}

template <class S>
using Tile = void (*)(const Product<S>&, int64_t row, int64_t vector);

// Tiles of 1, 2 … sizeof...(MB) rows.
template <class V, class S, int NV, bool transposed, int... MB>
constexpr auto tile_table(std::integer_sequence<int, MB...>) {
  return std::array<Tile<S>, sizeof...(MB)>{&tile<V, S, MB + 1, NV, transposed>...};
}

template <class V, class S, int NV>
void multiply_vectors(const Product<S>& p, int64_t vector) {
  constexpr int most = tile_rows(NV, sizeof(V));
  static constexpr auto tiles = tile_table<V, S, NV, false>(std::make_integer_sequence<int, most>());
  const int64_t count =
      (p.rows + most - 1) / most;  // tiles of even height: a last one of a single row would waste its time
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = p.rows * i / count, end = p.rows * (i + 1) / count;
    tiles[end - begin - 1](p, begin, vector);
  }
}

template <class V, class S>
void multiply(const Product<S>& p) {
  const int64_t most = tile_vectors(p.rows, p.vectors, sizeof(V));
  for (int64_t vector = 0; vector < p.vectors;) {
    const int64_t n = std::min(most, p.vectors - vector);
    switch (n) {
      case 1:
        multiply_vectors<V, S, 1>(p, vector);
        break;
      case 2:
        multiply_vectors<V, S, 2>(p, vector);
        break;
      case 3:
        multiply_vectors<V, S, 3>(p, vector);
        break;
      default:
        multiply_vectors<V, S, 4>(p, vector);
    }
    vector += n;
  }
}

// The product of a transposed A with pairs of vectors, `pair` numbers from one to the next: a tile of A stays in the
// first-level cache while all vectors use it.
template <class V, class S>
void multiply_transposed(const Product<S>& p, int64_t pair) {
  constexpr int most = tile_rows(2, sizeof(V));
  static constexpr auto pairs = tile_table<V, S, 2, true>(std::make_integer_sequence<int, most>());
  static constexpr auto singles = tile_table<V, S, 1, true>(std::make_integer_sequence<int, most>());
  const int64_t count = (p.rows + most - 1) / most;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = p.rows * i / count, end = p.rows * (i + 1) / count;
    Product<S> part = p;
    for (int64_t vector = 0; vector < p.vectors; vector += 2, part.W += pair, part.C += 2 * p.c_stride)
      (vector + 1 < p.vectors ? pairs : singles)[end - begin - 1](part, begin, 0);
  }
}

// Packs rows [first, first + count) of a row-major [*, K] matrix as one output vector; missing rows are zero.
template <class V, class S>
void pack_rows(const S* matrix, int64_t first, int count, int64_t K, S* packed) {
  constexpr int N = V::size;
  for (int64_t k = 0; k < K; k += N) {
    const int width = static_cast<int>(std::min<int64_t>(N, K - k));
    V square[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) square[j] = j < count ? V::load(matrix + (first + j) * K + k, width) : V(S(0));
    transpose<N / 2>(square);
    for (int i = 0; i < width; ++i) square[i].store(packed + (k + i) * N);
  }
}

// Packs columns [first, first + count) of a row-major [K, columns] matrix as one output vector.
template <class V, class S>
void pack_columns(const S* matrix, int64_t columns, int64_t first, int count, int64_t K, S* packed) {
  for (int64_t k = 0; k < K; ++k) V::load(matrix + k * columns + first, count).store(packed + k * V::size);
}

// The sums of the numbers in each of J vecs, J = 4 or, where a vec is that short, 2.
template <class T, int N, int J>
FUSEDRNN_INLINE void sums_of(vec<T, N> (&v)[J], T* sums) {
  if constexpr (N > J) {
    vec<T, N / 2> halves[J];
#pragma GCC unroll 4
    for (int i = 0; i < J; ++i) halves[i] = add_halves(v[i], std::make_integer_sequence<int, N / 2>());
    sums_of(halves, sums);
  } else {
    transpose<N / 2>(v);
    vec<T, N> total = v[0];
#pragma GCC unroll 4
    for (int i = 1; i < J; ++i) total = total + v[i];
    total.store(sums);
  }
}

// Weights read as they are: dot products of rows of A with J rows of the weights, which give J numbers a row of C.
template <class S>
struct Dots {
  static constexpr int most = 4;
  const S* W[most];
  const S* A;
  int64_t lda, K;
  S* C;
  int64_t ldc;
};

template <class V, class S, int MB>
__attribute__((noinline)) void dot_tile(const Dots<S>& p, int64_t row) {
  constexpr int N = V::size, J = std::min(N, Dots<S>::most), split = MB == 1 ? 2 : 1;
  const S* A = p.A + row * p.lda;
  const int64_t K = p.K, lda = p.lda;
  V sum[split][MB][J];
#pragma GCC unroll 2
  for (int s = 0; s < split; ++s)
#pragma GCC unroll 8
    for (int b = 0; b < MB; ++b)
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) sum[s][b][j] = V(S(0));
  const auto step = [&](int64_t k, int s, int width) __attribute__((always_inline)) {
    V a[MB];
#pragma GCC unroll 8
    for (int b = 0; b < MB; ++b) a[b] = V::load(A + b * lda + k, width);
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      const V w = V::load(p.W[j] + k, width);
#pragma GCC unroll 8
      for (int b = 0; b < MB; ++b) sum[s][b][j] = w * a[b] + sum[s][b][j];
    }
  };
  int64_t k = 0;
  for (; k + split * N <= K; k += split * N) {
#pragma GCC unroll 2
    for (int s = 0; s < split; ++s) step(k + s * N, s, N);
  }
  for (; k + N <= K; k += N) step(k, 0, N);
  if (k < K) step(k, 0, static_cast<int>(K - k));
#pragma GCC unroll 8
  for (int b = 0; b < MB; ++b) {
    if constexpr (split == 2)
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) sum[0][b][j] = sum[0][b][j] + sum[1][b][j];
    S sums[J], *C = p.C + (row + b) * p.ldc;
    sums_of(sum[0][b], sums);
    for (int j = 0; j < J; ++j) C[j] += sums[j];
  }
}

template <class V, class S, int... MB>
constexpr auto dot_table(std::integer_sequence<int, MB...>) {
  return std::array<void (*)(const Dots<S>&, int64_t), sizeof...(MB)>{&dot_tile<V, S, MB + 1>...};
}

// C[row*ldc] += A's row · rows [first, first + count) of a row-major [*, K] matrix, as one vec of N outputs; what it adds
// to outputs beyond `count` is of no use.
template <class V, class S>
void multiply_unpacked(const S* matrix, int64_t first, int count, const S* A, int64_t lda, int64_t K, int64_t rows,
                       S* C, int64_t ldc) {
  constexpr int J = std::min(V::size, Dots<S>::most), most = tile_rows(J, sizeof(V));
  static constexpr auto tiles = dot_table<V, S>(std::make_integer_sequence<int, most>());
  const int64_t tile_count = (rows + most - 1) / most;
  for (int unit = 0; unit < count; unit += J) {
    Dots<S> dots{{}, A, lda, K, C + unit, ldc};
    for (int j = 0; j < J; ++j) dots.W[j] = matrix + (first + std::min(unit + j, count - 1)) * K;
    for (int64_t i = 0; i < tile_count; ++i) {
      const int64_t begin = rows * i / tile_count, end = rows * (i + 1) / tile_count;
      tiles[end - begin - 1](dots, begin);
    }
  }
}

}  // namespace
}  // namespace fusedrnn::cpu
