#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

#include "device_memory.h"
#include "running.h"
#include "shim.h"

namespace shim {

Running running;
uint32_t launch_begin = 1, group_begin = 1, block_threads = 1;

namespace {

constexpr size_t arena_bytes = size_t{1} << 28, guard = 4096;

// What is known of a byte: who wrote it last and who read it since, and in which phase of their block.
struct Shadow {
  uint32_t writer, write_phase, reader, read_phase;
  bool allocated, written;
  bool several_readers;  // of the last one's block, in its phase
  bool several_blocks;   // have read it: `readers` knows them, or their groups differ
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
size_t top = guard;
bool between_launches = false;

// Of the bytes that several blocks of the group have read, the last phase of each that did.
std::unordered_map<size_t, View> readers;
uint32_t readers_of = 0;  // the group that `readers` is about, by its first thread

bool in_arena(const void* at) { return static_cast<size_t>(static_cast<const char*>(at) - arena) < arena_bytes; }

bool in_launch(uint32_t thread) { return thread >= launch_begin; }
bool in_group(uint32_t thread) { return thread >= group_begin; }
uint32_t block_of(uint32_t thread) { return (thread - group_begin) / block_threads; }

// Whether nothing orders what a thread of the launch did in that phase before what runs.
bool unordered(uint32_t thread, uint32_t phase) {
  if (!in_launch(thread) || thread == running.thread) return false;
  if (!in_group(thread)) return true;
  const uint32_t block = block_of(thread);
  return block == block_of(running.thread) ? phase >= running.phase : phase >= (*running.view)[block];
}

// Whether nothing orders what other threads read before what runs.
bool unordered_readers(const Shadow& byte, size_t offset) {
  if (!in_launch(byte.reader)) return false;
  if (byte.several_blocks) {
    if (!in_group(byte.reader)) return true;
    const auto found = readers.find(offset);
    if (found == readers.end()) return true;  // another group has read it too
    for (uint32_t block = 0; block < found->second.size(); ++block) {
      const uint32_t phase = found->second[block];
      const bool own = block == block_of(running.thread);
      if (phase && (own ? phase >= running.phase && byte.reader != running.thread : phase >= (*running.view)[block]))
        return true;
    }
  }
  if (byte.several_readers && in_group(byte.reader) && block_of(byte.reader) == block_of(running.thread) &&
      byte.read_phase == running.phase)
    return true;
  return unordered(byte.reader, byte.read_phase);
}

void note_reader(Shadow& byte, size_t offset) {
  const bool before = in_launch(byte.reader), same_group = before && in_group(byte.reader);
  const bool same_block = same_group && block_of(byte.reader) == block_of(running.thread);
  if (before && !same_block) {
    if (!byte.several_blocks && same_group) {
      View& phases = readers[offset];
      phases.assign(running.view->size(), 0);
      phases[block_of(byte.reader)] = byte.read_phase;
    }
    byte.several_blocks = true;
  } else if (!before) {
    byte.several_blocks = false;
  }
  if (byte.several_blocks)
    if (const auto found = readers.find(offset); found != readers.end())
      found->second[block_of(running.thread)] = running.phase;
  const bool same_phase = same_block && byte.read_phase == running.phase;
  byte.several_readers = same_phase && (byte.several_readers || byte.reader != running.thread);
  byte.reader = running.thread;
  byte.read_phase = running.phase;
}

}  // namespace

void report(const std::string& what, const void* at) {
  if (!first_error.empty()) return;
  first_error = what;
  if (at) {
    const size_t offset = static_cast<const char*>(at) - arena;
    std::string where = "no memory that was allocated";
    for (const Region& region : regions)
      if (offset + guard / 2 >= region.begin && offset < region.begin + region.bytes + guard / 2)
        where = region.name + " (byte " + std::to_string(static_cast<int64_t>(offset - region.begin)) + " of " +
                std::to_string(region.bytes) + ")";
    first_error += ": " + where;
  }
  const auto text = [](const uint3& at) {
    return std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z);
  };
  if (running.thread) first_error += ", by thread " + text(thread_index) + " of block " + text(block_index);
}

void forget_memory() {
  for (const Region& region : regions) std::fill_n(shadow + region.begin, region.bytes, Shadow{});
  regions.clear();
  first_error.clear();
  top = guard;
}

void* allocate_workspace(size_t bytes) {
  void* const at = allocate(bytes, "workspace");
  std::fill_n(shadow + (static_cast<char*>(at) - arena), bytes, Shadow{});
  return at;
}

void begin_array(void* at, size_t bytes) {
  const size_t offset = static_cast<char*>(at) - arena;
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (shadow[i].allocated) return report("arrays of a workspace overlap", arena + i);
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
    report("misaligned access of " + std::to_string(bytes) + " bytes", at);
}

void expect_ready(const void* at, size_t bytes) {
  expect_aligned(at, bytes);
  if (!in_arena(at)) return report("a counter or barrier in no device memory", at);
  const size_t offset = static_cast<const char*>(at) - arena;
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (!shadow[i].allocated) return report("a counter or barrier out of bounds", arena + i);
    if (!shadow[i].written) return report("a counter or barrier that nobody has set", arena + i);
    if (unordered(shadow[i].writer, shadow[i].write_phase))
      return report("a counter or barrier is used while another thread sets it", arena + i);
  }
}

void access(const void* at, size_t bytes, bool write) {
  if (!in_arena(at)) return;
  const size_t offset = static_cast<const char*>(at) - arena;
  if (!running.thread && !between_launches) report("host code accesses device memory", at);
  if (running.thread && readers_of != group_begin) {
    readers.clear();
    readers_of = group_begin;
  }
  for (size_t i = offset; i < std::min(offset + bytes, arena_bytes); ++i) {
    Shadow& byte = shadow[i];
    if (!byte.allocated) return report(write ? "write out of bounds" : "read out of bounds", arena + i);
    if (!write && !byte.written) return report("read of what nobody has written", arena + i);
    byte.written = byte.written || write;
    if (!running.thread) continue;
    if (unordered(byte.writer, byte.write_phase))
      return report(write ? "two threads write" : "one thread reads what another writes", arena + i);
    if (!write) {
      note_reader(byte, i);
      continue;
    }
    if (unordered_readers(byte, i)) return report("one thread writes what another reads", arena + i);
    byte.writer = running.thread;
    byte.write_phase = running.phase;
    byte.reader = 0;
    byte.several_blocks = byte.several_readers = false;
    readers.erase(i);
  }
}

float from_float16(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
uint16_t to_float16(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
uint16_t to_bfloat16(float x) {  // to the nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float to_tf32(float x) {  // to the nearest, ties away from zero
  return x != x ? x : std::bit_cast<float>((std::bit_cast<uint32_t>(x) + 0x1000) & 0xffffe000);
}
uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

}  // namespace shim

namespace {

template <class F>
cudaError_t between(const F& f) {
  ++shim::enqueued;
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
extern "C" void __ubsan_handle_out_of_bounds(void*, uintptr_t) { shim::report("an index out of an array's bounds"); }

extern "C" void __tsan_vptr_read(void*) {}
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
