#include "step.cuh"

namespace fusedrnn::cuda {

template struct StepOf<LSTM>;

}  // namespace fusedrnn::cuda
