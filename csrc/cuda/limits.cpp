#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "cuda.h"

namespace fusedrnn::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&value, which, device);
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("fusedrnn: CUDA says: ") + cudaGetErrorString(status));
  return value;
}

}  // namespace

Limits limits_of(int device) {
  return {attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

}  // namespace fusedrnn::cuda
