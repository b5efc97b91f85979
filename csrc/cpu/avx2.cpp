#include "standard.h"
#include "target.h"

#if defined(__x86_64__)
FUSEDRNN_TARGET_BEGIN("avx2,fma")
#include "kernels.h"
namespace fusedrnn::cpu {
extern const Kernels avx2;
const Kernels avx2 = make_kernels<32>("avx2");
}  // namespace fusedrnn::cpu
FUSEDRNN_TARGET_END
#endif
