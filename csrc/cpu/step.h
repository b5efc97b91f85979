// One step of a few rows, as streams and rollouts take them: weights are read where they are, once, by dot products, and
// nothing is kept, and nothing copied but a bfloat16 x and state, unless the processor multiplies these. Threads share out the hidden
// units and need not meet.
#pragma once

#include "memory.h"
#include "team.h"
#include "unpacked.h"

namespace fusedrnn::cpu {
namespace {

// Whether a step multiplies x and hx as they are, in pairs.
inline bool steps_in_pairs(const Problem& p) {
  return p.pairs == Pairs::dots && in_tiles(p) && p.narrow_sequence && p.narrow_states;
}

inline bool is_step(const Problem& p) {
  return p.sequence.T == 1 && !p.projection && !p.sequence.lengths && !p.sequence.resets &&
         (steps_in_pairs(p) ? p.sequence.B < most_step_rows
                            : !packs_for_step(p.sequence.B, p.H, p.converts_weights(), in_tiles(p)));
}

inline bool step_needs_team(const Problem& p, int64_t gates) {
  return gates * p.H * (p.I + p.H) * p.directions * (p.sequence.B + 1) / 2 >= step_for_team;
}

template <class Cell, class S, int N, class W>
struct Step {
  using V = vec<S, N>;
  static constexpr int gates = Cell::gates, sums = Cell::sums, saved = Cell::saved;

  const ForwardParams& p;
  const int64_t B = p.sequence.B, I = p.I, H = p.H, panels = (H + N - 1) / N;
  const bool in_pairs = steps_in_pairs(p);  // else what is bfloat16 of x and hx is widened
  Scratch<S> wide_x = scratch<S>(p.narrow_sequence && !in_pairs ? B * I : 0),
             wide_h = scratch<S>(p.narrow_states && !in_pairs ? p.directions * B * H : 0);
  const S* const x = in_pairs ? nullptr : widened(p.x, p.narrow_sequence, B* I, wide_x.get());
  const S* const hx = in_pairs ? nullptr : widened(p.hx, p.narrow_states, p.directions * B * H, wide_h.get());

  static const S* widened(const void* from, bool narrow, int64_t n, S* to) {
    const auto numbers = Numbers<const S, const W>::at(from, narrow);
    if (!numbers.narrow) return numbers.wide;
    widen<V>(numbers, n, to);
    return to;
  }

  Step(const ForwardParams& params, const Threads& threads) : p(params) {
    (step_needs_team(p, gates) ? threads : Threads{1, nullptr})
        .parallel(p.directions * panels, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) panel(i / panels, i % panels);
        });
  }

  void panel(int64_t direction, int64_t index) {
    alignas(64) S a[most_step_rows * sums * N];
    const int64_t unit = index * N;
    const int count = static_cast<int>(std::min<int64_t>(N, H - unit));
    const Weights& w = p.weights[direction];
    const auto bias = [&](const void* b, int64_t block) {
      return b ? load<V>(static_cast<const W*>(b) + block * H + unit, count) : V(S(0));
    };
    V start[sums];
    for (int k = 0; k < sums; ++k) start[k] = V(S(0));
    for (int g = 0; g < gates; ++g) {
      start[Cell::input_sum + g] = start[Cell::input_sum + g] + bias(w.b_ih, g);
      start[g] = start[g] + bias(w.b_hh, Cell::hidden_gate(g));
    }
    for (int64_t b = 0; b < B; ++b)
      for (int k = 0; k < sums; ++k) start[k].store(a + (b * sums + k) * N);
    if constexpr (takes_tiles<V, W>)
      if (in_pairs) add(w, unit, count, static_cast<const W*>(p.x), static_cast<const W*>(p.hx) + direction * B * H, a);
    if (!in_pairs) add(w, unit, count, x, hx + direction * B * H, a);
    for (int64_t b = 0; b < B; ++b) cell(direction, b, unit, count, a + b * sums * N);
  }

  // Adds x·W_ih and h·W_hh for `count` units.
  template <class Given>
  void add(const Weights& w, int64_t unit, int count, const Given* x, const Given* h, S* a) const {
    using Products = Dots<S, W, Given>;
    for (int k = 0; k < sums; ++k) {
      const bool of_x = k >= Cell::input_sum, of_h = k < gates;
      const Products input{static_cast<const W*>(w.w_ih) + (std::max(k - Cell::input_sum, 0) * H + unit) * I, x, I, I},
          hidden{static_cast<const W*>(w.w_hh) + (Cell::hidden_gate(k) * H + unit) * H, h, H, H};
      if (of_x && of_h) {
        multiply_unpacked<V, S, Products, 2>({{input, hidden}}, count, B, a + k * N, sums * N, H);
      } else {
        multiply_unpacked<V, S, Products, 1>({{of_x ? input : hidden}}, count, B, a + k * N, sums * N, H);
      }
    }
  }

  void cell(int64_t direction, int64_t b, int64_t unit, int count, const S* sum) {
    const int64_t state = (direction * B + b) * H + unit;
    V a[sums], gate[std::max(1, saved)], c(S(0));
    for (int k = 0; k < sums; ++k) a[k] = V::load(sum + k * N);
    using Given = Numbers<const S, const W>;
    using Made = Numbers<S, W>;
    const auto given = [&](const void* states) {
      return Given::at(states, p.narrow_states).template load<V>(state, count);
    };
    if constexpr (Cell::has_cell) c = given(p.cx);
    Cell::activate(a);
    const V h = Cell::forward(a, given(p.hx), c, gate);
    Made::at(p.y, p.narrow_sequence).store(h, (b * p.directions + direction) * H + unit, count);
    if (p.h_n != p.y) Made::at(p.h_n, p.narrow_states).store(h, state, count);
    if constexpr (Cell::has_cell) Made::at(p.c_n, p.narrow_states).store(c, state, count);
    if (!p.gates && !p.cells) return;
    for (int k = 0; k < saved; ++k)
      store(to_saved<Cell, W>(k, gate[k]), static_cast<W*>(p.gates) + ((direction * B + b) * saved + k) * H + unit,
            count);
    if constexpr (Cell::has_cell) store(c, static_cast<W*>(p.cells) + state, count);
  }
};

}  // namespace
}  // namespace fusedrnn::cpu
