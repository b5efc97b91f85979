// Products of bfloat16s whose sums are float32; numbers below 2^-126 count as zero. Weights are packed as tiles of 32 k times 16
// outputs, in pairs of k. One instruction multiplies a tile by 16 rows (AMX), at best 16 times as many products a cycle as fused
// multiply-adds make; or a row of its pairs by one pair (avx512_bf16), twice as many.
#pragma once

#include <array>

#include "../params.h"
#include "simd.h"

namespace fusedrnn::cpu {
namespace {

#if defined(__x86_64__)
constexpr bool tiles_exist = true;
#else
constexpr bool tiles_exist = false;
#endif
// Whether weights stored as Stored can be packed as tiles, by the width; whether the processor multiplies them, the Problem says.
template <class V, class Stored>
constexpr bool takes_tiles = tiles_exist && std::is_same_v<Stored, bfloat16> && V::size == 16;

constexpr int64_t tile_size = 512;  // bfloat16s: 16 rows of 64 bytes
// Blocks of 32 in k, which is what a tile has.
constexpr int64_t blocks_of(int64_t K) { return (K + 31) / 32; }

// Rows to be multiplied, as bfloat16s.
template <class V>
struct TileRows {
  uint16_t* memory = nullptr;
  int64_t row_step = 0, block_step = 0;  // from a row's 32 numbers to the next row's, and to its next ones

  // For tiles every block has all rows, 64 bytes each, so that any 16 rows in a row are one. For dot products rows are an odd number
  // of cache lines apart (see row_stride).
  static TileRows of(uint16_t* memory, Pairs pairs, int64_t rows, int64_t blocks) {
    return pairs == Pairs::tiles ? TileRows{memory, 32, rows * 32} : TileRows{memory, (blocks | 1) * 32, 32};
  }
  // In bfloat16s, either way. The last tile may reach beyond the last row.
  static int64_t size(int64_t rows, int64_t blocks) { return rows ? (rows * (blocks | 1) + 16) * 32 : 0; }
  uint16_t* at(int64_t block, int64_t row) const { return memory + block * block_step + row * row_step; }
  TileRows from(int64_t block, int64_t row) const { return {at(block, row), row_step, block_step}; }
  // Columns [k, k + 16) of a row, k being a multiple of 16, in the blocks from `first` on.
  FUSEDRNN_INLINE void store(int64_t first, int64_t row, int64_t k, V x) const {
    const auto half = upper_halves<V>(to_bfloat16(x));
    std::memcpy(at(first + k / 32, row) + k % 32, &half, sizeof(half));
  }
  // Columns [begin, end) of n rows that have `columns`. Whoever has the last one fills its block with zeros.
  template <class T>
  void fill(const T* from, int64_t stride, int64_t n, int64_t first, int64_t row, int64_t begin, int64_t end,
            int64_t columns) const {
    for (int64_t b = 0; b < n; ++b, from += stride) {
      int64_t k = begin;
      for (; k + 16 <= end; k += 16) store(first, row + b, k, load<V>(from + k));
      if (k < end) store(first, row + b, k, load<V>(from + k, static_cast<int>(end - k))), k += 16;
      if (end == columns && k % 32) store(first, row + b, k, V(0.0f));
    }
  }
};

#if defined(__x86_64__)
template <int tile>
FUSEDRNN_INLINE void load_tile(const void* p) {
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
template <int sum, int a, int w>
FUSEDRNN_INLINE void multiply_tile() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(w));
}
// sum + both products of each pair of bfloat16s.
template <class V>
FUSEDRNN_INLINE V add_pairs(V sum, V w, V a) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(w.v), "v"(a.v));
  return sum;
}
#else
template <int tile>
void load_tile(const void*);
template <int tile>
void store_tile(float*);
template <int tile>
void zero_tile();
template <int sum, int a, int w>
void multiply_tile();
template <class V>
V add_pairs(V sum, V w, V a);
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

// Where `count` vectors from `vector` on are in a row of C, of which `group` each are c_stride apart.
template <int group, int count>
FUSEDRNN_INLINE std::array<int64_t, count> places_of(int64_t vector, int64_t c_stride, int64_t group_stride) {
  std::array<int64_t, count> at;
  for (int v = 0; v < count; ++v) {
    const int64_t i = vector + v;
    at[v] = group == 1 ? i * c_stride : i / group * group_stride + i % group * c_stride;
  }
  return at;
}

// C[row*ldc + place of vector] += sum over k of A[row][k] * W[vector][k], as in Product (gemm.h).
template <class V>
struct TileProduct {
  const bfloat16_pair* W;  // [vector][block], a tile each
  int64_t vectors, blocks;
  TileRows<V> A;  // from the first block and row on
  int64_t rows;
  float* C;
  int64_t ldc, c_stride;
  bool fresh = false;        // C holds nothing yet
  int64_t group_stride = 0;  // from a group of vectors to the next in C
  bool backwards = false;    // the last vectors first
};

// Rows from `row` on, 16 or 32 of them at most, and some vectors: 4 tiles of sums.
template <class V, int group, int row_tiles, int... output>
__attribute__((noinline)) void tiles_of_rows(const TileProduct<V>& p, int64_t row, int64_t vector,
                                             std::integer_sequence<int, output...>) {
  constexpr int outputs = sizeof...(output), A = 4, W = 6;
  static_assert(row_tiles * outputs <= 4);
  const auto each = [&](auto f) __attribute__((always_inline)) { (f(std::integral_constant<int, output>()), ...); };
  each([&](auto c) __attribute__((always_inline)) {
    zero_tile<c()>();
    if constexpr (row_tiles > 1) zero_tile<outputs + c()>();
  });
  const uint16_t* a = p.A.at(0, row);
  const bfloat16_pair* w = p.W + vector * p.blocks * (tile_size / 2);
  const int64_t next = p.blocks * (tile_size / 2), blocks = p.blocks, block_step = p.A.block_step;
  for (int64_t k = 0; k < blocks; ++k, a += block_step, w += tile_size / 2) {
    load_tile<A>(a);
    if constexpr (row_tiles > 1) load_tile<A + 1>(a + tile_size);
    each([&](auto c) __attribute__((always_inline)) {
      load_tile<W + c() % 2>(w + c() * next);
      multiply_tile<c(), A, W + c() % 2>();
      if constexpr (row_tiles > 1) multiply_tile<outputs + c(), A + 1, W + c() % 2>();
    });
  }
  alignas(64) float sums[outputs * row_tiles][16][16];
  each([&](auto c) __attribute__((always_inline)) {
    store_tile<c()>(sums[c()][0]);
    if constexpr (row_tiles > 1) store_tile<outputs + c()>(sums[outputs + c()][0]);
  });
  const auto place = places_of<group, outputs>(vector, p.c_stride, p.group_stride);
  float* row_of_C = p.C + row * p.ldc;
  const int64_t count = std::min<int64_t>(row_tiles * 16, p.rows - row);
  for (int64_t b = 0; b < count; ++b, row_of_C += p.ldc)
#pragma GCC unroll 4
    for (int c = 0; c < outputs; ++c) {
      const V sum = V::load(sums[b / 16 * outputs + c][b % 16]);
      float* to = row_of_C + place[c];
      (p.fresh ? sum : V::load(to) + sum).store(to);
    }
}

// Vectors two at a time meet 32 rows, so that each tile that is loaded is used twice; four meet 16. The next rows begin with the
// vectors that these end with.
template <class V, int group>
void multiply_in_tiles(const TileProduct<V>& p) {
  constexpr std::make_integer_sequence<int, 1> one;
  bool backwards = p.backwards;
  for (int64_t row = 0; row < p.rows; row += 32, backwards = !backwards) {
    const bool two = p.rows - row > 16;
    const int64_t most = two ? 2 : 4, count = (p.vectors + most - 1) / most;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t vector = (backwards ? count - 1 - j : j) * most, end = std::min(vector + most, p.vectors);
      if (end - vector < most)
        for (int64_t v = vector; v < end; ++v)
          two ? tiles_of_rows<V, group, 2>(p, row, v, one) : tiles_of_rows<V, group, 1>(p, row, v, one);
      else if (two)
        tiles_of_rows<V, group, 2>(p, row, vector, std::make_integer_sequence<int, 2>());
      else
        tiles_of_rows<V, group, 1>(p, row, vector, std::make_integer_sequence<int, 4>());
    }
  }
}

}  // namespace
}  // namespace fusedrnn::cpu
