// Back-propagation through time on a CPU. Each row carries the gradients of its state, dh and dc, from its last step
// (where they are those of h_n and c_n) to before its first (where they are those of hx and cx).
#pragma once

#include "recurrence.h"

namespace fusedrnn::cpu {
namespace {

template <class Cell, class S, int N>
struct Backward : Recurrence<Cell, S, N> {
  using Base = Recurrence<Cell, S, N>;
  using Base::block_rows;
  using Base::gates, Base::sums, Base::saved, Base::sequence, Base::B, Base::H, Base::panels, Base::padded_H,
      Base::plan;
  using typename Base::V;

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
          pack_columns<V>(weights + Cell::hidden_gate(g) * H * H, H, panel * N, this->units(panel), H,
                          w_hh.get() + (i * gates + g) * H * N);
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
    const S* dsums =
        static_cast<const S*>(p.dsums) + this->sequence_at(job, sequence.start(t) + job.row_begin, sums * H);
    const int64_t in_place = std::clamp(first_packed, member.begin, member.end), packed = panels - first_packed;
    if (member.begin < in_place) {
      const S* weights = static_cast<const S*>(p.weights[job.direction].w_hh) + member.begin * N;
      for (int g = 0; g < gates; ++g)
        multiply<V, S>({weights + Cell::hidden_gate(g) * H * H, N, H, in_place - member.begin, dsums + g * H, sums * H,
                        H, count, dh + member.begin * N, padded_H, N});
    }
    if (in_place < member.end) {
      const S* weights = w_hh.get() + (job.direction * packed + in_place - first_packed) * gates * H * N;
      multiply<V, S>({weights, gates * H * N, N, member.end - in_place, dsums, sums * H, gates * H, count,
                      dh + in_place * N, padded_H, N});
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
    const auto before = [&](int64_t t, int64_t b, const S* outputs, int64_t width,
                            const void* initial) __attribute__((always_inline)) {
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
      if constexpr (Cell::needs_output)
        h_next = V::load(static_cast<const S*>(p.y) + row * y_width + y_at + unit, count);
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

}  // namespace
}  // namespace fusedrnn::cpu
