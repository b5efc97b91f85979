// The numbers of the GPU's schedules: pure functions of sizes, each with its reason. No CUDA header: they are tested
// without a GPU. Where no measurement is named there has been none yet.
#pragma once

#include <algorithm>
#include <cstdint>

#include "inline.h"

namespace fusedrnn::cuda {

// Threads of an element-wise block. Small, so that a small layer (B 32, H 256: 2048 threads of 4 units) spreads over as
// many multiprocessors as it can.
constexpr int block_threads = 128;

// Registers a thread of an element-wise kernel may have: 64 leave room for 8 blocks of 128 threads on a multiprocessor of
// 65,536 registers, half of the threads that it can hold, with four wide loads or more in flight each.
constexpr int register_budget = 64;
constexpr int blocks_at_once = 8;

// Units that a thread takes at once where H and addresses allow: 16 bytes of the accumulators' type, the widest access.
constexpr int vector_width(int accumulator_bytes) { return 16 / accumulator_bytes; }

// Room for what one chunk of steps makes: the input projection's sums forward, the gradients of pre-activations
// backward. Both are written by one kernel and read by the next, and stay in a 50 MB L2 (H100; A100 40, H200 60)
// without a way through device memory; and they do not grow with T. A product with so many rows (2048 of 4096 float32
// columns) still has several tiles of 128x128 for each of 132 multiprocessors.
constexpr int64_t chunk_bytes = 32 << 20;

// Rows of the sequence in a chunk, by the bytes that all directions need for one: at least the whole batch, so that a step
// fits.
constexpr int64_t chunk_rows(int64_t total_rows, int64_t batch, int64_t row_bytes, int64_t bytes = chunk_bytes) {
  return std::min(total_rows, std::max(batch, bytes / row_bytes));
}

// Blocks and threads of a kernel in which a thread takes `width` units of one row: units lie along x of a block, so that
// a warp's accesses are contiguous, and rows fill the rest of it.
struct Geometry {
  int64_t grid_x;
  unsigned grid_y, grid_z, block_x, block_y;
};

constexpr Geometry elementwise_geometry(int64_t rows, int64_t units, int width, int directions) {
  const int64_t columns = (units + width - 1) / width;
  int x = 1;
  while (x < block_threads && x < columns) x *= 2;
  const int y = block_threads / x;
  return {(rows + y - 1) / y, static_cast<unsigned>((columns + x - 1) / x), static_cast<unsigned>(directions),
          static_cast<unsigned>(x), static_cast<unsigned>(y)};
}

// The schedules besides the step schedule, as bits.
enum Schedules : unsigned { block_schedule = 1, cluster_schedule = 2, grid_schedule = 4, all_schedules = 7 };

// What a GPU offers (cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin, the most blocks of a
// cluster, or 0) and which schedules may be used on it.
struct Limits {
  int multiprocessors, shared_bytes, largest_cluster;
  unsigned schedules;
};

// Below 8 steps, loading the weights takes longer than the launches that are saved.
constexpr int64_t fewest_resident_steps = 8;

// The block schedule (block.cuh). With so many threads, each can have 128 registers.
constexpr int most_block_threads = 512;
constexpr int block_register_budget = 128;

// Weights that a step reads from shared memory in some 500 cycles, at 128 bytes each; from there on tensor cores with the
// weights in registers take less time, what blocks have to hand each other included.
constexpr int64_t block_weight_bytes = 64 << 10;

// Neighbouring outputs that a thread computes: 4 bytes of weights, the width of a bank of shared memory.
constexpr FUSEDRNN_INLINE int adjacent_units(int scalar_bytes) { return scalar_bytes < 4 ? 4 / scalar_bytes : 1; }

constexpr FUSEDRNN_INLINE int padded_units(int64_t H) { return static_cast<int>((H + 3) / 4 * 4); }

// An odd number of banks from row to row, so that a column is written without conflicts.
constexpr FUSEDRNN_INLINE int leading_dimension(int64_t H, int scalar_bytes) {
  return padded_units(H) + adjacent_units(scalar_bytes);
}

struct BlockPlan {
  int rows;  // of the batch in a block, or 0 where the step schedule must do
  int threads, shared_bytes;
};

// Units of all rows of a block that a thread takes in turn; more would need more registers than there are.
constexpr FUSEDRNN_INLINE int units_of_a_thread(int rows) { return rows < 4 ? 1 : rows / 2; }

// A thread for every `adjacent` units of every gate, and enough of them to share out the rows' units.
constexpr BlockPlan block_shape(int rows, int64_t H, int gates, bool has_cell, int scalar_bytes,
                                int accumulator_bytes) {
  const int64_t padded = padded_units(H), vectors = 1 + has_cell + 2 * gates, at_once = units_of_a_thread(rows);
  const int64_t threads = std::max(gates * padded / adjacent_units(scalar_bytes), (rows * H + at_once - 1) / at_once);
  const int64_t bytes =
      gates * padded * leading_dimension(H, scalar_bytes) * scalar_bytes + rows * vectors * padded * accumulator_bytes;
  return {rows, static_cast<int>((threads + 31) / 32 * 32), static_cast<int>(bytes)};
}

// Few rows a block, for a step takes longer the more there are, and 8 would need more registers than there are; but not
// more blocks than multiprocessors, for each fills one. A batch that does not fit that way has enough rows for the step
// schedule's products to be good.
constexpr BlockPlan block_plan(const Limits& limits, int64_t T, int64_t B, int64_t H, int directions, int gates,
                               bool has_cell, int scalar_bytes, int accumulator_bytes) {
  const bool allowed = limits.schedules & block_schedule;
  if (!allowed || T < fewest_resident_steps || B == 0 || H > 2 * most_block_threads) return {0, 0, 0};
  for (const int rows : {1, 2, 4}) {
    const BlockPlan plan = block_shape(rows, H, gates, has_cell, scalar_bytes, accumulator_bytes);
    if ((B + rows - 1) / rows * directions <= limits.multiprocessors && plan.threads <= most_block_threads &&
        plan.shared_bytes <= limits.shared_bytes)
      return plan;
  }
  return {0, 0, 0};
}

// The resident schedules (resident.cuh): the blocks of a team keep the recurrent weights of a direction in their registers,
// as operands of tensor cores, and what does not fit there in shared memory; each step they hand each other what they made
// of the state, in a cluster through their shared memory, in a grid through the L2.
constexpr int resident_threads = 256;
constexpr int resident_warps = resident_threads / 32;
constexpr int resident_register_budget = 255;  // one block to a multiprocessor

// A warp has two slots, each a part of the inner dimension for 16 rows of weights, of which so many groups (of 64 bytes a
// row: mma.cuh) are in registers: 2 * 8 groups of 8 registers a thread leave as many for everything else.
constexpr int slots = 2 * resident_warps;
constexpr int register_groups = 8;
constexpr int groups_at_once = 4;  // without a branch between them: loads need not wait for products
constexpr int group_words = 16;
constexpr int fragment_bytes = 8 * 32 * 4;  // of a slot's group: 8 registers of 32 threads

constexpr int tile_columns = 8;   // rows of the batch that an instruction takes
constexpr int units_at_once = 2;  // units of a tile that a thread takes in turn

// Teams with more tiles of the batch than this give cuBLAS's products enough rows to be as fast as these, which take 8 at a
// time.
constexpr int most_tiles = 8;

// A chunk's steps pay for loading the weights; what a chunk makes need not stay in L2, for it is read ahead of its use.
constexpr int64_t resident_chunk_factor = 4;

// Who works on a product in backward, whose inner dimension is the longer: that of all gates. Blocks of a grid that are
// neighbours, and a cluster, share it out for all of their units, so that each takes in a fourth of it: from the L2 the whole
// (1 MB a step for an LSTM of 2048 and 64 rows) would take longer than the step schedule does. What they have of each other's
// units is a few hundred bytes. More than 4 do not fit the 16 or 18 multiprocessors of an H100's GPC as well.
constexpr int split_blocks = 4;

enum class Team { cluster, split_grid, grid };

struct ResidentPlan {
  int blocks;       // of a team, or 0 where another schedule must do
  int units;        // of a block, a multiple of 8
  int rows, tiles;  // of the batch in a tile, and tiles of a team
  int teams;        // of a direction
  bool cluster;     // or a grid
  int split;        // blocks of a team that share the inner dimension, or 1
  int shared_bytes;
};

// How a block lies in its registers and its shared memory. Operands are 32-bit words, two or one of the scalars.
struct ResidentLayout {
  int gate_words;      // of all units, of one gate of what comes in
  int all_groups;      // of words of the inner dimension
  int groups;          // of them, those of a block
  int row_tiles;       // of 16 rows of weights
  int slots_per_part;  // that share a part of the inner dimension, even or 1, so that a warp's two share it or the rows
  int parts;           // of the inner dimension
  int part_groups;     // groups of a part
  int halved_tiles;    // row tiles, the first, that have two parts where there is one: slots are left for them
  int half_groups;     // groups of such a part
  int operand_words;   // [groups and one of zeros][rows][16]: a warp's 16-byte loads are of neighbours
  int sums_ld;         // a step of 8 banks from every second row to the next, for the stores of two columns each
  // Offsets in bytes of shared memory:
  int operand;   // [tiles][2] in a cluster, one in a grid
  int made;      // [gates that come in][rows][units] what is handed on
  int sums;      // [parts of a row tile][8][sums_ld]
  int states;    // [tiles][rows][units] twice, once for cells without a cell state
  int shares;    // [tiles][split][rows][units] of sums, where they are split
  int barriers;  // [tiles][2] in a cluster, [tiles] where sums are split
  int overflow;  // [parts and row_tiles: overflow_before][groups beyond the registers][2][32 threads][4]
  int bytes;
};

constexpr FUSEDRNN_INLINE int round_up(int64_t x, int to) { return static_cast<int>((x + to - 1) / to * to); }

// Groups beyond the registers of the slots before that of a part and a row tile.
constexpr FUSEDRNN_INLINE int overflow_before(const ResidentLayout& l, int part, int row_tile) {
  const auto beyond = [](int groups) { return groups > register_groups ? groups - register_groups : 0; };
  if (row_tile < l.halved_tiles) return (2 * row_tile + part) * beyond(l.half_groups);
  const int whole = part * l.row_tiles + row_tile - l.halved_tiles;
  return 2 * l.halved_tiles * beyond(l.half_groups) + whole * beyond(l.part_groups);
}

// Of what comes in and of what is made of it: forward the state and all gates, backward the other way round.
constexpr FUSEDRNN_INLINE int gates_in(int gates, bool backward) { return backward ? gates : 1; }
constexpr FUSEDRNN_INLINE int gates_out(int gates, bool backward) { return backward ? 1 : gates; }

constexpr FUSEDRNN_INLINE ResidentLayout resident_layout(const ResidentPlan& plan, int gates, bool backward,
                                                         bool has_cell, int scalar_bytes) {
  ResidentLayout l{};
  const int in = gates_in(gates, backward);
  l.gate_words = plan.blocks * plan.units * scalar_bytes / 4;
  l.all_groups = round_up(static_cast<int64_t>(in) * l.gate_words, group_words) / group_words;
  l.groups = (l.all_groups + plan.split - 1) / plan.split;
  l.row_tiles = round_up(gates_out(gates, backward) * plan.split * plan.units, 16) / 16;
  l.slots_per_part = l.row_tiles == 1 || 2 * l.row_tiles > slots ? l.row_tiles : round_up(l.row_tiles, 2);
  const int most_parts = slots / l.slots_per_part;
  l.part_groups = most_parts ? (l.groups + most_parts - 1) / most_parts : l.groups;
  l.parts = (l.groups + l.part_groups - 1) / l.part_groups;
  if (l.parts == 1 && l.groups > register_groups && l.row_tiles < slots) l.halved_tiles = slots - l.row_tiles;
  l.half_groups = (l.groups + 1) / 2;
  l.operand_words = (l.groups + 1) * plan.rows * group_words;
  l.sums_ld = l.row_tiles * 16 + 4;
  const int buffers = plan.cluster ? 2 * plan.tiles : 1, most_parts_of_a_tile = l.halved_tiles ? 2 : l.parts;
  const int tile_bytes = plan.rows * plan.units * 4, barriers = plan.cluster ? 2 : plan.split > 1 ? 1 : 0;
  l.made = l.operand + buffers * l.operand_words * 4;
  l.sums = l.made + in * plan.rows * plan.units * scalar_bytes;
  l.states = l.sums + most_parts_of_a_tile * tile_columns * l.sums_ld * 4;
  l.shares = l.states + (1 + has_cell) * plan.tiles * tile_bytes;
  l.barriers = l.shares + (plan.split > 1 ? plan.tiles * plan.split * tile_bytes : 0);
  l.overflow = round_up(l.barriers + barriers * plan.tiles * 8, 16);
  l.bytes = l.overflow + overflow_before(l, l.parts - 1, l.row_tiles) * fragment_bytes;
  return l;
}

// The fewest blocks whose registers hold all the weights, for the fewer share a state, the less there is to hand on; or else
// the fewest that hold them at all. The batch is shared out over as many teams as there is room for.
constexpr ResidentPlan resident_plan(const Limits& limits, Team team, int64_t T, int64_t B, int64_t H, int directions,
                                     int gates, bool backward, bool has_cell, int scalar_bytes) {
  const bool cluster = team == Team::cluster;
  const bool allowed = limits.schedules & (cluster ? cluster_schedule : grid_schedule);
  const int most = cluster ? std::min(limits.largest_cluster, 16) : limits.multiprocessors / directions;
  if (!allowed || T < fewest_resident_steps || B == 0 || H > (int64_t{1} << 20)) return {};
  const int split = team == Team::split_grid ? split_blocks : 1;
  if (split > (backward ? limits.largest_cluster : 1)) return {};
  for (const bool in_registers : {true, false})
    for (int blocks = std::max(2, split); blocks <= most; blocks += cluster ? blocks : split) {
      const int units = round_up((H + blocks - 1) / blocks, 8);
      // Blocks without units serve where their share of the inner dimension is needed, or there is no other cluster.
      const bool too_many = (blocks - split) * static_cast<int64_t>(units) >= H && !(cluster && !in_registers);
      if (units * tile_columns > units_at_once * resident_threads || too_many) continue;
      const int room = std::max(1, limits.multiprocessors / blocks / directions);
      const int64_t of_a_team = (B + room - 1) / room, all_tiles = (of_a_team + tile_columns - 1) / tile_columns;
      const int rows = static_cast<int>((of_a_team + all_tiles - 1) / all_tiles);
      ResidentPlan plan{blocks, units, rows, 1, 0, cluster, split, 0};
      const auto layout = [&] { return resident_layout(plan, gates, backward, has_cell, scalar_bytes); };
      if (layout().slots_per_part > slots || (in_registers && layout().part_groups > register_groups)) continue;
      if (all_tiles > most_tiles) return {};
      const auto fits = [&](int64_t tiles) {
        plan.tiles = static_cast<int>(tiles);
        plan.shared_bytes = layout().bytes;
        return plan.shared_bytes <= limits.shared_bytes;
      };
      // The blocks of a grid must all be there. More clusters than run at once take turns, all as long.
      int64_t turns = 1;
      while (!fits((all_tiles + turns - 1) / turns) && cluster && turns < all_tiles) ++turns;
      if (plan.shared_bytes > limits.shared_bytes) continue;
      const int64_t team_rows = static_cast<int64_t>(plan.tiles) * plan.rows;
      plan.teams = static_cast<int>((B + team_rows - 1) / team_rows);
      return plan;
    }
  return {};
}

}  // namespace fusedrnn::cuda
