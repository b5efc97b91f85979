#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "cuda.h"

namespace fusedrnn::cuda {
namespace {

void expect_success(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call, of whomever, would report it again
  throw std::runtime_error(std::string("fusedrnn: CUDA says: ") + cudaGetErrorString(status));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  expect_success(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

}  // namespace

void use_device(int device) { expect_success(cudaSetDevice(device)); }

Limits limits_of(int device) {
  // 16 is more than every GPU with clusters has to offer; how many of a kernel's fit is asked of the device (active_blocks).
  const int largest_cluster = attribute(cudaDevAttrClusterLaunch, device) ? 16 : 0;
  const unsigned grids = grid_schedule | split_grid_schedule;
  return {attribute(cudaDevAttrMultiProcessorCount, device), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          largest_cluster, attribute(cudaDevAttrCooperativeLaunch, device) ? all_schedules : all_schedules & ~grids};
}

}  // namespace fusedrnn::cuda
