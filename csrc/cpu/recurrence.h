// The time loops on a CPU: forward and back-propagation through time for any cell, scalar type and vector width.
//
// The batch's rows and the directions make jobs; teams of threads take jobs; the members of a team share out the hidden units in
// panels of N and meet once per step. A step is: pre-activations = bias + x·W_ih + h·W_hh for a panel (registers, then a buffer that
// stays in the first-level cache), then the cell, row by row.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "../params.h"
#include "gemm.h"
#include "team.h"
#include "tuning.h"

namespace fusedrnn::cpu {
namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class S>
using Scratch = std::unique_ptr<S[], Free>;

template <class S>
Scratch<S> scratch(int64_t count) {
  constexpr size_t line = 64;
  void* p = std::aligned_alloc(line, (count * sizeof(S) + line) / line * line);
  if (!p) throw std::bad_alloc();
  return Scratch<S>(static_cast<S*>(p));
}

// One direction of one block of rows, and the steps in the order in which forward takes them.
struct Job {
  const Sequence& sequence;
  int64_t direction, row_begin, row_end;

  bool reverse() const { return direction == 1; }
  int64_t step(int64_t s) const { return reverse() ? sequence.T - 1 - s : s; }
  int64_t rows_end(int64_t t) const { return std::min(row_end, sequence.rows_at(t)); }
  int64_t first_step(int64_t b) const { return reverse() ? sequence.length(b) - 1 : 0; }
  int64_t last_step(int64_t b) const { return reverse() ? 0 : sequence.length(b) - 1; }
  int64_t previous(int64_t t) const { return reverse() ? t + 1 : t - 1; }
  int64_t next(int64_t t) const { return reverse() ? t - 1 : t + 1; }
  bool reset_at(int64_t t, int64_t b) const { return sequence.resets && sequence.resets[sequence.start(t) + b]; }
};

// What one member of a team works on: panels [begin, end) of the hidden units.
struct Member {
  int64_t begin, end, arriving, slices;
  Barrier* barrier;
  int64_t generation = 0;
  void meet() { barrier->wait(arriving, slices, generation); }
};

template <class Cell, class S, int N>
struct Recurrence {
  using V = vec<S, N>;
  static constexpr int gates = Cell::gates, sums = Cell::sums, saved = Cell::saved;
  static constexpr int panels_at_once = std::max(1, 4 / gates);  // enough output vectors for a full register tile

  const Problem& problem;
  const Sequence& sequence = problem.sequence;
  const int64_t B = sequence.B, H = problem.H, rows = sequence.start(sequence.T);
  const int64_t panels = (H + N - 1) / N, padded_H = panels * N;
  const Plan plan;
  const int64_t block_rows = (B + plan.row_blocks - 1) / plan.row_blocks;

  Recurrence(const Problem& p, const Threads& threads)
      : problem(p),
        plan(make_plan(p.sequence.T, p.sequence.B, p.H, p.directions, gates, threads.count)) {}

  int units(int64_t panel) const { return static_cast<int>(std::min<int64_t>(N, H - panel * N)); }

  // Runs f(job, member, team, slice) for all jobs on all threads of all teams.
  template <class F>
  void run(const Threads& threads, const F& f) const {
    const auto barriers = std::make_unique<Barrier[]>(plan.groups);
    threads.parallel(plan.groups * plan.slices, [&](int64_t begin, int64_t end) {
      for (int64_t slice = begin; slice < end;) {
        const int64_t team = slice / plan.slices, origin = team * plan.slices;
        const int64_t stop = std::min(end, origin + plan.slices);
        Member member{panels * (slice - origin) / plan.slices, panels * (stop - origin) / plan.slices, stop - slice, plan.slices,
                      &barriers[team]};
        for (int64_t j = team; j < problem.directions * plan.row_blocks; j += plan.groups) {
          const int64_t block = j / problem.directions;
          f(Job{sequence, j % problem.directions, B * block / plan.row_blocks, B * (block + 1) / plan.row_blocks}, member, team, slice);
        }
        slice = stop;
      }
    });
  }

  // Element `unit` of row b in a [D, B, H] state, and of a sequence row in a [D, rows, width] array.
  int64_t state_at(const Job& job, int64_t b, int64_t unit) const { return (job.direction * B + b) * H + unit; }
  int64_t sequence_at(const Job& job, int64_t row, int64_t width) const { return (job.direction * rows + row) * width; }

  // The state before step t of row b: the step before's, the initial one, or nullptr for zero after a reset. `outputs` has one row of
  // `width` for every row of the sequence.
  const S* state_before(const Job& job, int64_t t, int64_t b, const S* outputs, int64_t width, const S* initial) const {
    if (job.reset_at(t, b)) return nullptr;
    if (t == job.first_step(b)) return initial + state_at(job, b, 0);
    return t < sequence.length(b) ? outputs + (sequence.start(job.previous(t)) + b) * width : nullptr;
  }
};

template <class Cell, class S, int N>
struct Forward : Recurrence<Cell, S, N> {
  using Base = Recurrence<Cell, S, N>;
  using typename Base::V;
  using Base::gates, Base::sums, Base::panels_at_once, Base::sequence, Base::B, Base::H, Base::panels, Base::padded_H, Base::plan;
  using Base::block_rows;

  const ForwardParams& p;
  const int64_t I = p.I;
  const int64_t capacity = block_rows * plan.chunk;                  // rows of pre-activations kept for a panel
  const int64_t panels_kept = plan.chunk > 1 ? panels : panels_at_once;
  Scratch<S> w_ih = scratch<S>(plan.packed ? p.directions * panels * gates * I * N : 0);
  Scratch<S> w_hh = scratch<S>(plan.packed ? p.directions * panels * gates * H * N : 0);
  Scratch<S> bias = scratch<S>(p.directions * panels * sums * N);
  Scratch<S> h_state = scratch<S>(plan.groups * 2 * block_rows * padded_H);
  Scratch<S> c_state = scratch<S>(Cell::has_cell ? plan.groups * block_rows * padded_H : 0);
  Scratch<S> pre_activations = scratch<S>(plan.groups * plan.slices * panels_kept * capacity * sums * N);

  Forward(const ForwardParams& params, const Threads& threads) : Base(params, threads), p(params) {
    const bool small = !plan.packed || gates * H * (I + H) < 30'000;  // a few µs of copying
    (small ? Threads{1, nullptr} : threads).parallel(p.directions * panels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack(i / panels, i % panels);
    });
    this->run(threads, [&](const Job& job, Member& member, int64_t team, int64_t slice) { steps(job, member, team, slice); });
  }

  void pack(int64_t direction, int64_t panel) {
    const Weights& w = p.weights[direction];
    const int64_t at = direction * panels + panel;
    const int count = this->units(panel);
    S* sum = bias.get() + at * sums * N;
    for (int k = 0; k < sums; ++k) V(S(0)).store(sum + k * N);
    for (int g = 0; g < gates; ++g) {
      const int64_t input_row = g * H + panel * N, hidden_row = Cell::hidden_gate(g) * H + panel * N;
      if (plan.packed) {
        pack_rows<V>(static_cast<const S*>(w.w_ih), input_row, count, I, w_ih.get() + (at * gates + g) * I * N);
        pack_rows<V>(static_cast<const S*>(w.w_hh), hidden_row, count, H, w_hh.get() + (at * gates + g) * H * N);
      }
      if (w.b_ih) add(sum + (Cell::input_sum + g) * N, static_cast<const S*>(w.b_ih) + input_row, count);
      if (w.b_hh) add(sum + g * N, static_cast<const S*>(w.b_hh) + hidden_row, count);
    }
  }
  static void add(S* sum, const S* bias, int count) { (V::load(sum) + V::load(bias, count)).store(sum); }

  // The initial state of the member's units, in both halves of the double buffer: a reverse direction starts late in short rows.
  void start(const Job& job, const Member& member, S* h, S* c) {
    for (int64_t b = job.row_begin; b < job.row_end; ++b) {
      const bool empty = sequence.length(b) == 0, reset = !empty && job.reset_at(job.first_step(b), b);
      for (int64_t panel = member.begin; panel < member.end; ++panel) {
        const int64_t state = this->state_at(job, b, panel * N), at = (b - job.row_begin) * padded_H + panel * N;
        const int count = this->units(panel);
        const V h0 = V::load(static_cast<const S*>(p.hx) + state, count), zero(S(0));
        for (int half = 0; half < 2; ++half) (reset ? zero : h0).store(h + half * block_rows * padded_H + at);
        if (empty) h0.store(static_cast<S*>(p.h_n) + state, count);
        if constexpr (Cell::has_cell) {
          const V c0 = V::load(static_cast<const S*>(p.cx) + state, count);
          (reset ? zero : c0).store(c + at);
          if (empty) c0.store(static_cast<S*>(p.c_n) + state, count);
        }
      }
    }
  }

  void steps(const Job& job, Member& member, int64_t team, int64_t slice) {
    S* h = h_state.get() + team * 2 * block_rows * padded_H;
    S* c = c_state.get() + team * block_rows * padded_H;
    S* a = pre_activations.get() + slice * panels_kept * capacity * sums * N;
    const auto kept = [&](int64_t panel) {
      return a + (plan.chunk > 1 ? panel - member.begin : 0) * capacity * sums * N;
    };
    start(job, member, h, c);
    member.meet();
    int64_t kept_row = 0;  // the sequence row of the first row of pre-activations kept
    for (int64_t s = 0; s < sequence.T; ++s) {
      const int64_t t = job.step(s), row = sequence.start(t) + job.row_begin, count = job.rows_end(t) - job.row_begin;
      const S* h_in = h + (s % 2) * block_rows * padded_H;
      S* h_out = h + ((s + 1) % 2) * block_rows * padded_H;
      if (plan.chunk > 1 && s % plan.chunk == 0) {
        const int64_t t_end = job.step(std::min(s + plan.chunk, sequence.T) - 1);
        kept_row = sequence.start(std::min(t, t_end));
        for (int64_t panel = member.begin; panel < member.end; panel += panels_at_once)
          project(job, panel, std::min<int64_t>(panels_at_once, member.end - panel), kept_row,
                  sequence.start(std::max(t, t_end) + 1) - kept_row, kept(panel));
      }
      for (int64_t panel = member.begin; count > 0 && panel < member.end; panel += panels_at_once) {
        const int64_t n = std::min<int64_t>(panels_at_once, member.end - panel);
        S* sum = kept(panel);
        if (plan.chunk == 1) {
          project(job, panel, n, row, count, sum);
        } else {
          sum += (row - kept_row) * sums * N;
        }
        product<Cell::hidden_gate>(job, panel, n, w_hh.get(), p.weights[job.direction].w_hh, h_in, padded_H, H, count, sum);
        for (int64_t i = 0; i < n; ++i) cell(job, t, panel + i, sum + i * capacity * sums * N, h_in, h_out, c);
      }
      member.meet();
    }
  }

  // pre-activations = bias + x·W_ih for n panels and some rows of the sequence.
  void project(const Job& job, int64_t panel, int64_t n, int64_t row, int64_t count, S* sum) {
    for (int64_t i = 0; i < n; ++i) {
      const S* b = bias.get() + (job.direction * panels + panel + i) * sums * N;
      for (int64_t r = 0; r < count; ++r)
        for (int k = 0; k < sums; ++k) V::load(b + k * N).store(sum + ((i * capacity + r) * sums + k) * N);
    }
    product<same_gate>(job, panel, n, w_ih.get(), p.weights[job.direction].w_ih, static_cast<const S*>(p.x) + row * I, I, I, count,
                       sum + Cell::input_sum * N);
  }

  static constexpr int same_gate(int g) { return g; }

  // Adds `count` rows of A (K wide) times the gates of n panels to the pre-activations; gate_of(g) is the weights' block for sum g.
  template <int (*gate_of)(int)>
  void product(const Job& job, int64_t panel, int64_t n, const S* packed, const void* weights, const S* A, int64_t lda, int64_t K,
               int64_t count, S* sum) {
    const int64_t panel_stride = capacity * sums * N;
    if (plan.packed) {
      multiply<V, S>({packed + (job.direction * panels + panel) * gates * K * N, K * N, N, gates * n, A, lda, K, count, sum, sums * N,
                      gates > 1 ? N : panel_stride});
      return;
    }
    for (int64_t i = 0; i < n; ++i)
      for (int g = 0; g < gates; ++g)
        multiply_unpacked<V>(static_cast<const S*>(weights), gate_of(g) * H + (panel + i) * N, this->units(panel + i), A, lda, K, count,
                             sum + i * panel_stride + g * N, sums * N);
  }

  void cell(const Job& job, int64_t t, int64_t panel, const S* sum, const S* h_in, S* h_out, S* c_state) {
    const int count = this->units(panel);
    const int64_t unit = panel * N, y_width = p.directions * H;
    const V zero(S(0));
    for (int64_t b = job.row_begin; b < job.rows_end(t); ++b, sum += sums * N) {
      const int64_t row = sequence.start(t) + b, at = (b - job.row_begin) * padded_H + unit;
      S* y = static_cast<S*>(p.y) + row * y_width + job.direction * H + unit;
      S* cells = p.cells ? static_cast<S*>(p.cells) + this->sequence_at(job, row, H) + unit : nullptr;
      if (t >= sequence.length(b)) {
        zero.store(y, count);
        continue;
      }
      V a[sums], gate[std::max(1, Base::saved)], c = zero;
      for (int k = 0; k < sums; ++k) a[k] = V::load(sum + k * N);
      if constexpr (Cell::has_cell) c = V::load(c_state + at);
      const V h = Cell::forward(a, V::load(h_in + at), c, gate);
      h.store(y, count);
      if (p.gates) {
        S* out = static_cast<S*>(p.gates) + this->sequence_at(job, row, Base::saved * H) + unit;
        for (int k = 0; k < Base::saved; ++k) gate[k].store(out + k * H, count);
        if constexpr (Cell::has_cell) c.store(cells, count);
      }
      const bool last = t == job.last_step(b), reset = !last && job.reset_at(job.next(t), b);
      (reset ? zero : h).store(h_out + at);
      if (last) h.store(static_cast<S*>(p.h_n) + this->state_at(job, b, unit), count);
      if constexpr (Cell::has_cell) {
        (reset ? zero : c).store(c_state + at);
        if (last) c.store(static_cast<S*>(p.c_n) + this->state_at(job, b, unit), count);
      }
    }
  }
};

// Back-propagation through time. Each row carries the gradients of its state, dh and dc, from its last step (where they are those of
// h_n and c_n) to before its first (where they are those of hx and cx).
template <class Cell, class S, int N>
struct Backward : Recurrence<Cell, S, N> {
  using Base = Recurrence<Cell, S, N>;
  using typename Base::V;
  using Base::gates, Base::sums, Base::saved, Base::sequence, Base::B, Base::H, Base::panels, Base::padded_H, Base::plan;
  using Base::block_rows;

  const BackwardParams& p;
  const int64_t full_panels = H / N;  // read in place when weights are not packed; a last partial one never is
  const int64_t first_packed = plan.packed ? 0 : full_panels;
  Scratch<S> w_hh = scratch<S>(p.directions * (panels - first_packed) * gates * H * N);
  Scratch<S> dh_carry = scratch<S>(plan.groups * block_rows * padded_H);
  Scratch<S> dc_carry = scratch<S>(Cell::has_cell ? plan.groups * block_rows * padded_H : 0);

  Backward(const BackwardParams& params, const Threads& threads) : Base(params, threads), p(params) {
    const bool small = !plan.packed || gates * H * H < 100'000;
    const int64_t packed = panels - first_packed;
    (small ? Threads{1, nullptr} : threads).parallel(p.directions * packed, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t panel = first_packed + i % packed;
        const S* weights = static_cast<const S*>(p.weights[i / packed].w_hh);
        for (int g = 0; g < gates; ++g)
          pack_columns<V>(weights + Cell::hidden_gate(g) * H * H, H, panel * N, this->units(panel), H, w_hh.get() + (i * gates + g) * H * N);
      }
    });
    this->run(threads, [&](const Job& job, Member& member, int64_t team, int64_t) { steps(job, member, team); });
  }

  void steps(const Job& job, Member& member, int64_t team) {
    S* dh = dh_carry.get() + team * block_rows * padded_H;
    S* dc = dc_carry.get() + team * block_rows * padded_H;
    exchange<true>(job, member, dh, static_cast<const S*>(p.dh_n));
    if constexpr (Cell::has_cell) exchange<true>(job, member, dc, static_cast<const S*>(p.dc_n));
    for (int64_t s = sequence.T - 1; s >= 0; --s) {
      const int64_t t = job.step(s), count = job.rows_end(t) - job.row_begin;
      for (int64_t panel = member.begin; panel < member.end; ++panel) cell(job, t, panel, dh, dc);
      member.meet();
      if (count > 0 && (s > 0 || p.dhx)) product(job, t, count, member, dh);
      if (sequence.resets) forget(job, t, member, dh, dc);
    }
    if (p.dhx) exchange<false>(job, member, dh, static_cast<S*>(p.dhx));
    if constexpr (Cell::has_cell)
      if (p.dcx) exchange<false>(job, member, dc, static_cast<S*>(p.dcx));
  }

  // Adds to the member's dh what comes back from step t through W_hh.
  void product(const Job& job, int64_t t, int64_t count, const Member& member, S* dh) {
    const S* dsums = static_cast<const S*>(p.dsums) + this->sequence_at(job, sequence.start(t) + job.row_begin, sums * H);
    const int64_t in_place = std::clamp(first_packed, member.begin, member.end), packed = panels - first_packed;
    if (member.begin < in_place) {
      const S* weights = static_cast<const S*>(p.weights[job.direction].w_hh) + member.begin * N;
      for (int g = 0; g < gates; ++g)
        multiply<V, S>({weights + Cell::hidden_gate(g) * H * H, N, H, in_place - member.begin, dsums + g * H, sums * H, H, count,
                        dh + member.begin * N, padded_H, N});
    }
    if (in_place < member.end) {
      const S* weights = w_hh.get() + (job.direction * packed + in_place - first_packed) * gates * H * N;
      multiply<V, S>({weights, gates * H * N, N, member.end - in_place, dsums, sums * H, gates * H, count, dh + in_place * N, padded_H, N});
    }
  }

  // Between a [D, B, H] state (nullptr: zero) and the carried gradients of the member's units.
  template <bool read, class State>
  void exchange(const Job& job, const Member& member, S* carry, State* state) {
    for (int64_t b = job.row_begin; b < job.row_end; ++b)
      for (int64_t panel = member.begin; panel < member.end; ++panel) {
        S* own = carry + (b - job.row_begin) * padded_H + panel * N;
        State* other = state ? state + this->state_at(job, b, panel * N) : nullptr;
        if constexpr (read) {
          (other ? V::load(other, this->units(panel)) : V(S(0))).store(own);
        } else {
          V::load(own).store(other, this->units(panel));
        }
      }
  }

  // No gradient crosses a reset.
  void forget(const Job& job, int64_t t, const Member& member, S* dh, S* dc) {
    for (int64_t b = job.row_begin; b < job.rows_end(t); ++b) {
      if (t >= sequence.length(b) || !job.reset_at(t, b)) continue;
      for (int64_t panel = member.begin; panel < member.end; ++panel) {
        const int64_t at = (b - job.row_begin) * padded_H + panel * N;
        V(S(0)).store(dh + at);
        if constexpr (Cell::has_cell) V(S(0)).store(dc + at);
      }
    }
  }

  void cell(const Job& job, int64_t t, int64_t panel, S* dh_carry, S* dc_carry) {
    const int count = this->units(panel);
    const int64_t unit = panel * N, y_width = p.directions * H, y_at = job.direction * H;
    const S* cells = static_cast<const S*>(p.cells) + this->sequence_at(job, 0, H);
    const auto before = [&](int64_t t, int64_t b, const S* outputs, int64_t width, const void* initial) __attribute__((always_inline)) {
      const S* state = this->state_before(job, t, b, outputs, width, static_cast<const S*>(initial));
      return state ? V::load(state + unit, count) : V(S(0));
    };
    const V zero(S(0));
    for (int64_t b = job.row_begin; b < job.rows_end(t); ++b) {
      const int64_t row = sequence.start(t) + b, at = (b - job.row_begin) * padded_H + unit;
      S* dsums = static_cast<S*>(p.dsums) + this->sequence_at(job, row, sums * H) + unit;
      V da[sums];
      if (t >= sequence.length(b)) {
        for (int k = 0; k < sums; ++k) zero.store(dsums + k * H, count);
        continue;
      }
      V gate[std::max(1, saved)], h = zero, h_next = zero, c = zero, c_next = zero, dc = zero;
      const S* gates_in = static_cast<const S*>(p.gates) + this->sequence_at(job, row, saved * H) + unit;
      for (int k = 0; k < saved; ++k) gate[k] = V::load(gates_in + k * H, count);
      if constexpr (Cell::needs_previous) h = before(t, b, static_cast<const S*>(p.y) + y_at, y_width, p.hx);
      if constexpr (Cell::needs_output) h_next = V::load(static_cast<const S*>(p.y) + row * y_width + y_at + unit, count);
      if constexpr (Cell::has_cell) {
        c = before(t, b, cells, H, p.cx);
        c_next = V::load(cells + row * H + unit, count);
        dc = V::load(dc_carry + at);
      }
      V dh = V::load(dh_carry + at);
      if (p.dy) dh = dh + V::load(static_cast<const S*>(p.dy) + row * y_width + y_at + unit, count);
      const V passed = Cell::backward(gate, c, c_next, h, h_next, dh, dc, da);
      for (int k = 0; k < sums; ++k) da[k].store(dsums + k * H, count);
      passed.store(dh_carry + at);  // the product adds to it what comes back through W_hh
      if constexpr (Cell::has_cell) dc.store(dc_carry + at);
    }
  }
};

template <template <class, class, int> class Pass, int bytes, class Params>
void run_pass(const Params& p, const Threads& threads) {
  const auto with_cell = [&](auto scalar) {
    using S = decltype(scalar);
    constexpr int N = bytes / sizeof(S);
    switch (p.cell) {
      case CellKind::rnn_tanh: Pass<RNN<false>, S, N>(p, threads); break;
      case CellKind::rnn_relu: Pass<RNN<true>, S, N>(p, threads); break;
      case CellKind::lstm: Pass<LSTM, S, N>(p, threads); break;
      case CellKind::gru: Pass<GRU, S, N>(p, threads); break;
    }
  };
  p.scalar == ScalarKind::float32 ? with_cell(float()) : with_cell(double());
}

}  // namespace
}  // namespace fusedrnn::cpu
