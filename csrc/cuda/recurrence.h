// The recurrence of one cell, without its insides (recurrence.cuh).
#pragma once

#include "cuda.h"

namespace fusedrnn::cuda {

template <class Cell>
struct RecurrenceOf {
  static const char* schedule(const Problem& p, const Limits& limits, bool tf32, bool backward);
  static int64_t workspace_bytes(const Problem& p, bool backward, const Context& context);
  static void forward(const ForwardParams& p, const Context& context);
  static void backward(const BackwardParams& p, const Context& context);
};

}  // namespace fusedrnn::cuda
