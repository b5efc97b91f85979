// The CPU implementation from outside: choose an instruction set, run a pass.
#pragma once

#include <string>
#include <vector>

#include "../params.h"
#include "team.h"

namespace fusedrnn::cpu {

// One build of the schedule for one instruction set. `functions` evaluates exp, sigmoid and tanh (0, 1, 2)
// for the accuracy tests.
struct Kernels {
  const char* name;
  void (*forward)(const ForwardParams&, const Threads&);
  void (*backward)(const BackwardParams&, const Threads&);
  void (*functions_float)(int function, const float* x, float* y, int64_t n);
  void (*functions_double)(int function, const double* x, double* y, int64_t n);
};

std::vector<std::string> built();      // instruction sets in this build, best first
std::vector<std::string> supported();  // those of them that this processor has
void use(const std::string& name);     // one of supported(), or "" for the best; throws std::invalid_argument otherwise
const Kernels& kernels();              // the ones in use

}  // namespace fusedrnn::cpu
