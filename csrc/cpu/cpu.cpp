#include "cpu.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fusedrnn::cpu {

extern const Kernels baseline;
#if defined(__x86_64__)
extern const Kernels avx2, avx512, avx512_bf16, amx;
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Dot products of pairs of bfloat16. On AMD's cores one takes as long as a fused multiply-add (Zen 4: 235 and 470 GFLOP/s on two);
// on Intel's it makes a third to a half of the products (Emerald Rapids: 58 to 85 and 175 GFLOP/s on one).
bool has_avx512_bf16() {
  constexpr unsigned avx512_bf16 = 1 << 5;  // CPUID 7.1, EAX
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & avx512_bf16);
}

// Tiles of bfloat16. Linux wants to be asked for the room that their registers take in a thread's state.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned amx_bf16 = 1 << 22, amx_tile = 1 << 24;        // CPUID 7.0, EDX
  constexpr long request_permission = 0x1023, tile_registers = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & amx_bf16) && (d & amx_tile) &&
         syscall(SYS_arch_prctl, request_permission, tile_registers) == 0;
#else
  return false;
#endif
}
#endif

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> list = [] {
    std::vector<Candidate> best_first = {
#if defined(__x86_64__)
        {&amx, has_amx()},       {&avx512_bf16, has_avx512_bf16()},
        {&avx512, has_avx512()}, {&avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
        {&baseline, true},
    };
#if defined(__x86_64__)
    if (!__builtin_cpu_is("amd")) std::swap(best_first[1], best_first[2]);  // see has_avx512_bf16
#endif
    return best_first;
  }();
  return list;
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

std::vector<std::string> built() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) names.push_back(c.kernels->name);
  return names;
}

std::vector<std::string> supported() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates())
    if (c.supported) names.push_back(c.kernels->name);
  return names;
}

void use(const std::string& name) {
  std::string offered;
  for (const Candidate& c : candidates()) {
    if (!c.supported) continue;
    if (name.empty() || name == c.kernels->name) {
      in_use = c.kernels;
      return;
    }
    offered += (offered.empty() ? "" : ", ") + std::string(c.kernels->name);
  }
  throw std::invalid_argument("expected an instruction set of this processor (" + offered + "), got '" + name + "'");
}

bool has_slow_cache() {
#if defined(__x86_64__)
  static const bool slow = has_avx512() && !__builtin_cpu_is("amd");
  return slow;
#else
  return false;
#endif
}

const Kernels& kernels() { return *in_use.load(std::memory_order_relaxed); }

}  // namespace fusedrnn::cpu
