#include "recurrence.cuh"

namespace fusedrnn::cuda {

template struct RecurrenceOf<RNN<false>>;

}  // namespace fusedrnn::cuda
