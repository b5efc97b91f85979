// The threads of a running group, as threads.cpp has them and exchange.cpp hands things between them.
#pragma once

#include <setjmp.h>

#include <array>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "running.h"
#include "shim.h"

namespace shim {

constexpr uint32_t warp_threads = 32;

// What the threads of a warp bring to an instruction of theirs: two in turn, for some may be one ahead.
using WarpWords = std::array<std::array<uint32_t, 6>, warp_threads>;
struct Warp {
  WarpWords words[2];
  uint32_t count = 0, arrived = 0;
};

struct Block {
  uint3 index;
  unsigned char* shared;
  size_t shared_bytes;
  uint32_t phase, waiting, waiting_for_cluster, live;
  std::vector<Warp> warps;
};

enum class State { ready, at_barrier, at_cluster_barrier, in_warp, polling, done };

// Contexts are only for the first steps on a new stack: they cost system calls, which jumps do not.
struct Fiber {
  jmp_buf here;
  bool waits_for_kernel = false, is_new = true;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  uint3 index;
  uint32_t block, thread;  // place in the group's blocks, number
  State state;
  View view;
  const void* asked = nullptr;  // the counter that it asked for last, and the answer
  uint32_t answer = 0;
  std::vector<std::pair<char*, std::vector<char>>> copies;
  static constexpr size_t stack_bytes = 128 << 10;
};

extern std::vector<Fiber*> fibers;
extern std::vector<Block> blocks;
extern Fiber* current;
extern uint32_t cluster_blocks;
extern std::mt19937_64 random_order;

inline Block& own_block() { return blocks[current->block]; }
inline uint32_t first_of_cluster() { return current->block / cluster_blocks * cluster_blocks; }

// The running thread gives way to others.
void leave(State state);
void wake(Fiber* fiber);

void join(View& view, const View& other);

// What the running thread passes on with a release: the phases of its block before this one are over.
View released();

// Of exchange.cpp: bytes on their way, one of which lands; and everything is forgotten.
bool any_in_flight();
void land_one();
void forget_exchange();

}  // namespace shim
