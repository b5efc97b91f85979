// The recurrence resident in a team of blocks (tuning.h): a block owns some units of a direction for some rows of the batch,
// keeps their rows (backward: their columns) of W_hh, and runs the steps of a chunk. Per step it takes in what all blocks of
// the team made, of all units (forward the state, backward the gradients of pre-activations), multiplies, and hands on what it
// makes of it for its own units. The batch is cut into tiles of up to 8 rows, which know nothing of each other: while one is
// on its way, the next is worked on.
#pragma once

#include "team.cuh"

namespace fusedrnn::cuda {

template <class Cell, class Multiplier, class Exchange, class S>
FUSEDRNN_DEVICE void run_resident_forward(const ResidentForward<S>& p, unsigned char* memory) {
  using V = Values<float, 1>;
  const ForwardStep<S>& step = p.step;
  const Resident<Cell, Multiplier, Exchange, ResidentForward<S>, false> block(p, memory);
  const ResidentPlan& plan = p.plan;
  Fragment weights[2][register_groups];
  block.load_weights(weights);
  block.begin();
  for (int tile = 0; tile < plan.tiles; ++tile) {
    block.for_items(tile, [&](int, const auto& item) {
      const int64_t state = (block.d * step.B + item.at.b) * step.H + item.at.j;
      const bool exists = block.exists(item.at);
      const V h = exists ? load<1>(step.h + state) : V{};
      store<1>(block.states(0, tile) + item.in_states(plan), h);
      if constexpr (Cell::has_cell)
        store<1>(block.states(1, tile) + item.in_states(plan), exists ? load<1>(step.c + state) : V{});
      block.make(item, 0, h);
    });
    __syncthreads();
    block.exchange.send(tile, 1);
    __syncthreads();
  }

  const int rounds = static_cast<int>(p.end - p.begin);
  for (int round = 1; round <= rounds; ++round) {
    const Place here = place(p.sequence, block.d, p.begin + round - 1);
    for (int tile = 0; tile < plan.tiles; ++tile) {
      V input[units_at_once][Cell::gates];
      block.for_items(tile, [&](int i, const auto& item) {
        if (item.at.j < step.H && step.rows.has(here, item.at.b)) load_input<Cell, S, 1>(step, here, item.at, input[i]);
      });
      block.exchange.receive(tile, round);
      block.multiply(weights, block.exchange.operand(tile, round));
      __syncthreads();
      Forwarded<Cell, float, 1> made[units_at_once];
      block.for_items(tile, [&](int i, const auto& item) {
        float* const h = block.states(0, tile) + item.in_states(plan);
        if (block.exists(item.at) && step.rows.has(here, item.at.b))
          made[i] = forward_units<Cell, S, 1>(
              step, here, item.at, input[i], [&](int gate) { return block.product(tile, item, gate); }, h,
              block.states(Cell::has_cell, tile) + item.in_states(plan));
        block.make(item, 0, load<1>(h));
      });
      __syncthreads();
      if (round < rounds) block.exchange.send(tile, round + 1);
      // Only now, for nobody waits for these.
      block.for_items(tile, [&](int i, const auto& item) {
        if (!block.exists(item.at) || item.at.b >= here.rows) return;
        if (step.rows.has(here, item.at.b))
          store_forward<Cell, S, 1>(step, here, item.at, made[i]);
        else
          forward_nothing<S, 1>(step, here, item.at);
      });
    }
  }

  for (int tile = 0; tile < plan.tiles; ++tile)
    block.for_items(tile, [&](int, const auto& item) {
      if (!block.exists(item.at)) return;
      const int64_t state = (block.d * step.B + item.at.b) * step.H + item.at.j;
      store<1>(step.h + state, load<1>(block.states(0, tile) + item.in_states(plan)));
      if constexpr (Cell::has_cell) store<1>(step.c + state, load<1>(block.states(1, tile) + item.in_states(plan)));
    });
}

template <class Cell, class Multiplier, class Exchange, class S>
FUSEDRNN_DEVICE void run_resident_backward(const ResidentBackward<S>& p, unsigned char* memory) {
  using V = Values<float, 1>;
  const BackwardStep<S>& step = p.step;
  const Resident<Cell, Multiplier, Exchange, ResidentBackward<S>, true> block(p, memory);
  const ResidentPlan& plan = p.plan;
  Fragment weights[2][register_groups];
  block.load_weights(weights);
  block.begin();
  const auto in_memory = [&](const Position& at) { return (block.d * step.B + at.b) * step.H + at.j; };
  for (int tile = 0; tile < plan.tiles; ++tile)
    block.for_items(tile, [&](int, const auto& item) {
      const bool exists = block.exists(item.at);
      store<1>(block.states(0, tile) + item.in_states(plan), exists ? load<1>(step.dh + in_memory(item.at)) : V{});
      if constexpr (Cell::has_cell)
        store<1>(block.states(1, tile) + item.in_states(plan), exists ? load<1>(step.dc + in_memory(item.at)) : V{});
    });

  // After the last step one more round, whose product is for the chunk before.
  const int rounds = static_cast<int>(p.end - p.begin);
  for (int round = 0; round <= rounds; ++round) {
    const int64_t number = p.end - 1 - round;
    const Place here = place(p.sequence, block.d, number);
    const bool is_step = round < rounds;
    for (int tile = 0; tile < plan.tiles; ++tile) {
      ForBackward<Cell, float, 1> values[units_at_once];
      const Place previous = place(p.sequence, block.d, number - 1);
      block.for_items(tile, [&](int i, const auto& item) {
        if (is_step && item.at.j < step.H && step.rows.has(here, item.at.b))
          values[i] = load_for_backward<Cell, S, 1>(step, previous, here, item.at);
      });
      if (round) {
        block.exchange.receive(tile, round);
        block.multiply(weights, block.exchange.operand(tile, round));
        block.exchange_sums(tile, round);
      }
      __syncthreads();
      const Place later = place(p.sequence, block.d, number + 1);
      V gradients[units_at_once][Cell::sums] = {};
      block.for_items(tile, [&](int i, const auto& item) {
        auto& gradient = gradients[i];
        if (block.exists(item.at)) {
          V returned{};
          if (round)
            returned = block.product(tile, item, 0);
          else if (p.end < p.sequence.T)
            returned = load<1>(step.product + in_memory(item.at));
          if (!is_step) return store<1>(step.product + in_memory(item.at), returned);

          float* const own = block.states(0, tile) + item.in_states(plan);
          V carried = load<1>(own);
          if (step.rows.has(later, item.at.b) && !step.rows.reset(later, item.at.b)) carried += returned;
          if (step.rows.has(here, item.at.b)) {
            float* const cell = block.states(Cell::has_cell, tile) + item.in_states(plan);
            V dc{};
            if constexpr (Cell::has_cell) dc = load<1>(cell);
            backward_units<Cell>(values[i], carried, dc, gradient);
            if constexpr (Cell::has_cell) store<1>(cell, dc);
          }
          store<1>(own, carried);
        }
#pragma unroll
        for (int k = 0; k < Cell::gates; ++k) block.make(item, Cell::hidden_gate(k), gradient[k]);
      });
      __syncthreads();
      if (!is_step) continue;
      block.exchange.send(tile, round + 1);
      // Only now, for nobody waits for these.
      block.for_items(tile, [&](int i, const auto& item) {
        if (!block.exists(item.at) || item.at.b >= here.rows) return;
        const bool has = step.rows.has(here, item.at.b);
        store_gradients<S, 1>(step, here, item.at, gradients[i], has ? values[i].h : V{});
      });
    }
  }

  for (int tile = 0; tile < plan.tiles; ++tile)
    block.for_items(tile, [&](int, const auto& item) {
      if (!block.exists(item.at)) return;
      store<1>(step.dh + in_memory(item.at), load<1>(block.states(0, tile) + item.in_states(plan)));
      if constexpr (Cell::has_cell)
        store<1>(step.dc + in_memory(item.at), load<1>(block.states(1, tile) + item.in_states(plan)));
    });
}

// Where there are no clusters the kernels are empty: the plan never chooses them.
template <class Cell, class Multiplier>
__global__ void __launch_bounds__(resident_threads, 1)
    cluster_forward(const __grid_constant__ ResidentForward<typename Multiplier::Scalar> p) {
#if FUSEDRNN_HAS_CLUSTERS
  FUSEDRNN_SHARED(memory);
  run_resident_forward<Cell, Multiplier, ClusterExchange>(p, memory);
#endif
}

template <class Cell, class Multiplier>
__global__ void __launch_bounds__(resident_threads, 1)
    cluster_backward(const __grid_constant__ ResidentBackward<typename Multiplier::Scalar> p) {
#if FUSEDRNN_HAS_CLUSTERS
  FUSEDRNN_SHARED(memory);
  run_resident_backward<Cell, Multiplier, ClusterExchange>(p, memory);
#endif
}

template <class Cell, class Multiplier>
__global__ void __launch_bounds__(resident_threads, 1)
    grid_forward(const __grid_constant__ ResidentForward<typename Multiplier::Scalar> p) {
  FUSEDRNN_SHARED(memory);
  run_resident_forward<Cell, Multiplier, GridExchange>(p, memory);
}

template <class Cell, class Multiplier>
__global__ void __launch_bounds__(resident_threads, 1)
    grid_backward(const __grid_constant__ ResidentBackward<typename Multiplier::Scalar> p) {
  FUSEDRNN_SHARED(memory);
  run_resident_backward<Cell, Multiplier, GridExchange>(p, memory);
}

}  // namespace fusedrnn::cuda
