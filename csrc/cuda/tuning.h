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

// What a GPU offers: cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin.
struct Limits {
  int multiprocessors, shared_bytes;
};

// The block schedule (block.cuh). With so many threads, each can have 128 registers.
constexpr int most_block_threads = 512;
constexpr int block_register_budget = 128;

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
// schedule's products to be good. Below 8 steps, loading the weights takes longer than the launches that are saved.
constexpr BlockPlan block_plan(const Limits& limits, int64_t T, int64_t B, int64_t H, int directions, int gates,
                               bool has_cell, int scalar_bytes, int accumulator_bytes) {
  if (T < 8 || B == 0 || H > 2 * most_block_threads) return {0, 0, 0};
  for (const int rows : {1, 2, 4}) {
    const BlockPlan plan = block_shape(rows, H, gates, has_cell, scalar_bytes, accumulator_bytes);
    if ((B + rows - 1) / rows * directions <= limits.multiprocessors && plan.threads <= most_block_threads &&
        plan.shared_bytes <= limits.shared_bytes)
      return plan;
  }
  return {0, 0, 0};
}

}  // namespace fusedrnn::cuda
