#include "step.cuh"

namespace fusedrnn::cuda {

template struct StepOf<RNN<false>>;
template struct StepOf<RNN<true>>;

}  // namespace fusedrnn::cuda
