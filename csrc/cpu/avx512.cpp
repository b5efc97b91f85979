#include "standard.h"
#include "target.h"

#if defined(__x86_64__)
FUSEDRNN_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include "kernels.h"
namespace fusedrnn::cpu {
// Tiles are instructions of their own, in assembly: the region does not name them.
extern const Kernels avx512, amx;
const Kernels avx512 = make_kernels<64>("avx512");
const Kernels amx = make_kernels<64, true>("amx");
}  // namespace fusedrnn::cpu
FUSEDRNN_TARGET_END
#endif
