// The recurrence on NVIDIA GPUs, for whoever has the pointers (params.h). All arrays lie on the current device, but for
// a packed batch's offsets, which lie on the host.
#pragma once

#include <cstdint>

#include "blas.h"
#include "params.h"
#include "tuning.h"

namespace fusedrnn::cuda {

struct Context {
  void* stream;     // a cudaStream_t: everything is enqueued here and nothing waits for it
  Blas* blas;       // on the same stream
  void* workspace;  // as many bytes as workspace_bytes says, aligned to 256
  Limits limits;
  bool tf32;  // whether float32 factors may be rounded to TF32
  int64_t chunk_bytes = cuda::chunk_bytes;
};

Limits limits_of(int device);

// Gives the thread the device's context, which one of autograd's may not have yet: torch warns where cuBLAS finds none.
void use_device(int device);

// How the steps of a problem would be run: "block", "cluster", "grid" or "step".
const char* schedule(const Problem& problem, const Limits& limits, bool tf32, bool backward);

// For a pass with this context, whose workspace may be missing yet.
int64_t workspace_bytes(const Problem& problem, bool backward, const Context& context);

// Throw std::runtime_error where CUDA refuses.
void forward(const ForwardParams& params, const Context& context);
void backward(const BackwardParams& params, const Context& context);

}  // namespace fusedrnn::cuda
