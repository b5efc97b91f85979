// The gradients of the biases: sums of the pre-activations' over all rows of the sequence, of which one of W_ih's biases and one of
// W_hh's may be part. A lane has a column, the warps of a block share a slice of the rows; every sum has one order.
#pragma once

#include "elementwise.cuh"

namespace fusedrnn::cuda {

template <class S>
struct BiasGradients {
  S *b_ih, *b_hh;  // [gates*H], or nullptr where nobody asks
};

template <class Cell, class S>
FUSEDRNN_DEVICE void store_biases(const BiasGradients<S>& to, int column, int H, Accumulator<S> sum) {
  const int k = column / H, unit = column - k * H;
  const Values<Accumulator<S>, 1> value{sum};
  if (to.b_ih && k >= Cell::input_sum) store<1>(to.b_ih + column - Cell::input_sum * H, value);
  if (to.b_hh && k < Cell::gates) store<1>(to.b_hh + Cell::hidden_gate(k) * H + unit, value);
}

// Of a chunk's rows.
template <class S>
struct ColumnSums {
  const S* da[2];  // [rows, sums*H]
  int rows[2];     // of each direction
  int H, slices;
  Accumulator<S>* sums;  // [D, slices, sums*H], or nullptr where they are all: of the only slice of the only chunk
  bool accumulate;       // onto the sums of other chunks
  BiasGradients<S> to[2];
};

template <class Cell, class S>
__global__ void __launch_bounds__(32 * column_warps, 1) sum_columns(const __grid_constant__ ColumnSums<S> p) {
  using A = Accumulator<S>;
  FUSEDRNN_SHARED(memory);
  A* const shares = reinterpret_cast<A*>(memory);  // [column_warps, 32]
  const int lane = threadIdx.x, warp = threadIdx.y, d = blockIdx.z, slice = blockIdx.y;
  const int columns = Cell::sums * p.H, column = static_cast<int>(blockIdx.x) * 32 + lane;
  const int end = static_cast<int>(int64_t{p.rows[d]} * (slice + 1) / p.slices);
  A sum = 0;
  if (column < columns)
#pragma unroll 8
    for (int row = static_cast<int>(int64_t{p.rows[d]} * slice / p.slices) + warp; row < end; row += column_warps)
      sum += load<1>(p.da[d] + static_cast<int64_t>(row) * columns + column)[0];
  store<1>(shares + warp * 32 + lane, Values<A, 1>{sum});
  __syncthreads();
  if (warp > 0 || column >= columns) return;
  for (int other = 1; other < column_warps; ++other) sum += load<1>(shares + other * 32 + lane)[0];
  if (!p.sums) return store_biases<Cell>(p.to[d], column, p.H, sum);
  A* const total = p.sums + static_cast<int64_t>(d * p.slices + slice) * columns + column;
  if (p.accumulate) sum += load<1>(total)[0];
  store<1>(total, Values<A, 1>{sum});
}

template <class S>
struct SliceSums {
  const Accumulator<S>* sums;  // as above
  int slices, H;
  BiasGradients<S> to[2];
};

template <class Cell, class S>
__global__ void __launch_bounds__(block_threads, blocks_at_once) add_slices(const __grid_constant__ SliceSums<S> p) {
  const auto [row, column, d] = position<1>();
  const int columns = Cell::sums * p.H;
  if (row > 0 || column >= columns) return;
  Accumulator<S> sum = 0;
  for (int slice = 0; slice < p.slices; ++slice)
    sum += load<1>(p.sums + static_cast<int64_t>(d * p.slices + slice) * columns + column)[0];
  store_biases<Cell>(p.to[d], column, p.H, sum);
}

}  // namespace fusedrnn::cuda
