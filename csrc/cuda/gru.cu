#include "recurrence.cuh"

namespace fusedrnn::cuda {

template struct RecurrenceOf<GRU>;

}  // namespace fusedrnn::cuda
