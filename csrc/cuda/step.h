// The step schedule of one cell, without its insides (step.cuh).
#pragma once

#include "cuda.h"

namespace fusedrnn::cuda {

template <class Cell>
struct StepOf {
  static int64_t workspace_bytes(const Problem& p, bool backward, int64_t chunk_bytes);
  static void forward(const ForwardParams& p, const Context& context);
  static void backward(const BackwardParams& p, const Context& context);
};

}  // namespace fusedrnn::cuda
