// Enough of CUDA to run the sources under csrc/cuda on the host, every access watched.
//
// Those sources are compiled by g++ with -fsanitize=thread, but libtsan is not linked: the calls that the compiler puts
// before every access end in shim.cpp, which knows each byte of "device" memory. It reports accesses out of bounds,
// misaligned, of memory that nobody has written, by host code, and those of two threads of which one writes and no barrier
// lies between. A launch runs its blocks one by one, and the threads of a block as fibers from barrier to barrier, both in
// an order drawn from the seed; blocks that wait for each other do not exist yet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

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

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

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

}  // namespace shim

#define threadIdx (shim::thread_index)
#define blockIdx (shim::block_index)
#define blockDim (shim::block_size)
#define __syncthreads() shim::synchronize()

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t);
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
