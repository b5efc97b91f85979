#include "recurrence.cuh"

namespace fusedrnn::cuda {

template struct RecurrenceOf<RNN<true>>;

}  // namespace fusedrnn::cuda
