#include "shim.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <deque>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "device_memory.h"

namespace shim {

void report(const std::string& what, size_t offset);

uint3 thread_index, block_index, block_size;

namespace {

constexpr size_t arena_bytes = size_t{1} << 30, guard = 4096;

// What is known of a byte: who wrote it last and who read it, and after how many of their block's barriers. Threads are
// numbered through all launches, those of a block one after the other.
struct Shadow {
  uint32_t writer, write_phase, reader, read_phase;
  bool allocated, written, several_readers, several_blocks;
};

struct Region {
  std::string name;
  size_t begin, bytes;
};

// Address space only: pages are taken when they are touched.
char* reserve(size_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(at);
}

char* const arena = reserve(arena_bytes);
Shadow* const shadow = reinterpret_cast<Shadow*>(reserve(arena_bytes * sizeof(Shadow)));

std::vector<Region> regions;
std::string first_error;
std::mt19937_64 random_order;
size_t top = guard;
uint32_t launch_begin = 1, block_begin = 1, running = 0, last_thread = 0, phase = 0;
bool between_launches = false;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  uint3 index;
  enum { ready, waiting, done } state;
};
std::deque<Fiber> fibers;  // of the running block; a context must not move
Fiber* current = nullptr;
ucontext_t scheduler;
const std::function<void()>* running_kernel = nullptr;
void* shared = nullptr;

void run_fiber() {
  (*running_kernel)();
  current->state = Fiber::done;  // uc_link goes on with the scheduler
}

bool in_arena(const void* at) { return static_cast<size_t>(static_cast<const char*>(at) - arena) < arena_bytes; }

}  // namespace

void report(const std::string& what, size_t offset) {
  if (!first_error.empty()) return;
  std::string where = "no memory that was allocated";
  for (const Region& region : regions)
    if (offset + guard / 2 >= region.begin && offset < region.begin + region.bytes + guard / 2)
      where = region.name + " (byte " + std::to_string(static_cast<int64_t>(offset - region.begin)) + " of " +
              std::to_string(region.bytes) + ")";
  const auto text = [](const uint3& at) {
    return std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z);
  };
  first_error = what + ": " + where;
  if (running) first_error += ", by thread " + text(thread_index) + " of block " + text(block_index);
}

void reset(uint64_t seed) {
  for (const Region& region : regions) std::fill_n(shadow + region.begin, region.bytes, Shadow{});
  regions.clear();
  first_error.clear();
  top = guard;
  random_order.seed(seed);
}

void* allocate_workspace(size_t bytes) {
  void* const at = allocate(bytes, "workspace");
  std::fill_n(shadow + (static_cast<char*>(at) - arena), bytes, Shadow{});
  return at;
}

void begin_array(void* at, size_t bytes) {
  const size_t offset = static_cast<char*>(at) - arena;
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (shadow[i].allocated) return report("arrays of a workspace overlap", i);
    shadow[i].allocated = true;
  }
}

void* allocate(size_t bytes, const std::string& name) {
  if (top + bytes + 2 * guard > arena_bytes) throw std::bad_alloc();
  regions.push_back({name, top, bytes});
  std::fill_n(shadow + top, bytes, Shadow{.allocated = true});
  void* const at = arena + top;
  top += (bytes + 255) / 256 * 256 + guard;
  return at;
}

// Takes back the region that was allocated last.
void free_last() {
  const Region& region = regions.back();
  std::fill_n(shadow + region.begin, region.bytes, Shadow{});
  top = region.begin;
  regions.pop_back();
}

void upload(void* to, const void* from, size_t bytes) {
  between_launches = true;
  access(to, bytes, true);
  between_launches = false;
  std::memcpy(to, from, bytes);
}

bool download(void* to, const void* from, size_t bytes) {
  const size_t offset = static_cast<const char*>(from) - arena;
  bool all = true;
  for (size_t i = 0; i < bytes; ++i) {
    const bool written = shadow[offset + i].written;
    static_cast<unsigned char*>(to)[i] = written ? static_cast<const unsigned char*>(from)[i] : 0xff;
    all = all && written;
  }
  return !all;
}

const std::string& error() { return first_error; }

void expect_aligned(const void* at, size_t bytes) {
  if (in_arena(at) && reinterpret_cast<uintptr_t>(at) % bytes)
    report("misaligned access of " + std::to_string(bytes) + " bytes", static_cast<const char*>(at) - arena);
}

void access(const void* at, size_t bytes, bool write) {
  if (!in_arena(at)) return;
  const size_t offset = static_cast<const char*>(at) - arena;
  if (!running && !between_launches) report("host code accesses device memory", offset);
  const auto in_launch = [](uint32_t thread) { return thread >= launch_begin; };
  const auto in_block = [](uint32_t thread) { return thread >= block_begin; };
  // Whether nothing orders that access before this one.
  const auto unordered = [&](uint32_t thread, uint32_t its_phase) {
    return in_launch(thread) && thread != running && (!in_block(thread) || its_phase == phase);
  };
  for (size_t i = offset; i < std::min(offset + bytes, arena_bytes); ++i) {
    Shadow& byte = shadow[i];
    if (!byte.allocated) return report(write ? "write out of bounds" : "read out of bounds", i);
    if (!write && !byte.written) return report("read of what nobody has written", i);
    byte.written = byte.written || write;
    if (!running) continue;
    if (unordered(byte.writer, byte.write_phase))
      return report(write ? "two threads write" : "one thread reads what another writes", i);
    if (write) {
      const bool others =
          in_launch(byte.reader) &&
          (byte.several_blocks || (in_block(byte.reader) && byte.read_phase == phase && byte.several_readers));
      if (others || unordered(byte.reader, byte.read_phase)) return report("one thread writes what another reads", i);
      byte.writer = running;
      byte.write_phase = phase;
      continue;
    }
    const bool read_before = in_launch(byte.reader), same_phase = in_block(byte.reader) && byte.read_phase == phase;
    byte.several_blocks = read_before && (byte.several_blocks || !in_block(byte.reader));
    byte.several_readers = same_phase && (byte.several_readers || byte.reader != running);
    byte.reader = running;
    byte.read_phase = phase;
  }
}

void synchronize() {
  current->state = Fiber::waiting;
  swapcontext(&current->context, &scheduler);
}

unsigned char* shared_memory() { return static_cast<unsigned char*>(shared); }

// All threads of a block, from barrier to barrier.
void run_block(dim3 block, size_t shared_bytes) {
  const uint32_t count = block.x * block.y * block.z;
  block_begin = last_thread + 1;
  last_thread += count;
  shared = allocate(shared_bytes, "shared memory");
  while (fibers.size() < count) fibers.emplace_back();
  for (uint32_t i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    fiber.state = Fiber::ready;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  for (phase = 0;; ++phase) {
    std::shuffle(order.begin(), order.end(), random_order);
    uint32_t waiting = 0;
    for (uint32_t i : order) {
      current = &fibers[i];
      thread_index = current->index;
      running = block_begin + i;
      swapcontext(&scheduler, &current->context);
      waiting += current->state == Fiber::waiting;
    }
    if (waiting == 0) break;
    if (waiting != count) {
      report("a barrier that not all threads of the block reach", arena_bytes);
      break;  // those that wait are dropped
    }
  }
  running = 0;
  free_last();
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  const uint64_t block_threads = uint64_t{block.x} * block.y * block.z;
  // The limits of every GPU from sm_80 on; shared memory is sm_90's.
  if (block_threads == 0 || block_threads > 1024 || grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535 || shared_bytes > 227 << 10)
    return report("a launch of an impossible size", arena_bytes);
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_order);
  if (order.size() * block_threads >= UINT32_MAX - last_thread)
    throw std::length_error("shim: too many threads in all");
  launch_begin = last_thread + 1;
  block_size = block;
  running_kernel = &kernel;
  for (uint64_t i : order) {
    block_index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                   static_cast<unsigned>(i / grid.x / grid.y)};
    run_block(block, shared_bytes);
  }
}

float from_float16(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
uint16_t to_float16(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
uint16_t to_bfloat16(float x) {  // to the nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace shim

namespace {

template <class F>
cudaError_t between(const F& f) {
  shim::between_launches = true;
  f();
  shim::between_launches = false;
  return cudaSuccess;
}

}  // namespace

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return between([&] {
    shim::access(from, bytes, false);
    shim::access(to, bytes, true);
    std::memcpy(to, from, bytes);
  });
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return between([&] {
    shim::access(to, bytes, true);
    std::memset(to, value, bytes);
  });
}

// What -fsanitize=thread calls.
#define WATCH(bytes)                                                                                                \
  extern "C" void __tsan_read##bytes(void* at) { shim::expect_aligned(at, bytes), shim::access(at, bytes, false); } \
  extern "C" void __tsan_write##bytes(void* at) { shim::expect_aligned(at, bytes), shim::access(at, bytes, true); } \
  extern "C" void __tsan_unaligned_read##bytes(void* at) { shim::access(at, bytes, false); }                        \
  extern "C" void __tsan_unaligned_write##bytes(void* at) { shim::access(at, bytes, true); }
WATCH(1) WATCH(2) WATCH(4) WATCH(8) WATCH(16) extern "C" void __tsan_read_range(void* at, size_t bytes) {
  shim::access(at, bytes, false);
}
extern "C" void __tsan_write_range(void* at, size_t bytes) { shim::access(at, bytes, true); }

// What -fsanitize=bounds calls where an array in registers has no such element.
extern "C" void __ubsan_handle_out_of_bounds(void*, uintptr_t) { shim::report("an index out of an array's bounds", 0); }

extern "C" void __tsan_vptr_read(void*) {}
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
