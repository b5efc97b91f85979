// For builds that should not take long: the cells that a file instantiates, each for one type, and those that it leaves out. Whoever
// asks for another is told so.
#pragma once

#include "cuda/recurrence.cuh"

namespace fusedrnn::cuda {

inline void expect_built(bool built) {
  if (!built) throw std::logic_error("not built");
}

#define INSTANTIATE(Cell, S, kind)                                                                             \
  template <>                                                                                                  \
  const char* RecurrenceOf<Cell>::schedule(const Problem& p, const Limits& limits, bool tf32, bool backward) { \
    expect_built(p.scalar == ScalarKind::kind);                                                                \
    return ChunkKernel<Cell, S>(p, limits, tf32, backward).name();                                             \
  }                                                                                                            \
  template <>                                                                                                  \
  int64_t RecurrenceOf<Cell>::workspace_bytes(const Problem& p, bool backward, const Context& context) {       \
    expect_built(p.scalar == ScalarKind::kind);                                                                \
    Context counting = context;                                                                                \
    counting.workspace = nullptr;                                                                              \
    return Recurrence<Cell, S>(p, counting, backward).workspace_bytes(backward);                               \
  }                                                                                                            \
  template <>                                                                                                  \
  void RecurrenceOf<Cell>::forward(const ForwardParams& p, const Context& context) {                           \
    Recurrence<Cell, S>(p, context, false).forward(p);                                                         \
  }                                                                                                            \
  template <>                                                                                                  \
  void RecurrenceOf<Cell>::backward(const BackwardParams& p, const Context& context) {                         \
    Recurrence<Cell, S>(p, context, true).backward(p);                                                         \
  }

#define LEAVE_OUT(Cell)                                                                 \
  template <>                                                                           \
  const char* RecurrenceOf<Cell>::schedule(const Problem&, const Limits&, bool, bool) { \
    throw std::logic_error("not built");                                                \
  }                                                                                     \
  template <>                                                                           \
  int64_t RecurrenceOf<Cell>::workspace_bytes(const Problem&, bool, const Context&) {   \
    throw std::logic_error("not built");                                                \
  }                                                                                     \
  template <>                                                                           \
  void RecurrenceOf<Cell>::forward(const ForwardParams&, const Context&) {}             \
  template <>                                                                           \
  void RecurrenceOf<Cell>::backward(const BackwardParams&, const Context&) {}

}  // namespace fusedrnn::cuda
