// Chooses the schedule and the instantiation for a problem.
#include "cuda.h"

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "step.h"

namespace fusedrnn::cuda {

namespace {

// f(a StepOf) with the cell that the params name.
template <class F>
auto with_cell(CellKind cell, const F& f) {
  switch (cell) {
    case CellKind::rnn_tanh:
      return f(StepOf<RNN<false>>());
    case CellKind::rnn_relu:
      return f(StepOf<RNN<true>>());
    case CellKind::lstm:
      return f(StepOf<LSTM>());
    default:
      return f(StepOf<GRU>());
  }
}

}  // namespace

int64_t workspace_bytes(const Problem& p, bool backward, int64_t chunk_bytes) {
  return with_cell(p.cell, [&](auto step) { return step.workspace_bytes(p, backward, chunk_bytes); });
}

void forward(const ForwardParams& p, const Context& context) {
  with_cell(p.cell, [&](auto step) { step.forward(p, context); });
}

void backward(const BackwardParams& p, const Context& context) {
  with_cell(p.cell, [&](auto step) { step.backward(p, context); });
}

}  // namespace fusedrnn::cuda
