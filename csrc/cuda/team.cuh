// A block of a team (tuning.h) that shares a recurrence: the units and rows of the batch that are its own, their weights, and
// the product with what comes in. What it does with them is resident.cuh's.
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
  uint32_t *data, *counters;  // of a grid, as GridExchange says of all directions' teams
};

template <class S>
using ResidentForward = ResidentParams<ForwardStep<S>, S>;
template <class S>
using ResidentBackward = ResidentParams<BackwardStep<S>, S>;

template <class Cell, class Multiplier, class Exchange, class P, bool is_backward>
struct Resident {
  using S = typename Multiplier::Scalar;
  static constexpr int in = gates_in(Cell::gates, is_backward);
  static constexpr int word_scalars = sizeof(uint32_t) / sizeof(S);
  static constexpr bool in_grid = std::is_same_v<Exchange, GridExchange>;
  static constexpr bool can_split = is_backward && in_grid && FUSEDRNN_HAS_CLUSTERS;
  using V = Values<float, 1>;

  const P& p;
  unsigned char* const memory;
  const ResidentPlan& plan;
  const ResidentLayout& layout;
  const int thread, lane, warp, H, d;
  const int rank;       // of the block in its team
  const int64_t first;  // row of the batch in the team
  Exchange exchange;
  int item_rows[units_at_once], item_units[units_at_once];  // of a tile that are this thread's

  FUSEDRNN_DEVICE Resident(const P& p, unsigned char* memory)
      : p(p),
        memory(memory),
        plan(p.plan),
        layout(p.layout),
        thread(threadIdx.x),
        lane(thread % 32),
        warp(same_in_warp(thread / 32)),
        H(static_cast<int>(p.step.H)),
        d(blockIdx.z),
        rank(blockIdx.x),
        first(static_cast<int64_t>(blockIdx.y) * plan.tiles * plan.rows),
        exchange(make_exchange()) {
#pragma unroll
    for (int i = 0; i < units_at_once; ++i) {
      const int number = thread + i * resident_threads;
      item_rows[i] = number / plan.units, item_units[i] = number % plan.units;
    }
  }

  FUSEDRNN_DEVICE Exchange make_exchange() const {
    const Pieces pieces{plan.units * static_cast<int>(sizeof(S)) / static_cast<int>(sizeof(Words)), plan.rows, in};
    if constexpr (in_grid)
      return {plan, layout, memory, pieces, rank, static_cast<int>(d * plan.teams + blockIdx.y), p.data, p.counters};
    else
      return {plan, layout, memory, pieces, rank};
  }

  // Blocks that share the inner dimension: this one and its neighbours.
  FUSEDRNN_DEVICE int split() const { return can_split ? plan.split : 1; }

  // Slot `i` of the warp: which rows and which groups of the inner dimension.
  struct Slot {
    int part, row_tile, first_group, groups;
  };
  FUSEDRNN_DEVICE Slot slot(int i) const {
    const int number = 2 * warp + i, part = number / layout.slots_per_part, row_tile = number % layout.slots_per_part;
    const bool half = row_tile < layout.halved_tiles;
    const int groups = half ? layout.half_groups : layout.part_groups, begin = part * groups;
    const int rest = layout.groups - begin;
    const bool used = part < layout.parts + half && row_tile < layout.row_tiles;
    return {part, row_tile, begin, !used ? 0 : rest < groups ? rest : groups};
  }
  FUSEDRNN_DEVICE uint32_t* overflow(const Slot& slot, int group) const {
    return reinterpret_cast<uint32_t*>(memory + layout.overflow) +
           (overflow_before(layout, slot.part, slot.row_tile) + group - register_groups) * (fragment_bytes / 4) +
           lane * 4;
  }
  static constexpr int half_fragment = fragment_bytes / 8;  // words from `upper` of all threads to their `lower`

  // Words 4q to 4q + 3 of a group of row `row` of the weights as they are multiplied; zeros where there is no such unit.
  FUSEDRNN_DEVICE Words load_row(int row, int group) const {
    const int word = (rank % split() * layout.groups + group) * group_words + lane % 4 * 4;
    const int gate_in = word / layout.gate_words, unit_in = word % layout.gate_words * word_scalars;
    const int units = split() * plan.units, gate_out = row / units;
    const int unit_out = rank / split() * units + row % units;
    const bool exists = gate_in < in && gate_out < gates_out(Cell::gates, is_backward) && unit_out < H;
    const S* const w = p.w_hh[d] + (is_backward ? (static_cast<int64_t>(gate_in) * H + unit_in) * H + unit_out
                                                : (static_cast<int64_t>(gate_out) * H + unit_out) * H + unit_in);
    constexpr int width = 4 * word_scalars;
    const int64_t next = is_backward ? H : 1;
    Words words{};
    const auto put = [&](int i, S x) { words[i / word_scalars] |= Multiplier::bits(x) << 16 * (i % word_scalars); };
    if (!is_backward && H % width == 0 && reinterpret_cast<uintptr_t>(p.w_hh[d]) % sizeof(Words) == 0) {
      if (!exists || unit_in >= H) return words;
      const auto pack = load_pack<width>(w);
#pragma unroll
      for (int i = 0; i < width; ++i) put(i, pack.value[i]);
      return words;
    }
#pragma unroll
    for (int i = 0; i < width; ++i)
      if (exists && unit_in + i < H) put(i, w[i * next]);
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

  FUSEDRNN_DEVICE void begin() const {
    // Zeros where no block ever writes.
    uint32_t* const words = exchange.operand(0, 0);
    for (int i = thread; i < (layout.made - layout.operand) / 16; i += resident_threads) store_words(words + i * 4, {});
#if FUSEDRNN_HAS_CLUSTERS
    if (split() > 1) shared_sums().begin();
#endif
    exchange.begin();
  }

  // sums = the weights times what came in.
  FUSEDRNN_DEVICE void multiply(const Weights& weights, const uint32_t* operand) const {
    const Slot slots[2] = {slot(0), slot(1)};
    const auto fragment = [&](const Slot& s, int group) {
      if (group >= s.groups) return Fragment{};
      return Fragment{load_words(overflow(s, group)), load_words(overflow(s, group) + half_fragment)};
    };
#pragma unroll 1
    for (int column = 0; column < plan.rows; column += Multiplier::columns) {
      typename Multiplier::Sum products[2] = {};
      const auto add = [&](int group, const Fragment& a0, const Fragment& a1) {
        // Where a slot has no such group, the zeros behind all: its weights there are zero too.
        const auto at = [&](const Slot& s) {
          return (group < s.groups ? s.first_group + group : layout.groups) * plan.rows * group_words;
        };
        const Columns columns{operand + column * group_words, plan.rows - column};
        Multiplier::add(products, a0, a1, {at(slots[0]), at(slots[1])}, columns, lane);
      };
#pragma unroll
      for (int begin = 0; begin < register_groups; begin += groups_at_once) {
        if (begin >= layout.part_groups) break;
#pragma unroll
        for (int i = begin; i < begin + groups_at_once; ++i) add(i, weights[0][i], weights[1][i]);
      }
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

#if FUSEDRNN_HAS_CLUSTERS
  FUSEDRNN_DEVICE SharedSums shared_sums() const { return {plan, layout, memory, rank}; }
#endif

  // After a product whose inner dimension other blocks have a share of.
  FUSEDRNN_DEVICE void exchange_sums(int tile, int round) const {
#if FUSEDRNN_HAS_CLUSTERS
    if (split() == 1) return;
    __syncthreads();
    shared_sums().exchange(tile, round, [&](int row, int of_weights) {
      Words words;
#pragma unroll
      for (int k = 0; k < piece_words; ++k) words[k] = bits_of(sum_of_parts(row, of_weights + k));
      return words;
    });
#endif
  }

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
      const int row = item_rows[i], unit = item_units[i];
      if (row < plan.rows) f(i, Item{row, unit, {first + tile * plan.rows + row, rank * plan.units + unit, d}});
    }
  }
  FUSEDRNN_DEVICE bool exists(const Position& at) const { return at.b < p.step.B && at.j < H; }

  FUSEDRNN_DEVICE float sum_of_parts(int row, int of_weights) const {
    float sum = 0;
    const int parts = layout.parts + (of_weights < layout.halved_tiles * 16);
    for (int part = 0; part < parts; ++part) sum += sums()[(part * tile_columns + row) * layout.sums_ld + of_weights];
    return sum;
  }

  // The product of a gate's row of the weights, from all parts and shares.
  FUSEDRNN_DEVICE V product(int tile, const Item& item, int gate) const {
#if FUSEDRNN_HAS_CLUSTERS
    if (split() > 1) {
      V sum{};
      for (int member = 0; member < plan.split; ++member)
        sum += load<1>(shared_sums().share(tile, member) + item.in_states(plan));
      return sum;
    }
#endif
    return V{sum_of_parts(item.row, gate * plan.units + item.unit)};
  }

  // Puts a value of an item where it is handed on from.
  FUSEDRNN_DEVICE void make(const Item& item, int gate, const V& value) const {
    S* const made = reinterpret_cast<S*>(memory + layout.made);
    store<1>(made + (gate * plan.rows + item.row) * plan.units + item.unit, V{Multiplier::rounded(value[0])});
  }
};

}  // namespace fusedrnn::cuda
