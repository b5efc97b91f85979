#include "cpu.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fusedrnn::cpu {

extern const Kernels baseline;
#if defined(__x86_64__)
extern const Kernels avx2, avx512;
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> list = {
#if defined(__x86_64__)
      {&avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {&avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&baseline, true},
  };
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

const Kernels& kernels() { return *in_use.load(std::memory_order_relaxed); }

}  // namespace fusedrnn::cpu
