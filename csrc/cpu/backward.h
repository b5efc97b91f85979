// Back-propagation through time on a CPU. Each row carries the gradients of its state, dh and dc, from its last step
// (where they are those of h_n and c_n) to before its first (where they are those of hx and cx). After some steps, the
// gradients of their pre-activations become those of input and weights (gradients.h).
#pragma once

#include "columns.h"
#include "gradients.h"

namespace fusedrnn::cpu {
namespace {

template <class Cell, class S, int N, class W>
struct Backward : Recurrence<Cell, S, N> {
  using Base = Recurrence<Cell, S, N>;
  using Base::block_rows;
  using Base::gates, Base::sums, Base::saved, Base::sequence, Base::B, Base::H, Base::R, Base::panels, Base::padded_H,
      Base::padded_R, Base::plan;
  using typename Base::V;

  using Given = Numbers<const S, const W>;
  using Made = Numbers<S, W>;

  const BackwardParams& p;
  const bool narrow = plan.tiled || B <= narrow_rows;
  Columns<V, S, W> w_hh{R, gates, H, hidden_gates(), p.directions, this->weight_sets, plan.packed, narrow},
      w_hr{H, p.projection ? 1 : 0, R, {}, p.directions, this->weight_sets, plan.packed, narrow};
  Gradients<Cell, S, N, W> gradients{*this, p};
  Scratch<S> packed = scratch<S>(w_hh.numbers() + w_hr.numbers());
  const int64_t chunk_rows = plan.chunk * block_rows, stride = row_stride<S>(sums * H + transposed_overrun<V>);
  Scratch<S> dsums = scratch<S>(plan.groups * chunk_rows * stride);
  // Of a projection: the gradients of a chunk's states, what they are projected from, and a step's gradients of that.
  const int64_t state_stride = row_stride<S>(R + transposed_overrun<V>);
  Scratch<S> dstates = scratch<S>(p.projection ? plan.groups * chunk_rows * state_stride : 0);
  Scratch<S> outputs = scratch<S>(p.projection ? plan.groups * chunk_rows * padded_H : 0);
  const int64_t dstate_size = TileRows<V>::size(plan.tiled && p.projection ? block_rows : 0, blocks_of(R));
  Scratch<uint16_t> dstate_tiles = scratch<uint16_t>(plan.groups * dstate_size);  // of a step
  Scratch<S> doutputs = scratch<S>(p.projection ? plan.groups * block_rows * padded_H : 0);
  Scratch<S> dh_carry = scratch<S>(plan.groups * block_rows * padded_R);
  Scratch<S> dc_carry = scratch<S>(Cell::has_cell ? plan.groups * block_rows * padded_H : 0);

  static constexpr std::array<int, 4> hidden_gates() {
    std::array<int, 4> blocks{};
    for (int g = 0; g < gates; ++g) blocks[g] = Cell::hidden_gate(g);
    return blocks;
  }

  Backward(const BackwardParams& params, const Threads& threads) : Base(params, threads, Pass::backward), p(params) {
    for (int64_t d = 0; d < p.directions; ++d) {
      w_hh.set(d, p.weights[d].w_hh);
      w_hr.set(d, p.weights[d].w_hr);
    }
    w_hh.place(packed.get());
    w_hr.place(packed.get() + w_hh.numbers());
    this->run(threads, [&](const Job& job, Member& member, int64_t team, int64_t slice) {
      if (job.first) {
        w_hh.pack(job.set, member.state_begin, member.state_end);
        w_hr.pack(job.set, member.begin, member.end);
      }
      steps(job, member, team, slice);
    });
    gradients.finish(threads);
  }

  void steps(const Job& job, Member& member, int64_t team, int64_t slice) {
    S* dh = dh_carry.get() + team * block_rows * padded_R;
    S* doutput = doutputs.get() + team * block_rows * padded_H;
    S* dc = dc_carry.get() + team * block_rows * padded_H;
    const TileRegisters registers(p.pairs == Pairs::tiles && plan.tiled);
    const TileRows<V> tiles = gradients.tiles_of(team),
                      dstate_rows =
                          TileRows<V>::of(dstate_tiles.get() + team * dstate_size, p.pairs, block_rows, blocks_of(R));
    take(job, of_hidden(member), dh, Given::at(p.dh_n, p.narrow_states));
    if constexpr (Cell::has_cell) take(job, of_cells(member), dc, Given::at(p.dc_n, p.narrow_states));
    for (int64_t s_end = job.T; s_end > 0;) {
      const int64_t s_begin = std::max<int64_t>(0, s_end - plan.chunk), one = job.step(s_begin),
                    other = job.step(s_end - 1);
      const Chunk<S> chunk{job,
                           std::min(one, other),
                           std::max(one, other) + 1,
                           {dsums.get() + team * chunk_rows * stride, stride},
                           {dstates.get() + team * chunk_rows * state_stride, state_stride},
                           {outputs.get() + team * chunk_rows * padded_H, padded_H}};
      for (int64_t s = s_end - 1; s >= s_begin; --s) {
        const int64_t t = job.step(s), count = job.rows_end(t) - job.row_begin;
        if constexpr (Cell::has_cell)
          if (p.projection) {
            states(chunk, t, member, dh, dstate_rows);
            member.meet_in_step();
            through_projection(chunk, t, member, dstate_rows, doutput, s % 2);
          }
        cell(chunk, t, member, p.projection ? doutput : dh, dc);
        if (plan.tiled) gradients.fill_tiles(chunk, chunk.row(t), count, member.begin, member.end, tiles);
        member.meet_in_step();
        if (count > 0 && (s > 0 || p.dhx)) {  // every other step backwards through the weights, as forward
          const int64_t begin = member.state_begin, end = member.state_end;
          S* C = dh + begin * N;
          if (plan.tiled)
            w_hh.multiply_tiles(p.pairs, job.set, tiles.from(0, chunk.row(t)), count, begin, end, C, padded_R, s % 2);
          else
            w_hh.multiply(job.set, chunk.dsums.at(chunk.row(t)), stride, count, begin, end, C, padded_R, s % 2);
        }
        if (sequence.resets) forget(job, t, member, dh, dc);
      }
      member.meet();
      gradients.add(chunk, member, team, slice);
      member.meet();
      s_end = s_begin;
    }
    if (p.dhx) give(job, of_hidden(member), dh, Made::at(p.dhx, p.narrow_states));
    if constexpr (Cell::has_cell)
      if (p.dcx) give(job, of_cells(member), dc, Made::at(p.dcx, p.narrow_states));
  }

  // Of a [D, B, width] state the member's panels [begin, end); `stride` is that of rows of its carried gradients.
  struct Part {
    int64_t width, stride, begin, end;
  };
  Part of_hidden(const Member& member) const { return {R, padded_R, member.state_begin, member.state_end}; }
  Part of_cells(const Member& member) const { return {H, padded_H, member.begin, member.end}; }

  // The carried gradients of a part, from the state's gradient, and to it.
  void take(const Job& job, const Part& part, S* carry, Given state) const {
    each_panel(job, part, [&](int64_t own, int64_t at, int count) {
      state.template load_or_zero<V>(at, count).store(carry + own);
    });
  }
  void give(const Job& job, const Part& part, const S* carry, Made state) const {
    each_panel(job, part, [&](int64_t own, int64_t at, int count) { state.store(V::load(carry + own), at, count); });
  }
  template <class F>
  void each_panel(const Job& job, const Part& part, const F& f) const {
    for (int64_t b = job.row_begin; b < job.row_end; ++b)
      for (int64_t panel = part.begin; panel < part.end; ++panel)
        f((b - job.row_begin) * part.stride + panel * N, this->state_at(job, b, part.width, panel * N),
          static_cast<int>(std::min<int64_t>(N, part.width - panel * N)));
  }

  // No gradient crosses a reset.
  void forget(const Job& job, int64_t t, const Member& member, S* dh, S* dc) {
    for (int64_t b = job.row_begin; b < job.rows_end(t); ++b) {
      if (t >= sequence.length(b) || !job.reset_at(t, b)) continue;
      clear(of_hidden(member), b - job.row_begin, dh);
      if constexpr (Cell::has_cell) clear(of_cells(member), b - job.row_begin, dc);
    }
  }
  static void clear(const Part& part, int64_t row, S* carry) {
    for (int64_t panel = part.begin; panel < part.end; ++panel) V(S(0)).store(carry + row * part.stride + panel * N);
  }

  // The rows of a job in step t that a chunk has dsums of.
  int64_t rows_end(const Chunk<S>& chunk, int64_t t) const {
    return chunk.whole() ? chunk.job.rows_end(t) : chunk.job.row_end;
  }

  // With a projection: the gradients of the states after step t, all of which goes back through it; in tiles, too, where weights are.
  void states(const Chunk<S>& chunk, int64_t t, const Member& member, S* dh_carry, const TileRows<V>& tiles) {
    const Job& job = chunk.job;
    const Part part = of_hidden(member);
    for (int64_t b = job.row_begin; b < rows_end(chunk, t); ++b) {
      const int64_t row = b - job.row_begin;
      S* to = chunk.dstates.at(chunk.row(t) + row);
      const Given dy =
          Given::at(p.dy, p.narrow_sequence) + ((sequence.start(t) + b) * p.directions + job.direction) * R;
      const bool valid = t < sequence.length(b);
      for (int64_t panel = part.begin; panel < part.end; ++panel) {
        const int count = this->numbers(panel);
        V dh(S(0));
        if (valid) dh = V::load(dh_carry + row * part.stride + panel * N);
        if (valid && dy) dh = dh + dy.template load<V>(panel * N, count);
        dh.store(to + panel * N, count);
      }
      if (valid) clear(part, row, dh_carry);
    }
    if constexpr (takes_tiles<V, W>)
      if (plan.tiled && part.begin < part.end)
        tiles.fill(chunk.dstates.at(chunk.row(t)), state_stride, job.rows_end(t) - job.row_begin, 0, 0, part.begin * N,
                   std::min(part.end * N, R), R);
  }

  // The gradients of the member's outputs, from those of the states.
  void through_projection(const Chunk<S>& chunk, int64_t t, const Member& member, const TileRows<V>& tiles, S* doutput,
                          bool backwards) {
    const Job& job = chunk.job;
    const int64_t count = job.rows_end(t) - job.row_begin;
    for (int64_t row = 0; row < count; ++row) clear(of_cells(member), row, doutput);
    if (count <= 0) return;
    S* C = doutput + member.begin * N;
    if (plan.tiled)
      w_hr.multiply_tiles(p.pairs, job.set, tiles, count, member.begin, member.end, C, padded_H, backwards);
    else
      w_hr.multiply(job.set, chunk.dstates.at(chunk.row(t)), state_stride, count, member.begin, member.end, C, padded_H,
                    backwards);
  }

  // `dh_carry`: with a projection the outputs' gradients.
  void cell(const Chunk<S>& chunk, int64_t t, const Member& member, S* dh_carry, S* dc_carry) {
    const Job& job = chunk.job;
    const bool projects = Cell::has_cell && p.projection;
    const int64_t y_width = p.directions * R, y_at = job.direction * R;
    const Given outputs = Given::at(p.y, p.narrow_sequence) + y_at;
    const Given all_cells = Given::at(p.cells, true) + this->sequence_at(job, 0, H);
    const V zero(S(0));
    for (int64_t b = job.row_begin; b < rows_end(chunk, t); ++b) {
      const int64_t row = sequence.start(t) + b, own_row = chunk.row(t) + b - job.row_begin;
      S *dsums = chunk.dsums.at(own_row), *output = chunk.outputs.at(own_row);
      const bool valid = t < sequence.length(b);
      Given h_before, c_before;
      if (valid && Cell::needs_previous) h_before = this->before(job, t, b, outputs, y_width, p.hx, R);
      if (valid && Cell::has_cell) c_before = this->before(job, t, b, all_cells, H, p.cx, H);
      const W* gates_in = static_cast<const W*>(p.gates) + this->sequence_at(job, row, saved * H);
      const W* dcells = p.dcells ? static_cast<const W*>(p.dcells) + this->sequence_at(job, row, H) : nullptr;
      const Given dy = Given::at(p.dy, p.narrow_sequence) + (row * y_width + y_at);
      if (!valid) {
        for (int k = 0; k < sums; ++k)
          std::fill(dsums + k * H + member.begin * N, dsums + k * H + std::min(member.end * N, H), S(0));
        continue;
      }
      const auto units = [&](int64_t panel, auto count) __attribute__((always_inline)) {
        const int64_t unit = panel * N, at = (b - job.row_begin) * padded_H + unit;
        V da[sums], gate[std::max(1, saved)], h = zero, h_next = zero, c = zero, c_next = zero, dc = zero;
        for (int k = 0; k < saved; ++k) gate[k] = from_saved<Cell, W>(k, load<V>(gates_in + k * H + unit, count));
        if constexpr (Cell::needs_previous) h = h_before.template load_or_zero<V>(unit, count);
        if constexpr (Cell::needs_output) h_next = outputs.template load<V>(row * y_width + unit, count);
        if constexpr (Cell::has_cell) {
          c = c_before.template load_or_zero<V>(unit, count);
          c_next = all_cells.template load<V>(row * H + unit, count);
          dc = V::load(dc_carry + at);
          if (dcells) dc = dc + load<V>(dcells + unit, count);
        }
        V dh = V::load(dh_carry + at);
        if (dy && !projects) dh = dh + dy.template load<V>(unit, count);
        const V passed = Cell::backward(gate, c, c_next, h, h_next, dh, dc, da);
        for (int k = 0; k < sums; ++k) da[k].store(dsums + k * H + unit, count);
        if (!projects) passed.store(dh_carry + at);  // the product adds to it what comes back through W_hh
        if constexpr (Cell::has_cell) {
          dc.store(dc_carry + at);
          if (projects) Cell::output(gate, c_next).store(output + unit);
        }
      };
      int64_t panel = member.begin;
      for (; panel < member.end && (panel + 1) * N <= H; ++panel) units(panel, std::integral_constant<int, N>());
      for (; panel < member.end; ++panel) units(panel, this->units(panel));
    }
  }
};

}  // namespace
}  // namespace fusedrnn::cpu
