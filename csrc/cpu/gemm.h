// The products of a recurrence: a few rows times all weights, again and again. Weights are packed once per
// call into output vectors: for each vec of N outputs, K vecs in a row. A register tile takes some rows and
// up to four output vectors; for an LSTM these are the four gates of the same hidden units. When all weights
// are used only a few times, packing would cost more than the products: then they are read as they are, by
// dot products.
#pragma once

#include <array>
#include <utility>

#include "simd.h"
#include "tuning.h"

namespace fusedrnn::cpu {
namespace {

// C[row*ldc + vector*c_stride] += sum over k of A[row*lda + k] * W[vector*w_stride + k*k_stride], for
// `vectors` × `rows` vecs.
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

// With `width`, A is not row-major but in tiles of so many rows: A[row*lda + k*width + b] for row b of the
// tile that starts at `row`.
template <class V, class S, int MB, int NV, int width = 0>
__attribute__((noinline)) void tile(const Product<S>& p, int64_t row, int64_t vector) {
  // A lone fused multiply-add waits four cycles for the one before: few accumulators are split over several
  // k.
  constexpr int split = MB * NV >= 8 ? 1 : MB * NV >= 4 ? 2 : 4;
  const S* W = p.W + vector * p.w_stride;
  const S* A = p.A + row * p.lda;
  S* C = p.C + row * p.ldc + vector * p.c_stride;
  const int64_t w_stride = p.w_stride, k_stride = p.k_stride;
  V sum[split][MB][NV];
  const auto step = [&](int64_t k, int s) __attribute__((always_inline)) {
    V w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) w[v] = V::load(W + v * w_stride + k * k_stride);
#pragma GCC unroll 16
    for (int b = 0; b < MB; ++b) {
      const V a(width ? A[k * width + b] : A[b * p.lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[s][b][v] = w[v] * a + sum[s][b][v];
    }
  };
  // Blocks of k are summed by themselves and then added to C: one long chain would round every small product
  // at the size of the total.
  for (int64_t k = 0; k < p.K;) {
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
  }
}

// Tiles of 1, 2 … sizeof...(MB) rows.
template <class V, class S, int NV, int width, int... MB>
constexpr auto tile_table(std::integer_sequence<int, MB...>) {
  return std::array<void (*)(const Product<S>&, int64_t, int64_t), sizeof...(MB)>{&tile<V, S, MB + 1, NV, width>...};
}

template <class V, class S, int NV>
void multiply_vectors(const Product<S>& p, int64_t vector) {
  constexpr int most = tile_rows(NV, sizeof(V));
  static constexpr auto tiles = tile_table<V, S, NV, 0>(std::make_integer_sequence<int, most>());
  const int64_t count =
      (p.rows + most - 1) / most;  // tiles of even height: a last one of a single row would waste its time
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = p.rows * i / count, end = p.rows * (i + 1) / count;
    tiles[end - begin - 1](p, begin, vector);
  }
}

template <class V, class S>
void multiply(const Product<S>& p) {
  const int64_t most = tile_vectors(p.rows, sizeof(V));
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

// A product of at most four output vectors whose A is in tiles.
template <class V, class S, int NV>
void multiply_tiles_vectors(const Product<S>& p) {
  constexpr int width = tile_rows(4, sizeof(V));
  static constexpr auto tiles = tile_table<V, S, NV, width>(std::make_integer_sequence<int, width>());
  for (int64_t row = 0; row < p.rows; row += width) tiles[std::min<int64_t>(width, p.rows - row) - 1](p, row, 0);
}

template <class V, class S>
void multiply_tiles(const Product<S>& p) {
  switch (p.vectors) {
    case 1:
      multiply_tiles_vectors<V, S, 1>(p);
      break;
    case 2:
      multiply_tiles_vectors<V, S, 2>(p);
      break;
    case 3:
      multiply_tiles_vectors<V, S, 3>(p);
      break;
    default:
      multiply_tiles_vectors<V, S, 4>(p);
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

// C[row*ldc] += A's row · rows [first, first + count) of a row-major [*, K] matrix, as one vec of N outputs.
template <class V, class S>
__attribute__((noinline)) void multiply_unpacked(const S* matrix, int64_t first, int count, const S* A, int64_t lda,
                                                 int64_t K, int64_t rows, S* C, int64_t ldc) {
  constexpr int N = V::size;
  const S* W[N];
  for (int j = 0; j < N; ++j) W[j] = matrix + (first + std::min(j, count - 1)) * K;
  for (int64_t row = 0; row < rows; ++row, A += lda, C += ldc) {
    V sum[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) sum[j] = V(S(0));
    int64_t k = 0;
    for (; k + N <= K; k += N) {
      const V a = V::load(A + k);
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) sum[j] = V::load(W[j] + k) * a + sum[j];
    }
    if (k < K) {
      const int width = static_cast<int>(K - k);
      const V a = V::load(A + k, width);
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) sum[j] = V::load(W[j] + k, width) * a + sum[j];
    }
    transpose<N / 2>(sum);
    V total = sum[0];
#pragma GCC unroll 16
    for (int j = 1; j < N; ++j) total = total + sum[j];
    (V::load(C) + total).store(C);
  }
}

// Packs columns [first, first + count) of a row-major [K, columns] matrix as one output vector.
template <class V, class S>
void pack_columns(const S* matrix, int64_t columns, int64_t first, int count, int64_t K, S* packed) {
  for (int64_t k = 0; k < K; ++k) V::load(matrix + k * columns + first, count).store(packed + k * V::size);
}

}  // namespace
}  // namespace fusedrnn::cpu
