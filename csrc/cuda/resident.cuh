// The recurrence resident in a team of blocks (tuning.h): a block owns some units of a direction for some rows of the batch,
// keeps their rows (backward: their columns) of W_hh, and runs the steps of a chunk. Per step it takes in what all blocks of
// the team made, of all units (forward the state, backward the gradients of pre-activations), multiplies, and hands on what it
// makes of it for its own units. Backward in a cluster it multiplies what it has made itself, and takes in what all blocks'
// products make of its own units. The batch is cut into tiles of up to 8 rows, which know nothing of each other: while one is
// on its way, the next is worked on.
#pragma once

#include "team.cuh"

namespace fusedrnn::cuda {

template <class Cell, class Multiplier, class Exchange, bool compact, class S>
FUSEDRNN_DEVICE void run_resident_forward(const ResidentForward<S>& p, unsigned char* memory) {
  using V = Values<float, 1>;
  const ForwardStep<S>& step = p.step;
  Resident<Cell, Multiplier, Exchange, ResidentForward<S>, false, compact> block(p, memory);
  using Team = decltype(block);
  using Item = typename Team::Item;
  Fragment weights[2][register_groups];
  block.load_weights(weights);
  block.begin();

  ForwardColumns<Cell, S> columns(step, block.unit, block.d);
  if constexpr (Team::has_registers) columns.keep();
  V biases[Cell::sums] = {};
  Walk walk(p.sequence, block.d, p.begin, p.end, p.begin, 1);
  for (int tile = 0; tile < block.tiles(); ++tile) {
    const Item item = block.item(tile);
    State<float, 1> state;
    if (item.exists) state = load_state<Cell, S, 1>(step, block.position(item));
    if (block.in_tile) {
      store<1>(block.own_state(0, tile), state.h);
      if constexpr (Cell::has_cell) store<1>(block.own_state(1, tile), state.c);
    }
    const V h[1] = {state.h};
    block.hand_on(tile, 1, h);
    block.exchange.sent(tile);
  }
  if (block.tiles() > 1) block.exchange.request(0, 1);
  if (block.has_unit) load_biases<Cell, S, 1>(step, {0, block.unit, block.d}, biases);

  Place here = walk.next_at_once();
  const int rounds = static_cast<int>(p.end - p.begin);
  int number = 0;  // of the product
#pragma unroll 1
  for (int round = 1; round <= rounds; ++round) {
    if constexpr (Team::has_registers) walk.look_ahead();
#pragma unroll 1
    for (int tile = 0; tile < block.tiles(); ++tile, ++number) {
      const bool last = tile + 1 == block.tiles();
      const Item item = block.item(tile);
      const bool in_place = item.exists && item.b < here.rows;
      const int row = here.start + item.b;
      // What comes from memory is on its way during the exchange and the product. Not from one turn of the loop to the
      // next: where a loop begins the compiler waits for all that is on its way.
      V input[Cell::gates], product[Cell::gates], h[1] = {}, c{};
      int length = 0;
      uint8_t reset = 0;
      if (in_place) {
        load_input(columns, row, input);
        length = step.rows.length(item.b);
        reset = step.rows.reset_byte(here, item.b);
      }
      float* const h_state = block.own_state(0, tile);
      float* const c_state = block.own_state(Cell::has_cell, tile);
      if (block.in_tile) {
        h[0] = load<1>(h_state);
        if constexpr (Cell::has_cell) c = load<1>(c_state);
      }
      block.exchange.receive(tile, round);
      block.multiply(weights, block.exchange.operand(tile, round), number);
      __syncthreads();
      block.products(tile, round, number, product);
      const bool takes_part = in_place && here.t < length;
      Forwarded<Cell, float, 1> made;
      if (takes_part) {
        made = forward_units<Cell>(biases, input, product, h[0], c, reset);
        h[0] = made.h;
        store<1>(h_state, h[0]);
        if constexpr (Cell::has_cell) store<1>(c_state, made.c);
      }
      if (round < rounds) block.hand_on(tile, round + 1, h);
      if (block.tiles() > 1 && !(last && round == rounds)) block.exchange.request(last ? 0 : tile + 1, round + last);
      if (round < rounds) block.exchange.sent(tile);
      if (takes_part)  // nobody waits for what is stored
        store_forward(columns, row, made);
      else if (in_place)
        forward_nothing<1>(columns, row);
    }
    if constexpr (!Team::has_registers) walk.look_ahead();
    here = walk.next();
  }

  for (int tile = 0; tile < block.tiles(); ++tile) {
    const Item item = block.item(tile);
    if (!item.exists) continue;
    State<float, 1> state;
    state.h = load<1>(block.own_state(0, tile));
    if constexpr (Cell::has_cell) state.c = load<1>(block.own_state(1, tile));
    store_state<Cell, S, 1>(step, block.position(item), state);
  }
}

template <class Cell, class Multiplier, class Exchange, bool compact, class S>
FUSEDRNN_DEVICE void run_resident_backward(const ResidentBackward<S>& p, unsigned char* memory) {
  using V = Values<float, 1>;
  const BackwardStep<S>& step = p.step;
  Resident<Cell, Multiplier, Exchange, ResidentBackward<S>, true, compact> block(p, memory);
  using Team = decltype(block);
  using Item = typename Team::Item;
  Fragment weights[2][register_groups];
  block.load_weights(weights);
  block.begin();
  BackwardColumns<Cell, S> columns(step, block.unit, block.d);
  if constexpr (Team::has_registers) columns.keep();
  const auto state_of = [&](const Item& item) {
    return static_cast<int64_t>(block.d * step.B + item.b) * step.H + block.unit;
  };
  for (int tile = 0; tile < block.tiles(); ++tile) {
    if (!block.in_tile) continue;
    const Item item = block.item(tile);
    State<float, 1> state;
    if (item.exists) state = load_gradients<Cell, S, 1>(step, block.position(item));
    store<1>(block.own_state(0, tile), state.h);
    if constexpr (Cell::has_cell) store<1>(block.own_state(1, tile), state.c);
  }

  Walk walk(p.sequence, block.d, 0, p.sequence.T, p.end - 1, -1);
  Place later = place(p.sequence, block.d, p.end), here = walk.next_at_once(), previous = walk.next_at_once();

  // After the last step one more round, whose product is for the chunk before.
  const int rounds = static_cast<int>(p.end - p.begin);
  int number = 0;  // of the product
#pragma unroll 1
  for (int round = 0; round <= rounds; ++round) {
    const bool is_step = round < rounds;
    if constexpr (Team::has_registers) walk.look_ahead();
#pragma unroll 1
    for (int tile = 0; tile < block.tiles(); ++tile, ++number) {
      const bool last = tile + 1 == block.tiles();
      const Item item = block.item(tile);
      const int length = item.exists ? step.rows.length(item.b) : 0;
      const auto in = [&](const Place& place) { return item.b < place.rows && place.t < length; };
      const bool takes_part = is_step && in(here), in_later = in(later);
      // What comes from memory is on its way during the exchange and the product, as forward; or, where the product
      // leaves no registers, during the exchange of sums.
      ForBackward<Cell, S, 1> values{};
      // As it is in memory: to make a bool of it would wait for it. Before sm_90 a grid has no register for it.
      std::conditional_t<FUSEDRNN_HAS_CLUSTERS || Team::has_registers, uint8_t, bool> reset_later{};
      const auto load_values = [&] {
        if (takes_part) values = load_for_backward<1>(columns, step.rows, previous, in(previous), here, item.b);
        if (in_later) reset_later = step.rows.reset_byte(later, item.b);
      };
      if constexpr (Team::has_registers) load_values();
      V returned[1] = {}, gradients[Cell::sums] = {}, to_gates[Cell::gates];
      if (round) {
        block.exchange.receive(tile, round);
        if constexpr (!Team::shares_sums) block.multiply(weights, block.exchange.operand(tile, round), number);
      }
      if constexpr (!Team::has_registers) load_values();
      if (round) {
        if constexpr (Team::in_split_grid) block.exchange_sums(tile, round, number);
        if constexpr (!Team::shares_sums) __syncthreads();
        block.products(tile, round, number, returned);
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
        float* const own = block.own_state(0, tile);
        V carried = load<1>(own);
        if (in_later && !reset_later) carried += returned[0];
        if (takes_part) {
          float* const cell = block.own_state(Cell::has_cell, tile);
          V dc{};
          if constexpr (Cell::has_cell) dc = load<1>(cell);
          backward_units<Cell>(values, carried, dc, gradients);
          if constexpr (Cell::has_cell) store<1>(cell, dc);
        }
        store<1>(own, carried);
      }
#pragma unroll
      for (int k = 0; k < Cell::gates; ++k) to_gates[Cell::hidden_gate(k)] = gradients[k];
      block.hand_on(tile, round + 1, to_gates);
#if FUSEDRNN_HAS_CLUSTERS
      if constexpr (Team::shares_sums) {
        __syncthreads();
        block.multiply_and_send(weights, tile, round + 1);
      } else
#endif
      {
        // A tile's first round has none before it.
        if (block.tiles() > 1 && round + last) block.exchange.request(last ? 0 : tile + 1, round + last);
        block.exchange.sent(tile);
      }
      // Nobody waits for what is stored. The gradients of a row that is absent from the step are zero.
      if (item.exists && item.b < here.rows) store_gradients(columns, here.start + item.b, gradients, values.h);
    }
    if constexpr (!Team::has_registers) walk.look_ahead();
    later = here, here = previous, previous = walk.next();
  }

  for (int tile = 0; tile < block.tiles(); ++tile) {
    const Item item = block.item(tile);
    if (!item.exists) continue;
    store<1>(step.dh + state_of(item), load<1>(block.own_state(0, tile)));
    if constexpr (Cell::has_cell) store<1>(step.dc + state_of(item), load<1>(block.own_state(1, tile)));
  }
}

#if FUSEDRNN_HAS_CLUSTERS
template <class Cell, bool compact>
using ClusterBackward =
    std::conditional_t<cluster_shares_sums(Cell::gates, true), ClusterSums<compact>, ClusterExchange<compact>>;
#endif

// Where there are no clusters the kernels are empty: the plan never chooses them.
template <class Cell, class Multiplier, bool compact>
__global__ void __launch_bounds__(resident_threads, 1)
    cluster_forward(const __grid_constant__ ResidentForward<typename Multiplier::Scalar> p) {
#if FUSEDRNN_HAS_CLUSTERS
  FUSEDRNN_SHARED(memory);
  run_resident_forward<Cell, Multiplier, ClusterExchange<compact>, compact>(p, memory);
#endif
}

template <class Cell, class Multiplier, bool compact>
__global__ void __launch_bounds__(resident_threads, 1)
    cluster_backward(const __grid_constant__ ResidentBackward<typename Multiplier::Scalar> p) {
#if FUSEDRNN_HAS_CLUSTERS
  FUSEDRNN_SHARED(memory);
  run_resident_backward<Cell, Multiplier, ClusterBackward<Cell, compact>, compact>(p, memory);
#endif
}

template <class Cell, class Multiplier, bool compact>
__global__ void __launch_bounds__(resident_threads, 1)
    grid_forward(const __grid_constant__ ResidentForward<typename Multiplier::Scalar> p) {
  FUSEDRNN_SHARED(memory);
  run_resident_forward<Cell, Multiplier, GridExchange<compact>, compact>(p, memory);
}

template <class Cell, class Multiplier, bool compact>
__global__ void __launch_bounds__(resident_threads, 1)
    grid_backward(const __grid_constant__ ResidentBackward<typename Multiplier::Scalar> p) {
  FUSEDRNN_SHARED(memory);
  run_resident_backward<Cell, Multiplier, GridExchange<compact>, compact>(p, memory);
}

}  // namespace fusedrnn::cuda
