// One instantiation in place of all.
#include "few.h"

namespace fusedrnn::cuda {

INSTANTIATE(GRU, bfloat16, bfloat16)
LEAVE_OUT(LSTM)
LEAVE_OUT(RNN<false>)
LEAVE_OUT(RNN<true>)

}  // namespace fusedrnn::cuda
