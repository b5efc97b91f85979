// A block of a team (tuning.h) that shares a recurrence: the units and rows of the batch that are its own, their weights, and
// the product with what comes in. What it does with them is resident.cuh's.
//
// A step is a chain of some hundred instructions that each waits for the one before, so what does not change is worked out
// once, and code that could stand twice is a loop instead: a step of thousands of instructions waits for the instruction cache.
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
  static constexpr int in = gates_in(Cell::gates, is_backward), out = gates_out(Cell::gates, is_backward);
  static constexpr int word_scalars = sizeof(uint32_t) / sizeof(S), piece_units = piece_words * word_scalars;
  static constexpr int warp_pieces = 32 / piece_units;  // of a gate of a warp's items
  static constexpr bool in_grid = std::is_same_v<Exchange, GridExchange>;
  static constexpr bool in_split_grid = is_backward && in_grid && FUSEDRNN_HAS_CLUSTERS;  // where the plan says so
  static constexpr bool shares_sums = !in_grid && cluster_shares_sums(Cell::gates, is_backward);
  using V = Values<float, 1>;

  const P& p;
  unsigned char* const memory;
  const ResidentPlan& plan;
  const ResidentLayout& layout;
  const int thread, lane, warp, H, d;
  const int rank;   // of the block in its team
  const int first;  // row of the batch in the team
  const Exchange exchange;
  // A warp's, each a part of the inner dimension for some row tiles.
  struct Slot {
    int part, row_tile, tiles, first_group, groups;
    int overflow;  // the place of its first group, as if all were beyond the registers
  };
  const Slot slots[2];
  const int item_row, item_unit;    // of a tile that are this thread's
  const int piece_row, first_unit;  // of the piece that this thread sends, of its warp's

  FUSEDRNN_DEVICE Resident(const P& p, unsigned char* memory)
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
        first(blockIdx.y * plan.tiles * plan.rows),
        exchange(make_exchange()),
        slots{make_slot(0), make_slot(1)},
        item_row(thread / plan.units),
        item_unit(thread % plan.units),
        piece_row(begin_of_piece() / plan.units),
        first_unit(begin_of_piece() % plan.units) {}

  FUSEDRNN_DEVICE int begin_of_piece() const { return thread - lane + lane % warp_pieces * piece_units; }

  FUSEDRNN_DEVICE Exchange make_exchange() const {
    if constexpr (in_grid) {
      const int team = d * plan.teams + blockIdx.y;
      return {plan, layout, memory, rank, in, team, p.data, p.counters};
    } else if constexpr (shares_sums) {
      return {plan, layout, memory, rank};
    } else {
      return {plan, layout, memory, rank, in};
    }
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

  // Number `number` of those of a slot, which are the groups of one row tile after those of another.
  FUSEDRNN_DEVICE Fragment load_fragment(const Slot& slot, int number) const {
    const int tile = shares_sums ? number / layout.part_groups : 0, group = number - tile * layout.part_groups;
    if (tile >= slot.tiles || group >= slot.groups) return {};
    const int row = (slot.row_tile + tile) * 16 + lane / 4;
    return {load_row(row, slot.first_group + group), load_row(row + 8, slot.first_group + group)};
  }

  using Weights = Fragment[2][register_groups];

  FUSEDRNN_DEVICE void load_weights(Weights& weights) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Slot& s = slots[i];
#pragma unroll
      for (int number = 0; number < register_groups; ++number) weights[i][number] = load_fragment(s, number);
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

  FUSEDRNN_DEVICE void begin() const {
    // Zeros where no block ever writes.
    uint32_t* const words = exchange.operand(0, 0);
    for (int i = thread; i < (layout.sums - layout.operand) / 16; i += resident_threads) store_words(words + i * 4, {});
#if FUSEDRNN_HAS_CLUSTERS
    if constexpr (in_split_grid)
      if (plan.split > 1) shared_sums().begin();
#endif
    exchange.begin();
  }

  // The weights times what came in. Calls put(slot, row tile of the slot, sums, first column) with each tile's sums.
  template <class Put>
  FUSEDRNN_DEVICE void multiply_by(const Weights& weights, const uint32_t* operand, const Put& put) const {
    if (!slots[0].groups) return;  // and then its second has none
    if constexpr (Multiplier::columns == tile_columns) {
      multiply_columns(weights, operand, 0, put);
    } else {
#pragma unroll 1
      for (int column = 0; column < plan.rows; column += Multiplier::columns)
        multiply_columns(weights, operand, column, put);
    }
  }

  template <class Put>
  FUSEDRNN_DEVICE void multiply_columns(const Weights& weights, const uint32_t* operand, int column,
                                        const Put& put) const {
    using Operand = typename Multiplier::Operand;
    constexpr int at_once = Multiplier::groups_at_once;
    const int a_group = plan.rows * group_words, all = layout.slot_groups;
    const bool same =
        shares_sums || (slots[0].first_group == slots[1].first_group && slots[0].groups == slots[1].groups);
    const uint32_t* const own = Multiplier::begin(operand, column, plan.rows, lane);
    const auto load = [&](int group) { return Multiplier::load(own + group * a_group, plan.rows - column); };
    // Where a slot has no such group, the zeros behind all: its weights there are zero too.
    const auto load_of = [&](const Slot& s, int group) {
      return load(group < s.groups ? s.first_group + group : layout.groups);
    };
    typename Multiplier::Sum sums[2] = {};
    int group = 0, tile = 0;  // of the slot's next
    const auto next_group = [&] {
      if (++group < layout.part_groups) return;
      put(slots[0], tile, sums[0], column);
      put(slots[1], tile, sums[1], column);
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
    if constexpr (!shares_sums) {
      put(slots[0], 0, sums[0], column);
      put(slots[1], 0, sums[1], column);
    }
  }

  // Sums of every other product in another place, so that none waits for those that still read the last.
  FUSEDRNN_DEVICE float* sums(int number) const {
    return reinterpret_cast<float*>(memory + layout.sums) + number % 2 * layout.sums_words;
  }

  // Leaves product `number` in shared memory.
  FUSEDRNN_DEVICE void multiply(const Weights& weights, const uint32_t* operand, int number) const {
    float* const to = sums(number);
    multiply_by(weights, operand, [&](Slot slot, int, const typename Multiplier::Sum& sum, int first_column) {
      float* const tile = to + (slot.part * tile_columns + first_column) * layout.sums_ld + slot.row_tile * 16;
      Multiplier::for_pairs(sum, lane, [&](int half, int row, int column, float x, float y) {
        if (!slot.groups) return;
        float* const at = tile + column * layout.sums_ld + half * 8 + row;
        at[0] = x;
        at[layout.sums_ld] = y;
      });
    });
  }

#if FUSEDRNN_HAS_CLUSTERS
  // Sends each block of the cluster its share.
  FUSEDRNN_DEVICE void multiply_and_send(const Weights& weights, int tile, int round) const {
    multiply_by(weights, exchange.operand(tile, round),
                [&](Slot slot, int of_slot, const typename Multiplier::Sum& sum, int first_column) {
                  Multiplier::for_pairs(sum, lane, [&](int half, int row, int column, float x, float y) {
                    if (of_slot < slot.tiles)
                      exchange.send(tile, round, (slot.row_tile + of_slot) * 16 + half * 8 + row, first_column + column,
                                    x, y);
                  });
                });
  }

  FUSEDRNN_DEVICE SharedSums shared_sums() const { return {plan, layout, memory, rank}; }
#endif

  // After product `number` of a split grid.
  FUSEDRNN_DEVICE void exchange_sums(int tile, int round, int number) const {
#if FUSEDRNN_HAS_CLUSTERS
    if (plan.split == 1) return;
    __syncthreads();
    shared_sums().exchange(tile, round, [&](int row, int of_weights) {
      V sum[piece_words] = {};
      const float* from = sums(number) + row * layout.sums_ld + of_weights;
      const int parts = layout.parts + (of_weights < layout.halved_tiles * 16);
#pragma unroll 1
      for (int part = 0; part < parts; ++part, from += tile_columns * layout.sums_ld) {
        const auto some = cuda::load<piece_words>(from);
#pragma unroll
        for (int k = 0; k < piece_words; ++k) sum[k] += V{some[k]};
      }
      Words words;
#pragma unroll
      for (int k = 0; k < piece_words; ++k) words[k] = bits_of(sum[k][0]);
      return words;
    });
#endif
  }

  // The two arrays of states, of a tile.
  FUSEDRNN_DEVICE float* states(int which, int tile) const {
    return reinterpret_cast<float*>(memory + layout.states) + (which * plan.tiles + tile) * plan.rows * plan.units;
  }

  // The unit and the row of a tile that are a thread's, and where they are in the block and in the batch.
  struct Item {
    int row, unit, in_states;
    Position at;
    bool in_tile, exists;  // not beyond the tile; nor beyond the layer and the batch
  };
  FUSEDRNN_DEVICE Item item(int tile) const {
    const int b = first + tile * plan.rows + item_row, j = rank * plan.units + item_unit;
    const bool in_tile = item_row < plan.rows;
    return {item_row, item_unit, thread, {b, j, d}, in_tile, in_tile && b < p.step.B && j < H};
  }

  // What the product of a tile and its exchange left for an item, of each gate.
  FUSEDRNN_DEVICE void products(int tile, int round, int number, const Item& item, V (&product)[out]) const {
#pragma unroll
    for (int gate = 0; gate < out; ++gate) product[gate] = V{};
    if (!item.in_tile) return;
#if FUSEDRNN_HAS_CLUSTERS
    if constexpr (shares_sums) {
      const float* from = exchange.shares(tile, round) + item.unit * layout.share_ld + item.row;
#pragma unroll 4
      for (int block = 0; block < plan.blocks; ++block, from += exchange.share_of_block()) product[0] += load<1>(from);
      return;
    }
    if (in_split_grid && plan.split > 1) {
#pragma unroll
      for (int member = 0; member < split_blocks; ++member)
        product[0] += load<1>(shared_sums().share(tile, member) + item.in_states);
      return;
    }
#endif
    const int first_row = item.unit * out, a_part = tile_columns * layout.sums_ld;
    const int most = layout.halved_tiles ? 2 : layout.parts, halved = layout.halved_tiles * 16;
    const float* from = sums(number) + item.row * layout.sums_ld + first_row;
#pragma unroll 1
    for (int part = 0; part < most; ++part, from += a_part) {
      if constexpr (out == 4) {  // of one row tile, and in one access
        if (part >= layout.parts && first_row >= halved) break;
        const auto all = cuda::load<out>(from);
#pragma unroll
        for (int gate = 0; gate < out; ++gate) product[gate] += V{all[gate]};
      } else {
#pragma unroll
        for (int gate = 0; gate < out; ++gate)
          if (part < layout.parts || first_row + gate < halved) product[gate] += load<1>(from + gate);
      }
    }
  }

  // Hands on what a warp's threads have made for an item, by gate.
  FUSEDRNN_DEVICE void hand_on(int tile, int round, const Item& item, const V (&made)[in]) const {
    if constexpr (shares_sums) {
      // To the block itself, for its own product.
      if (!item.in_tile) return;
#pragma unroll
      for (int gate = 0; gate < in; ++gate) {
        uint32_t* const word =
            exchange.operand(tile, round) + place_in_operand(plan, layout, gate, item.row, item.unit / word_scalars);
        if constexpr (word_scalars == 1)
          *word = Multiplier::bits(made[gate][0]);
        else
          store<1>(reinterpret_cast<S*>(word) + item.unit % word_scalars, made[gate]);
      }
    } else {
#pragma unroll
      for (int gate = 0; gate < in; ++gate) {
        const uint32_t bits = Multiplier::bits(made[gate][0]);
        const int begin = lane % warp_pieces * piece_units;
        Words words;
        if constexpr (word_scalars == 1) {
#pragma unroll
          for (int i = 0; i < piece_words; ++i) words[i] = from_lane(bits, begin + i);
        } else {
          const uint32_t pair = bits | from_lane(bits, lane | 1) << 16;  // of even lanes
#pragma unroll
          for (int i = 0; i < piece_words; ++i) words[i] = from_lane(pair, begin + 2 * i);
        }
        const int word = (rank * plan.units + first_unit) / word_scalars;
        if (piece_row < plan.rows)
          exchange.send(tile, round, place_in_operand(plan, layout, gate, piece_row, word), words, lane / warp_pieces,
                        piece_units);
      }
    }
  }
};

}  // namespace fusedrnn::cuda
