// What a kernel and its schedule may assume of where they run: on a GPU, or on the host that executes the same source
// in tests (tests/hostcuda). No other file asks which of the two it is, but those that hold PTX.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(FUSEDRNN_HOSTCUDA)
#include "shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "tuning.h"

#define FUSEDRNN_DEVICE __device__ __forceinline__

// The shared memory of the launch.
#if defined(FUSEDRNN_HOSTCUDA)
#define FUSEDRNN_SHARED(name) unsigned char* const name = shim::shared_memory()
#else
#define FUSEDRNN_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace fusedrnn::cuda {

inline void expect_success(cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("fusedrnn: CUDA says: ") + cudaGetErrorString(status));
}

// Kernels take one struct by value; their shared memory is what the launch gives them.
template <class P>
void launch(void (*kernel)(P), const Geometry& g, cudaStream_t stream, const P& p, int shared_bytes = 0) {
  const dim3 grid(static_cast<unsigned>(g.grid_x), g.grid_y, g.grid_z), block(g.block_x, g.block_y);
#if defined(FUSEDRNN_HOSTCUDA)
  (void)stream;
  shim::launch(grid, block, shared_bytes, [&] { kernel(p); });
#else
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  constexpr int without_asking = 48 << 10;
  if (shared_bytes > without_asking)
    expect_success(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  expect_success(cudaLaunchKernelEx(&config, kernel, p));
#endif
}

// Arrays in a workspace; on the host they lie apart, so that one cannot be taken for another.
#if defined(FUSEDRNN_HOSTCUDA)
constexpr int64_t workspace_gap = 256;
inline void begin_array(void* at, int64_t bytes) { shim::begin_array(at, bytes); }
#else
constexpr int64_t workspace_gap = 0;
inline void begin_array(void*, int64_t) {}
#endif

inline void copy(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  if (bytes) expect_success(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
}

inline void zero(void* to, int64_t bytes, cudaStream_t stream) {
  if (bytes) expect_success(cudaMemsetAsync(to, 0, bytes, stream));
}

}  // namespace fusedrnn::cuda
