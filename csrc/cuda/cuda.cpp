// Chooses the schedule and the instantiation for a problem.
#include "cuda.h"

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "recurrence.h"

namespace fusedrnn::cuda {

namespace {

// f(a RecurrenceOf) with the cell that the params name.
template <class F>
auto with_cell(CellKind cell, const F& f) {
  switch (cell) {
    case CellKind::rnn_tanh:
      return f(RecurrenceOf<RNN<false>>());
    case CellKind::rnn_relu:
      return f(RecurrenceOf<RNN<true>>());
    case CellKind::lstm:
      return f(RecurrenceOf<LSTM>());
    default:
      return f(RecurrenceOf<GRU>());
  }
}

}  // namespace

const char* schedule(const Problem& p, const Limits& limits, bool tf32, bool backward) {
  return with_cell(p.cell, [&](auto cell) { return cell.schedule(p, limits, tf32, backward); });
}

int64_t workspace_bytes(const Problem& p, bool backward, const Context& context) {
  return with_cell(p.cell, [&](auto cell) { return cell.workspace_bytes(p, backward, context); });
}

void forward(const ForwardParams& p, const Context& context) {
  with_cell(p.cell, [&](auto cell) { cell.forward(p, context); });
}

void backward(const BackwardParams& p, const Context& context) {
  with_cell(p.cell, [&](auto cell) { cell.backward(p, context); });
}

}  // namespace fusedrnn::cuda
