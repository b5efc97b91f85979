// Enough of CUDA to run the sources under csrc/cuda on the host, every access watched.
//
// Those sources are compiled by g++ with -fsanitize=thread, but libtsan is not linked: the calls that the compiler puts
// before every access end in memory.cpp, which knows each byte of "device" memory. It reports accesses out of bounds,
// misaligned, of memory that nobody has written, by host code, and those of two threads of which one writes and that nothing
// orders: no barrier of the block, and between blocks no barrier of the cluster, arrival of bytes or counter that was seen
// raised. threads.cpp runs the threads as fibers, in an order drawn from the seed: the blocks of a group (a cluster, or the
// whole grid) mixed, group after group; exchange.cpp is what passes between them. What a block sends into another's shared
// memory lands when the seed says so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};

using cudaStream_t = struct Stream*;
enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };

namespace shim {

// The running thread.
extern uint3 thread_index, block_index, block_size;

// The blocks of a cluster, which are neighbours, run at the same time, or all of the grid.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel, unsigned cluster,
            bool whole_grid);
extern int active_blocks;  // what a kernel is told that there is room for
extern int64_t enqueued;   // kernels, copies and fills so far

// Of the running thread's block.
void synchronize();
unsigned char* shared_memory();

// Notes an access of a kernel's thread, or of the copies and products between kernels, to device memory.
void access(const void* at, size_t bytes, bool write);
// Memory within a workspace, which without it is no memory at all.
void begin_array(void* at, size_t bytes);
void expect_aligned(const void* at, size_t bytes);

// One access of all bytes.
template <class T>
T load(const void* from) {
  expect_aligned(from, sizeof(T));
  access(from, sizeof(T), false);
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}
template <class T>
void store(void* to, const T& value) {
  expect_aligned(to, sizeof(T));
  access(to, sizeof(T), true);
  std::memcpy(to, &value, sizeof(T));
}

float from_float16(uint16_t bits);
uint16_t to_float16(float x);
float from_bfloat16(uint16_t bits);
uint16_t to_bfloat16(float x);
float to_tf32(float x);
uint32_t bits_of(float x);
float float_of(uint32_t bits);

// Of a whole warp (csrc/cuda/mma.cuh); only a TF32's first 19 bits are read.
enum class Operand { float16, bfloat16, tf32 };
void multiply_tile(Operand operand, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
uint32_t from_lane(uint32_t x, int lane);

// csrc/cuda/exchange.cuh.
void synchronize_cluster();
uintptr_t address_in(const void* own, int rank);
void init_barrier(uint64_t* barrier, uint32_t arrivals);
void expect_bytes(uint64_t* barrier, int bytes);
bool phase_is_over(uint64_t* barrier, int parity);
void store_async(uintptr_t to, const void* from, size_t bytes, uintptr_t barrier);
void add_release(uint32_t* counter, uint32_t value);
uint32_t load_acquire(const uint32_t* counter);
void begin_copy(void* to, const void* from, size_t bytes);  // nothing is there before the thread ends its copies
void end_copies();

}  // namespace shim

#define threadIdx (shim::thread_index)
#define blockIdx (shim::block_index)
#define blockDim (shim::block_size)
#define __syncthreads() shim::synchronize()

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t);
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return {}; }
