// The gradients of the input, the weights and the biases, from those of the pre-activations of the whole sequence. With n
// counting the sequence's rows:
//   dX[n] = Σ over directions of dgates[n] · W_ih
//   dW_ih = Σ_n dgates[n] ⊗ x[n]
//   dW_hh = Σ_n dgates[n] ⊗ h[before n]
//   db    = Σ_n dgates[n]
// They are cut into items (a block of rows of dX; some hidden units of one gate of one weight), which the threads take as
// they come.
#pragma once

#include "recurrence.h"

namespace fusedrnn::cpu {
namespace {

template <class Cell, class S, int N>
struct Gradients : Recurrence<Cell, S, N> {
  using Base = Recurrence<Cell, S, N>;
  using Base::gates, Base::sums, Base::sequence, Base::B, Base::H, Base::rows;
  using typename Base::V;
  static constexpr int tile = tile_rows(4, sizeof(V));

  struct Item {
    bool of_input;  // dX, rows [begin, end); else a weight, units [begin, end) of one gate
    bool recurrent;
    int direction, gate;
    int64_t begin, end;
  };

  const BackwardParams& p;
  const int64_t I = p.I;
  const int64_t input_vectors = (I + N - 1) / N;
  Scratch<S> w_ih = scratch<S>(p.dx ? p.directions * input_vectors * gates * H * N : 0);

  Gradients(const BackwardParams& params, const Threads& all_threads) : Base(params, all_threads), p(params) {
    const bool small = rows * gates * H * (I + H) < 500'000;  // some µs for one thread
    const Threads threads = small ? Threads{1, nullptr} : all_threads;
    if (p.dx)
      threads.parallel(p.directions * input_vectors, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t column = i % input_vectors * N;
          pack_columns<V>(static_cast<const S*>(p.weights[i / input_vectors].w_ih), I, column,
                          static_cast<int>(std::min<int64_t>(N, I - column)), gates * H,
                          w_ih.get() + i * gates * H * N);
        }
      });
    const int64_t parts =
        std::clamp<int64_t>(threads.count, 1, std::max<int64_t>(1, H / 32));  // enough items for every thread
    const int64_t blocks = p.dx ? (rows + gradient_rows - 1) / gradient_rows : 0,
                  weight_items = p.directions * 2 * gates * parts;
    std::atomic<int64_t> next{0};
    threads.parallel(threads.count, [&](int64_t, int64_t) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < weight_items + blocks;) {
        if (i >= weight_items) {
          input(rows * (i - weight_items) / blocks, rows * (i - weight_items + 1) / blocks);
          continue;
        }
        const int64_t part = i % parts, gate = i / parts % gates, direction = i / parts / gates % p.directions;
        weight(i / parts / gates / p.directions == 0, Job{sequence, direction, 0, B}, gate, H * part / parts,
               H * (part + 1) / parts);
      }
    });
  }

  const S* dsums(int64_t direction, int64_t row) const {
    return static_cast<const S*>(p.dsums) + (direction * rows + row) * sums * H;
  }

  static Scratch<S> zeros(int64_t count) {
    Scratch<S> made = scratch<S>(count);
    std::fill_n(made.get(), count, S(0));
    return made;
  }

  // Rows [begin, end) of dX.
  void input(int64_t begin, int64_t end) {
    const int64_t width = input_vectors * N, count = end - begin;
    const Scratch<S> sum = zeros(count * width);
    for (int64_t direction = 0; direction < p.directions; ++direction)
      for (int64_t k = 0; k < gates * H; k += gradient_depth)
        multiply<V, S>({w_ih.get() + direction * input_vectors * gates * H * N + k * N, gates * H * N, N, input_vectors,
                        dsums(direction, begin) + Cell::input_sum * H + k, sums * H,
                        std::min(gradient_depth, gates * H - k), count, sum.get(), width, N});
    for (int64_t row = 0; row < count; ++row)
      std::copy_n(sum.get() + row * width, I, static_cast<S*>(p.dx) + (begin + row) * I);
  }

  // Units [begin, end) of one gate of dW_hh (recurrent) or dW_ih, and of the bias beside it.
  void weight(bool recurrent, const Job& job, int64_t gate, int64_t begin, int64_t end) {
    const WeightGradients& gradients = p.gradients[job.direction];
    S* dw = static_cast<S*>(recurrent ? gradients.w_hh : gradients.w_ih);
    S* db = static_cast<S*>(recurrent ? gradients.b_hh : gradients.b_ih);
    if (!dw && !db) return;
    const int64_t columns = recurrent ? H : I, vectors = (columns + N - 1) / N, width = vectors * N,
                  units = end - begin;
    const int64_t tiles = (units + tile - 1) / tile, depth = std::min(gradient_depth, rows);
    const int64_t torch_gate = recurrent ? Cell::hidden_gate(static_cast<int>(gate)) : gate;
    const S* source = dsums(job.direction, 0) + (recurrent ? gate : Cell::input_sum + gate) * H + begin;
    S* result = dw ? dw + (torch_gate * H + begin) * columns : nullptr;
    if (rows == 0 && dw) std::fill_n(result, units * columns, S(0));
    // Where a row ends with a vec the products go straight to their place.
    const bool in_place = width == columns;
    const Scratch<S> padded = scratch<S>(in_place ? 0 : units * width);
    S* total = in_place ? result : padded.get();
    const Scratch<S> right = scratch<S>(vectors * depth * N), left = scratch<S>(tiles * tile * depth);
    const Scratch<S> bias = zeros(tiles * tile), block_bias = zeros(tiles * tile);
    int64_t t = 0;
    for (int64_t row = 0; row < rows; row += depth) {
      const int64_t count = std::min(depth, rows - row);
      for (int64_t k = 0; k < count; ++k) {
        while (row + k >= sequence.start(t + 1)) ++t;
        const int64_t b = row + k - sequence.start(t);
        const S* from = nullptr;  // past a row's end the gradient is zero, but x may be NaN
        if (t < sequence.length(b))
          from = recurrent ? this->state_before(job, t, b, static_cast<const S*>(p.y) + job.direction * H,
                                                p.directions * H, static_cast<const S*>(p.hx))
                           : static_cast<const S*>(p.x) + (row + k) * I;
        if (dw)
          for (int64_t v = 0; v < vectors; ++v) {
            const int n = static_cast<int>(std::min<int64_t>(N, columns - v * N));
            (from ? V::load(from + v * N, n) : V(S(0))).store(right.get() + (v * depth + k) * N);
          }
        split_tiles(source + (row + k) * sums * H, units, left.get() + k * tile, depth * tile, block_bias.get());
      }
      for (int64_t u = 0; u < units; ++u) {  // a block's sum at a time, as exact as the products' (gemm.h)
        bias[u] += block_bias[u];
        block_bias[u] = S(0);
      }
      if (!dw) continue;
      for (int64_t v = 0; v < vectors; v += 4)
        multiply_tiles<V, S>({right.get() + v * depth * N, depth * N, N, std::min<int64_t>(4, vectors - v), left.get(),
                              depth, count, units, total + v * N, width, N, row == 0});
    }
    for (int64_t u = 0; u < units && rows > 0 && dw && !in_place; ++u)
      std::copy_n(total + u * width, columns, result + u * columns);
    if (db) std::copy_n(bias.get(), units, db + torch_gate * H + begin);
  }

  // Copies one row's units to the tiles' places for it, and adds them to the bias.
  static void split_tiles(const S* from, int64_t units, S* to, int64_t stride, S* bias) {
    int64_t u = 0;
    for (; u + tile <= units; u += tile, to += stride)
      for (int i = 0; i < tile; ++i) {
        to[i] = from[u + i];
        bias[u + i] += from[u + i];
      }
    for (int i = 0; i < tile && u < units; ++i) {
      const S value = u + i < units ? from[u + i] : S(0);
      to[i] = value;
      bias[u + i] += value;
    }
  }
};

}  // namespace
}  // namespace fusedrnn::cpu
