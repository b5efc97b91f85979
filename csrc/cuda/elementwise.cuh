// The kernels of the step schedule: all of a time step but its matrix product, forward and backward, and the small
// conversions around the loop. A thread owns `width` neighbouring units of one row and shares nothing with any other.
#pragma once

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "places.h"
#include "values.cuh"

namespace fusedrnn::cuda {

// Which rows take part in a step, and which of them start anew. Both arrays are on the device, or nullptr (params.h).
struct Rows {
  const int64_t* lengths;
  const bool* resets;

  FUSEDRNN_DEVICE bool has(const Place& place, int64_t b) const {
    return b < place.rows && (!lengths || place.t < lengths[b]);
  }
  FUSEDRNN_DEVICE bool reset(const Place& place, int64_t b) const { return resets && resets[place.start + b]; }
};

// The units of a thread: row b of the batch, units [j, j + width) of direction d.
struct Position {
  int64_t b, j;
  int d;
};

template <int width>
FUSEDRNN_DEVICE Position position() {
  return {static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y,
          (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * width, static_cast<int>(blockIdx.z)};
}

// What the steps of a chunk have in common, and, for a kernel of one step, where that is.
template <class S>
struct ForwardStep {
  using A = Accumulator<S>;
  int64_t B, H, N;
  int directions;
  Rows rows;
  Place here[2];
  int64_t first[2];   // row of the sequence that input[d] begins with
  const A* input[2];  // [rows of the chunk, gates*H] x·W_ih
  const A* hidden;    // [D, B, gates*H] h·W_hh
  const A* biases;    // [D, sums*H], or nullptr
  S* y;               // [N, D*H]
  S* h;               // [D, B, H] the state, which the next product reads; h_n after the last step
  A* c;               // [D, B, H] the cell state
  S* c_n;             // [D, B, H] the cell state as it is given back, or nullptr where c is that
  S* gates;           // [D, N, saved*H], or nullptr
  S* cells;           // [D, N, H], or nullptr
};

// What x makes of the pre-activations of some units.
template <class Cell, class S, int width>
FUSEDRNN_DEVICE void load_input(const ForwardStep<S>& p, const Place& here, const Position& at,
                                Values<Accumulator<S>, width> (&input)[Cell::gates]) {
  const auto* from = p.input[at.d] + (here.start - p.first[at.d] + at.b) * Cell::gates * p.H + at.j;
#pragma unroll
  for (int k = 0; k < Cell::gates; ++k) input[k] = load<width>(from + k * p.H);
}

// What a step makes of some units.
template <class Cell, class A, int width>
struct Forwarded {
  Values<A, width> h, c, saved[Cell::saved + 1];  // + 1: no array has no element
};

// One step of some units of a row that takes part in it. hidden(g) is h·W_hh of gate g; h and c are the units' state,
// wherever it lies.
template <class Cell, class S, int width, class T, class Hidden>
FUSEDRNN_DEVICE Forwarded<Cell, Accumulator<S>, width> forward_units(
    const ForwardStep<S>& p, const Place& here, const Position& at,
    const Values<Accumulator<S>, width> (&input)[Cell::gates], const Hidden& hidden, T* h_state,
    Accumulator<S>* c_state) {
  using A = Accumulator<S>;
  using V = Values<A, width>;
  const auto [b, j, d] = at;
  const bool reset = p.rows.reset(here, b);

  // What x makes goes to the last `gates` sums, what h makes to the first. A state of zero makes nothing.
  V sums[Cell::sums] = {};
#pragma unroll
  for (int k = 0; k < Cell::sums; ++k) {
    if (p.biases) sums[k] = load<width>(p.biases + (d * Cell::sums + k) * p.H + j);
    if (k >= Cell::input_sum) sums[k] += input[k - Cell::input_sum];
    if (k < Cell::gates && !reset) sums[k] += hidden(Cell::hidden_gate(k));
  }
  Forwarded<Cell, A, width> made{};
  if (!reset) {
    made.h = load<width>(h_state);
    if constexpr (Cell::has_cell) made.c = load<width>(c_state);
  }
#pragma unroll
  for (int i = 0; i < width; ++i) {
    A a[Cell::sums], gate[Cell::saved + 1];
#pragma unroll
    for (int k = 0; k < Cell::sums; ++k) a[k] = sums[k][i];
    Cell::activate(a);
    made.h[i] = Cell::forward(a, made.h[i], made.c[i], gate);
#pragma unroll
    for (int k = 0; k < Cell::saved; ++k) made.saved[k][i] = gate[k];
  }
  store<width>(h_state, made.h);
  if constexpr (Cell::has_cell) store<width>(c_state, made.c);
  return made;
}

// All of it that outlives the step, but for the state.
template <class Cell, class S, int width>
FUSEDRNN_DEVICE void store_forward(const ForwardStep<S>& p, const Place& here, const Position& at,
                                   const Forwarded<Cell, Accumulator<S>, width>& made) {
  const auto [b, j, d] = at;
  const int64_t row = here.start + b, H = p.H;
  store<width>(p.y + (row * p.directions + d) * H + j, made.h);
  if constexpr (Cell::has_cell) {
    if (p.c_n) store<width>(p.c_n + (d * p.B + b) * H + j, made.c);
    if (p.cells) store<width>(p.cells + (d * p.N + row) * H + j, made.c);
  }
  if constexpr (Cell::saved > 0) {
    if (p.gates) {
#pragma unroll
      for (int k = 0; k < Cell::saved; ++k)
        store<width>(p.gates + ((d * p.N + row) * Cell::saved + k) * H + j, made.saved[k]);
    }
  }
}

// The output of a row that is absent from a step.
template <class S, int width>
FUSEDRNN_DEVICE void forward_nothing(const ForwardStep<S>& p, const Place& here, const Position& at) {
  store<width>(p.y + ((here.start + at.b) * p.directions + at.d) * p.H + at.j, Values<Accumulator<S>, width>{});
}

template <class Cell, class S, int width>
__global__ void __launch_bounds__(block_threads, blocks_at_once)
    forward_step(const __grid_constant__ ForwardStep<S> p) {
  const Position at = position<width>();
  const Place& here = p.here[at.d];
  if (at.b >= here.rows || at.j >= p.H) return;
  if (!p.rows.has(here, at.b)) return forward_nothing<S, width>(p, here, at);
  Values<Accumulator<S>, width> input[Cell::gates];
  load_input<Cell, S, width>(p, here, at, input);
  const int64_t row = at.d * p.B + at.b, state = row * p.H + at.j;
  const auto* const from = p.hidden + row * Cell::gates * p.H + at.j;
  const auto hidden = [&](int gate) { return load<width>(from + gate * p.H); };
  store_forward<Cell, S, width>(p, here, at,
                                forward_units<Cell, S, width>(p, here, at, input, hidden, p.h + state, p.c + state));
}

// As for forward.
template <class S>
struct BackwardStep {
  using A = Accumulator<S>;
  int64_t B, H, N;
  int directions;
  Rows rows;
  Place previous[2], here[2], later[2];  // in the order of the direction; later is the step processed before
  int64_t first[2];                      // row of the sequence that da[d] and h_previous[d] begin with
  const S* y;                            // [N, D*H]
  const S* hx;                           // [D, B, H]
  const S* cx;                           // [D, B, H]
  const S* gates;                        // [D, N, saved*H]
  const S* cells;                        // [D, N, H]
  const S* dy;                           // [N, D*H], or nullptr
  const S* dcells;                       // [D, N, H], or nullptr
  A* product;                            // [D, B, H] what comes back through W_hh from the later step
  A* dh;                                 // [D, B, H] the rest of the gradient of the state, in and out
  A* dc;                                 // [D, B, H] the gradient of the cell state, in and out
  S* da[2];                              // [rows of the chunk, sums*H] gradients of the pre-activations
  S* h_previous[2];                      // [rows of the chunk, H] the state before the step, or nullptr
};

// What forward left for some units of one step, and what comes from above.
template <class Cell, class A, int width>
struct ForBackward {
  Values<A, width> dy, dc, h, c, c_next, output, gates[Cell::saved + 1];
  bool reset;
};

template <class Cell, class S, int width>
FUSEDRNN_DEVICE ForBackward<Cell, Accumulator<S>, width> load_for_backward(const BackwardStep<S>& p,
                                                                           const Place& previous, const Place& here,
                                                                           const Position& at) {
  const auto [b, j, d] = at;
  const int64_t H = p.H, state = (d * p.B + b) * H + j, row = here.start + b, row_before = previous.start + b;
  ForBackward<Cell, Accumulator<S>, width> v{};
  v.reset = p.rows.reset(here, b);
  const bool given = !p.rows.has(previous, b);
  if (p.dy) v.dy = load<width>(p.dy + (row * p.directions + d) * H + j);
  if (!v.reset && (Cell::needs_previous || p.h_previous[d]))
    v.h = load<width>(given ? p.hx + state : p.y + (row_before * p.directions + d) * H + j);
  if constexpr (Cell::has_cell) {
    if (!v.reset) v.c = load<width>(given ? p.cx + state : p.cells + (d * p.N + row_before) * H + j);
    v.c_next = load<width>(p.cells + (d * p.N + row) * H + j);
    if (p.dcells) v.dc = load<width>(p.dcells + (d * p.N + row) * H + j);
  }
  if constexpr (Cell::needs_output) v.output = load<width>(p.y + (row * p.directions + d) * H + j);
#pragma unroll
  for (int k = 0; k < Cell::saved; ++k) v.gates[k] = load<width>(p.gates + ((d * p.N + row) * Cell::saved + k) * H + j);
  return v;
}

template <class S, int width, int sums>
FUSEDRNN_DEVICE void store_gradients(const BackwardStep<S>& p, const Place& here, const Position& at,
                                     const Values<Accumulator<S>, width> (&da)[sums],
                                     const Values<Accumulator<S>, width>& h_previous) {
  const int64_t row = here.start - p.first[at.d] + at.b;
#pragma unroll
  for (int k = 0; k < sums; ++k) store<width>(p.da[at.d] + (row * sums + k) * p.H + at.j, da[k]);
  if (p.h_previous[at.d]) store<width>(p.h_previous[at.d] + row * p.H + at.j, h_previous);
}

// One step of some units of a row that takes part in it: from dh and dc of the state after it, all told but dy and dcells, to da and
// to those of the state before it, but for what goes through W_hh. No gradient crosses a reset.
template <class Cell, class A, int width>
FUSEDRNN_DEVICE void backward_units(const ForBackward<Cell, A, width>& v, Values<A, width>& dh, Values<A, width>& dc,
                                    Values<A, width> (&da)[Cell::sums]) {
  dh += v.dy;
  if constexpr (Cell::has_cell) dc += v.dc;
#pragma unroll
  for (int i = 0; i < width; ++i) {
    A gate[Cell::saved + 1], gradient[Cell::sums];
#pragma unroll
    for (int k = 0; k < Cell::saved; ++k) gate[k] = v.gates[k][i];
    dh[i] = Cell::backward(gate, v.c[i], v.c_next[i], v.h[i], v.output[i], dh[i], dc[i], gradient);
#pragma unroll
    for (int k = 0; k < Cell::sums; ++k) da[k][i] = gradient[k];
  }
  if (v.reset) dh = dc = {};
}

// The gradients of a row that is absent from a step.
template <class Cell, class S, int width>
FUSEDRNN_DEVICE void backward_nothing(const BackwardStep<S>& p, const Place& here, const Position& at) {
  const Values<Accumulator<S>, width> da[Cell::sums] = {};
  store_gradients<S, width>(p, here, at, da, {});
}

// A row that has left the sequence (or has not entered it yet) only takes up what the later step sent back to it; `here`
// without rows does that for all rows, at the end.
template <class Cell, class S, int width>
__global__ void __launch_bounds__(block_threads, blocks_at_once)
    backward_step(const __grid_constant__ BackwardStep<S> p) {
  using V = Values<Accumulator<S>, width>;
  const Position at = position<width>();
  const Place &here = p.here[at.d], &later = p.later[at.d];
  if ((at.b >= here.rows && at.b >= later.rows) || at.j >= p.H) return;
  const int64_t state = (at.d * p.B + at.b) * p.H + at.j;

  V dh = load<width>(p.dh + state), dc{};
  if (p.rows.has(later, at.b) && !p.rows.reset(later, at.b)) dh += load<width>(p.product + state);
  if (p.rows.has(here, at.b)) {
    const auto v = load_for_backward<Cell, S, width>(p, p.previous[at.d], here, at);
    if constexpr (Cell::has_cell) dc = load<width>(p.dc + state);
    V da[Cell::sums];
    backward_units<Cell>(v, dh, dc, da);
    store_gradients<S, width>(p, here, at, da, v.h);
    if constexpr (Cell::has_cell) store<width>(p.dc + state, dc);
  } else if (at.b < here.rows) {
    backward_nothing<Cell, S, width>(p, here, at);
  }
  store<width>(p.dh + state, dh);
}

template <class S>
struct Biases {
  int64_t H;
  const S* b_ih[2];        // [gates*H]
  const S* b_hh[2];        // [gates*H]
  Accumulator<S>* biases;  // [D, sums*H]
};

// Both biases of every pre-activation, added.
template <class Cell, class S, int width>
__global__ void __launch_bounds__(block_threads, blocks_at_once) add_biases(const __grid_constant__ Biases<S> p) {
  const auto [k, j, d] = position<width>();
  if (k >= Cell::sums || j >= p.H) return;
  Values<Accumulator<S>, width> sum{};
  if (k >= Cell::input_sum) sum += load<width>(p.b_ih[d] + (k - Cell::input_sum) * p.H + j);
  if (k < Cell::gates) sum += load<width>(p.b_hh[d] + Cell::hidden_gate(static_cast<int>(k)) * p.H + j);
  store<width>(p.biases + (d * Cell::sums + k) * p.H + j, sum);
}

template <class To, class From>
struct Conversion {
  To* to;
  const From* from;
  int64_t rows, columns;
};

template <class To, class From, int width>
__global__ void __launch_bounds__(block_threads, blocks_at_once)
    convert_elements(const __grid_constant__ Conversion<To, From> p) {
  const auto [row, j, d] = position<width>();
  if (row >= p.rows || j >= p.columns) return;
  store<width>(p.to + row * p.columns + j, load<width>(p.from + row * p.columns + j));
}

template <class S>
struct Ones {
  S* to;
  int64_t count;
};

template <class S>
__global__ void __launch_bounds__(block_threads, blocks_at_once) fill_with_one(const __grid_constant__ Ones<S> p) {
  const Position at = position<1>();
  if (at.b < p.count && at.j == 0) store<1>(p.to + at.b, Values<Accumulator<S>, 1>{1});
}

}  // namespace fusedrnn::cuda
