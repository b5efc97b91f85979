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

#include <map>
#include <mutex>
#include <tuple>
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
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call, of whomever, would report it again
  throw std::runtime_error(std::string("fusedrnn: CUDA says: ") + cudaGetErrorString(status));
}

// Which blocks of a launch must run at the same time: those of a cluster (neighbours along x), and those of the whole grid.
struct Together {
  int cluster = 1;
  bool grid = false;
};

#if defined(FUSEDRNN_HOSTCUDA)
template <class P>
int active_blocks(void (*)(P), const Geometry&, int, Together together) {
  return shim::active_blocks / together.cluster * together.cluster;
}

template <class P>
void launch(void (*kernel)(P), const Geometry& g, cudaStream_t, const P& p, int shared_bytes = 0,
            Together together = {}) {
  shim::launch(
      dim3(static_cast<unsigned>(g.grid_x), g.grid_y, g.grid_z), dim3(g.block_x, g.block_y), shared_bytes,
      [&] { kernel(p); }, together.cluster, together.grid);
}
#else
inline int current_device(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  expect_success(cudaGetDevice(&device));
  expect_success(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

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
    // Always the same values, for another host thread may be launching the kernel with other sizes.
    constexpr int without_asking = 48 << 10, portable_cluster = 8;
    if (shared_bytes > without_asking)
      set(cudaFuncAttributeMaxDynamicSharedMemorySize, current_device(cudaDevAttrMaxSharedMemoryPerBlockOptin));
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

  // How many blocks, alone or in clusters, would run at the same time on the current device, which has no other work.
  int active_blocks() const {
    int count = 0;
    if (config_.numAttrs && attributes_[0].id == cudaLaunchAttributeClusterDimension) {
      // Compiled for a GPU without clusters, as PTX that a later one takes may be, the kernel does not use them.
      cudaFuncAttributes built;
      expect_success(cudaFuncGetAttributes(&built, kernel_));
      if (built.ptxVersion < 90) return 0;
      cudaLaunchConfig_t asked = config_;
      asked.numAttrs = 1;  // of a cluster only
      expect_success(cudaOccupancyMaxActiveClusters(&count, kernel_, &asked));
      return count * static_cast<int>(attributes_[0].val.clusterDim.x);
    }
    const int threads = static_cast<int>(config_.blockDim.x * config_.blockDim.y);
    expect_success(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel_, threads, config_.dynamicSmemBytes));
    return count * current_device(cudaDevAttrMultiProcessorCount);
  }

 private:
  void set(cudaFuncAttribute attribute, int value) { expect_success(cudaFuncSetAttribute(kernel_, attribute, value)); }

  void (*const kernel_)(P);
  cudaLaunchAttribute attributes_[2];
  cudaLaunchConfig_t config_{};
};

// How many of these blocks the current device can run at the same time, asked once; where it refuses to say, as it may of a
// cluster larger than it has, none.
template <class P>
int active_blocks(void (*kernel)(P), const Geometry& g, int shared_bytes, Together together) {
  static std::mutex one_at_a_time;
  static std::map<std::tuple<int, void (*)(P), int, int>, int> known;
  int device = 0;
  expect_success(cudaGetDevice(&device));
  const std::lock_guard lock(one_at_a_time);
  const auto [at, is_new] = known.try_emplace({device, kernel, shared_bytes, together.cluster}, 0);
  if (is_new) try {
      at->second = Launch<P>(kernel, g, nullptr, shared_bytes, together).active_blocks();
    } catch (const std::runtime_error&) {  // 0: asked again, it would refuse again, at every call
    }
  return at->second;
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
