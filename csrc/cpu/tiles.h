// Products in tiles (AMX): 16 rows times 32 products of bfloat16 times 16 outputs in one instruction, 16 times as many a cycle
// as fused multiply-adds. A float32 takes part as the sum of three bfloat16s, which it is exactly; of the nine products of
// two such sums those are left out that are below 2^-25 of the whole, so that the result is as good as float32's. Weights
// stored as bfloat16 are one piece, what they are multiplied with then two: the state is not rounded to bfloat16.
//
// Numbers below 2^-126 count as zero here. Where a result is not finite it is computed again with fused multiply-adds, for
// the pieces of an infinity are 0 and their products with it NaN.
#pragma once

#include "simd.h"

namespace fusedrnn::cpu {
namespace {

#if defined(__x86_64__)
constexpr bool tiles_exist = true;
#else
constexpr bool tiles_exist = false;
#endif
// Whether products of V can be made in tiles, by the width; the processor is asked elsewhere (tiles_in_use).
template <class V>
constexpr bool takes_tiles = tiles_exist && std::is_same_v<typename V::Scalar, float> && V::size == 16;

constexpr int64_t tile_size = 512;  // bfloat16s: 16 rows of 64 bytes
constexpr int64_t blocks_of(int64_t K) { return (K + 31) / 32; }

// Pieces of a stored number, and of what is multiplied with it.
template <class Stored>
constexpr int pieces_of = std::is_same_v<Stored, bfloat16> ? 1 : 3;
template <class Stored>
constexpr int pieces_beside = std::is_same_v<Stored, bfloat16> ? 2 : 3;

template <class V>
using Words = typename Bits<V::size>::Whole;

// Numbers as bfloat16s, each in the upper half of its word, largest first. What is near infinity is cut off instead of
// rounded, and of infinity and NaN there is one piece.
template <class V, int pieces>
__attribute__((noinline, cold)) void split_extremes(V x, Words<V> (&piece)[pieces]) {
  for (int lane = 0; lane < V::size; ++lane) {
    float rest = x.v[lane];
    for (int i = 0; i < pieces; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &rest, 4);
      const uint32_t magnitude = bits & 0x7fffffff;
      if (magnitude <= 0x7f7f7fff) bits += 0x7fff + (bits >> 16 & 1);
      if (magnitude > 0x7f800000) bits |= 0x00400000;
      bits &= 0xffff0000;
      piece[i][lane] = bits;
      float value;
      std::memcpy(&value, &bits, 4);
      rest = magnitude < 0x7f800000 ? rest - value : 0.0f;
    }
  }
}
template <class V, int pieces>
FUSEDRNN_INLINE void split(V x, Words<V> (&piece)[pieces]) {
  if (any_beyond(x, 0x7f7f7fff)) return split_extremes(x, piece);
#pragma GCC unroll 3
  for (int i = 0; i < pieces; ++i) {
    const auto bits = (Words<V>)x.v;
    piece[i] = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    x = x - V((typename V::Register)piece[i]);
  }
}

// Rows to be multiplied, split: for every 32 columns and every piece all rows, of 64 bytes each. So any 16 rows in a row are
// a tile.
template <class V, int pieces>
struct SplitRows {
  uint16_t* memory;
  int64_t capacity;  // rows

  // In bfloat16s. The last tile may reach beyond the last row.
  static int64_t size(int64_t rows, int64_t blocks) { return rows ? (rows * blocks * pieces + 16) * 32 : 0; }
  uint16_t* at(int64_t block, int64_t row) const { return memory + (block * pieces * capacity + row) * 32; }
  // 16 columns of a row, the lower or the upper ones of a block.
  FUSEDRNN_INLINE void store(int64_t block, int64_t upper, int64_t row, V x) const {
    Words<V> piece[pieces];
    split(x, piece);
    uint16_t* to = at(block, row) + upper * 16;
#pragma GCC unroll 3
    for (int i = 0; i < pieces; ++i) {
      const auto half = upper_halves<V>(piece[i]);
      std::memcpy(to + i * capacity * 32, &half, sizeof(half));
    }
  }
  // Columns [begin, end) of n rows, from a multiple of 16 on; `first` is the block of column 0. Whoever has the last column
  // fills its block with zeros.
  void fill(const float* from, int64_t stride, int64_t n, int64_t row, int64_t begin, int64_t end, int64_t first,
            int64_t columns) const {
    for (int64_t b = 0; b < n; ++b, from += stride) {
      int64_t k = begin;
      for (; k + 16 <= end; k += 16) store(first + k / 32, k / 16 % 2, row + b, V::load(from + k));
      if (k < end) store(first + k / 32, k / 16 % 2, row + b, V::load(from + k, static_cast<int>(end - k))), k += 16;
      if (end == columns && k % 32) store(first + k / 32, 1, row + b, V(0.0f));
    }
  }
};

// Two neighbours in k of an output vector, in all pieces: `to` is their place in the tile of the first piece.
template <class V, int pieces>
FUSEDRNN_INLINE void store_split(V even, V odd, uint16_t* to) {
  Words<V> first[pieces], second[pieces];
  split(even, first), split(odd, second);
#pragma GCC unroll 3
  for (int i = 0; i < pieces; ++i) {
    const Words<V> pairs = first[i] >> 16 | second[i];
    std::memcpy(to + i * tile_size, &pairs, sizeof(pairs));
  }
}

// What weights in tiles are stored as, as a type to pack into: for each block of 32 in k its pieces.
template <int count>
struct Tiles {
  static constexpr int pieces = count;
  uint16_t bits;
};
template <class T>
constexpr bool in_tiles = false;
template <int count>
constexpr bool in_tiles<Tiles<count>> = true;
// bfloat16s of an output vector, and the place of k's pair.
template <int pieces>
constexpr int64_t tiled_size(int64_t K) {
  return blocks_of(K) * pieces * tile_size;
}
template <int pieces>
constexpr int64_t tiled_place(int64_t k) {
  return k / 32 * pieces * tile_size + k % 32 / 2 * 32;
}

#if defined(__x86_64__)
template <int tile>
FUSEDRNN_INLINE void load_tile(const uint16_t* p) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(int64_t(64)), "i"(tile) : "memory");
}
template <int tile>
FUSEDRNN_INLINE void store_tile(float* p) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(int64_t(64)), "i"(tile) : "memory");
}
template <int tile>
FUSEDRNN_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int sum, int a, int b>
FUSEDRNN_INLINE void multiply_tile() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}
#else
template <int tile>
void load_tile(const uint16_t*);
template <int tile>
void store_tile(float*);
template <int tile>
void zero_tile();
template <int sum, int a, int b>
void multiply_tile();
#endif

// The thread's tile registers, all of 16 rows of 64 bytes, for as long as this lives.
class TileRegisters {
 public:
  explicit TileRegisters(bool wanted) : wanted_(wanted) {
#if defined(__x86_64__)
    struct alignas(64) Shape {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Shape shape;
    if (wanted) __asm__ volatile("ldtilecfg %0" ::"m"(shape));
#endif
  }
  ~TileRegisters() {
#if defined(__x86_64__)
    if (wanted_) __asm__ volatile("tilerelease");
#endif
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  bool wanted_;
};

// C[row*ldc + place(vector)] += sum over k of A[row][k] * W[vector][k], as in Product (gemm.h).
template <class V>
struct TileProduct {
  const uint16_t* W;  // [vector][block][piece], a tile each
  int64_t vectors, blocks;
  const uint16_t* A;  // SplitRows::at of the first block and row
  int64_t capacity, rows;
  float* C;
  int64_t ldc, c_stride;
  bool fresh = false;
  int64_t group = INT64_MAX, group_stride = 0;  // so many vectors are neighbours in C; from there to the next ones

  float* place(int64_t row, int64_t vector) const {
    return C + row * ldc + vector / group * group_stride + vector % group * c_stride;
  }
  void add(int64_t row, int64_t vector, V sum) const {
    float* c = place(row, vector);
    (fresh ? sum : V::load(c) + sum).store(c);
  }
};

// One element's sum of products as fused multiply-adds of the whole numbers.
template <class V, int of_a, int of_w>
__attribute__((noinline, cold)) void multiply_whole(const TileProduct<V>& p, int64_t row, int64_t vector) {
  V sum(0.0f);
  for (int64_t k = 0; k < p.blocks * 32; ++k) {
    const uint16_t* a = p.A + (k / 32 * of_a * p.capacity + row) * 32 + k % 32;
    const uint16_t* w = p.W + vector * p.blocks * of_w * tile_size + tiled_place<of_w>(k);
    float whole = 0.0f;
    V weights(0.0f);
    for (int i = 0; i < of_a; ++i) {
      const uint32_t bits = uint32_t(a[i * p.capacity * 32]) << 16;
      float piece;
      std::memcpy(&piece, &bits, 4);
      whole += piece;
    }
    for (int j = 0; j < of_w; ++j)
      weights = weights + (k % 2 ? load_half<V, 1>(w + j * tile_size) : load_half<V, 0>(w + j * tile_size));
    sum = weights * V(whole) + sum;
  }
  p.add(row, vector, sum);
}

template <class V, int of_a, int of_w, int... output>
__attribute__((noinline)) void tile_of_rows(const TileProduct<V>& p, int64_t row, int64_t vector,
                                            std::integer_sequence<int, output...>) {
  constexpr int outputs = sizeof...(output), A = 4, W = 7, order = std::max(of_a, of_w);
  const auto with_weights = [&](auto c, auto j, const uint16_t* w) __attribute__((always_inline)) {
    load_tile<W>(w + j * tile_size);
    multiply_tile<c(), A, W>();
    if constexpr (of_a > 1 && 1 + j() < order) multiply_tile<c(), A + 1, W>();
    if constexpr (of_a > 2 && 2 + j() < order) multiply_tile<c(), A + 2, W>();
  };
  (zero_tile<output>(), ...);
  const uint16_t *a = p.A + row * 32, *w = p.W + vector * p.blocks * of_w * tile_size;
  for (int64_t k = 0; k < p.blocks; ++k, a += of_a * p.capacity * 32, w += of_w * tile_size) {
    load_tile<A>(a);
    if constexpr (of_a > 1) load_tile<A + 1>(a + p.capacity * 32);
    if constexpr (of_a > 2) load_tile<A + 2>(a + 2 * p.capacity * 32);
    const auto column = [&](auto c) __attribute__((always_inline)) {
      const uint16_t* own = w + c * p.blocks * of_w * tile_size;
      if constexpr (of_w > 2) with_weights(c, std::integral_constant<int, 2>(), own);
      if constexpr (of_w > 1) with_weights(c, std::integral_constant<int, 1>(), own);
      with_weights(c, std::integral_constant<int, 0>(), own);
    };
    (column(std::integral_constant<int, output>()), ...);
  }
  alignas(64) float sums[outputs][16][16];
  (store_tile<output>(sums[output][0]), ...);
  const int count = static_cast<int>(std::min<int64_t>(16, p.rows - row));
  V zero[2] = {V(0.0f), V(0.0f)};  // NaN, where a result is not finite
  for (int b = 0; b < count; ++b)
#pragma GCC unroll 4
    for (int c = 0; c < outputs; ++c) {
      const V sum = V::load(sums[c][b]);
      zero[c % 2] = zero[c % 2] + (sum - sum);
    }
  const bool finite = !any_beyond(zero[0] + zero[1], 0);
  for (int b = 0; b < count; ++b)
#pragma GCC unroll 4
    for (int c = 0; c < outputs; ++c) {
      if (finite)
        p.add(row + b, vector + c, V::load(sums[c][b]));
      else
        multiply_whole<V, of_a, of_w>(p, row + b, vector + c);
    }
}

template <class V, int of_a, int of_w>
void multiply_tiles(const TileProduct<V>& p) {
  for (int64_t vector = 0; vector < p.vectors; vector += 4)
    for (int64_t row = 0; row < p.rows; row += 16) switch (p.vectors - vector) {
        case 1:
          tile_of_rows<V, of_a, of_w>(p, row, vector, std::make_integer_sequence<int, 1>());
          break;
        case 2:
          tile_of_rows<V, of_a, of_w>(p, row, vector, std::make_integer_sequence<int, 2>());
          break;
        case 3:
          tile_of_rows<V, of_a, of_w>(p, row, vector, std::make_integer_sequence<int, 3>());
          break;
        default:
          tile_of_rows<V, of_a, of_w>(p, row, vector, std::make_integer_sequence<int, 4>());
      }
}

}  // namespace
}  // namespace fusedrnn::cpu
