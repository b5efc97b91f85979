#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "cpu.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedrnn::cpu {

namespace {

using Clock = std::chrono::steady_clock;

// Blocks that nobody uses, the longest unused first.
struct Block {
  void* memory;
  size_t bytes;
  Clock::time_point since;
};

constexpr size_t line = 64;
constexpr size_t pooled_from = 64 << 10;  // malloc keeps smaller blocks itself
constexpr size_t pool_limit = 64 << 20;
constexpr std::chrono::seconds idle_limit{5};

// The mutex is only ever tried: a fork may leave it locked for good in the child, which then does without the pool.
struct Pool {
  std::mutex mutex;
  std::vector<Block> blocks;
  size_t bytes = 0;
};

// Never destroyed: threads may still work while the process ends.
Pool& pool() {
  static Pool& only = *new Pool;
  return only;
}

size_t rounded(size_t bytes) { return (bytes + line - 1) / line * line; }

}  // namespace

void* borrow(size_t bytes) {
  bytes = rounded(bytes);
  if (bytes >= pooled_from) {
    const std::unique_lock lock(pool().mutex, std::try_to_lock);
    if (lock) {
      auto& blocks = pool().blocks;
      // The one that came back last is the likeliest to be in cache.
      const auto found = std::find_if(blocks.rbegin(), blocks.rend(), [&](const Block& b) { return b.bytes == bytes; });
      if (found != blocks.rend()) {
        void* const memory = found->memory;
        blocks.erase(std::next(found).base());
        pool().bytes -= bytes;
        return memory;
      }
    }
  }
  void* const memory = std::aligned_alloc(line, bytes);
  if (!memory) throw std::bad_alloc();
  prefer_huge_pages(memory, bytes);
  return memory;
}

void give_back(void* memory, size_t bytes) {
  bytes = rounded(bytes);
  if (bytes < pooled_from || bytes > pool_limit) return std::free(memory);
  const Clock::time_point now = Clock::now();
  const std::unique_lock lock(pool().mutex, std::try_to_lock);
  if (!lock) return std::free(memory);
  auto& blocks = pool().blocks;
  blocks.push_back({memory, bytes, now});
  pool().bytes += bytes;
  size_t drop = 0;
  while (pool().bytes > pool_limit || now - blocks[drop].since > idle_limit) {
    pool().bytes -= blocks[drop].bytes;
    std::free(blocks[drop++].memory);
  }
  blocks.erase(blocks.begin(), blocks.begin() + drop);
}

size_t pooled() {
  const std::unique_lock lock(pool().mutex, std::try_to_lock);
  return lock ? pool().bytes : 0;
}

void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page,
                  end = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fusedrnn::cpu
