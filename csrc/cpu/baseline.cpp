// For every processor that the platform promises: SSE2 on x86-64, NEON on 64-bit ARM.
#include "kernels.h"
#include "standard.h"
namespace fusedrnn::cpu {
extern const Kernels baseline;
const Kernels baseline = make_kernels<16>("baseline");
}  // namespace fusedrnn::cpu
