// Weights as forward needs them: their rows as output vectors, and the sums of the biases. Packed at every call, by those who read
// them unless several teams share them, or once, for the calls to come; in a set for each direction, or for each team, of which set
// s has direction s % directions.
#pragma once

#include "recurrence.h"

namespace fusedrnn::cpu {
namespace {

template <class Cell, class S, int N, class W>
struct PackedWeights {
  using V = vec<S, N>;
  static constexpr int gates = Cell::gates, sums = Cell::sums;

  const Problem& p;
  const int64_t sets, I = p.I, H = p.H, R = p.R(), panels = (H + N - 1) / N;
  const int64_t projected_panels = p.projection ? (R + N - 1) / N : 0;
  const bool tiled = takes_tiles<V, W> && in_tiles(p);  // what is packed is tiles
  const bool narrow;                                    // packed w_hh stays of its type
  S* w_ih = nullptr;  // [sets, panels, gates, I, N], or nullptr where it is not packed; as Packed<W> where tiled
  S* w_hh = nullptr;  // [sets, panels, gates, R, N], or nullptr; as Packed<W> where narrow
  S* w_hr = nullptr;  // [sets, projected_panels, H, N] of a projection, beside w_hh and of its type
  S* bias = nullptr;  // [sets, panels, sums, N]

  // For products with `rows` rows of a state.
  PackedWeights(const Problem& problem, int64_t rows, int64_t sets, bool input, bool hidden)
      : p(problem),
        sets(sets),
        narrow(tiled || rows <= narrow_rows),
        input_size_(input ? (tiled ? packed_size<Packed<W>>(I) : I) * N : 0),
        hidden_size_(hidden ? (narrow ? packed_size<Packed<W>>(R) : R) * N : 0),
        projection_size_(hidden && p.projection ? (narrow ? packed_size<Packed<W>>(H) : H) * N : 0) {}

  // The numbers that it needs memory for: of what is recurrent, and of the rest.
  int64_t recurrent() const { return sets * (panels * gates * hidden_size_ + projected_panels * projection_size_); }
  int64_t others() const { return sets * panels * (sums * N + gates * input_size_); }
  // In one block, others first.
  void place(S* memory) { place(memory + others(), memory); }
  void place(S* recurrent, S* others) {
    if (hidden_size_) w_hh = recurrent;
    if (projection_size_) w_hr = recurrent + sets * panels * gates * hidden_size_;
    bias = others;
    if (input_size_) w_ih = bias + sets * panels * sums * N;
  }

  void pack(const Threads& threads) {
    const int64_t each = panels + projected_panels;
    threads.parallel(sets * each, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        i % each < panels ? panel(i / each, i % each) : projected_panel(i / each, i % each - panels);
    });
  }
  // Those that a member reads.
  void pack(int64_t set, const Member& member) {
    for (int64_t i = member.begin; i < member.end; ++i) panel(set, i);
    for (int64_t i = member.state_begin; i < member.state_end; ++i) projected_panel(set, i);
  }

 private:
  // Numbers in memory of an output vector of each; 0 where it is not packed.
  int64_t input_size_, hidden_size_, projection_size_;

  void projected_panel(int64_t set, int64_t index) {
    const int count = static_cast<int>(std::min<int64_t>(N, R - index * N));
    if (w_hr)
      pack(p.weights[set % p.directions].w_hr, index * N, count, H,
           w_hr + (set * projected_panels + index) * projection_size_, narrow);
  }

  // `count` rows of a matrix from `row` on as an output vector.
  void pack(const void* matrix, int64_t row, int count, int64_t K, S* to, bool stays) const {
    const W* from = static_cast<const W*>(matrix);
    stays ? pack_rows<V>(from, K, row, count, K, reinterpret_cast<Packed<W>*>(to))
          : pack_rows<V>(from, K, row, count, K, to);
  }

  void panel(int64_t set, int64_t index) {
    const Weights& w = p.weights[set % p.directions];
    const int64_t at = set * panels + index;
    const int count = static_cast<int>(std::min<int64_t>(N, H - index * N));
    S* sum = bias + at * sums * N;
    for (int k = 0; k < sums; ++k) V(S(0)).store(sum + k * N);
    for (int g = 0; g < gates; ++g) {
      const int64_t input_row = g * H + index * N, hidden_row = Cell::hidden_gate(g) * H + index * N;
      if (w_ih) pack(w.w_ih, input_row, count, I, w_ih + (at * gates + g) * input_size_, tiled);
      if (w_hh) pack(w.w_hh, hidden_row, count, R, w_hh + (at * gates + g) * hidden_size_, narrow);
      if (w.b_ih) add(sum + (Cell::input_sum + g) * N, static_cast<const W*>(w.b_ih) + input_row, count);
      if (w.b_hh) add(sum + g * N, static_cast<const W*>(w.b_hh) + hidden_row, count);
    }
  }
  static void add(S* sum, const W* bias, int count) { (V::load(sum) + load<V>(bias, count)).store(sum); }
};

// Packs everything for the calls to come.
template <class Cell, class S, int N, class W>
struct Prepare {
  Prepare(const PrepareParams& p, const Threads& threads) {
    PackedWeights<Cell, S, N, W> packed(p, p.sequence.B, p.directions, true, true);
    if (p.bytes) *p.bytes = (packed.others() + packed.recurrent()) * sizeof(S);
    if (!p.memory) return;
    packed.place(static_cast<S*>(p.memory));
    packed.pack(threads);
  }
};

}  // namespace
}  // namespace fusedrnn::cpu
