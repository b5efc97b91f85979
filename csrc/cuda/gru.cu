#include "step.cuh"

namespace fusedrnn::cuda {

template struct StepOf<GRU>;

}  // namespace fusedrnn::cuda
