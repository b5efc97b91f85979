// A lone time step of a few rows: products, gates and states in one kernel. Two products and a kernel would be three launches for
// weights that a GPU reads in a few µs. A warp owns a unit and reads its rows of both weights, for a few rows of the batch at
// a time; a lane has every 32nd number, or `width` of them.
#pragma once

#include "elementwise.cuh"
#include "mma.cuh"

namespace fusedrnn::cuda {

template <class S>
struct LoneStep {
  ForwardStep<S> step;
  const S* x;  // [B, I]
  int I;
  const S* w_ih[2];  // [gates*H, I]
  const S* w_hh[2];  // [gates*H, H]
};

// sums[r][gate] = row r of `rows`, of K numbers, times that of the unit in each gate's block of w [gates*H, K]; the same in every
// lane. A row beyond the batch is its last.
template <int gates, int width, int R, class S>
FUSEDRNN_DEVICE void dot_products(const S* rows, int first, int B, int K, const S* w, int unit, int H, int lane,
                                  Values<float, 1> (&sums)[R][gates]) {
  const S* row[R];
#pragma unroll
  for (int r = 0; r < R; ++r) row[r] = element_of(rows, first + r < B ? first + r : B - 1, K, 0);
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int gate = 0; gate < gates; ++gate) sums[r][gate] = {};
#pragma unroll 2
  for (int k = lane * width; k < K; k += 32 * width) {
    Values<float, width> of_row[R];
#pragma unroll
    for (int r = 0; r < R; ++r) of_row[r] = load<width>(row[r] + k);
#pragma unroll
    for (int gate = 0; gate < gates; ++gate) {
      const auto weights = load<width>(element_of(w, gate * H + unit, K, k));
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int i = 0; i < width; ++i) sums[r][gate][0] += of_row[r][i] * weights[i];
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int gate = 0; gate < gates; ++gate)
        sums[r][gate][0] += float_of(from_lane(bits_of(sums[r][gate][0]), lane ^ distance));
}

template <class Cell, class S, int R, int width>
__global__ void __launch_bounds__(block_threads, lone_blocks_at_once) lone_step(const __grid_constant__ LoneStep<S> p) {
  using V = Values<float, 1>;
  const ForwardStep<S>& step = p.step;
  const int lane = threadIdx.x, unit = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y), d = blockIdx.z;
  const int first = static_cast<int>(blockIdx.y) * R;
  if (unit >= step.H) return;
  V input[R][Cell::gates], hidden[R][Cell::gates];
  dot_products<Cell::gates, width>(p.x, first, step.B, p.I, p.w_ih[d], unit, step.H, lane, input);
  const S* const hx = step.hx + static_cast<int64_t>(d) * step.B * step.H;
  dot_products<Cell::gates, width>(hx, first, step.B, step.H, p.w_hh[d], unit, step.H, lane, hidden);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const Position at{first + r, unit, d};
    if (lane != r || at.b >= step.B) continue;
    V biases[Cell::sums];
    load_biases<Cell, S, 1>(step, at, biases);
    const Place& here = step.here[d];
    const auto before = load_state<Cell, S, 1>(step, at);
    const auto made = forward_units<Cell>(biases, input[r], hidden[r], before.h, before.c, step.rows.reset(here, at.b));
    store_state<Cell, S, 1>(step, at, {made.h, made.c});
    store_forward(ForwardColumns<Cell, S>(step, at.j, at.d), here.start + at.b, made);
  }
}

}  // namespace fusedrnn::cuda
