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

// The biases' gradients (biases.cuh): warps of a block, which share the rows of 32 columns, and rows that are worth a second block,
// whose sums then take a second kernel. 2048 rows are 128 loads of a thread, some 5 µs by their latency.
constexpr int column_warps = 16;
constexpr int64_t rows_of_slice = 2048;

constexpr int row_slices(int64_t rows) {
  constexpr int64_t most = 65535;  // blocks along y
  return static_cast<int>(std::clamp<int64_t>((rows + rows_of_slice - 1) / rows_of_slice, 1, most));
}
constexpr Geometry column_sums_geometry(int64_t columns, int slices, int directions) {
  return {(columns + 31) / 32, static_cast<unsigned>(slices), static_cast<unsigned>(directions), 32, column_warps};
}

// A lone step (lone_step.cuh) reads the weights once for so many rows of the batch, whose sums of all gates a thread's registers
// hold; from the L2 again for the next, where it has to have room for them. Up to how many rows that takes less time than the launches
// that it saves, no GPU has said: 16 read an LSTM's 2 MB at 512 units four times, some 2 µs.
constexpr int lone_rows = 4;
constexpr int64_t most_lone_rows = 16, most_lone_bytes = 16 << 20;
constexpr int lone_blocks_at_once = 4;
constexpr int lone_register_budget = 128;  // 65536 for a multiprocessor's threads

// Whether a call of forward is one, for everything but float64, which is for checks of gradients.
constexpr bool is_lone_step(int64_t T, int64_t B, int64_t hidden_bytes, bool has_lengths, int accumulator_bytes) {
  const bool few = B <= lone_rows || (B <= most_lone_rows && hidden_bytes <= most_lone_bytes);
  return T == 1 && B > 0 && few && !has_lengths && accumulator_bytes == 4;
}

// A warp for a unit, of some rows of a direction.
constexpr Geometry lone_step_geometry(int64_t rows, int64_t units, int rows_at_once, int directions) {
  constexpr int warps = block_threads / 32;
  return {(units + warps - 1) / warps, static_cast<unsigned>((rows + rows_at_once - 1) / rows_at_once),
          static_cast<unsigned>(directions), 32, warps};
}

// The schedules besides the step schedule, as bits; that of a grid whose neighbours share backward's products, apart.
enum Schedules : unsigned {
  block_schedule = 1,
  cluster_schedule = 2,
  grid_schedule = 4,
  split_grid_schedule = 8,
  all_schedules = 15
};

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
constexpr int group_words = 16;
constexpr int most_slot_tiles = 16;         // row tiles of a slot: 2 lanes of a warp know where the sums of each go
constexpr int fragment_bytes = 8 * 32 * 4;  // of a slot's group: 8 registers of 32 threads

// Rows of the batch that an instruction takes. A tile has fewer where a thread would have more than one of its units: what a
// thread does for a unit is most of a step's code, and most of its time.
constexpr int tile_columns = 8;

// What a tile's part of a step takes, in cycles of an H100 and an H200, from the times of kernels of 256 to 2048 units: all but
// the product and what it reads; where sums are shared by a grid's neighbours, or by a cluster, for each of a slot's row
// tiles; and a group of the product, whose weights are in registers or in shared memory. That a tile takes so long, whatever
// its weights, is why fewer tiles are worth more than weights in registers.
constexpr int64_t cluster_tile_cycles = 3300, grid_tile_cycles = 4400;
// The same in a compact team (is_compact): some 1600 fewer by the machine code's own account (docs/experiments.md), not measured.
constexpr int64_t compact_tile_cycles = 1700;
constexpr int64_t neighbours_cycles = 1100, sent_row_tile_cycles = 900;
constexpr int64_t register_group_cycles = 92, shared_group_cycles = 200;
// That every multiprocessor takes in of the L2 in a cycle, when all do.
constexpr int64_t bytes_from_l2 = 54;

// What the step schedule's launches take on that machine's host, 20 us a step. A team that takes longer has no advantage.
constexpr int64_t most_step_cycles = 36'000;

// A chunk's steps pay for loading the weights; what a chunk makes need not stay in L2, for it is read ahead of its use.
constexpr int64_t resident_chunk_factor = 4;

// Who works on a product in backward, whose inner dimension is the longer: that of all gates. Blocks of a grid that are
// neighbours, and a cluster, share it out for all of their units, so that each takes in a fourth of it: from the L2 the whole
// (1 MB a step for an LSTM of 2048 and 64 rows) would take longer than the step schedule does. What they have of each other's
// units is a few hundred bytes. More than 4 do not fit the 16 or 18 multiprocessors of an H100's GPC as well.
constexpr int split_blocks = 4;

// All blocks of a cluster share it out where a cell has gates: none then takes in anything of what the others made, 2 or 4
// bytes for every gate of a unit and a row, but 4 bytes for each unit and row: their shares of the sum.
constexpr FUSEDRNN_INLINE bool cluster_shares_sums(int gates, bool backward) { return backward && gates > 1; }

enum class Team { cluster, split_grid, grid };

constexpr Schedules schedule_of(Team team) {
  return team == Team::cluster ? cluster_schedule : team == Team::grid ? grid_schedule : split_grid_schedule;
}

struct ResidentPlan {
  int blocks;       // of a team, or 0 where another schedule must do
  int units;        // of a block, a multiple of 8, of 16 where a cluster shares the inner dimension
  int rows, tiles;  // of the batch in a tile, and tiles of a team
  int teams;        // of a direction
  bool cluster;     // or a grid
  int split;  // blocks of a team that share the inner dimension: some neighbours of a grid, all of a cluster, or 1
  int shared_bytes;
  int64_t cycles;  // of a step
};

// How a block lies in its registers and its shared memory. Operands are 32-bit words, two or one of the scalars.
struct ResidentLayout {
  int gate_words;      // of all units that come in, of one gate
  int all_groups;      // of words of what comes in
  int groups;          // of them, those of a block
  int row_tiles;       // of 16 rows of weights
  int slots_per_part;  // that share a part of the inner dimension, even or 1, so that a warp's two share it or the rows
  int parts;           // of the inner dimension
  int part_groups;     // groups of a part
  int halved_tiles;    // row tiles, the first, that have two parts where there is one: slots are left for them
  int half_groups;     // groups of such a part
  int slot_tiles;      // row tiles of a slot, more than one only where a cluster shares the inner dimension
  int slot_groups;     // of all of them
  int operand_words;   // [groups and one of zeros][rows][16]: a warp's 16-byte loads are of neighbours
  int sums_ld;         // a step of 8 banks from every second row to the next, for the stores of two columns each
  int sums_words;      // of one of two buffers
  int share_ld;        // rows, a multiple of 2 that is none of 4: 8 neighbouring units are then in as many banks
  // Offsets in bytes of shared memory:
  int operand;  // [tiles][2] in a cluster, one in a grid
  int sums;     // [2][parts of a row tile][8][sums_ld]
  int states;   // [tiles][rows][units] twice, once for cells without a cell state
  int shares;  // where sums are split: [tiles][split][rows][units] in a grid, [tiles][2][split][share_ld of a unit] in a cluster
  int barriers;  // [tiles][2] in a cluster, [tiles] where sums are split
  int overflow;  // [slots: overflow_before][groups beyond the registers][2][32 threads][4]
  int bytes;
};

constexpr FUSEDRNN_INLINE int round_up(int64_t x, int to) { return static_cast<int>((x + to - 1) / to * to); }

// Groups beyond the registers of the slots before that of a part and a row tile.
constexpr FUSEDRNN_INLINE int overflow_before(const ResidentLayout& l, int part, int row_tile) {
  const auto beyond = [](int groups) { return groups > register_groups ? groups - register_groups : 0; };
  if (row_tile < l.halved_tiles) return (2 * row_tile + part) * beyond(l.half_groups);
  const int whole = (part * l.row_tiles + row_tile - l.halved_tiles + l.slot_tiles - 1) / l.slot_tiles;
  return 2 * l.halved_tiles * beyond(l.half_groups) + whole * beyond(l.slot_groups);
}

// Of what comes in and of what is made of it: forward the state and all gates, backward the other way round.
constexpr FUSEDRNN_INLINE int gates_in(int gates, bool backward) { return backward ? gates : 1; }
constexpr FUSEDRNN_INLINE int gates_out(int gates, bool backward) { return backward ? 1 : gates; }

constexpr FUSEDRNN_INLINE ResidentLayout resident_layout(const ResidentPlan& plan, int gates, bool backward,
                                                         bool has_cell, int scalar_bytes) {
  ResidentLayout l{};
  const int in = gates_in(gates, backward);
  const bool all_share = plan.cluster && plan.split > 1;
  l.gate_words = (all_share ? 1 : plan.blocks) * plan.units * scalar_bytes / 4;
  l.all_groups = round_up(static_cast<int64_t>(in) * l.gate_words, group_words) / group_words;
  l.groups = all_share ? l.all_groups : (l.all_groups + plan.split - 1) / plan.split;
  l.row_tiles = round_up(gates_out(gates, backward) * plan.split * plan.units, 16) / 16;
  l.slot_tiles = all_share ? (l.row_tiles + slots - 1) / slots : 1;
  const int row_slots = (l.row_tiles + l.slot_tiles - 1) / l.slot_tiles;
  l.slots_per_part = row_slots == 1 || 2 * row_slots > slots ? row_slots : round_up(row_slots, 2);
  const int most_parts = all_share ? 1 : slots / l.slots_per_part;
  l.part_groups = most_parts ? (l.groups + most_parts - 1) / most_parts : l.groups;
  l.parts = (l.groups + l.part_groups - 1) / l.part_groups;
  if (!all_share && l.parts == 1 && l.groups > register_groups && l.row_tiles < slots)
    l.halved_tiles = slots - l.row_tiles;
  l.half_groups = (l.groups + 1) / 2;
  l.slot_groups = l.slot_tiles * l.part_groups;
  l.operand_words = (l.groups + 1) * plan.rows * group_words;
  l.sums_ld = l.row_tiles * 16 + 4;
  const int parts_of_a_tile = l.halved_tiles ? 2 : l.parts;
  l.sums_words = all_share ? 0 : parts_of_a_tile * tile_columns * l.sums_ld;
  l.share_ld = all_share ? round_up(plan.rows + 2, 4) - 2 : plan.rows;
  const int buffers = plan.cluster ? 2 * plan.tiles : 1, barriers = plan.cluster ? 2 : plan.split > 1 ? 1 : 0;
  l.sums = l.operand + buffers * l.operand_words * 4;
  l.states = l.sums + 2 * l.sums_words * 4;
  l.shares = l.states + (1 + has_cell) * plan.tiles * plan.rows * plan.units * 4;
  const int of_shares = plan.split > 1 ? plan.tiles * plan.split * l.share_ld * plan.units * 4 : 0;
  l.barriers = round_up(l.shares + (all_share ? 2 : 1) * of_shares, 8);
  l.overflow = round_up(l.barriers + barriers * plan.tiles * 8, 16);
  l.bytes = l.overflow + overflow_before(l, l.parts - 1, l.row_tiles) * fragment_bytes;
  return l;
}

// Whether a step's code may take it for granted that a team has one tile, that all weights are in registers, and that a warp's
// two slots take the same of what comes in; where a cluster shares the inner dimension, that a slot has one or two row tiles,
// whose weights then have a half of its registers each.
constexpr int compact_tile_groups = register_groups / 2;

constexpr bool is_compact(const ResidentPlan& plan, const ResidentLayout& l) {
  if (plan.tiles > 1 || l.slot_groups > register_groups) return false;
  if (plan.cluster && plan.split > 1) return l.part_groups <= compact_tile_groups && l.slot_tiles <= 2;
  return l.slots_per_part % 2 == 0 || l.parts == 1;
}

constexpr int64_t tile_cycles(const ResidentPlan& plan, const ResidentLayout& l) {
  const int in_registers = std::min(l.slot_groups, register_groups);
  const int64_t product = in_registers * register_group_cycles + (l.slot_groups - in_registers) * shared_group_cycles;
  const bool split = plan.split > 1;
  if (plan.cluster)
    return (is_compact(plan, l) ? compact_tile_cycles : cluster_tile_cycles) +
           split * l.slot_tiles * sent_row_tile_cycles + product;
  return grid_tile_cycles + split * neighbours_cycles + l.groups * plan.rows * group_words * 4 / bytes_from_l2 +
         product;
}

// The team whose steps take the fewest cycles, and of equals that of the fewest blocks: the fewer share a state, the less
// there is to hand on. The batch is shared out over as many teams as there is room for.
constexpr ResidentPlan resident_plan(const Limits& limits, Team team, int64_t T, int64_t B, int64_t H, int directions,
                                     int gates, bool backward, bool has_cell, int scalar_bytes) {
  const bool cluster = team == Team::cluster;
  const bool allowed = limits.schedules & schedule_of(team);
  const int most = cluster ? std::min(limits.largest_cluster, 16) : limits.multiprocessors / directions;
  if (!allowed || T < fewest_resident_steps || B == 0 || H > (int64_t{1} << 20)) return {};
  const bool all_share = cluster && cluster_shares_sums(gates, backward);
  const int neighbours = team == Team::split_grid ? split_blocks : 1;
  if (neighbours > 1 && !(backward && neighbours <= limits.largest_cluster)) return {};
  ResidentPlan best{};
  const auto consider = [&](int blocks, int units) {
    if (blocks > most || units > resident_threads) return;
    // A cluster may have blocks without units, but not so many that half of it would do; a grid only as many as make up its last
    // neighbours.
    const int64_t without = cluster ? blocks / 2 : neighbours;
    if ((blocks - without) * units >= H && !(cluster && blocks == 2)) return;
    const int most_rows = std::min(tile_columns, resident_threads / units);
    const int room = std::max(1, limits.multiprocessors / blocks / directions);
    const int64_t of_a_team = (B + room - 1) / room, all_tiles = (of_a_team + most_rows - 1) / most_rows;
    const int rows = static_cast<int>((of_a_team + all_tiles - 1) / all_tiles);
    ResidentPlan plan{blocks, units, rows, 1, 0, cluster, all_share ? blocks : neighbours, 0, 0};
    const auto layout = [&] { return resident_layout(plan, gates, backward, has_cell, scalar_bytes); };
    const ResidentLayout of_one = layout();
    plan.tiles = static_cast<int>(all_tiles);
    plan.cycles = all_tiles * tile_cycles(plan, of_one);
    if (of_one.slots_per_part > slots || of_one.slot_tiles > most_slot_tiles || plan.cycles > most_step_cycles) return;
    if (best.blocks && plan.cycles >= best.cycles) return;
    const auto fits = [&](int64_t tiles) {
      plan.tiles = static_cast<int>(tiles);
      plan.shared_bytes = layout().bytes;
      return plan.shared_bytes <= limits.shared_bytes;
    };
    // The blocks of a grid must all be there. More clusters than run at once take turns, all as long.
    int64_t turns = 1;
    while (!fits((all_tiles + turns - 1) / turns) && cluster && turns < all_tiles) ++turns;
    if (plan.shared_bytes > limits.shared_bytes) return;
    const int64_t team_rows = static_cast<int64_t>(plan.tiles) * plan.rows;
    plan.teams = static_cast<int>((B + team_rows - 1) / team_rows);
    best = plan;
  };
  if (cluster) {
    for (int blocks = 2; blocks <= 16; blocks *= 2)
      consider(blocks, round_up((H + blocks - 1) / blocks, all_share ? 16 : 8));
  } else {
    for (int units = resident_threads; units > 0; units -= 8)
      consider(round_up(std::max<int64_t>((H + units - 1) / units, 2), neighbours), units);
  }
  return best;
}

}  // namespace fusedrnn::cuda
