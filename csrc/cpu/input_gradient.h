// The gradient of the input from those of the pre-activations: dX[n] = Σ over directions of dgates[n] · W_ih. A bfloat16 dX is rounded
// chunk by chunk, and of two directions each, and their sum.
#pragma once

#include "chunk.h"

namespace fusedrnn::cpu {
namespace {

template <class Cell, class S, int N, class W>
struct InputGradient {
  using Base = Recurrence<Cell, S, N>;
  using V = typename Base::V;
  static constexpr int gates = Base::gates;

  using Made = Numbers<S, W>;

  const Base& base;
  const BackwardParams& p;
  const Sequence& sequence = p.sequence;
  const int64_t I = p.I, H = p.H;
  const int64_t vectors = (I + N - 1) / N;
  const bool tiled = base.plan.tiled;
  Scratch<S> dx_reverse = scratch<S>(!p.dx || p.directions == 1 ? 0
                                     : p.narrow_sequence        ? (base.rows * I + 1) / 2
                                                                : base.rows * I);
  const int64_t chunk_rows = base.plan.chunk * base.block_rows;
  // A block of W_ih that is copied: so many vectors of columns, so many rows, and numbers from one vector to the next.
  const int64_t block_columns = tiled ? tiled_columns : input_columns, block_k = tiled ? gates * H : input_rows;
  const int64_t copied_column = tiled ? gates * packed_size<bfloat16_pair>(H) * N : row_stride<S>(input_rows * N);
  const int64_t block_room = block_columns * copied_column;
  // Of a slice: the copy, beside a last vector of dX that sticks out of its row.
  const int64_t room = p.dx ? block_room + chunk_rows * N : 0;
  // The dX of a team's chunk, where it is to be rounded.
  const int64_t dx_size = p.dx && p.narrow_sequence ? chunk_rows * I : 0;
  Scratch<S> wide_dx = scratch<S>(base.plan.groups * dx_size);

  InputGradient(const Base& recurrence, const BackwardParams& params) : base(recurrence), p(params) {}

  // dX of the chunk's rows: a member's share of the columns, or of the rows where there are few columns.
  void add(const Chunk<S>& chunk, const Member& member, const TileRows<V>& tiles, int64_t team, S* memory) {
    if (!p.dx) return;
    S* wide = wide_dx.get() + team * dx_size;
    const bool by_columns = vectors >= member.slices;  // by rows everyone copies all of W_ih
    const auto [begin, end] = by_columns ? member.share(vectors) : std::pair<int64_t, int64_t>(0, vectors);
    const int64_t first_copied = base.plan.packed ? begin : std::clamp(I / N, begin, end);
    const W* w_ih = static_cast<const W*>(p.weights[chunk.job.direction].w_ih);
    if (begin < first_copied)
      each_run(chunk, member, by_columns, [&](int64_t row, int64_t at, int64_t rows) {
        S* dx = sums_of_input(chunk, row, at, wide);
        multiply<V, S, W>({w_ih + begin * N, N, I, first_copied - begin, input_sums(chunk, row), chunk.dsums.stride,
                           gates * H, rows, dx + begin * N, I, N, true});
      });
    for (int64_t vector = first_copied; vector < end; vector += block_columns)
      for (int64_t k = 0; k == 0 || k < gates * H; k += block_k)
        add_block(chunk, member, by_columns, tiles, w_ih, vector, std::min(block_columns, end - vector), k, wide,
                  memory);
    if (!p.narrow_sequence) return;
    const int64_t from = begin * N, width = std::min(end * N, I) - from;
    each_run(chunk, member, by_columns, [&](int64_t row, int64_t at, int64_t rows) {
      for (int64_t i = 0; i < rows; ++i)
        each_vector<N>(width, [&](int64_t v, auto n) {
          dx_of(chunk).store(V::load(wide + (row + i) * I + from + v, n), (at + i) * I + from + v, n);
        });
    });
  }

  // Where the dX of a chunk's direction goes in the end, and where its products are made: for row `row` of the chunk, row `at` of
  // the sequence.
  Made dx_of(const Chunk<S>& chunk) const {
    return Made::at(chunk.job.direction == 0 ? p.dx : dx_reverse.get(), p.narrow_sequence);
  }
  S* sums_of_input(const Chunk<S>& chunk, int64_t row, int64_t at, S* wide) const {
    return p.narrow_sequence ? wide + row * I : dx_of(chunk).wide + at * I;
  }

  // What a block of W_ih adds to dX: `count` vectors of columns, rows from k on. It is copied, and meets all rows before the next
  // one does: no copy of all of W_ih is needed.
  void add_block(const Chunk<S>& chunk, const Member& member, bool by_columns, const TileRows<V>& tiles, const W* w_ih,
                 int64_t vector, int64_t count, int64_t k, S* wide, S* copy) {
    const int64_t size = std::min(block_k, gates * H - k), whole = std::min(count, I / N - vector);
    const int left = static_cast<int>(std::min(count * N, I - vector * N) - whole * N);  // columns of a last vector
    copy_weights(w_ih + k * I + vector * N, whole * N + left, size, copy);
    const auto product = [&](int64_t first, int64_t vectors, int64_t row, int64_t rows, S* C, int64_t ldc) {
      const S* W_block = copy + first * copied_column;
      if constexpr (takes_tiles<V, W>)
        if (tiled)
          return multiply_tiles<V>(p.pairs,
                                   {reinterpret_cast<const bfloat16_pair*>(W_block), vectors, gates * blocks_of(H),
                                    tiles.from(Cell::input_sum * blocks_of(H), row), rows, C, ldc, N, true});
      multiply<V, S>({W_block, copied_column, N, vectors, input_sums(chunk, row) + k, chunk.dsums.stride, size, rows, C,
                      ldc, N, k == 0});
    };
    each_run(chunk, member, by_columns, [&](int64_t row, int64_t at, int64_t rows) {
      S* to = sums_of_input(chunk, row, at, wide) + vector * N;
      if (whole) product(0, whole, row, rows, to, I);
      if (!left) return;
      S* last = copy + block_room + row * N;
      product(whole, 1, row, rows, last, N);
      if (k + size == gates * H)
        for (int64_t i = 0; i < rows; ++i) V::load(last + i * N).store(to + i * I + whole * N, left);
    });
  }

  // f(row of the chunk, its row of the sequence, rows) for a member's rows that are next to each other.
  template <class F>
  void each_run(const Chunk<S>& chunk, const Member& member, bool by_columns, const F& f) {
    for (int64_t t = chunk.t_begin; t < chunk.t_end; t = chunk.whole() ? chunk.t_end : t + 1) {
      const int64_t count = chunk.whole() ? chunk.rows() : chunk.job.rows_end(t) - chunk.job.row_begin;
      const auto [begin, end] = by_columns ? std::pair<int64_t, int64_t>(0, count) : member.share(count);
      if (begin < end) f(chunk.row(t) + begin, sequence.start(t) + chunk.job.row_begin + begin, end - begin);
    }
  }

  const S* input_sums(const Chunk<S>& chunk, int64_t row) const { return chunk.dsums.at(row) + Cell::input_sum * H; }

  // Some columns of `size` rows of W_ih as output vectors; for tiles of all rows, each gate's padded by themselves.
  void copy_weights(const W* from, int64_t columns, int64_t size, S* to) const {
    if constexpr (takes_tiles<V, W>)
      if (tiled) {
        auto* panels = reinterpret_cast<bfloat16_pair*>(to);
        for (int g = 0; g < gates; ++g, from += H * I, panels += packed_size<bfloat16_pair>(H) * N)
          pack_columns<V>(from, I, 0, columns, H, panels, copied_column);
        return;
      }
    pack_columns<V>(from, I, 0, columns, size, to, copied_column);
  }

  // When all jobs are done: both directions' dX.
  void finish(const Threads& threads) {
    if (!dx_reverse || !base.rows) return;
    threads.parallel(base.rows, [&](int64_t begin, int64_t end) {
      const Made one = Made::at(p.dx, p.narrow_sequence), other = Made::at(dx_reverse.get(), p.narrow_sequence);
      each_vector<N>((end - begin) * I, [&](int64_t v, auto n) {
        const int64_t i = begin * I + v;
        one.store(one.template load<V>(i, n) + other.template load<V>(i, n), i, n);
      });
    });
  }
};

}  // namespace
}  // namespace fusedrnn::cpu
