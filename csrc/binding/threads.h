// torch's threads for the CPU kernels.
#pragma once

#include <atomic>

#include "cpu/cpu.h"

namespace fusedrnn::binding {

// A pool that queues tasks may run a team's members one after the other, which would wait for each other forever (see
// cpu/team.h): then there is one thread.
extern std::atomic<bool> pool_runs_at_once;

cpu::Threads threads();

}  // namespace fusedrnn::binding
