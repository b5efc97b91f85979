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

template <class S>
struct ForwardStep {
  using A = Accumulator<S>;
  int64_t B, H;
  int directions;
  Rows rows;
  Place here[2];
  const A* input[2];  // [rows of the step, gates*H] x·W_ih
  const A* hidden;    // [D, B, gates*H] h·W_hh
  const A* biases;    // [D, sums*H], or nullptr
  S* y;               // [N, D*H]
  S* h;               // [D, B, H] the state, which the next product reads; h_n after the last step
  A* c;               // [D, B, H] the cell state
  S* c_n;             // [D, B, H] the cell state as it is given back, or nullptr where c is that
  S* gates;           // [D, N, saved*H], or nullptr
  S* cells;           // [D, N, H], or nullptr
  int64_t N;
};

template <class Cell, class S, int width>
__global__ void __launch_bounds__(block_threads) forward_step(const __grid_constant__ ForwardStep<S> p) {
  using A = Accumulator<S>;
  using V = Values<A, width>;
  const auto [b, j, d] = position<width>();
  const Place& here = p.here[d];
  if (b >= here.rows || j >= p.H) return;
  const int64_t row = here.start + b, H = p.H;
  S* const y = p.y + (row * p.directions + d) * H + j;
  if (!p.rows.has(here, b)) {
    store<width>(y, V{});
    return;
  }
  const int64_t state = (d * p.B + b) * H + j;
  const bool reset = p.rows.reset(here, b);

  // What x makes goes to the last `gates` sums, what h makes to the first. A state of zero makes nothing.
  V sums[Cell::sums] = {};
#pragma unroll
  for (int k = 0; k < Cell::sums; ++k) {
    if (p.biases) sums[k] = load<width>(p.biases + (d * Cell::sums + k) * H + j);
    if (k >= Cell::input_sum) sums[k] += load<width>(p.input[d] + (b * Cell::gates + k - Cell::input_sum) * H + j);
    if (k < Cell::gates && !reset)
      sums[k] += load<width>(p.hidden + ((d * p.B + b) * Cell::gates + Cell::hidden_gate(k)) * H + j);
  }
  V h{}, c{};
  if (!reset) {
    h = load<width>(p.h + state);
    if constexpr (Cell::has_cell) c = load<width>(p.c + state);
  }

  V saved[Cell::saved + 1];  // + 1: no array has no element
#pragma unroll
  for (int i = 0; i < width; ++i) {
    A a[Cell::sums], gate[Cell::saved + 1];
#pragma unroll
    for (int k = 0; k < Cell::sums; ++k) a[k] = sums[k][i];
    Cell::activate(a);
    h[i] = Cell::forward(a, h[i], c[i], gate);
#pragma unroll
    for (int k = 0; k < Cell::saved; ++k) saved[k][i] = gate[k];
  }
  store<width>(y, h);
  store<width>(p.h + state, h);
  if constexpr (Cell::has_cell) {
    store<width>(p.c + state, c);
    if (p.c_n) store<width>(p.c_n + state, c);
    if (p.cells) store<width>(p.cells + (d * p.N + row) * H + j, c);
  }
  if constexpr (Cell::saved > 0) {
    if (p.gates) {
#pragma unroll
      for (int k = 0; k < Cell::saved; ++k)
        store<width>(p.gates + ((d * p.N + row) * Cell::saved + k) * H + j, saved[k]);
    }
  }
}

template <class S>
struct BackwardStep {
  using A = Accumulator<S>;
  int64_t B, H;
  int directions;
  Rows rows;
  Place previous[2], here[2], later[2];  // in the order of the direction; later is the step processed before
  const S* y;                            // [N, D*H]
  const S* hx;                           // [D, B, H]
  const S* cx;                           // [D, B, H]
  const S* gates;                        // [D, N, saved*H]
  const S* cells;                        // [D, N, H]
  const S* dy;                           // [N, D*H], or nullptr
  const A* product;                      // [D, B, H] what comes back through W_hh from the later step
  A* dh;                                 // [D, B, H] the rest of the gradient of the state, in and out
  A* dc;                                 // [D, B, H] the gradient of the cell state, in and out
  S* da[2];                              // [rows of the step, sums*H] gradients of the pre-activations
  S* h_previous[2];                      // [rows of the step, H] the state before the step, or nullptr
  int64_t N;
};

// A row that has left the sequence (or has not entered it yet) only takes up what the later step sent back to it; `here`
// without rows does that for all rows, at the end.
template <class Cell, class S, int width>
__global__ void __launch_bounds__(block_threads) backward_step(const __grid_constant__ BackwardStep<S> p) {
  using A = Accumulator<S>;
  using V = Values<A, width>;
  const auto [b, j, d] = position<width>();
  const Place &here = p.here[d], &later = p.later[d], &previous = p.previous[d];
  if ((b >= here.rows && b >= later.rows) || j >= p.H) return;
  const int64_t H = p.H, row = here.start + b, state = (d * p.B + b) * H + j;

  V dh = load<width>(p.dh + state);
  if (p.rows.has(later, b) && !p.rows.reset(later, b)) dh += load<width>(p.product + state);
  if (!p.rows.has(here, b)) {
    store<width>(p.dh + state, dh);
    if (b < here.rows) {
#pragma unroll
      for (int k = 0; k < Cell::sums; ++k) store<width>(p.da[d] + (b * Cell::sums + k) * H + j, V{});
      if (p.h_previous[d]) store<width>(p.h_previous[d] + b * H + j, V{});
    }
    return;
  }
  if (p.dy) dh += load<width>(p.dy + (row * p.directions + d) * H + j);

  const bool reset = p.rows.reset(here, b), given = !p.rows.has(previous, b);
  const int64_t row_before = previous.start + b;
  V h{}, c{}, c_next{}, output{}, dc{}, gates[Cell::saved + 1];
  if (!reset && (Cell::needs_previous || p.h_previous[d]))
    h = load<width>(given ? p.hx + state : p.y + (row_before * p.directions + d) * H + j);
  if constexpr (Cell::has_cell) {
    if (!reset) c = load<width>(given ? p.cx + state : p.cells + (d * p.N + row_before) * H + j);
    c_next = load<width>(p.cells + (d * p.N + row) * H + j);
    dc = load<width>(p.dc + state);
  }
  if constexpr (Cell::needs_output) output = load<width>(p.y + (row * p.directions + d) * H + j);
#pragma unroll
  for (int k = 0; k < Cell::saved; ++k) gates[k] = load<width>(p.gates + ((d * p.N + row) * Cell::saved + k) * H + j);

  V da[Cell::sums];
#pragma unroll
  for (int i = 0; i < width; ++i) {
    A gate[Cell::saved + 1], gradient[Cell::sums];
#pragma unroll
    for (int k = 0; k < Cell::saved; ++k) gate[k] = gates[k][i];
    dh[i] = Cell::backward(gate, c[i], c_next[i], h[i], output[i], dh[i], dc[i], gradient);
#pragma unroll
    for (int k = 0; k < Cell::sums; ++k) da[k][i] = gradient[k];
  }
#pragma unroll
  for (int k = 0; k < Cell::sums; ++k) store<width>(p.da[d] + (b * Cell::sums + k) * H + j, da[k]);
  if (p.h_previous[d]) store<width>(p.h_previous[d] + b * H + j, h);
  store<width>(p.dh + state, reset ? V{} : dh);  // no gradient crosses a reset
  if constexpr (Cell::has_cell) store<width>(p.dc + state, reset ? V{} : dc);
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
__global__ void __launch_bounds__(block_threads) add_biases(const __grid_constant__ Biases<S> p) {
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
__global__ void __launch_bounds__(block_threads) convert_elements(const __grid_constant__ Conversion<To, From> p) {
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
__global__ void __launch_bounds__(block_threads) fill_with_one(const __grid_constant__ Ones<S> p) {
  const Position at = position<1>();
  if (at.b < p.count && at.j == 0) store<1>(p.to + at.b, Values<Accumulator<S>, 1>{1});
}

}  // namespace fusedrnn::cuda
