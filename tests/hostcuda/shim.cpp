#include "shim.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
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

// What is known of a byte. Threads are numbered through all launches; a launch's first number stands for several of its
// threads.
struct Shadow {
  uint32_t writer, reader;
  bool allocated, written;
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
uint32_t launch_begin = 1, running = 0, last_thread = 0;
bool between_launches = false;

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
  std::fill_n(shadow + top, bytes, Shadow{0, 0, true, false});
  void* const at = arena + top;
  top += (bytes + 255) / 256 * 256 + guard;
  return at;
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
  const auto another = [](uint32_t thread) { return thread >= launch_begin && thread != running; };
  for (size_t i = offset; i < std::min(offset + bytes, arena_bytes); ++i) {
    Shadow& byte = shadow[i];
    if (!byte.allocated) return report(write ? "write out of bounds" : "read out of bounds", i);
    if (!write && !byte.written) return report("read of what nobody has written", i);
    byte.written = byte.written || write;
    if (!running) continue;
    if (another(byte.writer)) return report(write ? "two threads write" : "one thread reads what another writes", i);
    if (write && another(byte.reader)) return report("one thread writes what another reads", i);
    if (write)
      byte.writer = running;
    else
      byte.reader = another(byte.reader) ? launch_begin : running;
  }
}

void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  const uint64_t block_threads = uint64_t{block.x} * block.y * block.z;
  // The limits of every GPU from sm_80 on.
  if (block_threads == 0 || block_threads > 1024 || grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535)
    return report("a launch of an impossible size", arena_bytes);
  std::vector<uint64_t> order(block_threads * grid.x * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_order);
  if (order.size() >= UINT32_MAX - last_thread) throw std::length_error("shim: too many threads in one process");
  launch_begin = ++last_thread;
  block_size = block;
  const auto split = [](uint64_t i, const uint3& size) {
    return uint3{static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
                 static_cast<unsigned>(i / size.x / size.y)};
  };
  for (uint64_t number : order) {
    running = ++last_thread;
    thread_index = split(number % block_threads, block);
    block_index = split(number / block_threads, grid);
    kernel();
  }
  running = 0;
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
