#include "standard.h"
#include "target.h"

#if defined(__x86_64__)
FUSEDRNN_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include "kernels.h"
namespace fusedrnn::cpu {
extern const Kernels avx512;
const Kernels avx512 = make_kernels<64>("avx512");
}  // namespace fusedrnn::cpu
FUSEDRNN_TARGET_END
#endif
