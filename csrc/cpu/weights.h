// Weights as forward needs them: their rows as output vectors, and the sums of the biases. Packed at every call, or once, for
// the calls of a stream.
#pragma once

#include "gemm.h"
#include "memory.h"
#include "team.h"

namespace fusedrnn::cpu {
namespace {

template <class Cell, class S, int N, class W>
struct PackedWeights {
  using V = vec<S, N>;
  static constexpr int gates = Cell::gates, sums = Cell::sums;

  const Problem& p;
  const int64_t I = p.I, H = p.H, panels = (H + N - 1) / N;
  const bool tiled, narrow;  // both packed weights are tiles; packed w_hh stays of its type
  S* w_ih = nullptr;         // [D, panels, gates, I, N], or nullptr where it is read in place
  S* w_hh = nullptr;         // [D, panels, gates, H, N], or nullptr; as Packed<W> where narrow
  S* bias = nullptr;         // [D, panels, sums, N]
  int64_t numbers = 0;

  PackedWeights(const Problem& problem, bool input, bool hidden, bool tiled)
      : p(problem), tiled(tiled), narrow(!tiled && p.sequence.B <= narrow_rows), input_(input), hidden_(hidden) {
    numbers = p.directions * panels * (gates * ((input ? vector_size(I) : 0) + (hidden ? vector_size(H) : 0)) + sums * N);
  }

  // An output vector's numbers in memory.
  int64_t vector_size(int64_t K) const { return tiled ? tiled_size<pieces_of<W>>(K) / 2 : K * N; }

  // Gives it memory for `numbers`.
  void place(S* memory) {
    const int64_t count = p.directions * panels * N;
    bias = memory;
    if (input_) w_ih = bias + count * sums;
    if (hidden_) w_hh = bias + count * sums + (input_ ? p.directions * panels * gates * vector_size(I) : 0);
  }

  void pack(const Threads& threads) {
    const bool small = gates * H * ((input_ ? I : 0) + (hidden_ ? H : 0)) < packing_for_team;
    (small ? Threads{1, nullptr} : threads).parallel(p.directions * panels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) panel(i / panels, i % panels);
    });
  }

 private:
  bool input_, hidden_;

  void panel(int64_t direction, int64_t index) {
    const Weights& w = p.weights[direction];
    const int64_t at = direction * panels + index;
    const int count = static_cast<int>(std::min<int64_t>(N, H - index * N));
    S* sum = bias + at * sums * N;
    for (int k = 0; k < sums; ++k) V(S(0)).store(sum + k * N);
    for (int g = 0; g < gates; ++g) {
      const int64_t input_row = g * H + index * N, hidden_row = Cell::hidden_gate(g) * H + index * N;
      const W *input = static_cast<const W*>(w.w_ih), *hidden = static_cast<const W*>(w.w_hh);
      const int64_t to = at * gates + g;
      if constexpr (takes_tiles<V>)
        if (tiled) {
          if (w_ih) pack_rows<V>(input, input_row, count, I, tiles(w_ih + to * vector_size(I)));
          if (w_hh) pack_rows<V>(hidden, hidden_row, count, H, tiles(w_hh + to * vector_size(H)));
        }
      if (w_ih && !tiled) pack_rows<V>(input, input_row, count, I, w_ih + to * I * N);
      if (w_hh && !tiled)
        narrow ? pack_rows<V>(hidden, hidden_row, count, H,
                              reinterpret_cast<Packed<W>*>(w_hh) + to * packed_size<Packed<W>>(H) * N)
               : pack_rows<V>(hidden, hidden_row, count, H, w_hh + to * H * N);
      if (w.b_ih) add(sum + (Cell::input_sum + g) * N, static_cast<const W*>(w.b_ih) + input_row, count);
      if (w.b_hh) add(sum + g * N, static_cast<const W*>(w.b_hh) + hidden_row, count);
    }
  }
  static auto* tiles(S* memory) { return reinterpret_cast<Tiles<pieces_of<W>>*>(memory); }
  static void add(S* sum, const W* bias, int count) { (V::load(sum) + load<V>(bias, count)).store(sum); }
};

// Whether a layer's forward products are made in tiles where its weights are packed, for any T.
template <class V>
bool tiles_for(const Problem& p) {
  return takes_tiles<V> && p.tiles && in_tiles_from(p.sequence.B, p.H, p.converts_weights());
}

// Packs everything for the calls to come.
template <class Cell, class S, int N, class W>
struct Prepare {
  using V = vec<S, N>;

  Prepare(const PrepareParams& p, const Threads& threads) {
    PackedWeights<Cell, S, N, W> packed(p, true, true, tiles_for<V>(p));
    if (p.bytes) *p.bytes = packed.numbers * sizeof(S);
    if (!p.memory) return;
    packed.place(static_cast<S*>(p.memory));
    packed.pack(threads);
  }
};

}  // namespace
}  // namespace fusedrnn::cpu
