// The CPU implementation from outside: choose an instruction set, run a pass.
#pragma once

#include <string>
#include <vector>

#include "../params.h"
#include "team.h"

namespace fusedrnn::cpu {

// How a pass is carried out (see tuning.h).
struct PlanInfo {
  int64_t teams, members, row_blocks;
  bool packed, tiled, step;
};

// One build of the schedule for one instruction set. `functions` evaluates sigmoid (0) or tanh (1) for the
// accuracy tests.
struct Kernels {
  const char* name;
  void (*forward)(const ForwardParams&, const Threads&);
  void (*backward)(const BackwardParams&, const Threads&);
  void (*prepare)(const PrepareParams&, const Threads&);
  void (*functions_float)(int function, const float* x, float* y, int64_t n);
  void (*functions_double)(int function, const double* x, double* y, int64_t n);
  PlanInfo (*plan)(const Problem&, bool backward, int64_t threads);
  double (*multiply_add)(int64_t n, const Threads&);    // see roofline.h
  double (*multiply_tiles)(int64_t n, const Threads&);  // the same of bfloat16s, by tiles or in pairs, or nullptr
  void (*read_all)(const float* memory, int64_t count, int64_t repeats, const Threads&);
};

std::vector<std::string> built();      // instruction sets in this build, best first
std::vector<std::string> supported();  // those of them that this processor has
void use(const std::string& name);     // one of supported(), or "" for the best; throws std::invalid_argument otherwise
const Kernels& kernels();              // the ones in use

// Whether the last-level cache is far from the cores: that of Intel's processors with AVX-512, mostly servers, whose cores share it
// by a mesh. AMD's share it by eights.
bool has_slow_cache();

// Memory for the length of a pass, at the start of a cache line. Large blocks are kept for the next pass, 256 MiB of them at
// most, until another comes back after they have lain idle for a few seconds: memory fresh from the system costs more to touch
// than a small layer's step (2 MiB: 0.5 ms).
// borrow throws where there is no memory; `bytes` of give_back are those asked for.
void* borrow(size_t bytes);
void give_back(void* memory, size_t bytes);
size_t pooled();  // bytes kept and not in use

// Asks for pages of 2 MiB for memory that is not touched yet: the first touch of 100 MB in pages of 4 KiB takes 40 ms.
// Only a wish, and only made where such a page fits.
void prefer_huge_pages(void* memory, size_t bytes);

}  // namespace fusedrnn::cpu
