// Weights as backward needs them: their columns as output vectors, for products that go back through them.
#pragma once

#include "gemm.h"

namespace fusedrnn::cpu {
namespace {

// The [gates*H, columns] weights of up to two directions. A product takes `gates` blocks of H numbers a row, the one for
// block g times the weights' block gate_of[g]. Where weights are not packed, whole vectors are read in place; a last
// partial one never is. `narrow`: packed weights stay of the type that they are stored in. Packed ones are in sets, as forward's
// (weights.h).
template <class V, class S, class W>
struct Columns {
  static constexpr int N = V::size;
  static constexpr int64_t vectors_at_once = 16;  // that are packed together
  int64_t columns, gates, H;
  std::array<int, 4> gate_of;
  int64_t directions, sets, vectors = (columns + N - 1) / N, first_packed, packed = vectors - first_packed;
  bool narrow;
  const W* weights[2] = {};
  S* panels = nullptr;  // of Packed<W>, where they are narrow: [set][vector][gate][packed_size(H)][N]

  Columns(int64_t columns, int64_t gates, int64_t H, std::array<int, 4> gate_of, int64_t directions, int64_t sets,
          bool packed, bool narrow)
      : columns(columns),
        gates(gates),
        H(H),
        gate_of(gate_of),
        directions(directions),
        sets(sets),
        first_packed(packed ? 0 : columns / N),
        narrow(narrow) {}

  void set(int64_t direction, const void* matrix) { weights[direction] = static_cast<const W*>(matrix); }

  // What packing needs memory for.
  int64_t numbers() const { return sets * packed * gates * (narrow ? packed_size<Packed<W>>(H) : H) * N; }
  void place(S* memory) { panels = memory; }

  // Vectors [begin, end), those that a member reads.
  void pack(int64_t set, int64_t begin, int64_t end) {
    for (int64_t vector = std::max(begin, first_packed); vector < end; vector += vectors_at_once)
      for (int g = 0; g < gates; ++g) pack(set, g, vector, std::min(vector + vectors_at_once, end));
  }

  // Adds A's rows times vectors [begin, end) of a direction's columns to C.
  void multiply(int64_t set, const S* A, int64_t lda, int64_t rows, int64_t begin, int64_t end, S* C, int64_t ldc,
                bool backwards) const {
    const int64_t in_place = std::clamp(first_packed, begin, end);
    if (begin < in_place)
      for (int g = 0; g < gates; ++g)
        cpu::multiply<V, S, W>({weights[set % directions] + gate_of[g] * H * columns + begin * N, N, columns,
                                in_place - begin, A + g * H, lda, H, rows, C, ldc, N, false});
    if (in_place == end) return;
    // All gates are one product, unless a pair would span two of them.
    const auto from_panels = [&](auto* panels) {
      using Stored = std::remove_pointer_t<decltype(panels)>;
      const int64_t size = packed_size<Stored>(H) * N, blocks = padded<Stored>(H) == H ? 1 : gates;
      panels += (set * packed + in_place - first_packed) * gates * size;
      for (int64_t g = 0; g < blocks; ++g)
        cpu::multiply<V, S, Stored>({panels + g * size, gates * size, N, end - in_place, A + g * H, lda,
                                     gates / blocks * H, rows, C + (in_place - begin) * N, ldc, N, false, 0, backwards,
                                     (end - in_place) * gates * H * N > far_weights});
    };
    narrow ? from_panels(reinterpret_cast<Packed<W>*>(panels)) : from_panels(panels);
  }

  // The same in tiles, where weights are narrow and all are packed. A has `gates` times the blocks of H columns.
  void multiply_tiles(Pairs pairs, int64_t set, const TileRows<V>& A, int64_t rows, int64_t begin, int64_t end, S* C,
                      int64_t ldc, bool backwards) const {
    if constexpr (takes_tiles<V, W>)
      cpu::multiply_tiles<V>(pairs, {reinterpret_cast<const Packed<W>*>(panels) +
                                         (set * vectors + begin) * gates * packed_size<Packed<W>>(H) * N,
                                     end - begin, gates * blocks_of(H), A, rows, C, ldc, N, false, 0, backwards});
  }

 private:
  void pack(int64_t set, int64_t g, int64_t vector, int64_t end) {
    const int64_t column = vector * N, count = std::min(end * N, columns) - column,
                  to = (set * packed + vector - first_packed) * gates + g;
    const W* from = weights[set % directions] + gate_of[g] * H * columns;
    const auto to_panels = [&](auto* panels) {
      const int64_t size = packed_size<std::remove_pointer_t<decltype(panels)>>(H) * N;
      pack_columns<V>(from, columns, column, count, H, panels + to * size, gates * size);
    };
    narrow ? to_panels(reinterpret_cast<Packed<W>*>(panels)) : to_panels(panels);
  }
};

}  // namespace
}  // namespace fusedrnn::cpu
