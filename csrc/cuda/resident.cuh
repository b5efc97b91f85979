// The recurrence resident in a team of blocks (tuning.h): a block owns some units of a direction for some rows of the batch,
// keeps their rows (backward: their columns) of W_hh, and runs the steps of a chunk. Per step it takes in what all blocks of
// the team made, of all units (forward the state, backward the gradients of pre-activations), multiplies, and hands on what it
// makes of it for its own units. Backward in a cluster it multiplies what it has made itself, and takes in what all blocks'
// products make of its own units. The batch is cut into tiles of up to 8 rows, which know nothing of each other: while one is
// on its way, the next is worked on.
#pragma once

#include "team.cuh"

namespace fusedrnn::cuda {

template <class Cell, class Multiplier, class Exchange, class S>
FUSEDRNN_DEVICE void run_resident_forward(const ResidentForward<S>& p, unsigned char* memory) {
  using V = Values<float, 1>;
  const ForwardStep<S>& step = p.step;
  Resident<Cell, Multiplier, Exchange, ResidentForward<S>, false> block(p, memory);
  using Item = typename decltype(block)::Item;
  const ResidentPlan& plan = p.plan;
  Fragment weights[2][register_groups];
  block.load_weights(weights);
  block.begin();

  V biases[Cell::sums] = {}, input[Cell::gates];
  bool reset = false;
  const auto load_ahead = [&](const Item& item, const Place& place) {
    if (!item.exists || !step.rows.has(place, item.at.b)) return;
    load_input<Cell, S, 1>(step, place, item.at, input);
    reset = step.rows.reset(place, item.at.b);
  };
  Place here = place(p.sequence, block.d, p.begin);
  for (int tile = 0; tile < plan.tiles; ++tile) {
    const Item item = block.item(tile);
    State<float, 1> state;
    if (item.exists) state = load_state<Cell, S, 1>(step, item.at);
    if (item.in_tile) {
      store<1>(block.states(0, tile) + item.in_states, state.h);
      if constexpr (Cell::has_cell) store<1>(block.states(1, tile) + item.in_states, state.c);
    }
    const V h[1] = {state.h};
    block.hand_on(tile, 1, item, h);
    block.exchange.sent(tile);
  }
  if (plan.tiles > 1) block.exchange.request(0, 1);
  if (block.item(0).exists) load_biases<Cell, S, 1>(step, block.item(0).at, biases);
  load_ahead(block.item(0), here);

  const int rounds = static_cast<int>(p.end - p.begin);
  int number = 0;  // of the product
#pragma unroll 1
  for (int round = 1; round <= rounds; ++round) {
    const Place next = place(p.sequence, block.d, round < rounds ? p.begin + round : -1);
#pragma unroll 1
    for (int tile = 0; tile < plan.tiles; ++tile, ++number) {
      const Item item = block.item(tile);
      const bool takes_part = item.exists && step.rows.has(here, item.at.b);
      block.exchange.receive(tile, round);
      block.multiply(weights, block.exchange.operand(tile, round), number);
      __syncthreads();
      V product[Cell::gates], h[1] = {}, c{};
      Forwarded<Cell, float, 1> made;
      block.products(tile, round, number, item, product);
      if (item.in_tile) {
        float* const h_state = block.states(0, tile) + item.in_states;
        float* const c_state = block.states(Cell::has_cell, tile) + item.in_states;
        h[0] = load<1>(h_state);
        if constexpr (Cell::has_cell) c = load<1>(c_state);
        if (takes_part) {
          made = forward_units<Cell>(biases, input, product, h[0], c, reset);
          h[0] = made.h;
          store<1>(h_state, h[0]);
          if constexpr (Cell::has_cell) store<1>(c_state, made.c);
        }
      }
      const bool last = tile + 1 == plan.tiles;
      if (round < rounds) block.hand_on(tile, round + 1, item, h);
      if (plan.tiles > 1 && !(last && round == rounds)) block.exchange.request(last ? 0 : tile + 1, round + last);
      if (round < rounds) block.exchange.sent(tile);
      // What comes from memory is on its way during the next product. Nobody waits for what is stored.
      load_ahead(block.item(last ? 0 : tile + 1), either(last, next, here));
      if (takes_part)
        store_forward<Cell, S, 1>(step, here, item.at, made);
      else if (item.exists && item.at.b < here.rows)
        forward_nothing<S, 1>(step, here, item.at);
    }
    here = next;
  }

  for (int tile = 0; tile < plan.tiles; ++tile) {
    const Item item = block.item(tile);
    if (!item.exists) continue;
    State<float, 1> state;
    state.h = load<1>(block.states(0, tile) + item.in_states);
    if constexpr (Cell::has_cell) state.c = load<1>(block.states(1, tile) + item.in_states);
    store_state<Cell, S, 1>(step, item.at, state);
  }
}

template <class Cell, class Multiplier, class Exchange, class S>
FUSEDRNN_DEVICE void run_resident_backward(const ResidentBackward<S>& p, unsigned char* memory) {
  using V = Values<float, 1>;
  const BackwardStep<S>& step = p.step;
  Resident<Cell, Multiplier, Exchange, ResidentBackward<S>, true> block(p, memory);
  using Team = decltype(block);
  using Item = typename Team::Item;
  const ResidentPlan& plan = p.plan;
  Fragment weights[2][register_groups];
  block.load_weights(weights);
  block.begin();
  const auto state_of = [&](const Item& item) {
    return static_cast<int64_t>(block.d * step.B + item.at.b) * step.H + item.at.j;
  };
  for (int tile = 0; tile < plan.tiles; ++tile) {
    const Item item = block.item(tile);
    if (!item.in_tile) continue;
    State<float, 1> state;
    if (item.exists) state = load_gradients<Cell, S, 1>(step, item.at);
    store<1>(block.states(0, tile) + item.in_states, state.h);
    if constexpr (Cell::has_cell) store<1>(block.states(1, tile) + item.in_states, state.c);
  }

  ForBackward<Cell, S, 1> values{};
  const auto load_ahead = [&](const Item& item, const Place& previous, const Place& place) {
    if (item.exists && step.rows.has(place, item.at.b))
      values = load_for_backward<Cell, S, 1>(step, previous, place, item.at);
  };
  Place later = place(p.sequence, block.d, p.end), here = place(p.sequence, block.d, p.end - 1),
        previous = place(p.sequence, block.d, p.end - 2);
  load_ahead(block.item(0), previous, here);

  // After the last step one more round, whose product is for the chunk before.
  const int rounds = static_cast<int>(p.end - p.begin);
  int number = 0;  // of the product
#pragma unroll 1
  for (int round = 0; round <= rounds; ++round) {
    const bool is_step = round < rounds;
    const Place before = place(p.sequence, block.d, p.end - 3 - round);
#pragma unroll 1
    for (int tile = 0; tile < plan.tiles; ++tile, ++number) {
      const Item item = block.item(tile);
      const bool takes_part = item.exists && step.rows.has(here, item.at.b);
      const bool returns = item.exists && step.rows.has(later, item.at.b) && !step.rows.reset(later, item.at.b);
      const bool last = tile + 1 == plan.tiles;
      V returned[1] = {}, gradients[Cell::sums] = {}, to_gates[Cell::gates];
      if (round) {
        block.exchange.receive(tile, round);
        if constexpr (!Team::shares_sums) {
          block.multiply(weights, block.exchange.operand(tile, round), number);
          if constexpr (Team::in_split_grid) block.exchange_sums(tile, round, number);
          __syncthreads();
        }
        block.products(tile, round, number, item, returned);
      } else if (item.exists && p.end < p.sequence.T) {
        returned[0] = load<1>(step.product + state_of(item));
      }
      if (!is_step) {
        if (item.exists) store<1>(step.product + state_of(item), returned[0]);
        if constexpr (Team::in_grid)
          if (!last) block.exchange.request(tile + 1, round);
        continue;
      }
      if (item.exists) {
        float* const own = block.states(0, tile) + item.in_states;
        V carried = load<1>(own);
        if (returns) carried += returned[0];
        if (takes_part) {
          float* const cell = block.states(Cell::has_cell, tile) + item.in_states;
          V dc{};
          if constexpr (Cell::has_cell) dc = load<1>(cell);
          backward_units<Cell>(values, carried, dc, gradients);
          if constexpr (Cell::has_cell) store<1>(cell, dc);
        }
        store<1>(own, carried);
      }
#pragma unroll
      for (int k = 0; k < Cell::gates; ++k) to_gates[Cell::hidden_gate(k)] = gradients[k];
      block.hand_on(tile, round + 1, item, to_gates);
#if FUSEDRNN_HAS_CLUSTERS
      if constexpr (Team::shares_sums) {
        __syncthreads();
        block.multiply_and_send(weights, tile, round + 1);
      } else
#endif
      {
        // A tile's first round has none before it.
        if (plan.tiles > 1 && round + last) block.exchange.request(last ? 0 : tile + 1, round + last);
        block.exchange.sent(tile);
      }
      // What comes from memory is on its way during the next product. Nobody waits for what is stored.
      const Pack<S, 1> h = values.h;
      if (!last || round + 1 < rounds)
        load_ahead(block.item(last ? 0 : tile + 1), either(last, before, previous), either(last, previous, here));
      if (item.exists && item.at.b < here.rows)
        store_gradients<S, 1>(step, here, item.at, gradients, takes_part ? h : Pack<S, 1>{});
    }
    later = here, here = previous, previous = before;
  }

  for (int tile = 0; tile < plan.tiles; ++tile) {
    const Item item = block.item(tile);
    if (!item.exists) continue;
    store<1>(step.dh + state_of(item), load<1>(block.states(0, tile) + item.in_states));
    if constexpr (Cell::has_cell) store<1>(step.dc + state_of(item), load<1>(block.states(1, tile) + item.in_states));
  }
}

#if FUSEDRNN_HAS_CLUSTERS
template <class Cell>
using ClusterBackward = std::conditional_t<cluster_shares_sums(Cell::gates, true), ClusterSums, ClusterExchange>;
#endif

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
  run_resident_backward<Cell, Multiplier, ClusterBackward<Cell>>(p, memory);
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
