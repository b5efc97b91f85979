#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedrnn::cpu {

namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t line = 64;

// In the cache line before a block's memory: a block may be larger than what was asked for.
struct alignas(line) Header {
  size_t bytes;
};

// Blocks that nobody uses, the longest unused first.
struct Block {
  Header* header;
  Clock::time_point since;

  size_t bytes() const { return header->bytes; }
};

constexpr size_t pooled_from = 64 << 10;  // malloc keeps smaller blocks itself
// Enough for the packed weights of an LSTM of 2048: fresh pages for them would take 9 to 19 % of a call's time (Emerald Rapids, LSTM
// of 1536 and 2048, 25 and 50 steps of 1 to 16 rows).
constexpr size_t pool_limit = 256 << 20;
constexpr std::chrono::seconds idle_limit{5};

// The mutex is only ever tried: a fork may leave it locked for good in the child, which then does without the pool.
struct Pool {
  std::mutex mutex;
  std::vector<Block> blocks;
  size_t bytes = 0;

  Pool() { blocks.reserve(pool_limit / pooled_from + 1); }  // all that there can be: to give back must not fail
};

// Never destroyed: threads may still work while the process ends.
Pool& pool() {
  static Pool& only = *new Pool;
  return only;
}

Header* take(std::vector<Block>::iterator block) {
  Header* const header = block->header;
  pool().bytes -= header->bytes;
  pool().blocks.erase(block);
  return header;
}

size_t rounded(size_t bytes) { return (bytes + line - 1) / line * line; }

// All that is kept back to the system.
void empty() {
  if (const std::unique_lock lock(pool().mutex, std::try_to_lock); lock)
    while (!pool().blocks.empty()) std::free(take(pool().blocks.end() - 1));
}

void* allocate(size_t bytes) {
  void* memory = std::aligned_alloc(line, bytes);
  if (!memory) {
    empty();
    memory = std::aligned_alloc(line, bytes);
  }
  if (!memory)  // as torch says it, to whom RuntimeError means this
    throw std::runtime_error("fusedrnn: can't allocate memory: tried to allocate " + std::to_string(bytes) + " bytes");
  prefer_huge_pages(memory, bytes);
  return memory;
}

}  // namespace

void* borrow(size_t bytes) {
  bytes = rounded(bytes);
  if (bytes < pooled_from) return allocate(bytes);
  if (const std::unique_lock lock(pool().mutex, std::try_to_lock); lock) {
    auto& blocks = pool().blocks;
    // The smallest that does (of equals the last that came back, the likeliest to be in cache), so that the passes of a step
    // work in the same memory. Where none does, one that is almost large enough makes way for one that serves both.
    auto larger = blocks.end(), smaller = blocks.end();
    for (auto b = blocks.begin(); b != blocks.end(); ++b) {
      const size_t own = b->bytes();
      if (own >= bytes && own <= 2 * bytes && (larger == blocks.end() || own <= larger->bytes())) larger = b;
      if (own < bytes && own >= bytes / 2 && (smaller == blocks.end() || own > smaller->bytes())) smaller = b;
    }
    if (larger != blocks.end()) return take(larger) + 1;
    if (smaller != blocks.end()) std::free(take(smaller));
  }
  return new (allocate(sizeof(Header) + bytes)) Header{bytes} + 1;
}

void give_back(void* memory, size_t bytes) {
  if (rounded(bytes) < pooled_from) return std::free(memory);
  Header* const header = static_cast<Header*>(memory) - 1;
  if (header->bytes > pool_limit) return std::free(header);
  const Clock::time_point now = Clock::now();
  const std::unique_lock lock(pool().mutex, std::try_to_lock);
  if (!lock) return std::free(header);
  auto& blocks = pool().blocks;
  blocks.push_back({header, now});
  pool().bytes += header->bytes;
  size_t drop = 0;
  while (pool().bytes > pool_limit || now - blocks[drop].since > idle_limit) {
    pool().bytes -= blocks[drop].bytes();
    std::free(blocks[drop++].header);
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
