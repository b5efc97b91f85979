// The numbers of the GPU's schedules: pure functions of sizes, each with its reason. No CUDA header: they are tested
// without a GPU. Where no measurement is named there has been none yet.
#pragma once

#include <algorithm>
#include <cstdint>

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

// Rows of the sequence in a chunk, per direction: at least the whole batch, so that a step fits.
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

}  // namespace fusedrnn::cuda
