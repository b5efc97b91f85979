// A product of a block of a team (tuning.h): the recurrent weights that its warps keep in registers and shared memory, times what
// comes in.
//
// A step is a chain of some hundred instructions that each waits for the one before, so what does not change is worked out
// once, and code that could stand twice is a loop instead: a step of thousands of instructions waits for the instruction cache.
#pragma once

#include "exchange.cuh"
#include "units.cuh"

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

template <class Cell, class Multiplier, class Exchange, class P, bool is_backward, bool compact>
struct TeamProduct {
  using S = typename Multiplier::Scalar;
  static constexpr int in = gates_in(Cell::gates, is_backward), out = gates_out(Cell::gates, is_backward);
  static constexpr int word_scalars = sizeof(uint32_t) / sizeof(S);
  static constexpr bool in_grid = std::is_same_v<Exchange, GridExchange<compact>>;
  static constexpr bool in_split_grid = is_backward && in_grid && FUSEDRNN_HAS_CLUSTERS;  // where the plan says so
  static constexpr bool has_registers = compact || !in_grid;  // left, to keep what could be read again
  static constexpr bool shares_sums = !in_grid && cluster_shares_sums(Cell::gates, is_backward);
  using V = Values<float, 1>;

  const P& p;
  unsigned char* const memory;
  const ResidentPlan& plan;
  const ResidentLayout& layout;
  const int thread, lane, warp, H, d;
  const int rank;  // of the block in its team
  // A warp's, each a part of the inner dimension for some row tiles.
  struct Slot {
    int part, row_tile, tiles, first_group, groups;
    int overflow;  // the place of its first group, as if all were beyond the registers
  };
  const Slot slots[2];
  const int operand_at;  // of what it multiplies, in a group
  // Of a compact team, of what it multiplies all that one access of each group takes, in an operand: of the sums of a cluster,
  // of one row tile.
  static constexpr int own_groups = shares_sums ? compact_tile_groups : register_groups;
  int group_at[own_groups];

  FUSEDRNN_DEVICE TeamProduct(const P& p, unsigned char* memory)
      : p(p),
        memory(memory),
        plan(p.plan),
        layout(p.layout),
        thread(threadIdx.x),
        lane(thread % 32),
        warp(same_in_warp(thread / 32)),
        H(p.step.H),
        d(blockIdx.z),
        rank(blockIdx.x),
        slots{make_slot(0), make_slot(1)},
        operand_at(kept_if<has_registers>(Multiplier::place(plan.rows, lane))) {
    if constexpr (compact)
#pragma unroll
      for (int i = 0; i < own_groups; ++i) group_at[i] = kept(operand_at + place_of_group(slots[0], i));
  }

  // Blocks whose units a product is for: all of a cluster or some neighbours, this one among them, share its inner dimension.
  FUSEDRNN_DEVICE int split() const { return in_split_grid || shares_sums ? plan.split : 1; }

  FUSEDRNN_DEVICE Slot make_slot(int i) const {
    const int number = 2 * warp + i;
    if constexpr (shares_sums) {
      const int row_tile = number * layout.slot_tiles, rest = layout.row_tiles - row_tile;
      const int tiles = rest < 0 ? 0 : rest < layout.slot_tiles ? rest : layout.slot_tiles;
      return {0, row_tile, tiles, 0, tiles ? layout.groups : 0, overflow_before(layout, 0, row_tile) - register_groups};
    }
    const int part = number / layout.slots_per_part, row_tile = number % layout.slots_per_part;
    const bool half = row_tile < layout.halved_tiles;
    const int groups = half ? layout.half_groups : layout.part_groups, begin = part * groups;
    const int rest = layout.groups - begin;
    const bool used = part < layout.parts + half && row_tile < layout.row_tiles;
    return {part,
            row_tile,
            used,
            begin,
            !used           ? 0
            : rest < groups ? rest
                            : groups,
            overflow_before(layout, part, row_tile) - register_groups};
  }

  static constexpr int half_fragment = fragment_bytes / 8;  // words from `upper` of all threads to their `lower`

  // Words 4q to 4q + 3 of a group of row `row` of the weights as they are multiplied; zeros where there is no such unit.
  FUSEDRNN_DEVICE Words load_row(int row, int group) const {
    constexpr int width = 4 * word_scalars;
    const int first_group = shares_sums ? 0 : rank % split() * layout.groups;
    const int word = (first_group + group) * group_words + lane % 4 * 4;
    // Rows are units, and those of a unit its gates: what a thread sums up lies side by side.
    const int gate_in = word / layout.gate_words, gate_out = row % out, units = split() * plan.units;
    const int unit_in = (shares_sums ? rank * plan.units : 0) + word % layout.gate_words * word_scalars;
    const int unit_out = rank / split() * units + row / out;
    const bool exists = gate_in < in && row / out < units && unit_out < H;
    const S* const w = p.w_hh[d] + (is_backward ? (static_cast<int64_t>(gate_in) * H + unit_in) * H + unit_out
                                                : (static_cast<int64_t>(gate_out) * H + unit_out) * H + unit_in);
    const int64_t next = is_backward ? H : 1;
    Words words{};
    const auto put = [&](int i, S x) {
      words[i / word_scalars] |= Multiplier::bits_of_weight(x) << 16 * (i % word_scalars);
    };
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

  // Registers of a row tile of a slot that has some.
  FUSEDRNN_DEVICE int tile_groups() const { return compact ? compact_tile_groups : layout.part_groups; }

  // Number `number` of those of a slot, which are the groups of one row tile after those of another.
  FUSEDRNN_DEVICE Fragment load_fragment(const Slot& slot, int number) const {
    const int tile = shares_sums ? number / tile_groups() : 0, group = number - tile * tile_groups();
    if (tile >= slot.tiles || group >= slot.groups) return {};
    const int row = (slot.row_tile + tile) * 16 + lane / 4;
    return {load_row(row, slot.first_group + group), load_row(row + 8, slot.first_group + group)};
  }

  // Of a slot's group, the words of an operand before it: where the slot has no such group, those before the zeros behind all, for
  // its weights there are zero too.
  FUSEDRNN_DEVICE int place_of_group(const Slot& s, int group) const {
    return (group < s.groups ? s.first_group + group : layout.groups) * plan.rows * group_words;
  }

  using Weights = Fragment[2][register_groups];
  using Sums = typename Multiplier::Sum[2];  // of both slots

  FUSEDRNN_DEVICE void load_weights(Weights& weights) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Slot& s = slots[i];
#pragma unroll
      for (int number = 0; number < register_groups; ++number) weights[i][number] = load_fragment(s, number);
      if constexpr (compact) continue;
      const int count = shares_sums ? s.tiles * layout.part_groups : s.groups;
#pragma unroll 1
      for (int number = register_groups; number < count; ++number) {
        const Fragment a = load_fragment(s, number);
        uint32_t* const to = reinterpret_cast<uint32_t*>(memory + layout.overflow) +
                             (s.overflow + number) * (fragment_bytes / 4) + lane * 4;
        store_words(to, a.upper);
        store_words(to + half_fragment, a.lower);
      }
    }
  }

  // The weights times what came in. Calls put(row tile of the slots, both slots' sums, first column) with each tile's sums.
  template <class Put>
  FUSEDRNN_DEVICE void multiply_by(const Weights& weights, const uint32_t* operand, const Put& put) const {
    if (!slots[0].groups) return;  // and then its second has none
    if constexpr (compact) {
      multiply_compact(weights, operand, put);
    } else if constexpr (Multiplier::columns == tile_columns) {
      multiply_columns(weights, operand, 0, put);
    } else {
#pragma unroll 1
      for (int column = 0; column < plan.rows; column += Multiplier::columns)
        multiply_columns(weights, operand, column, put);
    }
  }

  // All weights are in registers, and both slots take the same operands: hardly a branch.
  template <class Put>
  FUSEDRNN_DEVICE void multiply_compact(const Weights& weights, const uint32_t* operand, const Put& put) const {
    constexpr int at_once = Multiplier::groups_at_once;
    static_assert(Multiplier::columns == tile_columns && at_once == compact_tile_groups);
    typename Multiplier::Operand b[at_once];
    const auto load = [&](int begin) {
#pragma unroll
      for (int i = 0; i < at_once; ++i) b[i] = Multiplier::load(operand + group_at[begin + i], plan.rows);
    };
    Sums sums = {};
    const auto add = [&](int begin) {
#pragma unroll
      for (int i = 0; i < at_once; ++i)
#pragma unroll
        for (int k = 0; k < 2; ++k) Multiplier::add(sums[k], weights[k][begin + i], b[i]);
    };
    load(0);
    add(0);
    if constexpr (shares_sums) {
      put(0, sums, 0);
      if (layout.slot_tiles == 1) return;
      sums[0] = sums[1] = {};
      add(at_once);
    } else if (layout.slot_groups > at_once) {
      load(at_once);
      add(at_once);
    }
    put(shares_sums, sums, 0);
  }

  template <class Put>
  FUSEDRNN_DEVICE void multiply_columns(const Weights& weights, const uint32_t* operand, int column,
                                        const Put& put) const {
    using Operand = typename Multiplier::Operand;
    constexpr int at_once = Multiplier::groups_at_once;
    const int a_group = plan.rows * group_words, all = layout.slot_groups;
    const bool same =
        shares_sums || (slots[0].first_group == slots[1].first_group && slots[0].groups == slots[1].groups);
    const uint32_t* const own = operand + operand_at + column * group_words;
    const auto load = [&](int group) { return Multiplier::load(own + group * a_group, plan.rows - column); };
    const auto load_of = [&](const Slot& s, int group) {
      return Multiplier::load(own + place_of_group(s, group), plan.rows - column);
    };
    Sums sums = {};
    int group = 0, tile = 0;  // of the slot's next
    const auto next_group = [&] {
      if (++group < layout.part_groups) return;
      put(tile, sums, column);
      sums[0] = sums[1] = {};
      group = 0;
      ++tile;
    };
#pragma unroll
    for (int begin = 0; begin < register_groups; begin += at_once) {
      if (begin >= all) break;
      Operand b[at_once];
      if constexpr (shares_sums) {
        int next = group;
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
          b[i] = load(next);
          next = next + 1 < layout.part_groups ? next + 1 : 0;
        }
      } else if (begin + at_once <= slots[0].groups) {
#pragma unroll
        for (int i = 0; i < at_once; ++i) b[i] = load(slots[0].first_group + begin + i);
      } else {
#pragma unroll
        for (int i = 0; i < at_once; ++i) b[i] = load_of(slots[0], begin + i);
      }
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        Multiplier::add(sums[0], weights[0][begin + i], b[i]);
        if (same) Multiplier::add(sums[1], weights[1][begin + i], b[i]);
        if (shares_sums && begin + i < all) next_group();
      }
      if (!same)
#pragma unroll
        for (int i = 0; i < at_once; ++i) Multiplier::add(sums[1], weights[1][begin + i], load_of(slots[1], begin + i));
    }
    if (all > register_groups) {
      const auto* const beyond = reinterpret_cast<const uint32_t*>(memory + layout.overflow) + lane * 4;
      const auto fragment = [&](const Slot& s, int number) {
        if (shares_sums ? tile >= s.tiles : number >= s.groups) return Fragment{};
        const uint32_t* const at = beyond + (s.overflow + number) * (fragment_bytes / 4);
        return Fragment{load_words(at), load_words(at + half_fragment)};
      };
#pragma unroll 1
      for (int number = register_groups; number < all; ++number) {
        const Operand b = load_of(slots[0], shares_sums ? group : number);
        Multiplier::add(sums[0], fragment(slots[0], number), b);
        Multiplier::add(sums[1], fragment(slots[1], number), same ? b : load_of(slots[1], number));
        if (shares_sums) next_group();
      }
    }
    if constexpr (!shares_sums) put(0, sums, column);
  }
};

}  // namespace fusedrnn::cuda
