// The products of a recurrence: a few rows times all weights, again and again. Weights are packed into output vectors: for each
// vec of N outputs, K vecs in a row; W_hh once per call. A register tile takes some rows and a few of these vectors.
#pragma once

#include <array>
#include <utility>

#include "../params.h"
#include "simd.h"
#include "tiles.h"
#include "tuning.h"

namespace fusedrnn::cpu {
namespace {

// What packed weights are stored as, where they keep their type: bfloat16 in pairs of neighbours in k. An output vector has
// packed_size vecs; those of pairs are whole tiles (tiles.h), zero beyond K.
template <class Stored>
using Packed = std::conditional_t<std::is_same_v<Stored, bfloat16>, bfloat16_pair, Stored>;
template <class Stored>
constexpr bool in_pairs = std::is_same_v<Stored, bfloat16_pair>;
template <class Stored>
constexpr int64_t padded(int64_t K) {
  return in_pairs<Stored> ? blocks_of(K) * 32 : K;
}
template <class Stored>
constexpr int64_t packed_size(int64_t K) {
  return in_pairs<Stored> ? padded<Stored>(K) / 2 : K;
}

// C[row*ldc + vector*c_stride] += sum over k of A[row*lda + k] * W[vector*w_stride + k*k_stride], for
// `vectors` × `rows` vecs. Where A is transposed, its element is A[k*lda + row]. Weights may be stored as another type; in
// pairs, of which k/2 is the index, unless A has pairs, too: then K counts pairs, and a product is the sum of two.
template <class S, class Stored = S, class Given = S>
struct Product {
  using Sum = S;
  using Weight = Stored;
  static constexpr bool dots = in_pairs<Given>, halves = in_pairs<Stored> && !dots;

  const Stored* W;
  int64_t w_stride, k_stride, vectors;
  const Given* A;
  int64_t lda, K, rows;
  S* C;
  int64_t ldc, c_stride;
  bool fresh = false;        // C holds nothing yet: = in place of +=
  int64_t group_stride = 0;  // where multiply takes groups of vectors: from one to the next in C
  bool backwards = false;    // the last vectors first
  bool far = false;          // see far_weights; only where k_stride is N

  // Where NV vectors from `vector` on are in a row of C.
  template <int group, int NV>
  std::array<int64_t, NV> places(int64_t vector) const {
    return places_of<group, NV>(vector, c_stride, group_stride);
  }
};

// Whether all tiles ask for the next tile's weights (multiply_vectors), in every step of k. With 32 registers there is one for their
// address; with 16, tiles of three vectors took 13 % longer for it, and some ask for far weights, between short loops over k.
template <class V>
constexpr bool always_asks = sizeof(V) == 64;

// An element's sum has one order, that of k, whatever tile it falls into: a step alone gives the same bits as among others.
// Vector v of the tile belongs at place[v] of a row of C. A tile that asks brings K vecs from `ahead` on into the second-level cache.
template <class V, class P, int MB, int NV, bool transposed, bool asks>
__attribute__((noinline)) void tile(const P& p, int64_t row, int64_t vector, const int64_t* place,
                                    const typename P::Weight* ahead) {
  using S = typename P::Sum;
  // A lone fused multiply-add waits four cycles for the one before: few accumulators are split over several k, where nobody
  // asks for one order.
  constexpr int split = !transposed || MB * NV >= 8 ? 1 : MB * NV >= 4 ? 2 : 4;
  const int64_t w_stride = p.w_stride, k_stride = p.k_stride, lda = p.lda;
  const auto* W = p.W + vector * w_stride;
  const auto* A = p.A + (transposed ? row : row * lda);
  S* C = p.C + row * p.ldc;
  if constexpr (transposed)  // such a C is a whole weight gradient, far from the core
    for (int b = 0; b < MB; ++b) __builtin_prefetch(C + b * p.ldc + place[0], 1);
  V sum[split][MB][NV];
  const auto broadcast = [&](int64_t k, int b) __attribute__((always_inline)) {
    return broadcast_of<V>(transposed ? A[k * lda + b] : A[b * lda + k]);
  };
  // `half` is that of k in its pair, where there are pairs.
  const auto weights = [&](int64_t k, auto v, auto half) __attribute__((always_inline)) {
    if constexpr (P::halves)
      return load_half<V, half()>(W + v * w_stride + k / 2 * k_stride);
    else
      return load<V>(W + v * w_stride + k * k_stride);
  };
  const auto add = [&](V& total, V w, V a) __attribute__((always_inline)) {
    if constexpr (P::dots)
      total = add_pairs(total, w, a);
    else
      total = w * a + total;
  };
  // The smaller side of the tile stays in registers, beside one value of the other: with 12 accumulators that is 16.
  const auto step = [&](int64_t k, int s, auto half) __attribute__((always_inline)) {
    if constexpr (asks && always_asks<V>) __builtin_prefetch(ahead + k * k_stride, 0, 2);
    if constexpr (NV <= MB) {
      V w[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) w[v] = weights(k, v, half);
#pragma GCC unroll 16
      for (int b = 0; b < MB; ++b) {
        const V a = broadcast(k, b);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) add(sum[s][b][v], w[v], a);
      }
    } else {
      V a[MB];
#pragma GCC unroll 16
      for (int b = 0; b < MB; ++b) a[b] = broadcast(k, b);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const V w = weights(k, v, half);
#pragma GCC unroll 16
        for (int b = 0; b < MB; ++b) add(sum[s][b][v], w, a[b]);
      }
    }
  };
  using First = std::integral_constant<int, 0>;
  using Second = std::integral_constant<int, 1>;
  // Blocks of k are summed by themselves and then added to C: one long chain would round every small product
  // at the size of the total.
  int64_t k = 0;
  do {
    const bool fresh = p.fresh && k == 0;
    const int64_t end = std::min(k + summation_block, p.K);
#pragma GCC unroll 8
    for (int s = 0; s < split; ++s)
#pragma GCC unroll 16
      for (int b = 0; b < MB; ++b)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[s][b][v] = V(S(0));
    constexpr int at_once = P::halves ? 2 : split;
    const auto steps = [&](int64_t stop) __attribute__((always_inline)) {
      for (; k + at_once <= stop; k += at_once)
        if constexpr (P::halves) {
          step(k, 0, First());
          step(k + 1, 0, Second());
        } else {
#pragma GCC unroll 8
          for (int s = 0; s < split; ++s) step(k + s, s, First());
        }
    };
    if constexpr (asks && !always_asks<V>)
      while (k + at_once <= end) {
        const char* const next = reinterpret_cast<const char*>(ahead + k * V::size);
#pragma GCC unroll 16
        for (size_t i = 0; i < asking_loop * sizeof(V); i += 64) __builtin_prefetch(next + i, 0, 2);
        steps(std::min(k + asking_loop, end));
      }
    else
      steps(end);
    for (; k < end; ++k) step(k, 0, First());
#pragma GCC unroll 16
    for (int b = 0; b < MB; ++b)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        V total = sum[0][b][v];
#pragma GCC unroll 8
        for (int s = 1; s < split; ++s) total = total + sum[s][b][v];
        S* c = C + b * p.ldc + place[v];
        (fresh ? total : V::load(c) + total).store(c);
      }
  } while (k < p.K);
}

template <class P>
using Tile = void (*)(const P&, int64_t row, int64_t vector, const int64_t* place, const typename P::Weight* ahead);

// Tiles of 1, 2 … sizeof...(MB) rows. Those that ask have three at least (see multiply).
template <bool asks, int rows>
constexpr bool asks_with = asks && rows > 2;
template <class V, class P, int NV, bool transposed, bool asks, int... MB>
constexpr auto tile_table(std::integer_sequence<int, MB...>) {
  return std::array<Tile<P>, sizeof...(MB)>{&tile<V, P, MB + 1, NV, transposed, asks_with<asks, MB + 1>>...};
}

// n things in as few parts of at most `most` as can be, of which no two differ by more than one.
struct Cut {
  int64_t count, least, larger;  // the first `larger` parts have one more than the others

  Cut(int64_t n, int64_t most)
      : count((n + most - 1) / most), least(count ? n / count : 0), larger(n - least * count) {}
  int64_t begin(int64_t part) const { return part * least + std::min(part, larger); }
  int64_t size(int64_t part) const { return least + (part < larger); }
};

// A block of k for all rows, then the next: its weights are in the first-level cache from the second tile on. Those of the next block,
// or of the vectors that follow, meanwhile come into the second where tiles ask, one vector during each of the first ones.
template <class V, int group, int NV, class P>
void multiply_vectors(const P& p, int64_t vector, int64_t following) {
  constexpr int most = tile_rows(NV, sizeof(V));
  // Where not all do, those of three vectors, which far weights mostly meet.
  constexpr bool can_ask = always_asks<V> || (NV == 3 && std::is_same_v<typename P::Sum, typename P::Weight>);
  constexpr std::make_integer_sequence<int, most> heights;
  static constexpr auto tiles = tile_table<V, P, NV, false, always_asks<V>>(heights),
                        asking = tile_table<V, P, NV, false, can_ask>(heights);
  const Cut cut(p.rows, most);  // tiles of even height: a last one of a single row would waste its time
  const bool asks = always_asks<V> || (p.far && cut.count > 1);
  const int64_t step = (P::halves ? summation_block / 2 : summation_block) * p.k_stride;
  const auto place = p.template places<group, NV>(vector);
  P block = p;
  for (int64_t k = 0; k == 0 || k < p.K; k += summation_block) {
    block.K = std::min(summation_block, p.K - k);
    const auto *weights = block.W + vector * p.w_stride,
               *next = k + summation_block < p.K ? weights + step : p.W + following * p.w_stride;
    for (int64_t i = 0; i < cut.count; ++i) {
      const bool ask = asks && i < NV;
      (ask ? asking : tiles)[cut.size(i) - 1](block, cut.begin(i), vector, place.data(),
                                              ask ? next + i * p.w_stride : weights);
    }
    block.W += step;
    block.A += summation_block;
    block.fresh = false;
  }
}

// One or two rows: as many vectors together as a fused multiply-add has cycles to wait for the one before.
template <class V, int MB, int group, class P, int... NV>
void multiply_few(const P& p, std::integer_sequence<int, NV...>) {
  static constexpr std::array<Tile<P>, sizeof...(NV)> tiles = {&tile<V, P, MB, NV + 1, false, false>...};
  constexpr int most = sizeof...(NV);
  const Cut cut(p.vectors, most);
  for (int64_t j = 0; j < cut.count; ++j) {
    const int64_t i = p.backwards ? cut.count - 1 - j : j, begin = cut.begin(i);
    tiles[cut.size(i) - 1](p, 0, begin, p.template places<group, most>(begin).data(), nullptr);
  }
}

// How the processor multiplies weights where they are packed, and whether they are tiles.
inline Pairs packed_pairs(const Problem& p) {
  return p.converts_weights() && p.R() >= tile_width ? p.pairs : Pairs::none;
}
inline bool in_tiles(const Problem& p) { return packed_pairs(p) != Pairs::none; }

// Of `group` vectors each is c_stride after the one before.
template <class V, class S, class Stored = S, int group = 1, class Given = S>
void multiply(const Product<S, Stored, Given>& p) {
  if (p.rows == 1) return multiply_few<V, 1, group>(p, std::make_integer_sequence<int, 8>());
  if (p.rows == 2) return multiply_few<V, 2, group>(p, std::make_integer_sequence<int, 6>());
  const Cut cut(p.vectors, tile_vectors(p.rows, sizeof(V)));
  for (int64_t j = 0; j < cut.count; ++j) {
    const int64_t i = p.backwards ? cut.count - 1 - j : j, vector = cut.begin(i),
                  following = cut.begin(p.backwards ? std::max<int64_t>(i - 1, 0) : i + 1);
    switch (cut.size(i)) {
      case 1:
        multiply_vectors<V, group, 1>(p, vector, following);
        break;
      case 2:
        multiply_vectors<V, group, 2>(p, vector, following);
        break;
      case 3:
        multiply_vectors<V, group, 3>(p, vector, following);
        break;
      default:
        multiply_vectors<V, group, 4>(p, vector, following);
    }
  }
}

// A product of tiles, as the processor makes it.
template <class V, int group = 1>
void multiply_tiles(Pairs pairs, const TileProduct<V>& p) {
  if (pairs == Pairs::tiles) return multiply_in_tiles<V, group>(p);
  using Pair = bfloat16_pair;
  multiply<V, float, Pair, group, Pair>({p.W, p.blocks * (tile_size / 2), V::size, p.vectors,
                                         reinterpret_cast<const Pair*>(p.A.memory), p.A.row_step / 2, p.blocks * 16,
                                         p.rows, p.C, p.ldc, p.c_stride, p.fresh, p.group_stride, p.backwards});
}

// What multiply_transposed may read of A beyond its last column.
template <class V>
constexpr int64_t transposed_overrun = (tile_rows(2, sizeof(V)) - 1) / V::size * V::size + V::size - 1;

// The product of a transposed A, K <= gradient_rows, with pairs of vectors, `pair` numbers from one to the next: a tile of A
// stays in the first-level cache while all vectors use it. For many vectors it is copied: where it lies, a cache line of every
// row comes along, and with the vectors' that is more than the cache has.
template <class V, class S>
void multiply_transposed(const Product<S>& p, int64_t pair) {
  constexpr int most = tile_rows(2, sizeof(V));
  static constexpr auto pairs = tile_table<V, Product<S>, 2, true, false>(std::make_integer_sequence<int, most>());
  static constexpr auto singles = tile_table<V, Product<S>, 1, true, false>(std::make_integer_sequence<int, most>());
  alignas(64) S copy[gradient_rows * most + V::size];
  const Cut cut(p.rows, most);
  for (int64_t i = 0; i < cut.count; ++i) {
    const int64_t begin = cut.begin(i);
    Product<S> part = p;
    part.A += begin;
    part.C += begin * p.ldc;
    if (p.vectors >= vectors_worth_a_copy) {
      for (int64_t k = 0; k < p.K; ++k)
        for (int b = 0; b < most; b += V::size) V::load(part.A + k * p.lda + b).store(copy + k * most + b);
      part.A = copy;
      part.lda = most;
    }
    const auto place = p.template places<1, 2>(0);
    for (int64_t vector = 0; vector < p.vectors; vector += 2, part.W += pair, part.C += 2 * p.c_stride)
      (vector + 1 < p.vectors ? pairs : singles)[cut.size(i) - 1](part, 0, 0, place.data(), nullptr);
  }
}

// Packs K columns of rows [first, first + count) of a row-major [*, columns] matrix as one output vector; missing rows are zero.
template <class V, class From, class To>
void pack_rows(const From* matrix, int64_t columns, int64_t first, int count, int64_t K, To* packed) {
  constexpr int N = V::size;
  const auto square = [&](int64_t k, auto height, auto width) __attribute__((always_inline)) {
    V rows[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j)
      rows[j] = j < height ? load<V>(matrix + (first + j) * columns + k, width) : V(typename V::Scalar(0));
    transpose<N / 2>(rows);
    if constexpr (in_pairs<To>)
      for (int i = 0; i < N; i += 2) store_pairs(rows[i], rows[i + 1], packed + (k + i) / 2 * N);
    else
      for (int i = 0; i < width; ++i) rows[i].store(packed + (k + i) * N);
  };
  int64_t k = 0;
  if (count == N)  // known sizes: three times as fast
    for (constexpr std::integral_constant<int, N> whole{}; k + N <= K; k += N) square(k, whole, whole);
  for (; k < padded<To>(K); k += N) square(k, count, static_cast<int>(std::clamp<int64_t>(K - k, 0, N)));
}

// Packs columns [first, first + count) of a row-major [K, columns] matrix as output vectors, `stride` numbers from one to the
// next. Several vectors at once use whole cache lines, and those next to them, while they are near.
template <class V, class From, class To>
void pack_columns(const From* matrix, int64_t columns, int64_t first, int64_t count, int64_t K, To* packed,
                  int64_t stride) {
  constexpr int N = V::size, rows_at_once = 8;
  const auto vector = [&](int64_t begin, int64_t end, int64_t v, auto width) __attribute__((always_inline)) {
    const From* from = matrix + first + v * N;
    To* to = packed + v * stride;
    const auto row = [&](int64_t k) { return k < K ? load<V>(from + k * columns, width) : V(0); };
    if constexpr (in_pairs<To>)
      for (int64_t k = begin; k < end; k += 2) store_pairs(row(k), row(k + 1), to + k / 2 * N);
    else
      for (int64_t k = begin; k < end; ++k) load<V>(from + k * columns, width).store(to + k * N);
  };
  const int64_t rows = padded<To>(K);
  for (int64_t k = 0; k < rows; k += rows_at_once) {
    const int64_t end = std::min(k + rows_at_once, rows);
    int64_t v = 0;
    for (; (v + 1) * N <= count; ++v) vector(k, end, v, std::integral_constant<int, N>());
    if (v * N < count) vector(k, end, v, static_cast<int>(count - v * N));
  }
}

}  // namespace
}  // namespace fusedrnn::cpu
