// The gradients of the input, the weights and the biases, from those of the pre-activations (dsums). With n counting the
// sequence's rows:
//   dX[n] = Σ over directions of dgates[n] · W_ih
//   dW_ih = Σ_n dgates[n] ⊗ x[n]
//   dW_hh = Σ_n dgates[n] ⊗ h[before n]
//   db    = Σ_n dgates[n]
// and with a projection of the outputs, q = o∘tanh(c), to the states h = W_hr·q:
//   dW_hr = Σ_n dh[n] ⊗ q[n]
// They are taken chunk by chunk, while the chunk's dsums are still in cache. The members of a team share out the columns of
// the weights. A team of its own for each direction adds where the gradients belong, unless they are bfloat16; teams that share
// a direction add up for themselves first, so that no sum depends on who comes first.
#pragma once

#include "input_gradient.h"

namespace fusedrnn::cpu {
namespace {

// The matrices that have gradients.
enum class Matrix { input, hidden, projection };

template <class Cell, class S, int N, class W>
struct Gradients {
  using Base = Recurrence<Cell, S, N>;
  using V = typename Base::V;
  static constexpr int gates = Base::gates, sums = Base::sums;

  using Given = Numbers<const S, const W>;

  const Base& base;
  const BackwardParams& p;
  const Sequence& sequence = p.sequence;
  const int64_t I = p.I, H = p.H, R = p.R(), D = p.directions;
  InputGradient<Cell, S, N, W> input{base, p};
  const int64_t input_vectors = input.vectors, hidden_vectors = (R + N - 1) / N,
                output_vectors = p.projection ? (H + N - 1) / N : 0;
  const bool shared = base.plan.row_blocks > 1;        // whether several teams work on one direction
  const int64_t sets = shared ? base.plan.groups : D;  // of sums; set s has direction s % D
  const bool tiled = base.plan.tiled;
  Scratch<S> ih_sums, hh_sums, hr_sums, bias_sums = scratch<S>(sets * sums * H);
  // A slice's own, for dX and then the rest: a copy of some rows in pairs of vectors (see weight), or in tiles beside the dsums of 16 units.
  const int64_t chunk_rows = input.chunk_rows, copied_rows = std::min(gradient_rows, chunk_rows);
  // Whether a product is a whole sum: then it goes, rounded, to the gradient itself, and no sums of all of it are needed.
  const bool at_once = !std::is_same_v<S, W> && !shared && base.plan.chunk >= sequence.T && chunk_rows <= gradient_rows;
  const int64_t vectors_at_once =
      std::min(2 * gradient_pairs, std::max({input_vectors, hidden_vectors, output_vectors}) + 1);
  const int64_t tile_numbers = packed_size<bfloat16_pair>(copied_rows) * N;  // of a vector of copied rows
  const int64_t copy_room = tiled ? (vectors_at_once + 2) * tile_numbers : copied_rows * vectors_at_once * N;
  const int64_t sums_room = at_once ? rounded_rows * vectors_at_once * N : 0;  // behind the copy
  const int64_t slice_room = std::max(input.room, copy_room + sums_room);
  Scratch<S> room = scratch<S>(base.plan.groups * base.plan.slices * slice_room);
  // The dsums of a team's chunk for tiles.
  const int64_t tiles_size = TileRows<V>::size(tiled ? chunk_rows : 0, blocks_of(H) * sums);
  Scratch<uint16_t> dsums_tiles = scratch<uint16_t>(base.plan.groups * tiles_size);

  Gradients(const Base& recurrence, const BackwardParams& params) : base(recurrence), p(params) {
    if (at_once) return;
    if (!adds_in_place(I)) ih_sums = scratch<S>(sets * gates * H * input_vectors * N);
    if (!adds_in_place(R)) hh_sums = scratch<S>(sets * gates * H * hidden_vectors * N);
    if (!adds_in_place(H)) hr_sums = scratch<S>(sets * R * output_vectors * N);
  }

  // Where a row of the gradient ends with a vec and nobody else adds to it, the products go straight to their place.
  bool adds_in_place(int64_t columns) const { return std::is_same_v<S, W> && !shared && columns % N == 0; }

  TileRows<V> tiles_of(int64_t team) const {
    return TileRows<V>::of(dsums_tiles.get() + team * tiles_size, p.pairs, chunk_rows, blocks_of(H) * sums);
  }

  // The dsums of panels [begin, end) and some of the chunk's rows, for tiles.
  void fill_tiles(const Chunk<S>& chunk, int64_t row, int64_t count, int64_t begin, int64_t end,
                  const TileRows<V>& to) const {
    if constexpr (takes_tiles<V, W>)
      for (int64_t k = 0; k < sums && begin < end; ++k)
        to.fill(chunk.dsums.at(row) + k * H, chunk.dsums.stride, count, k * blocks_of(H), row, begin * N,
                std::min(end * N, H), H);
  }

  // A member's part of one chunk.
  void add(const Chunk<S>& chunk, Member& member, int64_t team, int64_t slice) {
    S* own_room = room.get() + slice * slice_room;
    input.add(chunk, member, tiles_of(team), team, own_room);
    const int64_t direction = chunk.job.direction, set = shared ? team : direction;
    const WeightGradients& wanted = p.gradients[direction];
    const bool first = !member.started[direction];
    member.started[direction] = true;
    const int64_t of_input = wanted.w_ih ? input_vectors : 0, of_hidden = wanted.w_hh ? hidden_vectors : 0,
                  of_outputs = wanted.w_hr ? output_vectors : 0;
    if (tiled) {
      const auto [begin, end] = member.share(base.panels);
      weight_in_tiles<Matrix::input>(chunk, set, begin, end, of_input, first, own_room);
      weight_in_tiles<Matrix::hidden>(chunk, set, begin, end, of_hidden, first, own_room);
      if constexpr (Cell::has_cell) {
        const auto [begin, end] = member.share(base.state_panels);
        weight_in_tiles<Matrix::projection>(chunk, set, begin, end, of_outputs, first, own_room);
      }
    } else {
      const auto [begin, end] = member.share(of_input + of_hidden);
      weight<Matrix::input>(chunk, set, std::min(begin, of_input), std::min(end, of_input), first, own_room);
      weight<Matrix::hidden>(chunk, set, std::max(begin - of_input, int64_t(0)), std::max(end - of_input, int64_t(0)),
                             first, own_room);
      if constexpr (Cell::has_cell) {  // whose columns are shorter
        const auto [begin, end] = member.share(of_outputs);
        weight<Matrix::projection>(chunk, set, begin, end, first, own_room);
      }
    }
    if (wanted.b_ih || wanted.b_hh) {
      const auto [unit, last] = member.share(sums * H);
      bias(chunk, bias_sums.get() + set * sums * H, unit, last, first);
    }
  }

  template <Matrix of, class T>
  static constexpr T& choose(T& input, T& hidden, T& projection) {
    return of == Matrix::input ? input : of == Matrix::hidden ? hidden : projection;
  }
  template <Matrix of>
  int64_t columns() const {
    return choose<of>(I, R, H);
  }
  // Of which `blocks` make the rows.
  template <Matrix of>
  int64_t block() const {
    return of == Matrix::projection ? R : H;
  }
  template <Matrix of>
  static constexpr int blocks = of == Matrix::projection ? 1 : gates;

  // Where the sums of a matrix's gradient are, for one direction of a team, and how wide a row is.
  template <Matrix of>
  std::pair<S*, int64_t> total(const Chunk<S>& chunk, int64_t set) const {
    const int64_t width = choose<of>(input_vectors, hidden_vectors, output_vectors) * N;
    if (adds_in_place(columns<of>())) return {static_cast<S*>(gradient<of>(chunk)), width};
    return {choose<of>(ih_sums, hh_sums, hr_sums).get() + set * blocks<of> * block<of>() * width, width};
  }

  template <Matrix of>
  void* gradient(const Chunk<S>& chunk) const {
    const WeightGradients& wanted = p.gradients[chunk.job.direction];
    return choose<of>(wanted.w_ih, wanted.w_hh, wanted.w_hr);
  }

  // `count` vectors from `vector` on, of `rows` rows of a gradient from `row` on, which product(C, its row's length) makes or adds
  // to.
  template <Matrix of, class F>
  void add_product(const Chunk<S>& chunk, int64_t set, int64_t row, int64_t rows, int64_t vector, int64_t count,
                   S* room, const F& product) const {
    if (!at_once) {
      const auto [to, width] = total<of>(chunk, set);
      product(to + row * width + vector * N, width);
      return;
    }
    const int64_t width = std::min(count * N, columns<of>() - vector * N);
    product(room, count * N);
    for (int64_t i = 0; i < rows; ++i) {
      W* to = static_cast<W*>(gradient<of>(chunk)) + (row + i) * columns<of>() + vector * N;
      each_vector<N>(width, [&](int64_t k, auto n) { store(V::load(room + i * count * N + k, n), to + k, n); });
    }
  }

  // Of a block of a matrix's rows the gradients that go into it, and its place among torch's.
  template <Matrix of>
  static constexpr int sum_of(int g) {
    return of == Matrix::input ? Cell::input_sum + g : g;
  }
  template <Matrix of>
  static constexpr int gate_of(int g) {
    return of == Matrix::hidden ? Cell::hidden_gate(g) : g;
  }

  // Vectors [begin, end) of the columns of a matrix's gradient.
  template <Matrix of>
  void weight(const Chunk<S>& chunk, int64_t set, int64_t begin, int64_t end, bool fresh, S* right) {
    const RowsOf<S>& left = of == Matrix::projection ? chunk.dstates : chunk.dsums;
    const int64_t rows = chunk.rows(), parts = (rows + gradient_rows - 1) / gradient_rows;
    const int64_t height = block<of>(), at_a_time = at_once ? rounded_rows : height;
    for (int64_t vector = begin; vector < end; vector += 2 * gradient_pairs)
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t count = std::min<int64_t>(2 * gradient_pairs, end - vector);
        const int64_t row = rows * i / parts, K = rows * (i + 1) / parts - row;
        copy<of>(chunk, row, row + K, vector, count, right);
        for (int g = 0; g < blocks<of>; ++g)
          for (int64_t unit = 0; unit < height; unit += at_a_time) {
            const int64_t units = std::min(at_a_time, height - unit);
            add_product<of>(chunk, set, gate_of<of>(g) * height + unit, units, vector, count, right + copy_room,
                            [&](S* C, int64_t ldc) {
                              multiply_transposed<V, S>(
                                  {right, N, 2 * N, count, left.at(row) + sum_of<of>(g) * height + unit, left.stride, K,
                                   units, C, ldc, N, fresh && i == 0},
                                  2 * N * K);
                            });
          }
      }
  }

  // Panels [begin, end) of each block of a gradient's rows, all of their columns: the other way round, since the dsums must be
  // transposed.
  template <Matrix of>
  void weight_in_tiles(const Chunk<S>& chunk, int64_t set, int64_t begin, int64_t end, int64_t vectors, bool fresh,
                       S* memory) {
    if constexpr (takes_tiles<V, W>) {
      if (begin == end) return;
      const RowsOf<S>& from = of == Matrix::projection ? chunk.dstates : chunk.dsums;
      const int64_t rows = chunk.rows(), parts = (rows + gradient_rows - 1) / gradient_rows, height = block<of>();
      bfloat16_pair* right = reinterpret_cast<bfloat16_pair*>(memory);
      for (int64_t vector = 0; vector < vectors; vector += 2 * gradient_pairs)
        for (int64_t i = 0; i < parts; ++i) {
          const int64_t count = std::min<int64_t>(2 * gradient_pairs, vectors - vector);
          const int64_t row = rows * i / parts, K = rows * (i + 1) / parts - row;
          const auto left = TileRows<V>::of(reinterpret_cast<uint16_t*>(right + vectors_at_once * tile_numbers),
                                            p.pairs, N, blocks_of(K));
          copy_to_tiles<of>(chunk, row, K, vector, count, right);
          for (int g = 0; g < blocks<of>; ++g)
            for (int64_t panel = begin; panel < end; ++panel) {
              const int units = static_cast<int>(std::min<int64_t>(N, height - panel * N));
              transpose_to_tiles(from.at(row) + sum_of<of>(g) * height + panel * N, from.stride, K, units, left);
              add_product<of>(chunk, set, gate_of<of>(g) * height + panel * N, units, vector, count, memory + copy_room,
                              [&](S* C, int64_t ldc) {
                                multiply_tiles<V>(
                                    p.pairs, {right, count, blocks_of(K), left, units, C, ldc, N, fresh && i == 0});
                              });
            }
        }
    }
  }

  // K rows of up to N units as the N rows of a product over K.
  static void transpose_to_tiles(const S* from, int64_t stride, int64_t K, int units, const TileRows<V>& to) {
    const auto square = [&](int64_t k, auto width) __attribute__((always_inline)) {
      V rows[N];
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) rows[j] = k + j < K ? V::load(from + (k + j) * stride, width) : V(S(0));
      transpose<N / 2>(rows);
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) to.store(0, j, k, rows[j]);
    };
    for (int64_t k = 0; k < blocks_of(K) * 32; k += N)
      units == N ? square(k, std::integral_constant<int, N>()) : square(k, units);
  }

  // Row k of the chunk of what a matrix is multiplied with; none past a row's end, where the gradient is zero, but x may be NaN.
  template <Matrix of, class F>
  void each_row(const Chunk<S>& chunk, int64_t begin, int64_t end, const F& f) const {
    const Job& job = chunk.job;
    const Given x = Given::at(p.x, p.narrow_sequence), outputs = Given::at(p.y, p.narrow_sequence) + job.direction * R;
    for (int64_t t = chunk.t_begin; t < chunk.t_end; ++t) {
      const int64_t first = chunk.row(t);
      if (first >= end) break;
      for (int64_t b = std::max(job.row_begin, job.row_begin + begin - first); b < job.row_end; ++b) {
        const int64_t k = first + b - job.row_begin;
        if (k >= end || (chunk.whole() && b >= sequence.rows_at(t))) break;
        Given from;
        if (t < sequence.length(b))
          from = of == Matrix::input    ? x + (sequence.start(t) + b) * I
                 : of == Matrix::hidden ? base.before(job, t, b, outputs, D * R, p.hx, R)
                                        : Given{chunk.outputs.at(k)};
        f(k - begin, from);
      }
    }
  }

  // Rows [begin, end) of them, `count` vectors from `vector` on, in pairs: for every pair its rows, one after the other.
  template <Matrix of>
  void copy(const Chunk<S>& chunk, int64_t begin, int64_t end, int64_t vector, int64_t count, S* pairs) const {
    const int64_t K = end - begin, width = columns<of>(), whole = std::min(count, width / N - vector);
    each_row<of>(chunk, begin, end, [&](int64_t k, const Given& row) {
      const auto to = [&](int64_t v) { return pairs + ((v / 2 * K + k) * 2 + v % 2) * N; };
      const Given from = row + vector * N;
      constexpr std::integral_constant<int, N> all;
      for (int64_t v = 0; v < whole; ++v) from.template load_or_zero<V>(v * N, all).store(to(v));
      if (whole < count) from.template load_or_zero<V>(whole * N, static_cast<int>(width % N)).store(to(whole));
    });
  }

  // K rows of them from `row` on, as weights of a product over K.
  template <Matrix of>
  void copy_to_tiles(const Chunk<S>& chunk, int64_t row, int64_t K, int64_t vector, int64_t count,
                     bfloat16_pair* tiles) const {
    const int64_t end = padded<bfloat16_pair>(K);
    std::array<Given, gradient_rows> rows{};  // a multiple of 32
    each_row<of>(chunk, row, row + K, [&](int64_t k, const Given& from) { rows[k] = from; });
    for (int64_t v = 0; v < count; ++v, tiles += end / 2 * N) {
      const int64_t column = (vector + v) * N;
      const int width = static_cast<int>(std::min<int64_t>(N, columns<of>() - column));
      const auto rounded = [&](int64_t k) {
        return V((typename V::Register)to_bfloat16(rows[k].template load_or_zero<V>(column, width)));
      };
      for (int64_t k = 0; k < end; k += 2) store_pairs(rounded(k), rounded(k + 1), tiles + k / 2 * N);
    }
  }

  // A block's sum at a time, as exact as the products'.
  void bias(const Chunk<S>& chunk, S* total, int64_t begin, int64_t end, bool fresh) {
    const auto vector = [&](int64_t unit, auto n) {
      V all = fresh ? V(S(0)) : V::load(total + unit, n);
      for (int64_t row = 0; row < chunk.rows();) {
        V sum(S(0));
        for (const int64_t stop = std::min(row + summation_block, chunk.rows()); row < stop; ++row)
          sum = sum + V::load(chunk.dsums.at(row) + unit, n);
        all = all + sum;
      }
      all.store(total + unit, n);
    };
    each_vector<N>(end - begin, [&](int64_t unit, auto n) { vector(begin + unit, n); });
  }

  // What is left when all jobs are done: sums of several teams, padded rows, sums that are to be rounded, both directions' dX.
  void finish(const Threads& threads) {
    input.finish(threads);
    for (int64_t d = 0; d < D; ++d) {
      const WeightGradients& wanted = p.gradients[d];
      const bool left = ih_sums || hh_sums || hr_sums || base.rows == 0;
      threads.parallel(left ? gates * H : 0, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          collect(wanted.w_ih, ih_sums.get(), d, row, gates * H, I);
          collect(wanted.w_hh, hh_sums.get(), d, row, gates * H, R);
          if (row < R) collect(wanted.w_hr, hr_sums.get(), d, row, R, H);  // R <= H
        }
      });
      for (int g = 0; g < gates; ++g) {
        const auto bias = [&](void* gradient, int64_t torch_gate, int64_t sum) {
          if (gradient) give(static_cast<W*>(gradient) + torch_gate * H, bias_sums.get(), sums * H, d, sum * H, H);
        };
        bias(wanted.b_ih, g, Cell::input_sum + g);
        bias(wanted.b_hh, Cell::hidden_gate(g), g);
      }
    }
  }

  // One row of the `height` of a matrix's gradient, unless nobody wants it or it is in its place.
  void collect(void* gradient, const S* all, int64_t d, int64_t row, int64_t height, int64_t columns) const {
    const int64_t width = (columns + N - 1) / N * N;
    if (gradient && (all || base.rows == 0))
      give(static_cast<W*>(gradient) + row * columns, all, height * width, d, row * width, columns);
  }

  // A part of a gradient: `count` numbers, from `first` on, of direction d's sets, `size` numbers each, added up.
  void give(W* gradient, const S* all, int64_t size, int64_t d, int64_t first, int64_t count) const {
    if (base.rows == 0) return void(std::fill_n(gradient, count, W{}));
    each_vector<N>(count, [&](int64_t i, auto n) {
      V sum = V::load(all + d * size + first + i, n);
      for (int64_t set = d + D; set < sets; set += D) sum = sum + V::load(all + set * size + first + i, n);
      store(sum, gradient + i, n);
    });
  }
};

}  // namespace
}  // namespace fusedrnn::cpu
