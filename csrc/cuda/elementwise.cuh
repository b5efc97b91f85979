// The kernels of the step schedule: all of a time step but its matrix product, forward and backward, and the small
// conversions around the loop. A thread owns `width` neighbouring units of one row and shares nothing with any other.
#pragma once

#include "units.cuh"

namespace fusedrnn::cuda {

template <int width>
FUSEDRNN_DEVICE Position position() {
  return {static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y),
          static_cast<int>((blockIdx.y * blockDim.x + threadIdx.x) * width), static_cast<int>(blockIdx.z)};
}

template <class Cell, class S, int width>
__global__ void __launch_bounds__(block_threads, blocks_at_once)
    forward_step(const __grid_constant__ ForwardStep<S> p) {
  using V = Values<Accumulator<S>, width>;
  const Position at = position<width>();
  const Place& here = p.here[at.d];
  if (at.b >= here.rows || at.j >= p.H) return;
  const ForwardColumns<Cell, S> columns(p, at.j, at.d);
  const int row = here.start + at.b;
  if (!p.rows.has(here, at.b)) return forward_nothing<width>(columns, row);
  V biases[Cell::sums], input[Cell::gates], hidden[Cell::gates];
  load_biases<Cell, S, width>(p, at, biases);
  load_input(columns, row, input);
  const auto* const from = element_of(p.hidden, at.d * p.B + at.b, Cell::gates * p.H, at.j);
#pragma unroll
  for (int k = 0; k < Cell::gates; ++k) hidden[k] = load<width>(from + k * p.H);
  const auto before = load_state<Cell, S, width>(p, at);
  const auto made = forward_units<Cell>(biases, input, hidden, before.h, before.c, p.rows.reset(here, at.b));
  store_state<Cell, S, width>(p, at, {made.h, made.c});
  store_forward(columns, row, made);
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
  const int64_t state = static_cast<int64_t>(at.d * p.B + at.b) * p.H + at.j;

  const BackwardColumns<Cell, S> columns(p, at.j, at.d);
  auto [dh, dc] = load_gradients<Cell, S, width>(p, at);
  if (p.rows.has(later, at.b) && !p.rows.reset(later, at.b)) dh += load<width>(p.product + state);
  if (p.rows.has(here, at.b)) {
    const Place& previous = p.previous[at.d];
    auto v = load_for_backward<width>(columns, p.rows, previous, p.rows.has(previous, at.b), here, at.b);
    V da[Cell::sums];
    backward_units<Cell>(v, dh, dc, da);
    store_gradients(columns, here.start + at.b, da, v.h);
    if constexpr (Cell::has_cell) store<width>(p.dc + state, dc);
  } else if (at.b < here.rows) {
    backward_nothing<width>(columns, here.start + at.b);
  }
  store<width>(p.dh + state, dh);
}

// Rows [first, first + count) of a padded sequence, those that are not there as zeros: a product with them has their gradients, which
// are zero, for factors, and zero times what is not a number would be none either.
template <class S>
struct PresentRows {
  S* to;
  const S* from;  // of row `first`
  Rows rows;
  int first, count, B, columns;
};

template <class S, int width>
__global__ void __launch_bounds__(block_threads, blocks_at_once)
    copy_present_rows(const __grid_constant__ PresentRows<S> p) {
  const auto [row, j, d] = position<width>();
  if (row >= p.count || j >= p.columns) return;
  const int step = (p.first + row) / p.B, b = (p.first + row) % p.B;
  Values<Accumulator<S>, width> x{};
  if (step < p.rows.length(b)) x = load<width>(element_of(p.from, row, p.columns, j));
  store<width>(element_of(p.to, row, p.columns, j), x);
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

}  // namespace fusedrnn::cuda
