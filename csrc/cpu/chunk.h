// Some steps of a job whose gradients of input and weights are taken together (input_gradient.h, gradients.h).
#pragma once

#include "recurrence.h"

namespace fusedrnn::cpu {
namespace {

// What is kept of a chunk's rows.
template <class S>
struct RowsOf {
  S* first;
  int64_t stride;

  S* at(int64_t row) const { return first + row * stride; }
};

// Steps [t_begin, t_end) of a job with the dsums of their rows and, with a projection, the gradients of their states and what these
// are projected from. A job of all rows of the batch has them without gaps, as the sequence has them.
template <class S>
struct Chunk {
  const Job& job;
  int64_t t_begin, t_end;
  RowsOf<S> dsums, dstates, outputs;

  bool whole() const { return job.row_begin == 0 && job.row_end == job.sequence.B; }
  int64_t row(int64_t t) const {
    return whole() ? job.sequence.start(t) - job.sequence.start(t_begin)
                   : (t - t_begin) * (job.row_end - job.row_begin);
  }
  int64_t rows() const { return row(t_end); }
};

}  // namespace
}  // namespace fusedrnn::cpu
