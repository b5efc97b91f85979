// The forward time loop on a CPU, for any cell, scalar type and vector width. A step is, for some panels: pre-activations =
// bias + x·W_ih + h·W_hh (registers, then a buffer that stays in the caches of its core), then the cell, row by row.
#pragma once

#include "recurrence.h"
#include "unpacked.h"
#include "weights.h"

namespace fusedrnn::cpu {
namespace {

template <class Cell, class S, int N, class W>
struct Forward : Recurrence<Cell, S, N> {
  using Base = Recurrence<Cell, S, N>;
  using Base::block_rows;
  using Base::gates, Base::sums, Base::sequence, Base::B, Base::H, Base::R, Base::own_weights, Base::panels,
      Base::state_panels, Base::padded_H, Base::padded_R, Base::plan;
  using typename Base::V;
  using Given = Numbers<const S, const W>;
  using Made = Numbers<S, W>;

  const ForwardParams& p;
  const int64_t I = p.I;
  // Pre-activations are kept for the steps of a chunk and all panels, or else for some rows of some panels.
  // A stream takes all panels of a step at a time, too. A packed batch's largest block may have more rows than were planned for.
  const int64_t planned_rows = (B + plan.row_blocks - 1) / plan.row_blocks;
  const int64_t chunk = std::max<int64_t>(plan.chunk * planned_rows / std::max<int64_t>(block_rows, 1), 1);
  const bool chunked = chunk > 1 || (p.prepared && plan.row_blocks == 1 && B <= projection_rows);
  const Together at_once =
      chunked ? Together{block_rows * chunk, panels} : together(block_rows, gates, sums, sizeof(V), in_tiles(p));
  const int64_t capacity = at_once.rows;  // rows a panel
  const int64_t panels_kept = std::min(panels, at_once.panels);
  const bool copied_input = plan.copied_input && !p.prepared;
  PackedWeights<Cell, S, N, W> weights{p, p.prepared ? p.prepared_rows : B, this->weight_sets,
                                       (plan.packed_input && !copied_input) || p.prepared, plan.packed || p.prepared};
  // As large as what backward packs, where it shares out work alike, so that both passes of a step take turns in one block.
  Scratch<S> recurrent = scratch<S>(p.prepared ? 0 : weights.recurrent());
  Scratch<S> others = scratch<S>(p.prepared ? 0 : weights.others());
  // A slice's copy of some of W_ih.
  static constexpr int64_t copied_panels = input_columns / gates, copied_vector = row_stride<S>(input_rows * N);
  const int64_t copy_size = copied_panels * gates * copied_vector;
  Scratch<S> copies = scratch<S>(copied_input ? plan.groups * plan.slices * copy_size : 0);
  Scratch<S> h_state = scratch<S>(plan.groups * 2 * block_rows * padded_R);
  Scratch<S> c_state = scratch<S>(Cell::has_cell ? plan.groups * block_rows * padded_H : 0);
  // Of a team with a projection, what is to be projected and what it becomes.
  Scratch<S> outputs = scratch<S>(p.projection ? plan.groups * block_rows * padded_H : 0);
  Scratch<S> projected = scratch<S>(p.projection ? plan.groups * block_rows * padded_R : 0);
  Scratch<S> pre_activations = scratch<S>(plan.groups * plan.slices * panels_kept * capacity * sums * N);
  // What tiles are multiplied with: a team's states, twice as in h_state, and for every slice the rows of x that a chunk has.
  const bool tiled = weights.tiled && (plan.packed || p.prepared),
             tiled_input = weights.tiled && (plan.packed_input || p.prepared);
  const int64_t x_rows = chunked ? capacity : block_rows,
                h_size = TileRows<V>::size(tiled ? block_rows : 0, blocks_of(R)),
                out_size = TileRows<V>::size(tiled && p.projection ? block_rows : 0, blocks_of(H)),
                x_size = TileRows<V>::size(tiled_input ? x_rows : 0, blocks_of(I));
  Scratch<uint16_t> h_tiles = scratch<uint16_t>(plan.groups * 2 * h_size);
  Scratch<uint16_t> out_tiles = scratch<uint16_t>(plan.groups * out_size);
  Scratch<uint16_t> x_tiles = scratch<uint16_t>(plan.groups * plan.slices * x_size);
  // Or else these rows of x for a team, where it is bfloat16, or where they are some of the batch's rows in several steps, which
  // are not next to each other.
  const bool gathered = chunked && plan.row_blocks > 1;
  const int64_t wide_size = (p.narrow_sequence || gathered) && !tiled_input ? x_rows * I : 0;
  Scratch<S> wide_x = scratch<S>(plan.groups * wide_size);

  // Rows to be multiplied; where weights are tiles, the same for them.
  struct Rows {
    const S* first;
    int64_t stride, K;
    TileRows<V> tiles{};

    Rows from(int64_t row) const {
      return {first ? first + row * stride : nullptr, stride, K, tiles.memory ? tiles.from(0, row) : tiles};
    }
  };

  Forward(const ForwardParams& params, const Threads& threads)
      : Base(params, threads, Pass::forward, params.prepared), p(params) {
    if (p.prepared) {
      weights.place(static_cast<S*>(p.prepared));
    } else {
      weights.place(recurrent.get(), others.get());
      if (!own_weights) weights.pack(threads);
    }
    this->run(threads, [&](const Job& job, Member& member, int64_t team, int64_t slice) {
      if (own_weights && job.first) weights.pack(job.set, member);
      steps(job, member, team, slice);
    });
  }

  // The initial state of the member's units, h in both halves of the double buffer: a reverse direction starts
  // late in short rows.
  void start(const Job& job, const Member& member, S* h, S* c) {
    for (int64_t b = job.row_begin; b < job.row_end; ++b) {
      const bool empty = sequence.length(b) == 0, reset = !empty && job.reset_at(job.first_step(b), b);
      const V zero(S(0));
      for (int64_t panel = member.state_begin; panel < member.state_end; ++panel) {
        const int64_t state = this->state_at(job, b, R, panel * N), at = (b - job.row_begin) * padded_R + panel * N;
        const int count = this->numbers(panel);
        const V h0 = Given::at(p.hx, p.narrow_states).template load<V>(state, count);
        for (int half = 0; half < 2; ++half) (reset ? zero : h0).store(h + half * block_rows * padded_R + at);
        if (empty) Made::at(p.h_n, p.narrow_states).store(h0, state, count);
      }
      if constexpr (Cell::has_cell)
        for (int64_t panel = member.begin; panel < member.end; ++panel) {
          const int64_t state = this->state_at(job, b, H, panel * N);
          const int count = this->units(panel);
          const V c0 = Given::at(p.cx, p.narrow_states).template load<V>(state, count);
          (reset ? zero : c0).store(c + (b - job.row_begin) * padded_H + panel * N);
          if (empty) Made::at(p.c_n, p.narrow_states).store(c0, state, count);
        }
    }
  }

  // The member's numbers of some rows of a state, for tiles, and its units of what is to be projected.
  void fill_tiles(const Member& member, const S* h, int64_t count, const TileRows<V>& to) const {
    if constexpr (takes_tiles<V, W>)
      if (tiled && member.state_begin < member.state_end)
        to.fill(h, padded_R, count, 0, 0, member.state_begin * N, std::min(member.state_end * N, R), R);
  }
  void fill_output_tiles(const Member& member, const S* out, int64_t count, const TileRows<V>& to) const {
    if constexpr (takes_tiles<V, W>)
      if (tiled && member.begin < member.end)
        to.fill(out, padded_H, count, 0, 0, member.begin * N, std::min(member.end * N, H), H);
  }

  // `count` rows of x, from `row` of the sequence on, as they are multiplied; copies are rows of `tiles` or `wide` from `at` on. A
  // team's members make those in `wide` together, and meet before they read them.
  Rows input(const Member& member, int64_t row, int64_t count, const TileRows<V>& tiles, S* wide,
             int64_t at = 0) const {
    const Given x = Given::at(p.x, p.narrow_sequence) + row * I;
    if constexpr (takes_tiles<V, W>)
      if (tiled_input) {
        x.narrow ? tiles.fill(x.narrow, I, count, 0, at, 0, I, I) : tiles.fill(x.wide, I, count, 0, at, 0, I, I);
        return {nullptr, I, I, tiles};
      }
    if (!wide_size) return {x.wide, I, I};
    const auto [begin, end] = member.share(count * I);
    widen<V>(x + begin, end - begin, wide + at * I + begin);
    return {wide, I, I};
  }

  // The first of a job's rows in step t, and how many there are.
  std::pair<int64_t, int64_t> rows_of(const Job& job, int64_t t) const {
    return {sequence.start(t) + job.row_begin, std::max<int64_t>(job.rows_end(t) - job.row_begin, 0)};
  }

  // The rows of x of the chunk that begins with step s, in the order of time, and how many there are.
  std::pair<Rows, int64_t> chunk_input(const Job& job, const Member& member, int64_t s, const TileRows<V>& tiles,
                                       S* wide) const {
    const int64_t t = job.step(s), t_end = job.step(std::min(s + chunk, job.T) - 1);
    const int64_t first = std::min(t, t_end), end = std::max(t, t_end) + 1;
    int64_t rows = 0;
    if (!gathered) {
      rows = sequence.start(end) - sequence.start(first);
      return {input(member, sequence.start(first), rows, tiles, wide), rows};
    }
    Rows x;
    for (int64_t next = first; next < end; ++next) {
      const auto [row, count] = rows_of(job, next);
      x = input(member, row, count, tiles, wide, rows);
      rows += count;
    }
    return {x, rows};
  }

  void steps(const Job& job, Member& member, int64_t team, int64_t slice) {
    const TileRegisters registers(p.pairs == Pairs::tiles && (tiled || tiled_input));
    const auto h_half = [&](int64_t half) {
      return TileRows<V>::of(h_tiles.get() + (team * 2 + half) * h_size, p.pairs, block_rows, blocks_of(R));
    };
    const TileRows<V> h_rows[2] = {h_half(0), h_half(1)},
                      own_x = TileRows<V>::of(x_tiles.get() + slice * x_size, p.pairs, x_rows, blocks_of(I)),
                      out_rows = TileRows<V>::of(out_tiles.get() + team * out_size, p.pairs, block_rows, blocks_of(H));
    S* h = h_state.get() + team * 2 * block_rows * padded_R;
    S* c = c_state.get() + team * block_rows * padded_H;
    S* a = pre_activations.get() + slice * panels_kept * capacity * sums * N;
    S* own_wide = wide_x.get() + team * wide_size;
    start(job, member, h, c);
    for (const TileRows<V>& rows : h_rows) fill_tiles(member, h, job.row_end - job.row_begin, rows);
    member.meet_in_step();
    int64_t at = 0;  // the step's first row among the pre-activations kept
    for (int64_t s = 0; s < job.T; ++s) {
      const int64_t t = job.step(s);
      const auto [row, count] = rows_of(job, t);
      const Rows h_in{h + (s % 2) * block_rows * padded_R, padded_R, R, tiled ? h_rows[s % 2] : TileRows<V>{}};
      S* h_out = h + ((s + 1) % 2) * block_rows * padded_R;
      S* out = p.projection ? outputs.get() + team * block_rows * padded_H : h_out;
      if (chunked) {
        const int64_t n = member.end - member.begin;
        if (s % chunk == 0) {
          const auto [x, rows] = chunk_input(job, member, s, own_x, own_wide);
          if (wide_size) member.meet_in_step();
          project(job, member.begin, n, x, rows, a, copies.get() + slice * copy_size);
          at = job.reverse() ? rows : 0;
        }
        if (job.reverse()) at -= count;
        step(job, t, member.begin, n, job.row_begin, count, a + at * sums * N, h_in, out, c, s % 2);
        if (!job.reverse()) at += count;
      } else {
        const Rows x = input(member, row, count, own_x, own_wide);
        if (wide_size) member.meet_in_step();
        for (int64_t panel = member.begin; panel < member.end; panel += panels_kept)
          for (int64_t r = 0; r < count; r += capacity) {
            const int64_t n = std::min(panels_kept, member.end - panel), rows = std::min(capacity, count - r);
            project(job, panel, n, x.from(r), rows, a);
            step(job, t, panel, n, job.row_begin + r, rows, a, h_in, out, c);
          }
      }
      if constexpr (Cell::has_cell)
        if (p.projection) {
          fill_output_tiles(member, out, count, out_rows);
          member.meet_in_step();
          const Rows rows{out, padded_H, H, tiled ? out_rows : TileRows<V>{}};
          project_outputs(job, member, t, count, rows, projected.get() + team * block_rows * padded_R, h_out,
                          chunked && s % 2);
        }
      if (s + 1 < job.T) fill_tiles(member, h_out, count, h_rows[(s + 1) % 2]);
      member.meet_in_step();
    }
  }

  // Step t for n panels and `count` rows from b on, from their pre-activations without h, to `out`: the next state, or what is
  // projected to it. A step that goes backwards through the weights of a forwards one finds in the caches what that one read last.
  void step(const Job& job, int64_t t, int64_t panel, int64_t n, int64_t b, int64_t count, S* sum, const Rows& h_in,
            S* out, S* c, bool backwards = false) {
    const Rows A = h_in.from(b - job.row_begin);
    const void* w_hh = p.weights[job.direction].w_hh;
    weights.narrow ? product<Cell::hidden_gate>(job, panel, n, reinterpret_cast<const Packed<W>*>(weights.w_hh), w_hh,
                                                A, count, sum, backwards)
                   : product<Cell::hidden_gate>(job, panel, n, static_cast<const S*>(weights.w_hh), w_hh, A, count, sum,
                                                backwards);
    activate(n, count, sum);
    cell(job, t, panel, n, b, count, sum, h_in.first, out, c);
  }

  // pre-activations = bias + x·W_ih for n panels and some rows of the sequence.
  void project(const Job& job, int64_t panel, int64_t n, const Rows& x, int64_t count, S* sum, S* copy = nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      const S* b = weights.bias + (job.set * panels + panel + i) * sums * N;
      for (int64_t r = 0; r < count; ++r)
        for (int k = 0; k < sums; ++k) V::load(b + k * N).store(sum + ((i * capacity + r) * sums + k) * N);
    }
    sum += Cell::input_sum * N;
    if (copied_input)
      multiply_copied(job, panel, n, x, count, sum, copy);
    else
      product<same_gate>(job, panel, n, static_cast<const S*>(weights.w_ih), p.weights[job.direction].w_ih, x, count,
                         sum);
  }

  // Adds x·W_ih. A block of W_ih is copied and meets all rows before the next one is, so that no copy of all of it is needed.
  void multiply_copied(const Job& job, int64_t panel, int64_t n, const Rows& x, int64_t count, S* sum, S* copy) {
    const W* w_ih = static_cast<const W*>(p.weights[job.direction].w_ih);
    const int64_t panel_stride = capacity * sums * N;
    for (const int64_t end = panel + n; panel < end; panel += copied_panels, sum += copied_panels * panel_stride)
      for (int64_t k = 0; k < I; k += input_rows) {
        const int64_t size = std::min(input_rows, I - k), vectors = std::min(copied_panels, end - panel) * gates;
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t own = panel + v / gates;
          pack_rows<V>(w_ih + k, I, v % gates * H + own * N, this->units(own), size, copy + v * copied_vector);
        }
        multiply<V, S, S, gates>({copy, copied_vector, N, vectors, x.first + k, x.stride, size, count, sum, sums * N,
                                  gates == 1 ? panel_stride : N, false, panel_stride});
      }
  }

  static constexpr int same_gate(int g) { return g; }

  // Adds `count` rows of A times the gates of n panels to the pre-activations; gate_of(g) is the weights' block for sum g.
  // `packed` is nullptr where weights are read in place.
  template <int (*gate_of)(int), class Stored>
  void product(const Job& job, int64_t panel, int64_t n, const Stored* packed, const void* weights, const Rows& rows,
               int64_t count, S* sum, bool backwards = false) {
    const S* A = rows.first;
    const int64_t panel_stride = capacity * sums * N, lda = rows.stride, K = rows.K;
    if constexpr (takes_tiles<V, W>)
      if (rows.tiles.memory) {
        const auto* tiles = reinterpret_cast<const Packed<W>*>(packed) +
                            (job.set * panels + panel) * gates * packed_size<Packed<W>>(K) * N;
        multiply_tiles<V, gates>(p.pairs, {tiles, n * gates, blocks_of(K), rows.tiles, count, sum, sums * N,
                                           gates == 1 ? panel_stride : N, false, panel_stride, backwards});
        return;
      }
    if (packed) {
      // A step reads both weights, unless x·W_ih is there for all steps of a chunk.
      const bool far = gates * H * (chunked ? K : I + R) / plan.slices > far_weights;
      const int64_t size = packed_size<Stored>(K) * N;
      multiply<V, S, Stored, gates>({packed + (job.set * panels + panel) * gates * size, size, N, n * gates, A, lda, K,
                                     count, sum, sums * N, gates == 1 ? panel_stride : N, false, panel_stride,
                                     backwards, far});
      return;
    }
    for (int64_t j = 0; j < n; ++j) {
      const int64_t i = backwards ? n - 1 - j : j;
      for (int g = 0; g < gates; ++g) {
        const W* own = static_cast<const W*>(weights) + (gate_of(g) * H + (panel + i) * N) * K;
        multiply_unpacked<V, S, Dots<S, W>, 1>({{{own, A, K, lda}}}, this->units(panel + i), count,
                                               sum + i * panel_stride + g * N, sums * N, H);
      }
    }
  }

  // The cell's first half, for `count` rows of n panels.
  void activate(int64_t n, int64_t count, S* sum) {
    const int64_t row = sums * N, panel = capacity * row;
    if (count == 1) return activate_all(n, panel, sum);
    for (int64_t i = 0; i < n; ++i) activate_all(count, row, sum + i * panel);
  }
  // `count` units' vectors, `stride` numbers from one to the next: two at a time, a last one twice.
  void activate_all(int64_t count, int64_t stride, S* sum) {
    for (int64_t i = 0; i < count; i += 2, sum += 2 * stride) {
      const int64_t next = i + 1 < count ? stride : 0;
      Twin<V> a[sums];
      for (int k = 0; k < sums; ++k) a[k] = Twin<V>::load(sum + k * N, next);
      Cell::activate(a);
      for (int k = 0; k < sums; ++k) a[k].store(sum + k * N, next);
    }
  }

  // The second half, for `count` rows: two panels at a time, a last one twice.
  void cell(const Job& job, int64_t t, int64_t panel, int64_t n, int64_t first_row, int64_t count, const S* sum,
            const S* h_in, S* out, S* c_state) {
    const bool projects = Cell::has_cell && p.projection;
    const int64_t panel_stride = capacity * sums * N;
    const Made y = Made::at(p.y, p.narrow_sequence), h_n = Made::at(p.h_n, p.narrow_states),
               c_n = Made::at(p.c_n, p.narrow_states);
    const Twin<V> zero(S(0));
    for (int64_t b = first_row; b < first_row + count; ++b, sum += sums * N) {
      const int64_t row = sequence.start(t) + b, at = (b - job.row_begin) * padded_H;
      const End end = end_of(job, t, b);
      W* gates_out = p.gates ? static_cast<W*>(p.gates) + this->sequence_at(job, row, Base::saved * H) : nullptr;
      W* cells = p.cells ? static_cast<W*>(p.cells) + this->sequence_at(job, row, H) : nullptr;
      if (!end.valid) {
        if (!projects) y.clear(end.y_at + panel * N, std::min(n * N, H - panel * N));
        continue;
      }
      const auto units = [&](int64_t i, int64_t more, auto first, auto second) __attribute__((always_inline)) {
        const int64_t unit = (panel + i) * N, next = more * N;
        const S* own_sums = sum + i * panel_stride;
        Twin<V> a[sums], gate[std::max(1, Base::saved)], before = zero, c = zero;
        for (int k = 0; k < sums; ++k) a[k] = Twin<V>::load(own_sums + k * N, more * panel_stride);
        if constexpr (Cell::has_cell) c = Twin<V>::load(c_state + at + unit, next);
        if constexpr (Cell::needs_previous) before = Twin<V>::load(h_in + at + unit, next);
        const Twin<V> h = Cell::forward(a, before, c, gate);
        if (gates_out)
          for (int k = 0; k < Base::saved; ++k)
            to_saved<Cell, W>(k, gate[k]).store(gates_out + k * H + unit, next, first, second);
        if (projects) {
          h.store(out + at + unit, next);
        } else {
          y.store(h, end.y_at + unit, next, first, second);
          (end.reset ? zero : h).store(out + at + unit, next);
          if (end.last) h_n.store(h, this->state_at(job, b, H, unit), next, first, second);
        }
        if constexpr (Cell::has_cell) {
          if (cells) c.store(cells + unit, next, first, second);
          (end.reset ? zero : c).store(c_state + at + unit, next);
          if (end.last) c_n.store(c, this->state_at(job, b, H, unit), next, first, second);
        }
      };
      constexpr std::integral_constant<int, N> whole;
      int64_t i = 0;
      for (; i + 2 <= n && (panel + i + 2) * N <= H; i += 2) units(i, 1, whole, whole);
      for (; i < n; ++i) units(i, 0, this->units(panel + i), this->units(panel + i));
    }
  }

  // What becomes of row b's state after step t.
  struct End {
    int64_t y_at;  // where it is in y
    bool valid, last, reset;
  };
  End end_of(const Job& job, int64_t t, int64_t b) const {
    const bool valid = t < sequence.length(b), last = t == job.last_step(b);
    return {((sequence.start(t) + b) * p.directions + job.direction) * R, valid, last,
            valid && !last && job.reset_at(job.next(t), b)};
  }

  // `count` rows of outputs times n panels of a packed W_hr.
  template <class Stored>
  void project_all(const Job& job, int64_t panel, int64_t n, const Stored* packed, const Rows& out, int64_t count,
                   S* sums, bool backwards) const {
    const int64_t size = packed_size<Stored>(H) * N;
    packed += (job.set * state_panels + panel) * size;
    sums += panel * N;
    if constexpr (takes_tiles<V, W> && in_pairs<Stored>)
      if (out.tiles.memory)
        return multiply_tiles<V>(p.pairs,
                                 {packed, n, blocks_of(H), out.tiles, count, sums, padded_R, N, true, 0, backwards});
    multiply<V, S, Stored>({packed, size, N, n, out.first, padded_H, H, count, sums, padded_R, N, true, 0, backwards,
                            n * size > far_weights});
  }

  // The member's numbers of the states after step t, for `count` rows: W_hr times their outputs.
  void project_outputs(const Job& job, const Member& member, int64_t t, int64_t count, const Rows& out, S* sums,
                       S* h_out, bool backwards) {
    const int64_t begin = member.state_begin, n = member.state_end - begin;
    if (weights.w_hr) {
      weights.narrow
          ? project_all(job, begin, n, reinterpret_cast<const Packed<W>*>(weights.w_hr), out, count, sums, backwards)
          : project_all(job, begin, n, static_cast<const S*>(weights.w_hr), out, count, sums, backwards);
    } else {
      const W* w_hr = static_cast<const W*>(p.weights[job.direction].w_hr);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t i = begin; i < begin + n; ++i) V(S(0)).store(sums + r * padded_R + i * N);
      for (int64_t i = begin; i < begin + n; ++i)
        multiply_unpacked<V, S, Dots<S, W>, 1>({{{w_hr + i * N * H, out.first, H, padded_H}}}, this->numbers(i), count,
                                               sums + i * N, padded_R, N);
    }
    const Made y = Made::at(p.y, p.narrow_sequence), h_n = Made::at(p.h_n, p.narrow_states);
    for (int64_t r = 0; r < count; ++r) {
      const End end = end_of(job, t, job.row_begin + r);
      if (!end.valid) {
        y.clear(end.y_at + begin * N, std::max<int64_t>(std::min(n * N, R - begin * N), 0));
        continue;
      }
      for (int64_t i = begin; i < begin + n; ++i) {
        const V h = V::load(sums + r * padded_R + i * N);
        const int own = this->numbers(i);
        y.store(h, end.y_at + i * N, own);
        (end.reset ? V(S(0)) : h).store(h_out + r * padded_R + i * N);
        if (end.last) h_n.store(h, this->state_at(job, job.row_begin + r, R, i * N), own);
      }
    }
  }
};

}  // namespace
}  // namespace fusedrnn::cpu
