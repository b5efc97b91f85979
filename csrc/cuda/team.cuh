// A block of a team (tuning.h) that shares a recurrence: the units and rows of the batch that are its own, their weights, and
// the product with what comes in. What it does with them is resident.cuh's.
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

template <class Cell, class Multiplier, class Exchange, class P, bool is_backward>
struct Resident {
  using S = typename Multiplier::Scalar;
  static constexpr int in = gates_in(Cell::gates, is_backward), out = gates_out(Cell::gates, is_backward);
  static constexpr int word_scalars = sizeof(uint32_t) / sizeof(S), piece_units = piece_words * word_scalars;
  static constexpr int warp_pieces = 32 / piece_units;  // of a gate of a warp's items
  static constexpr bool in_grid = std::is_same_v<Exchange, GridExchange>;
  static constexpr bool in_split_grid = is_backward && in_grid && FUSEDRNN_HAS_CLUSTERS;  // where the plan says so
  static constexpr bool has_registers = !in_grid;  // left, to keep what could be read again
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
  const int item_row, item_unit;  // of a tile that are this thread's
  const int unit;                 // of the layer, likewise
  const bool in_tile, has_unit;   // not beyond the tile; nor beyond the layer
  const bool sends;               // a piece of what its warp makes, or all of its own
  int places[in];                 // in an operand, of what it sends of each gate
  const int operand_at;           // of what it multiplies, in a group
  float* const own_states;        // of the first tile
  struct Parts {
    const float* first;
    int count, next, buffer;  // words from one to the next, and from one buffer to the next
  };
  const Parts kept_parts;  // of the sums that are this thread's, where there are registers for them
  const int destination;   // of 8 rows of the weights of this warp, as find_destination says

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
        unit(rank * plan.units + item_unit),
        in_tile(item_row < plan.rows),
        has_unit(in_tile && unit < H),
        sends(first_sent() / plan.units < plan.rows),
        operand_at(keep(Multiplier::place(plan.rows, lane))),
        own_states(keep_shared(reinterpret_cast<float*>(memory + layout.states) + thread)),
        kept_parts(keep_parts()),
        destination(find_destination()) {
    if constexpr (has_registers)
#pragma unroll
      for (int gate = 0; gate < in; ++gate) places[gate] = find_place(gate);
  }

  FUSEDRNN_DEVICE int find_place(int gate) const {
    const int row = first_sent() / plan.units, of_block = first_sent() % plan.units;
    const int word = ((shares_sums ? 0 : rank * plan.units) + of_block) / word_scalars;
    return place_in_operand(plan, layout, gate, row, word);
  }
  FUSEDRNN_DEVICE int place(int gate) const { return has_registers ? places[gate] : find_place(gate); }

  FUSEDRNN_DEVICE Parts find_parts() const {
#if FUSEDRNN_HAS_CLUSTERS
    if constexpr (shares_sums) {
      const int of_block = exchange.share_of_block();
      return {exchange.shares(0, 0) + item_unit * layout.share_ld + item_row, plan.blocks, of_block,
              plan.blocks * of_block};
    }
    if (is_split()) {
      const int items = plan.rows * plan.units;
      return {shared_sums().share(0, 0) + thread, plan.split, items, plan.split * items};
    }
#endif
    return {sums(0) + item_row * layout.sums_ld + item_unit * out, layout.halved_tiles ? 2 : layout.parts,
            tile_columns * layout.sums_ld, layout.sums_words};
  }
  FUSEDRNN_DEVICE Parts keep_parts() const {
    if constexpr (!has_registers) return {};
    const Parts p = find_parts();
    return {kept_shared(p.first), kept(p.count), kept(p.next), kept(p.buffer)};
  }
  static FUSEDRNN_DEVICE int keep(int x) { return has_registers ? kept(x) : x; }
  static FUSEDRNN_DEVICE float* keep_shared(float* x) { return has_registers ? kept_shared(x) : x; }
  FUSEDRNN_DEVICE bool is_split() const { return in_split_grid && plan.split > 1; }

  // Of a tile's items, the first of those that this thread sends.
  FUSEDRNN_DEVICE int first_sent() const {
    return shares_sums ? thread : thread - lane + lane % warp_pieces * piece_units;
  }

  FUSEDRNN_DEVICE Exchange make_exchange() const {
    if constexpr (in_grid) {
      const int team = d * plan.teams + blockIdx.y;
      return {plan, layout, memory, rank, in, team, rank % split() * layout.groups, p.data, p.counters};
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

  // Where the sums of 8 rows of the weights go in a cluster. A warp's lanes know it of all of the warp's rows, 4 lanes of the
  // halves of a row tile of both slots: an address is then asked of a lane, not the result of a division and what follows.
  FUSEDRNN_DEVICE int find_destination() const {
    if constexpr (!shares_sums) return 0;
    const Slot slot = make_slot(lane / 2 % 2);
    const int tile = lane / 4, unit = (slot.row_tile + tile) * 16 + lane % 2 * 8, to = unit / plan.units;
    return tile < slot.tiles && to < plan.blocks ? destination_of(to, unit - to * plan.units, layout) : nowhere;
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
  using Sums = typename Multiplier::Sum[2];  // of both slots

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
    for (int i = thread; i < (layout.states - layout.operand) / 16; i += resident_threads)
      store_words(words + i * 4, {});
#if FUSEDRNN_HAS_CLUSTERS
    if constexpr (in_split_grid)
      if (plan.split > 1) shared_sums().begin();
#endif
    exchange.begin();
  }

  // The weights times what came in. Calls put(row tile of the slots, both slots' sums, first column) with each tile's sums.
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
    const uint32_t* const own = operand + operand_at + column * group_words;
    const auto load = [&](int group) { return Multiplier::load(own + group * a_group, plan.rows - column); };
    // Where a slot has no such group, the zeros behind all: its weights there are zero too.
    const auto load_of = [&](const Slot& s, int group) {
      return load(group < s.groups ? s.first_group + group : layout.groups);
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

  // Sums of every other product in another place, so that none waits for those that still read the last.
  FUSEDRNN_DEVICE float* sums(int number) const {
    return reinterpret_cast<float*>(memory + layout.sums) + (number & 1) * layout.sums_words;
  }

  // Leaves product `number` in shared memory.
  FUSEDRNN_DEVICE void multiply(const Weights& weights, const uint32_t* operand, int number) const {
    float* const to = sums(number);
    multiply_by(weights, operand, [&](int, const Sums& both, int first_column) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!slots[i].groups) continue;
        float* const tile =
            to + (slots[i].part * tile_columns + first_column) * layout.sums_ld + slots[i].row_tile * 16;
        Multiplier::for_pairs(both[i], lane, [&](int pair, float x, float y) {
          float* const at = tile + Multiplier::column(lane) * layout.sums_ld + Multiplier::half(pair, lane) * 8 +
                            Multiplier::row(lane);
          at[0] = x;
          at[layout.sums_ld] = y;
        });
      }
    });
  }

#if FUSEDRNN_HAS_CLUSTERS
  // Sends each block of the cluster its share.
  FUSEDRNN_DEVICE void multiply_and_send(const Weights& weights, int tile, int round) const {
    const auto outbox =
        exchange.outbox(tile, round, Multiplier::row(lane) * layout.share_ld + Multiplier::column(lane));
    multiply_by(weights, exchange.operand(tile, round), [&](int of_slots, const Sums& both, int first_column) {
      int to[2][Multiplier::pairs];  // all first: they come from other lanes
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int pair = 0; pair < Multiplier::pairs; ++pair)
          to[i][pair] = from_lane(destination, of_slots * 4 + i * 2 + Multiplier::half(pair, lane));
#pragma unroll
      for (int i = 0; i < 2; ++i)
        Multiplier::for_pairs(both[i], lane, [&](int pair, float x, float y) {
          if (to[i][pair] != nowhere && first_column + Multiplier::column(lane) < plan.rows)
            outbox.send(to[i][pair], first_column, x, y);
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

  // Of the two arrays of states, a tile's item.
  FUSEDRNN_DEVICE float* own_state(int which, int tile) const {
    return own_states + (which * plan.tiles + tile) * plan.rows * plan.units;
  }

  // What a tile has for a thread.
  struct Item {
    int b;        // row of the batch
    bool exists;  // not beyond the tile, the layer and the batch
  };
  FUSEDRNN_DEVICE Item item(int tile) const {
    const int b = first + tile * plan.rows + item_row;
    return {b, has_unit && b < p.step.B};
  }
  FUSEDRNN_DEVICE Position position(const Item& item) const { return {item.b, unit, d}; }

  // What the product of a tile and its exchange left for an item, of each gate.
  FUSEDRNN_DEVICE void products(int tile, int round, int number, V (&product)[out]) const {
#pragma unroll
    for (int gate = 0; gate < out; ++gate) product[gate] = V{};
    if (!in_tile) return;
    const int buffer = shares_sums ? tile * 2 + (round & 1) : is_split() ? tile : number & 1;
    const Parts parts = has_registers ? kept_parts : find_parts();
    const float* from = in_shared(parts.first + buffer * parts.buffer);
    const auto add_some = [&](auto some) {
      constexpr int count = decltype(some)::value;
      Values<float, out> part[count];
#pragma unroll
      for (int i = 0; i < count; ++i, from += parts.next) {
        if constexpr (out == 4) {  // in one access
          part[i] = cuda::load<out>(from);
        } else {
#pragma unroll
          for (int gate = 0; gate < out; ++gate) part[i][gate] = load<1>(from + gate)[0];
        }
      }
#pragma unroll
      for (int i = 0; i < count; ++i)
#pragma unroll
        for (int gate = 0; gate < out; ++gate) product[gate] += V{part[i][gate]};
    };
    constexpr int at_once = out == 1 ? 4 : 2;
    int left = parts.count;
#pragma unroll 1
    for (; left >= at_once; left -= at_once) add_some(std::integral_constant<int, at_once>());
#pragma unroll 1
    for (; left > 0; --left) add_some(std::integral_constant<int, 1>());
  }

  // Hands on what a warp's threads have made for their items, by gate.
  FUSEDRNN_DEVICE void hand_on(int tile, int round, const V (&made)[in]) const {
    if constexpr (shares_sums) {
      // To the block itself, for its own product.
      if (!sends) return;
#pragma unroll
      for (int gate = 0; gate < in; ++gate) {
        uint32_t* const word = exchange.operand(tile, round) + place(gate);
        if constexpr (word_scalars == 1)
          *word = Multiplier::bits(made[gate][0]);
        else
          store<1>(reinterpret_cast<S*>(word) + item_unit % word_scalars, made[gate]);
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
        if (sends) exchange.send(tile, round, place(gate), words, lane / warp_pieces, piece_units);
      }
    }
  }
};

}  // namespace fusedrnn::cuda
