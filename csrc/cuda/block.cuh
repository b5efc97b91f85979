// The recurrence inside one block: a block keeps W_hh of its direction in shared memory and runs the steps of a chunk for
// a few rows of the batch. Blocks share nothing, so there is nothing that could wait for a block that does not run.
#pragma once

#include "elementwise.cuh"

namespace fusedrnn::cuda {

// Steps [begin, end) in the order of each direction.
template <class S>
struct BlockForward {
  ForwardStep<S> step;
  int64_t begin, end;
  Sequence sequence;  // its offsets on the device
  const S* w_hh[2];   // [gates*H, H]
};

template <class S>
struct BlockBackward {
  BackwardStep<S> step;
  int64_t begin, end;
  Sequence sequence;
  const S* w_hh[2];
};

// Offsets on their way to the device as a kernel's argument: nothing is copied from memory that the caller may take back,
// so that a CUDA graph can replay it.
struct Offsets {
  static constexpr int most = 500;  // a kernel has at most 4 KB of arguments
  int64_t* to;
  int count;
  int64_t value[most];
};

template <int width>  // a template, so that every file may have it
__global__ void __launch_bounds__(block_threads, blocks_at_once) write_offsets(const __grid_constant__ Offsets p) {
  const Position at = position<width>();
  if (at.b < p.count && at.j == 0) p.to[at.b] = p.value[at.b];
}

// The matrix of a gate in shared memory, as [in][out] of rows `ld` apart, and vectors of `padded` values, all with zeros
// where there are no units. block_shape (tuning.h) says how large all of it is.
template <class Cell, class S, int R>
struct Block {
  using A = Accumulator<S>;
  static constexpr int adjacent = adjacent_units(sizeof(S)), items = units_of_a_thread(R);
  using V = Values<A, 1>;
  using W = Values<A, adjacent>;

  const int H, padded, ld, thread, threads;
  S* const weights;                         // [gates][padded][ld]
  int item_rows[items], item_units[items];  // that are this thread's

  FUSEDRNN_DEVICE Block(int64_t H, unsigned char* memory)
      : H(static_cast<int>(H)),
        padded(padded_units(this->H)),
        ld(leading_dimension(this->H, sizeof(S))),
        thread(threadIdx.x),
        threads(blockDim.x),
        weights(reinterpret_cast<S*>(memory)) {
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const int item = thread + i * threads;
      item_rows[i] = item / this->H, item_units[i] = item % this->H;
    }
  }

  // What follows the weights.
  FUSEDRNN_DEVICE A* vectors() const { return reinterpret_cast<A*>(weights + Cell::gates * padded * ld); }

  // Each gate's block of w [gates*H, H], transposed for forward: there what comes in is the second index.
  FUSEDRNN_DEVICE void load_weights(const S* w, bool transpose) const {
    const W nothing{};
    for (int i = thread; i < Cell::gates * padded * ld / adjacent; i += threads)
      store<adjacent>(weights + i * adjacent, nothing);
    __syncthreads();
    constexpr int warp = 32;
    for (int row = thread / warp; row < Cell::gates * H; row += threads / warp) {
      S* const gate = weights + row / H * padded * ld;
      const int first = row % H;
      for (int second = thread % warp; second < H; second += warp)
        store<1>(gate + (transpose ? second * ld + first : first * ld + second),
                 load<1>(w + static_cast<int64_t>(row) * H + second));
    }
  }

  FUSEDRNN_DEVICE void clear(A* vector, int count) const {
    for (int i = thread; i < count; i += threads) store<1>(vector + i, V{});
  }

  // out[r][gate] = in[r][gate or all] times the gate's matrix, for R rows; in and out are `padded` apart from row to row
  // (and gate to gate), in's gates `gate_stride`.
  FUSEDRNN_DEVICE void multiply(const A* in, int row_stride, int gate_stride, A* out) const {
    const int columns = padded / adjacent, gate = thread / columns, x = thread % columns * adjacent;
    if (gate >= Cell::gates) return;
    W sums[R] = {};
    const S* const w = weights + gate * padded * ld + x;
    const A* const v = in + gate * gate_stride;
#pragma unroll 2
    for (int l = 0; l < padded; l += unroll) {
      Values<A, unroll> h[R];
#pragma unroll
      for (int r = 0; r < R; ++r) h[r] = load<unroll>(v + r * row_stride + l);
#pragma unroll
      for (int i = 0; i < unroll; ++i) {
        const W column = load<adjacent>(w + (l + i) * ld);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int e = 0; e < adjacent; ++e) sums[r][e] += h[r][i] * column[e];
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) store<adjacent>(out + (r * Cell::gates + gate) * padded + x, sums[r]);
  }

  // A thread's units in what lies in memory; kept where it has one only, for more would need more registers than there are.
  template <class Columns, class Step>
  struct ColumnsOf {
    const Step& step;
    const int d;
    Columns own;

    FUSEDRNN_DEVICE ColumnsOf(const Block& block, const Step& step, int d) : step(step), d(d) {
      if constexpr (items > 1) return;
      own = {step, block.item_units[0], d};
      own.keep();
    }
    FUSEDRNN_DEVICE Columns of(int unit) const {
      if constexpr (items > 1) return {step, unit, d};
      return own;
    }
  };

  // Calls f(number, row of the block, position) for the units of R rows that are this thread's.
  template <class F>
  FUSEDRNN_DEVICE void for_items(int B, const F& f) const {
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const int r = item_rows[i], b = static_cast<int>(blockIdx.x) * R + r;
      if (r < R && b < B) f(i, r, Position{b, item_units[i], static_cast<int>(blockIdx.y)});
    }
  }

  static constexpr int unroll = 16 / sizeof(A);  // values of a vector that one access takes
};

template <class Cell, class S, int R>
__global__ void __launch_bounds__(most_block_threads, 1) block_forward(const __grid_constant__ BlockForward<S> p) {
  using A = Accumulator<S>;
  using V = Values<A, 1>;
  FUSEDRNN_SHARED(memory);
  const ForwardStep<S>& step = p.step;
  using Own = Block<Cell, S, R>;
  const Own block(step.H, memory);
  const int d = blockIdx.y, H = block.H, padded = block.padded;
  A* const h = block.vectors();                       // [R][padded]
  A* const c = h + R * padded;                        // [R][padded], cells with a cell state only
  A* const hidden = c + Cell::has_cell * R * padded;  // [R][gates][padded]

  block.load_weights(p.w_hh[d], true);
  block.clear(h, R * padded);
  __syncthreads();
  const auto for_items = [&](const auto& f) { block.for_items(step.B, f); };
  for_items([&](int, int r, const Position& at) {
    const auto state = load_state<Cell, S, 1>(step, at);
    store<1>(h + r * padded + at.j, state.h);
    if constexpr (Cell::has_cell) store<1>(c + r * padded + at.j, state.c);
  });
  __syncthreads();

  constexpr int items = Own::items;
  V biases[items][Cell::sums];
  for_items([&](int i, int, const Position& at) { load_biases<Cell, S, 1>(step, at, biases[i]); });
  const typename Own::template ColumnsOf<ForwardColumns<Cell, S>, ForwardStep<S>> columns(block, step, d);
  Walk walk(p.sequence, d, p.begin, p.end, p.begin, 1);
  Place here = walk.next_at_once();
  for (int64_t number = p.begin; number < p.end; ++number) {
    walk.look_ahead();
    // What comes from memory is on its way during the product. Not from one turn of the loop to the next: where a loop begins
    // the compiler waits for all that is on its way.
    V input[items][Cell::gates];
    uint8_t reset[items];
    for_items([&](int i, int, const Position& at) {
      if (at.b >= here.rows) return;
      load_input(columns.of(at.j), here.start + at.b, input[i]);
      reset[i] = step.rows.reset_byte(here, at.b);
    });
    block.multiply(h, padded, 0, hidden);
    __syncthreads();
    for_items([&](int i, int r, const Position& at) {
      const int row = here.start + at.b;
      if (step.rows.has(here, at.b)) {
        V product[Cell::gates], c_before{};
#pragma unroll
        for (int k = 0; k < Cell::gates; ++k) product[k] = load<1>(hidden + (r * Cell::gates + k) * padded + at.j);
        if constexpr (Cell::has_cell) c_before = load<1>(c + r * padded + at.j);
        A* const own = h + r * padded + at.j;
        const auto made = forward_units<Cell>(biases[i], input[i], product, load<1>(own), c_before, reset[i]);
        store<1>(own, made.h);
        if constexpr (Cell::has_cell) store<1>(c + r * padded + at.j, made.c);
        store_forward(columns.of(at.j), row, made);
      } else if (at.b < here.rows) {
        forward_nothing<1>(columns.of(at.j), row);
      }
    });
    here = walk.next();
    __syncthreads();
  }

  for_items([&](int, int r, const Position& at) {
    State<A, 1> state;
    state.h = load<1>(h + r * padded + at.j);
    if constexpr (Cell::has_cell) state.c = load<1>(c + r * padded + at.j);
    store_state<Cell, S, 1>(step, at, state);
  });
}

template <class Cell, class S, int R>
__global__ void __launch_bounds__(most_block_threads, 1) block_backward(const __grid_constant__ BlockBackward<S> p) {
  using A = Accumulator<S>;
  using V = Values<A, 1>;
  FUSEDRNN_SHARED(memory);
  const BackwardStep<S>& step = p.step;
  using Own = Block<Cell, S, R>;
  const Own block(step.H, memory);
  const int d = blockIdx.y, H = block.H, padded = block.padded;
  A* const dh = block.vectors();                   // [R][padded]
  A* const dc = dh + R * padded;                   // [R][padded], cells with a cell state only
  A* const da = dc + Cell::has_cell * R * padded;  // [R][gates][padded] by the gates of w_hh
  A* const parts = da + R * Cell::gates * padded;  // [R][gates][padded] of what comes back through w_hh

  block.load_weights(p.w_hh[d], false);
  block.clear(da, 2 * R * Cell::gates * padded);
  __syncthreads();
  const auto for_items = [&](const auto& f) { block.for_items(step.B, f); };
  const auto returned = [&](int r, int j) {
    V sum{};
#pragma unroll
    for (int g = 0; g < Cell::gates; ++g) sum += load<1>(parts + (r * Cell::gates + g) * padded + j);
    return sum;
  };
  for_items([&](int, int r, const Position& at) {
    const int64_t state = static_cast<int64_t>(d * step.B + at.b) * H + at.j;
    const auto gradients = load_gradients<Cell, S, 1>(step, at);
    store<1>(dh + r * padded + at.j, gradients.h);
    if constexpr (Cell::has_cell) store<1>(dc + r * padded + at.j, gradients.c);
    if (p.end < p.sequence.T) store<1>(parts + r * Cell::gates * padded + at.j, load<1>(step.product + state));
  });
  __syncthreads();

  constexpr int items = Own::items;
  const typename Own::template ColumnsOf<BackwardColumns<Cell, S>, BackwardStep<S>> columns(block, step, d);
  Walk walk(p.sequence, d, 0, p.sequence.T, p.end - 1, -1);
  Place here = walk.next_at_once(), previous = walk.next_at_once();
  bool returns[items];  // whether the product is of this row
  for_items([&](int i, int, const Position& at) {
    const Place later = place(p.sequence, d, p.end);
    returns[i] = step.rows.has(later, at.b) && !step.rows.reset(later, at.b);
  });
  for (int64_t number = p.end - 1; number >= p.begin; --number) {
    walk.look_ahead();
    // As forward. The first product was made by the kernel of the later steps.
    ForBackward<Cell, S, 1> values[items];
    bool takes_part[items];
    for_items([&](int i, int, const Position& at) {
      takes_part[i] = step.rows.has(here, at.b);
      if (takes_part[i])
        values[i] =
            load_for_backward<1>(columns.of(at.j), step.rows, previous, step.rows.has(previous, at.b), here, at.b);
    });
    if (number + 1 < p.end) block.multiply(da, Cell::gates * padded, padded, parts);
    __syncthreads();
    for_items([&](int i, int r, const Position& at) {
      A* const own = dh + r * padded + at.j;
      V carried = load<1>(own);
      if (returns[i]) carried += returned(r, at.j);
      V gradient[Cell::sums] = {};
      if (takes_part[i]) {
        V cell{};
        if constexpr (Cell::has_cell) cell = load<1>(dc + r * padded + at.j);
        backward_units<Cell>(values[i], carried, cell, gradient);
        store_gradients(columns.of(at.j), here.start + at.b, gradient, values[i].h);
        if constexpr (Cell::has_cell) store<1>(dc + r * padded + at.j, cell);
      } else if (at.b < here.rows) {
        backward_nothing<1>(columns.of(at.j), here.start + at.b);
      }
      returns[i] = takes_part[i] && !values[i].reset;
      store<1>(own, carried);
#pragma unroll
      for (int k = 0; k < Cell::gates; ++k)
        store<1>(da + (r * Cell::gates + Cell::hidden_gate(k)) * padded + at.j, gradient[k]);
    });
    here = previous, previous = walk.next();
    __syncthreads();
  }
  block.multiply(da, Cell::gates * padded, padded, parts);
  __syncthreads();

  for_items([&](int, int r, const Position& at) {
    const int64_t state = static_cast<int64_t>(d * step.B + at.b) * H + at.j;
    store<1>(step.dh + state, load<1>(dh + r * padded + at.j));
    if constexpr (Cell::has_cell) store<1>(step.dc + state, load<1>(dc + r * padded + at.j));
    store<1>(step.product + state, returned(r, at.j));
  });
}

}  // namespace fusedrnn::cuda
