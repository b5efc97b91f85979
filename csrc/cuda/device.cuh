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

// Which blocks of a launch must run at the same time: those of a cluster (neighbours along x), or all.
struct Together {
  int cluster = 1;
  bool grid = false;
};

#if defined(FUSEDRNN_HOSTCUDA)
template <class P>
bool can_run(void (*)(P), const Geometry&, int, Together) {
  return true;
}

template <class P>
void launch(void (*kernel)(P), const Geometry& g, cudaStream_t, const P& p, int shared_bytes = 0,
            Together together = {}) {
  const dim3 grid(static_cast<unsigned>(g.grid_x), g.grid_y, g.grid_z);
  const unsigned all = grid.x * grid.y * grid.z;
  shim::launch(
      grid, dim3(g.block_x, g.block_y), shared_bytes, [&] { kernel(p); }, together.grid ? all : together.cluster);
}
#else
// Kernels take one struct by value; their shared memory is what the launch gives them.
template <class P>
class Launch {
 public:
  Launch(void (*kernel)(P), const Geometry& g, cudaStream_t stream, int shared_bytes, Together together)
      : kernel_(kernel) {
    config_.gridDim = dim3(static_cast<unsigned>(g.grid_x), g.grid_y, g.grid_z);
    config_.blockDim = dim3(g.block_x, g.block_y);
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
    config_.attrs = attributes_;
    constexpr int without_asking = 48 << 10, portable_cluster = 8;
    if (shared_bytes > without_asking) set(cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (together.cluster > portable_cluster) set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (together.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(together.cluster), 1, 1};
    }
    if (together.grid) {
      cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
  }
  Launch(const Launch&) = delete;

  void run(const P& p) const { expect_success(cudaLaunchKernelEx(&config_, kernel_, p)); }

  // How many clusters, or blocks of a multiprocessor, would run at the same time.
  int active() const {
    int count = 0;
    const bool cluster = config_.numAttrs && attributes_[0].id == cudaLaunchAttributeClusterDimension;
    expect_success(cluster ? cudaOccupancyMaxActiveClusters(&count, kernel_, &config_)
                           : cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                                 &count, kernel_, static_cast<int>(config_.blockDim.x * config_.blockDim.y),
                                 config_.dynamicSmemBytes));
    return count;
  }

 private:
  void set(cudaFuncAttribute attribute, int value) { expect_success(cudaFuncSetAttribute(kernel_, attribute, value)); }

  void (*const kernel_)(P);
  cudaLaunchAttribute attributes_[1];
  cudaLaunchConfig_t config_{};
};

// Whether the current device can hold the blocks that must run at the same time; where it refuses to say, as it may of a
// cluster larger than it has, it cannot. A grid is of no more blocks than there are multiprocessors.
template <class P>
bool can_run(void (*kernel)(P), const Geometry& g, int shared_bytes, Together together) {
  try {
    return Launch<P>(kernel, g, nullptr, shared_bytes, together).active() > 0;
  } catch (const std::runtime_error&) {
    cudaGetLastError();  // or the next call would report it
    return false;
  }
}

template <class P>
void launch(void (*kernel)(P), const Geometry& g, cudaStream_t stream, const P& p, int shared_bytes = 0,
            Together together = {}) {
  Launch<P>(kernel, g, stream, shared_bytes, together).run(p);
}
#endif

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
