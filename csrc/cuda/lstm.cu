#include "recurrence.cuh"

namespace fusedrnn::cuda {

template struct RecurrenceOf<LSTM>;

}  // namespace fusedrnn::cuda
