// The recurrence resident in a team of blocks (tuning.h): a block owns some units of a direction for some rows of the batch,
// keeps their rows (backward: their columns) of W_hh, and runs the steps of a chunk. Per step it takes in what all blocks of
// the team made, of all units (forward the state, backward the gradients of pre-activations), multiplies on tensor cores, and
// hands on what it makes of it for its own units. The batch is cut into tiles of up to 8 rows, which know nothing of each
// other: while one is on its way, the next is worked on.
#pragma once

#include "elementwise.cuh"
#include "exchange.cuh"

namespace fusedrnn::cuda {

// Steps [begin, end) in the order of each direction.
template <class Step, class S>
struct ResidentParams {
  Step step;
  int64_t begin, end;
  Sequence sequence;  // its offsets on the device
  const S* w_hh[2];   // [gates*H, H]
  ResidentPlan plan;
  ResidentLayout layout;
  uint32_t* data;      // of a grid, [D, teams] of what GridExchange says
  uint32_t* counters;  // of a grid, [D, teams, tiles]
};

template <class S>
using ResidentForward = ResidentParams<ForwardStep<S>, S>;
template <class S>
using ResidentBackward = ResidentParams<BackwardStep<S>, S>;

constexpr FUSEDRNN_INLINE int gates_in(int gates, bool backward) { return backward ? gates : 1; }
constexpr FUSEDRNN_INLINE int gates_out(int gates, bool backward) { return backward ? 1 : gates; }

template <class Cell, class Multiplier, class Exchange, class P, bool is_backward>
struct Resident {
  using S = typename Multiplier::Scalar;
  static constexpr int in = gates_in(Cell::gates, is_backward);
  static constexpr int word_scalars = sizeof(uint32_t) / sizeof(S);
  using V = Values<float, 1>;

  const P& p;
  unsigned char* const memory;
  const ResidentPlan& plan;
  const ResidentLayout& layout;
  const int thread, lane, warp, H, d;
  const int rank;       // of the block in its team
  const int64_t first;  // row of the batch in the team
  Exchange exchange;
  struct {
    int row, unit;
  } items[units_at_once];  // of a tile that are this thread's

  FUSEDRNN_DEVICE Resident(const P& p, unsigned char* memory)
      : p(p),
        memory(memory),
        plan(p.plan),
        layout(p.layout),
        thread(threadIdx.x),
        lane(thread % 32),
        warp(thread / 32),
        H(static_cast<int>(p.step.H)),
        d(blockIdx.z),
        rank(blockIdx.x),
        first(static_cast<int64_t>(blockIdx.y) * plan.tiles * plan.rows),
        exchange(make_exchange()) {
#pragma unroll
    for (int i = 0; i < units_at_once; ++i) {
      const int number = thread + i * resident_threads;
      items[i] = {number / plan.units, number % plan.units};
    }
  }

  FUSEDRNN_DEVICE Exchange make_exchange() const {
    const Pieces pieces{plan.units * static_cast<int>(sizeof(S)) / static_cast<int>(sizeof(Words)), plan.rows, in};
    if constexpr (std::is_same_v<Exchange, GridExchange>) {
      const int64_t team = d * plan.teams + blockIdx.y;
      return {plan,  layout, memory,
              pieces, rank,   p.data + team * plan.tiles * 2 * plan.blocks * pieces.count() * 4,
              p.counters + team * plan.tiles};
    } else {
      return {plan, layout, memory, pieces, rank};
    }
  }

  // Slot `i` of the warp: which rows and which groups of the inner dimension.
  struct Slot {
    int part, row_tile, first_group, groups;
  };
  FUSEDRNN_DEVICE Slot slot(int i) const {
    const int number = 2 * warp + i, part = number / layout.slots_per_part, row_tile = number % layout.slots_per_part;
    const int begin = part * layout.part_groups, rest = layout.groups - begin;
    const bool used = part < layout.parts && row_tile < layout.row_tiles;
    return {part, row_tile, begin, !used ? 0 : rest < layout.part_groups ? rest : layout.part_groups};
  }
  FUSEDRNN_DEVICE uint32_t* overflow(const Slot& slot, int group) const {
    const int groups = layout.part_groups - register_groups, number = slot.part * layout.row_tiles + slot.row_tile;
    return reinterpret_cast<uint32_t*>(memory + layout.overflow) +
           (number * groups + group - register_groups) * (fragment_bytes / 4) + lane * 4;
  }
  static constexpr int half_fragment = fragment_bytes / 8;  // words from `upper` of all threads to their `lower`

  // Words 4q to 4q + 3 of a group of row `row` of the weights as they are multiplied; zeros where there is no such unit.
  FUSEDRNN_DEVICE Words load_row(int row, int group) const {
    const int groups = layout.gate_words / group_words, gate_in = group / groups;
    const int unit_in = (group % groups * group_words + lane % 4 * 4) * word_scalars;
    const int gate_out = row / plan.units, unit_out = rank * plan.units + row % plan.units;
    const bool exists = gate_out < gates_out(Cell::gates, is_backward) && unit_out < H;
    const S* const w = p.w_hh[d] + (is_backward ? (static_cast<int64_t>(gate_in) * H + unit_in) * H + unit_out
                                                : (static_cast<int64_t>(gate_out) * H + unit_out) * H + unit_in);
    const int64_t next = is_backward ? H : 1;
    Words words{};
#pragma unroll
    for (int i = 0; i < 4 * word_scalars; ++i)
      if (exists && unit_in + i < H) words[i / word_scalars] |= Multiplier::bits(w[i * next]) << 16 * (i % word_scalars);
    return words;
  }

  FUSEDRNN_DEVICE Fragment load_fragment(const Slot& slot, int group) const {
    const int row = slot.row_tile * 16 + lane / 4;
    return {load_row(row, slot.first_group + group), load_row(row + 8, slot.first_group + group)};
  }

  using Weights = Fragment[2][register_groups];

  FUSEDRNN_DEVICE void load_weights(Weights& weights) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Slot s = slot(i);
#pragma unroll
      for (int group = 0; group < register_groups; ++group)
        weights[i][group] = group < s.groups ? load_fragment(s, group) : Fragment{};
      for (int group = register_groups; group < s.groups; ++group) {
        const Fragment a = load_fragment(s, group);
        store_words(overflow(s, group), a.upper);
        store_words(overflow(s, group) + half_fragment, a.lower);
      }
    }
  }

  // Zeros where no block ever writes.
  FUSEDRNN_DEVICE void clear_operands() const {
    uint32_t* const words = exchange.operand(0, 0);
    for (int i = thread; i < (layout.made - layout.operand) / 16; i += resident_threads) store_words(words + i * 4, {});
  }

  // sums = the weights times what came in.
  FUSEDRNN_DEVICE void multiply(const Weights& weights, const uint32_t* operand) const {
    const Slot slots[2] = {slot(0), slot(1)};
    const auto fragment = [&](const Slot& s, int group) {
      if (group >= s.groups) return Fragment{};
      return Fragment{load_words(overflow(s, group)), load_words(overflow(s, group) + half_fragment)};
    };
#pragma unroll 1
    for (int column = 0; column < tile_columns; column += Multiplier::columns) {
      typename Multiplier::Sum products[2] = {};
      const auto add = [&](int group, const Fragment& a0, const Fragment& a1) {
        const auto at = [&](const Slot& s) { return group < s.groups ? (s.first_group + group) * group_words : -1; };
        const uint32_t* const columns = operand + column * layout.operand_ld;
        Multiplier::add(products, a0, a1, {at(slots[0]), at(slots[1])}, columns, layout.operand_ld, lane);
      };
#pragma unroll
      for (int group = 0; group < register_groups; ++group) add(group, weights[0][group], weights[1][group]);
#pragma unroll 1
      for (int group = register_groups; group < layout.part_groups; ++group)
        add(group, fragment(slots[0], group), fragment(slots[1], group));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* const to = sums() + (slots[i].part * tile_columns + column) * layout.sums_ld + slots[i].row_tile * 16;
        if (slots[i].groups) Multiplier::store(products[i], to, layout.sums_ld, lane);
      }
    }
  }

  FUSEDRNN_DEVICE float* sums() const { return reinterpret_cast<float*>(memory + layout.sums); }

  // The two arrays of states, of a tile.
  FUSEDRNN_DEVICE float* states(int which, int tile) const {
    return reinterpret_cast<float*>(memory + layout.states) + (which * plan.tiles + tile) * plan.rows * plan.units;
  }

  // A unit and a row of a tile, and where they are in the block and in the batch.
  struct Item {
    int row, unit;
    Position at;
    FUSEDRNN_DEVICE int in_states(const ResidentPlan& plan) const { return row * plan.units + unit; }
  };

  // Calls f(number, item) for the units of a tile that are this thread's, those beyond the layer and the batch too.
  template <class F>
  FUSEDRNN_DEVICE void for_items(int tile, const F& f) const {
#pragma unroll
    for (int i = 0; i < units_at_once; ++i) {
      const auto [row, unit] = items[i];
      if (row < plan.rows) f(i, Item{row, unit, {first + tile * plan.rows + row, rank * plan.units + unit, d}});
    }
  }
  FUSEDRNN_DEVICE bool exists(const Position& at) const { return at.b < p.step.B && at.j < H; }

  // The product of row `row` of the weights, from all parts.
  FUSEDRNN_DEVICE V product(const Item& item, int row) const {
    V sum{};
    for (int part = 0; part < layout.parts; ++part)
      sum += V{sums()[(part * tile_columns + item.row) * layout.sums_ld + row]};
    return sum;
  }

  // Puts a value of an item where it is handed on from.
  FUSEDRNN_DEVICE void make(const Item& item, int gate, const V& value) const {
    S* const made = reinterpret_cast<S*>(memory + layout.made);
    store<1>(made + (gate * plan.rows + item.row) * plan.units + item.unit, V{Multiplier::rounded(value[0])});
  }
};

template <class Cell, class Multiplier, class Exchange, class S>
FUSEDRNN_DEVICE void run_resident_forward(const ResidentForward<S>& p, unsigned char* memory) {
  using V = Values<float, 1>;
  const ForwardStep<S>& step = p.step;
  const Resident<Cell, Multiplier, Exchange, ResidentForward<S>, false> block(p, memory);
  const ResidentPlan& plan = p.plan;
  Fragment weights[2][register_groups];
  block.load_weights(weights);
  block.clear_operands();
  for (int tile = 0; tile < plan.tiles; ++tile)
    block.for_items(tile, [&](int, const auto& item) {
      const int64_t state = (block.d * step.B + item.at.b) * step.H + item.at.j;
      const bool exists = block.exists(item.at);
      store<1>(block.states(0, tile) + item.in_states(plan), exists ? load<1>(step.h + state) : V{});
      if constexpr (Cell::has_cell)
        store<1>(block.states(1, tile) + item.in_states(plan), exists ? load<1>(step.c + state) : V{});
    });
  __syncthreads();
  // The first state is not handed on: every block reads all of it.
  const auto read_state = [&](int tile) {
    for (int64_t i = block.thread; i < plan.rows * step.H; i += resident_threads) {
      const int64_t row = i / step.H, j = i % step.H, b = block.first + tile * plan.rows + row;
      S* const to = reinterpret_cast<S*>(block.exchange.operand(tile, 0) + row * p.layout.operand_ld) + j;
      const V h = b < step.B ? load<1>(step.h + (block.d * step.B + b) * step.H + j) : V{};
      store<1>(to, V{Multiplier::rounded(h[0])});
    }
  };
  block.exchange.begin();

  for (int64_t number = p.begin; number < p.end; ++number) {
    const Place here = place(p.sequence, block.d, number);
    const int round = static_cast<int>(number - p.begin);
    for (int tile = 0; tile < plan.tiles; ++tile) {
      V input[units_at_once][Cell::gates];
      block.for_items(tile, [&](int i, const auto& item) {
        if (item.at.j < step.H && step.rows.has(here, item.at.b)) load_input<Cell, S, 1>(step, here, item.at, input[i]);
      });
      if (round) {
        block.exchange.receive(tile, round);
      } else {
        read_state(tile);
        __syncthreads();
      }
      block.multiply(weights, block.exchange.operand(tile, round));
      __syncthreads();
      Forwarded<Cell, float, 1> made[units_at_once];
      block.for_items(tile, [&](int i, const auto& item) {
        float* const h = block.states(0, tile) + item.in_states(plan);
        if (block.exists(item.at) && step.rows.has(here, item.at.b))
          made[i] = forward_units<Cell, S, 1>(
              step, here, item.at, input[i],
              [&](int gate) { return block.product(item, gate * plan.units + item.unit); }, h,
              block.states(Cell::has_cell, tile) + item.in_states(plan));
        block.make(item, 0, load<1>(h));
      });
      __syncthreads();
      block.exchange.send(tile, round + 1);
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

  for (int tile = 0; tile < plan.tiles; ++tile) {
    // Nobody reads the first state any more.
    block.exchange.receive(tile, static_cast<int>(p.end - p.begin));
    block.for_items(tile, [&](int, const auto& item) {
      if (!block.exists(item.at)) return;
      const int64_t state = (block.d * step.B + item.at.b) * step.H + item.at.j;
      store<1>(step.h + state, load<1>(block.states(0, tile) + item.in_states(plan)));
      if constexpr (Cell::has_cell)
        store<1>(step.c + state, load<1>(block.states(1, tile) + item.in_states(plan)));
    });
  }
}

template <class Cell, class Multiplier, class Exchange, class S>
FUSEDRNN_DEVICE void run_resident_backward(const ResidentBackward<S>& p, unsigned char* memory) {
  using V = Values<float, 1>;
  const BackwardStep<S>& step = p.step;
  const Resident<Cell, Multiplier, Exchange, ResidentBackward<S>, true> block(p, memory);
  const ResidentPlan& plan = p.plan;
  Fragment weights[2][register_groups];
  block.load_weights(weights);
  block.clear_operands();
  const auto in_memory = [&](const Position& at) { return (block.d * step.B + at.b) * step.H + at.j; };
  for (int tile = 0; tile < plan.tiles; ++tile)
    block.for_items(tile, [&](int, const auto& item) {
      const bool exists = block.exists(item.at);
      store<1>(block.states(0, tile) + item.in_states(plan), exists ? load<1>(step.dh + in_memory(item.at)) : V{});
      if constexpr (Cell::has_cell)
        store<1>(block.states(1, tile) + item.in_states(plan), exists ? load<1>(step.dc + in_memory(item.at)) : V{});
    });
  block.exchange.begin();

  // After the last step one more round, whose product is for the chunk before.
  for (int64_t number = p.end - 1; number >= p.begin - 1; --number) {
    const Place here = place(p.sequence, block.d, number);
    const int round = static_cast<int>(p.end - 1 - number);
    const bool is_step = number >= p.begin;
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
      }
      __syncthreads();
      const Place later = place(p.sequence, block.d, number + 1);
      V gradients[units_at_once][Cell::sums] = {};
      block.for_items(tile, [&](int i, const auto& item) {
        auto& gradient = gradients[i];
        if (block.exists(item.at)) {
          V returned{};
          if (round)
            returned = block.product(item, item.unit);
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
