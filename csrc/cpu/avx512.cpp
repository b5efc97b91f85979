#include "standard.h"
#include "target.h"

#if defined(__x86_64__)
FUSEDRNN_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include "kernels.h"
namespace fusedrnn::cpu {
// What multiplies bfloat16s is in assembly: the region does not name it.
extern const Kernels avx512, avx512_bf16, amx;
const Kernels avx512 = make_kernels<64>("avx512");
const Kernels avx512_bf16 = make_kernels<64, Pairs::dots>("avx512_bf16");
const Kernels amx = make_kernels<64, Pairs::tiles>("amx");
}  // namespace fusedrnn::cpu
FUSEDRNN_TARGET_END
#endif
