// A block of a team (tuning.h) that shares a recurrence: the units and rows of the batch that are its own, and what becomes of
// the sums of a product (product.cuh). What it does with them is resident.cuh's.
#pragma once

#include "product.cuh"

namespace fusedrnn::cuda {

template <class Cell, class Multiplier, class Exchange, class P, bool is_backward, bool compact>
struct Resident : TeamProduct<Cell, Multiplier, Exchange, P, is_backward, compact> {
  using Base = TeamProduct<Cell, Multiplier, Exchange, P, is_backward, compact>;
  using Base::in, Base::out, Base::word_scalars, Base::in_grid, Base::in_split_grid, Base::has_registers,
      Base::shares_sums;
  using Base::p, Base::memory, Base::plan, Base::layout, Base::thread, Base::lane, Base::warp, Base::H, Base::d,
      Base::rank;
  using Base::slots, Base::split, Base::multiply_by;
  using typename Base::S, typename Base::V, typename Base::Slot, typename Base::Sums, typename Base::Weights;
  static constexpr int piece_units = piece_words * word_scalars;
  static constexpr int warp_pieces = 32 / piece_units;  // of a gate of a warp's items
  const int first;                                      // row of the batch in the team
  const Exchange exchange;
  const int item_row, item_unit;  // of a tile that are this thread's
  const int unit;                 // of the layer, likewise
  const bool in_tile, has_unit;   // not beyond the tile; nor beyond the layer
  const bool sends;               // a piece of what its warp makes, or all of its own
  int places[in];                 // in an operand, of what it sends of each gate
  float* const own_states;        // of the first tile
  float* slot_sums[2];            // of a compact team, where this thread's of even products go, of both slots
  struct Parts {
    const float* first;
    int count, next, buffer;  // words from one to the next, and from one buffer to the next
  };
  const Parts kept_parts;  // of the sums that are this thread's, where there are registers for them
  const int destination;   // of a row tile of this warp's weights, as find_destination says
  float* const own_share;  // where what this thread sends of such a tile is in a share of the first tile's even rounds

  FUSEDRNN_DEVICE Resident(const P& p, unsigned char* memory)
      : Base(p, memory),
        first(blockIdx.y * plan.tiles * plan.rows),
        exchange(make_exchange()),
        item_row(thread / plan.units),
        item_unit(thread % plan.units),
        unit(rank * plan.units + item_unit),
        in_tile(item_row < plan.rows),
        has_unit(in_tile && unit < H),
        sends(first_sent() / plan.units < plan.rows),
        own_states(kept_if<has_registers>(reinterpret_cast<float*>(memory + layout.states) + thread)),
        kept_parts(keep_parts()),
        destination(find_destination()),
        own_share(find_own_share()) {
    if constexpr (has_registers)
#pragma unroll
      for (int gate = 0; gate < in; ++gate) places[gate] = find_place(gate);
    if constexpr (compact && !shares_sums)
      for (int i = 0; i < 2; ++i)
        slot_sums[i] = kept_shared(sums_of(slots[i], sums(0), 0) + Multiplier::column(lane) * layout.sums_ld +
                                   Multiplier::row(lane));
  }

  FUSEDRNN_DEVICE int tiles() const { return compact ? 1 : plan.tiles; }

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
      return {exchange.shares() + place_in_share(layout, item_unit, item_row), plan.blocks, of_block,
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

  // Where the sums of a row tile go in a cluster. A warp's lanes know it of all of the warp's, two lanes of a tile of both slots:
  // an address is then asked of a lane, not the result of a division and what follows.
  FUSEDRNN_DEVICE int find_destination() const {
    if constexpr (!shares_sums) return 0;
    const Slot slot = this->make_slot(lane % 2);
    const int tile = lane / 2, unit = (slot.row_tile + tile) * 16, to = unit / plan.units;
    return tile < slot.tiles && to < plan.blocks ? destination_of(to, unit - to * plan.units, layout) : nowhere;
  }
  FUSEDRNN_DEVICE float* find_own_share() const {
#if FUSEDRNN_HAS_CLUSTERS
    if constexpr (shares_sums) {
      const int unit = Multiplier::row(lane) + (Multiplier::pairs == 1 ? Multiplier::half(0, lane) * 8 : 0);
      const int place = place_in_share(layout, unit, Multiplier::column(lane));
      return kept_if<compact>(exchange.shares() + rank * exchange.share_of_block() + place);
    }
#endif
    return nullptr;
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

  // Sums of every other product in another place, so that none waits for those that still read the last.
  FUSEDRNN_DEVICE float* sums(int number) const {
    return reinterpret_cast<float*>(memory + layout.sums) + (number & 1) * layout.sums_words;
  }

  // Where the sums of a slot go, from a column on.
  FUSEDRNN_DEVICE float* sums_of(const Slot& slot, float* sums, int first_column) const {
    return sums + (slot.part * tile_columns + first_column) * layout.sums_ld + slot.row_tile * 16;
  }

  // Leaves product `number` in shared memory.
  FUSEDRNN_DEVICE void multiply(const Weights& weights, const uint32_t* operand, int number) const {
    float* const all = sums(number);
    const int buffer = (number & 1) * (in_split_grid ? layout.sums_words : kept_parts.buffer);
    multiply_by(weights, operand, [&](int, const Sums& both, int first_column) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!slots[i].groups) continue;
        float* const tile = sums_of(slots[i], all, first_column);
        Multiplier::for_pairs(both[i], lane, [&](int pair, float x, float y) {
          float* const at = compact ? slot_sums[i] + buffer + Multiplier::half(pair, lane) * 8
                                    : tile + Multiplier::column(lane) * layout.sums_ld +
                                          Multiplier::half(pair, lane) * 8 + Multiplier::row(lane);
          at[0] = x;
          at[layout.sums_ld] = y;
        });
      }
    });
  }

#if FUSEDRNN_HAS_CLUSTERS
  // Sends each block of the cluster its share.
  FUSEDRNN_DEVICE void multiply_and_send(const Weights& weights, int tile, int round) const {
    float* const share = own_share + (tile * 2 + (round & 1)) * kept_parts.buffer;
    multiply_by(weights, exchange.operand(tile, round), [&](int of_slots, const Sums& both, int first_column) {
      int to[2];  // both first: they come from other lanes
#pragma unroll
      for (int i = 0; i < 2; ++i) to[i] = from_lane(destination, of_slots * 2 + i);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Values<float, 2 * Multiplier::pairs> sums;
        Multiplier::for_pairs(both[i], lane,
                              [&](int pair, float x, float y) { sums[2 * pair] = x, sums[2 * pair + 1] = y; });
        if (to[i] != nowhere && first_column + Multiplier::column(lane) < plan.rows)
          exchange.send(tile, round, to[i], share + place_in_share(layout, 0, first_column), sums);
      }
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
    return own_states + (which * tiles() + tile) * plan.rows * plan.units;
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
      for (int i = 0; i < count; ++i) {
        const float* const at = from + i * parts.next;
        if constexpr (out == 4) {  // in one access
          part[i] = cuda::load<out>(at);
        } else {
#pragma unroll
          for (int gate = 0; gate < out; ++gate) part[i][gate] = load<1>(at + gate)[0];
        }
      }
      from += count * parts.next;
      // In halves, for an addition waits for the one before.
#pragma unroll
      for (int apart = 8; apart > 0; apart /= 2)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (i < apart && 2 * apart <= count) part[i] += part[i + apart];
#pragma unroll
      for (int gate = 0; gate < out; ++gate) product[gate] += V{part[0][gate]};
    };
    constexpr int at_once = out == 1 ? 4 : 2;
    int left = parts.count;
    if constexpr (compact || shares_sums) {  // of the largest cluster, or as 512 units have them
      constexpr int usual = shares_sums ? 16 : out == 1 ? 8 : 2;
      if (left == usual) return add_some(std::integral_constant<int, usual>());
    }
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
