// Instantiates the schedule for one instruction set; included once by each of baseline.cpp, avx2.cpp and
// avx512.cpp.
#pragma once

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "../cells/saved.h"
#include "backward.h"
#include "cpu.h"
#include "forward.h"
#include "functions.h"
#include "roofline.h"
#include "step.h"

namespace fusedrnn::cpu {
namespace {

template <class S, int bytes>
void evaluate(int function, const S* x, S* y, int64_t n) {
  using V = vec<S, bytes / sizeof(S)>;
  for (int64_t i = 0; i < n; i += V::size) {
    const int count = static_cast<int>(std::min<int64_t>(V::size, n - i));
    const V in = V::load(x + i, count);
    (function == 0 ? sigmoid(in) : tanh(in)).store(y + i, count);
  }
}

// A single step of a few rows needs none of what a sequence does.
template <class Cell, class S, int N, class W>
struct ForwardOrStep {
  ForwardOrStep(const ForwardParams& p, const Threads& threads) {
    is_step(p) && !p.prepared ? void(Step<Cell, S, N, W>(p, threads)) : void(Forward<Cell, S, N, W>(p, threads));
  }
};

template <template <class, class, int, class> class Pass, int bytes, Pairs pairs, class Params>
void run_pass(const Params& params, const Threads& threads) {
  Params p = params;
  p.pairs = pairs;
  p.slow_cache = has_slow_cache();
  const auto with_cell = [&](auto scalar, auto weight) {
    using S = decltype(scalar);
    using W = decltype(weight);
    constexpr int N = bytes / sizeof(S);
    switch (p.cell) {
      case CellKind::rnn_tanh:
        Pass<RNN<false>, S, N, W>(p, threads);
        break;
      case CellKind::rnn_relu:
        Pass<RNN<true>, S, N, W>(p, threads);
        break;
      case CellKind::lstm:
        Pass<LSTM, S, N, W>(p, threads);
        break;
      case CellKind::gru:
        Pass<GRU, S, N, W>(p, threads);
        break;
    }
  };
  switch (p.scalar) {
    case ScalarKind::float32:
      with_cell(float(), float());
      break;
    case ScalarKind::float64:
      with_cell(double(), double());
      break;
    case ScalarKind::float32_of_bfloat16:
      with_cell(float(), bfloat16());
      break;
    case ScalarKind::float16:  // the binding lets neither come here
    case ScalarKind::bfloat16:
      break;
  }
}

constexpr int64_t gates_of(CellKind cell) {
  switch (cell) {
    case CellKind::lstm:
      return LSTM::gates;
    case CellKind::gru:
      return GRU::gates;
    default:
      return RNN<false>::gates;
  }
}

template <int bytes, Pairs pairs>
PlanInfo plan_of(const Problem& problem, bool backward, int64_t threads) {
  Problem p = problem;
  p.pairs = pairs;
  p.slow_cache = has_slow_cache();
  const int64_t gates = gates_of(p.cell),
                N = bytes / (p.scalar == ScalarKind::float64 ? sizeof(double) : sizeof(float));
  if (!backward && is_step(p)) {
    const int64_t panels = (p.H + N - 1) / N * p.directions;
    return {1, step_needs_team(p, gates) ? std::min(threads, panels) : 1, 1, false, false, true};
  }
  const Plan plan = make_plan(call_of(p, backward ? Pass::backward : Pass::forward, gates, N, threads));
  return {plan.groups, plan.slices, plan.row_blocks, plan.packed, plan.tiled, false};
}

template <int bytes, Pairs pairs = Pairs::none>
constexpr Kernels make_kernels(const char* name) {
  return {name,
          &run_pass<ForwardOrStep, bytes, pairs, ForwardParams>,
          &run_pass<Backward, bytes, pairs, BackwardParams>,
          &run_pass<Prepare, bytes, pairs, PrepareParams>,
          &evaluate<float, bytes>,
          &evaluate<double, bytes>,
          &plan_of<bytes, pairs>,
          &multiply_add<bytes>,
          pairs == Pairs::none ? nullptr : &multiply_tiles_of_zeros<pairs>,
          &read_all<bytes>};
}

}  // namespace
}  // namespace fusedrnn::cpu
