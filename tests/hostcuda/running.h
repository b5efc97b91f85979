// The thread of a kernel that runs, as memory.cpp has to know it to tell which accesses are ordered.
#pragma once

#include <cstdint>
#include <vector>

namespace shim {

// Of a block, how many of its phases (from one barrier to the next) are known to be over; by the block's place in its group.
using View = std::vector<uint32_t>;

// Threads are numbered through all launches, those of a block, and the blocks of a group, one after the other.
struct Running {
  uint32_t thread = 0;  // 0 where no kernel runs
  uint32_t phase = 0;   // of its block, from 1 on
  const View* view = nullptr;
};
extern Running running;

extern uint32_t launch_begin, group_begin, block_threads;  // the first thread of the launch and of the group

// Takes the place of what runs while something is done in its name.
class InTheNameOf {
 public:
  explicit InTheNameOf(const Running& other) : saved_(running) { running = other; }
  ~InTheNameOf() { running = saved_; }

 private:
  const Running saved_;
};

void report(const std::string& what, const void* at = nullptr);

// Takes back the region that was allocated last.
void free_last();

// Of memory that is accessed in an order of its own (counters, barriers): whether it is there, and was written, by whoever
// wrote it last, before what runs.
void expect_ready(const void* at, size_t bytes);

}  // namespace shim
