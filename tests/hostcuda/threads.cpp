#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "device_memory.h"
#include "running.h"
#include "shim.h"

namespace shim {

uint3 thread_index, block_index, block_size;
int active_blocks = 1 << 30;

namespace {

constexpr uint32_t warp_threads = 32;

std::mt19937_64 random_order;
uint32_t last_thread = 0, cluster_blocks = 1;

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

// A barrier in shared memory that counts arrivals and bytes.
struct ByteBarrier {
  uint32_t arrivals, pending, phase = 0;
  int64_t bytes = 0;
  View view, last_view;  // of the running phase and of the one before
};

// Bytes on their way into another block's shared memory.
struct Flight {
  char* to;
  std::vector<char> bytes;
  uint64_t* barrier;
  uint32_t thread, phase;
  View view;
};

std::deque<Fiber> pool;      // a context must not move
std::vector<Fiber*> fibers;  // of the running group
std::vector<Block> blocks;
std::vector<Fiber*> ready;
std::vector<Flight> flights;
std::map<const void*, ByteBarrier> byte_barriers;
std::map<const void*, View> counters;  // what those that raised one had seen
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* running_kernel = nullptr;

Block& own_block() { return blocks[current->block]; }

uint32_t first_of_cluster() { return current->block / cluster_blocks * cluster_blocks; }

void jump_to_scheduler() {
  if (_setjmp(current->here) == 0) _longjmp(scheduler, 1);
}

void run_fiber() {
  for (;;) {
    (*running_kernel)();
    current->state = State::done;
    current->waits_for_kernel = true;
    jump_to_scheduler();
    current->waits_for_kernel = false;
  }
}

void leave(State state) {
  current->state = state;
  if (state == State::ready) ready.push_back(current);
  jump_to_scheduler();
}

void wake(Fiber* fiber) {
  fiber->state = State::ready;
  ready.push_back(fiber);
}

void wake_pollers() {
  for (Fiber* fiber : fibers)
    if (fiber->state == State::polling) wake(fiber);
}

void join(View& view, const View& other) {
  view.resize(std::max(view.size(), other.size()));
  for (size_t i = 0; i < other.size(); ++i) view[i] = std::max(view[i], other[i]);
}

// What the running thread passes on with a release: the phases of its block before this one are over.
View released() {
  View view = current->view;
  view[current->block] = own_block().phase;
  return view;
}

// All threads of `members` go on, knowing what each of them knew; a new phase begins.
void release(const std::vector<uint32_t>& members) {
  View all;
  const auto for_members = [&](const auto& f) {
    for (uint32_t i : members)
      for (uint32_t k = 0; k < block_threads; ++k) f(fibers[i * block_threads + k]);
  };
  for_members([&](const Fiber* fiber) { join(all, fiber->view); });
  for (uint32_t i : members) {
    all[i] = ++blocks[i].phase;
    blocks[i].waiting = blocks[i].waiting_for_cluster = 0;
  }
  for_members([&](Fiber* fiber) {
    fiber->view = all;
    wake(fiber);
  });
}

uint32_t own_lane() { return (current->thread - group_begin) % block_threads % warp_threads; }

// Leaves a thread's words for its warp; returns those of all when all have come.
const WarpWords& meet_warp(const std::array<uint32_t, 6>& given) {
  const uint32_t own = current->thread - group_begin;
  Warp& warp = own_block().warps[own % block_threads / warp_threads];
  // As many instructions as this thread has been through; others are at most one ahead.
  WarpWords& words = warp.words[warp.count % 2];
  words[own_lane()] = given;
  if (++warp.arrived == warp_threads) {
    warp.arrived = 0;
    ++warp.count;
    for (uint32_t i = own - own_lane(); i < own - own_lane() + warp_threads; ++i)
      if (fibers[i] != current) wake(fibers[i]);
  } else {
    leave(State::in_warp);
  }
  return words;
}

ByteBarrier& byte_barrier(const void* at) {
  expect_ready(at, 8);
  const auto found = byte_barriers.find(at);
  if (found == byte_barriers.end()) {
    report("a barrier that nobody has made", at);
    return byte_barriers[at] = {1, 1};
  }
  return found->second;
}

void settle(ByteBarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  barrier.last_view = std::move(barrier.view);
  barrier.view.clear();
  wake_pollers();
}

Block* block_with(const void* at) {
  const auto* const byte = static_cast<const unsigned char*>(at);
  for (Block& block : blocks)
    if (byte >= block.shared && byte < block.shared + block.shared_bytes) return &block;
  return nullptr;
}

void land(Flight flight) {
  // As if in the phase before: whoever sees the bytes counted may read them, though that of the sending is not over.
  const InTheNameOf sender({flight.thread, flight.phase - 1, &flight.view});
  const Block* const to = block_with(flight.to);
  if (!to || to->live == 0) return report("bytes arrive at a block that has ended", flight.to);
  access(flight.to, flight.bytes.size(), true);
  std::memcpy(flight.to, flight.bytes.data(), flight.bytes.size());
  ByteBarrier& barrier = byte_barrier(flight.barrier);
  barrier.bytes -= static_cast<int64_t>(flight.bytes.size());
  join(barrier.view, flight.view);
  settle(barrier);
}

std::string why_stuck() {
  const auto some = [](State state) {
    return std::any_of(fibers.begin(), fibers.end(), [&](const Fiber* fiber) { return fiber->state == state; });
  };
  if (some(State::in_warp)) return "an instruction that not all threads of the warp reach";
  if (some(State::at_barrier)) return "a barrier that not all threads of the block reach";
  if (some(State::at_cluster_barrier)) return "a barrier that not all threads of the cluster reach";
  return "threads wait for what never comes";
}

void begin(Fiber& fiber) {
  ucontext_t here, there;
  getcontext(&there);
  there.uc_stack.ss_sp = fiber.stack.get();
  there.uc_stack.ss_size = Fiber::stack_bytes;
  there.uc_link = nullptr;
  makecontext(&there, run_fiber, 0);
  swapcontext(&here, &there);  // never comes back here
}

void resume(Fiber& fiber) {
  current = &fiber;
  thread_index = fiber.index;
  block_index = own_block().index;
  running = {fiber.thread, own_block().phase, &fiber.view};
  if (_setjmp(scheduler) == 0) {
    if (fiber.is_new) {
      fiber.is_new = false;
      begin(fiber);
    }
    _longjmp(fiber.here, 1);
  }
  running = {};
  if (current->state == State::done) --own_block().live;
}

void run_group(const std::vector<uint3>& indices, dim3 block, size_t shared_bytes) {
  const uint32_t count = block_threads * static_cast<uint32_t>(indices.size());
  group_begin = last_thread + 1;
  last_thread += count;
  blocks.clear();
  for (const uint3& index : indices) {
    auto* const shared = static_cast<unsigned char*>(allocate(shared_bytes, "shared memory"));
    blocks.push_back({index, shared, shared_bytes, 1, 0, 0, block_threads, std::vector<Warp>(block_threads / 32 + 1)});
  }
  while (pool.size() < count) pool.emplace_back();
  fibers.clear();
  ready.clear();
  flights.clear();
  byte_barriers.clear();
  counters.clear();
  for (uint32_t i = 0; i < count; ++i) {
    Fiber& fiber = pool[i];
    fibers.push_back(&fiber);
    const uint32_t t = i % block_threads;
    fiber.index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
    fiber.block = i / block_threads;
    fiber.thread = group_begin + i;
    fiber.state = State::ready;
    fiber.view.assign(indices.size(), 0);
    fiber.asked = nullptr;
    fiber.copies.clear();
    fiber.is_new = !fiber.waits_for_kernel;  // or it was dropped in the middle of a kernel
    ready.push_back(&fiber);
  }
  // In some groups one block seldom has its turn.
  const bool starve = random_order() % 3 == 0;
  const uint32_t slow = static_cast<uint32_t>(random_order() % indices.size());
  while (!ready.empty() || !flights.empty()) {
    if (!flights.empty() && (ready.empty() || random_order() % 64 == 0)) {
      std::swap(flights[random_order() % flights.size()], flights.back());
      Flight flight = std::move(flights.back());
      flights.pop_back();
      land(std::move(flight));
      continue;
    }
    size_t chosen = random_order() % ready.size();
    if (starve && ready[chosen]->block == slow && random_order() % 16) chosen = random_order() % ready.size();
    std::swap(ready[chosen], ready.back());
    Fiber* const fiber = ready.back();
    ready.pop_back();
    resume(*fiber);
  }
  if (std::any_of(fibers.begin(), fibers.end(), [](const Fiber* fiber) { return fiber->state != State::done; }))
    report(why_stuck());  // those that wait are dropped
  for (size_t i = 0; i < indices.size(); ++i) free_last();
}

}  // namespace

void reset(uint64_t seed) {
  forget_memory();
  random_order.seed(seed);
}

void synchronize() {
  Block& block = own_block();
  if (++block.waiting == block_threads) {
    current->state = State::at_barrier;
    release({current->block});
    jump_to_scheduler();
  } else {
    leave(State::at_barrier);
  }
}

unsigned char* shared_memory() { return own_block().shared; }

void synchronize_cluster() {
  ++own_block().waiting_for_cluster;
  std::vector<uint32_t> all(cluster_blocks);
  std::iota(all.begin(), all.end(), first_of_cluster());
  if (!std::all_of(all.begin(), all.end(), [](uint32_t i) { return blocks[i].waiting_for_cluster == block_threads; }))
    return leave(State::at_cluster_barrier);
  current->state = State::at_cluster_barrier;
  release(all);
  jump_to_scheduler();
}

void multiply_tile(Operand operand, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t lane = own_lane();
  const WarpWords& all = meet_warp({a[0], a[1], a[2], a[3], b0, b1});
  const auto scalar = [&](uint32_t word, int i) {
    const uint16_t half = static_cast<uint16_t>(word >> 16 * i);
    if (operand == Operand::bfloat16) return from_bfloat16(half);
    if (operand == Operand::float16) return from_float16(half);
    float value;
    word &= 0xffffe000;
    std::memcpy(&value, &word, sizeof(value));
    return value;
  };
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (uint32_t word = 0; word < 8; ++word) {
      const uint32_t from_a = all[row % 8 * 4 + word % 4][row / 8 + word / 4 * 2];
      const uint32_t from_b = all[column * 4 + word % 4][4 + word / 4];
      for (int k = 0; k < (operand == Operand::tf32 ? 1 : 2); ++k) sum[i] += scalar(from_a, k) * scalar(from_b, k);
    }
  }
}

float from_lane_xor(float x, int mask) {
  const uint32_t other = own_lane() ^ static_cast<uint32_t>(mask);
  return float_of(meet_warp({bits_of(x)})[other][0]);
}

uintptr_t address_in(const void* own, int rank) {
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(own) - own_block().shared);
  if (offset >= own_block().shared_bytes || rank < 0 || static_cast<uint32_t>(rank) >= cluster_blocks) {
    report("an address in no block of the cluster", own);
    return reinterpret_cast<uintptr_t>(own);
  }
  return reinterpret_cast<uintptr_t>(blocks[first_of_cluster() + rank].shared + offset);
}

void init_barrier(uint64_t* barrier, uint32_t arrivals) {
  store(barrier, uint64_t{0});
  byte_barriers[barrier] = {arrivals, arrivals};
}

void expect_bytes(uint64_t* barrier, int bytes) {
  ByteBarrier& b = byte_barrier(barrier);
  if (b.pending == 0) return report("more arrivals at a barrier than it takes", barrier);
  b.bytes += bytes;
  --b.pending;
  join(b.view, released());
  settle(b);
}

bool phase_is_over(uint64_t* barrier, int parity) {
  const ByteBarrier& b = byte_barrier(barrier);
  if (static_cast<int>(b.phase % 2) != parity) {
    join(current->view, b.last_view);
    return true;
  }
  leave(State::polling);
  return false;
}

void store_async(uintptr_t to, const void* from, size_t bytes, uintptr_t barrier) {
  auto* const target = reinterpret_cast<char*>(to);
  expect_aligned(target, bytes);
  byte_barrier(reinterpret_cast<uint64_t*>(barrier));
  const auto* const data = static_cast<const char*>(from);
  flights.push_back({target,
                     {data, data + bytes},
                     reinterpret_cast<uint64_t*>(barrier),
                     current->thread,
                     own_block().phase,
                     released()});
  leave(State::ready);
}

void add_release(uint32_t* counter, uint32_t value) {
  expect_ready(counter, 4);
  *counter += value;
  join(counters[counter], released());
  wake_pollers();
  leave(State::ready);
}

uint32_t load_acquire(const uint32_t* counter) {
  expect_ready(counter, 4);
  // Who asks again in vain goes on when something has changed, so that waiting for ever is seen.
  const bool in_vain = current->asked == counter && current->answer == *counter;
  leave(in_vain ? State::polling : State::ready);
  const auto found = counters.find(counter);
  if (found != counters.end()) join(current->view, found->second);
  current->asked = counter;
  return current->answer = *counter;
}

void begin_copy(void* to, const void* from, size_t bytes) {
  expect_aligned(to, bytes);
  expect_aligned(from, bytes);
  access(from, bytes, false);
  const auto* const data = static_cast<const char*>(from);
  current->copies.push_back({static_cast<char*>(to), {data, data + bytes}});
}

void end_copies() {
  for (const auto& [to, bytes] : current->copies) {
    access(to, bytes.size(), true);
    std::memcpy(to, bytes.data(), bytes.size());
  }
  current->copies.clear();
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel, unsigned cluster,
            bool whole_grid) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  // The limits of every GPU from sm_80 on; shared memory and clusters are sm_90's.
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535 ||
      grid.z == 0 || grid.z > 65535 || shared_bytes > 227 << 10 || cluster == 0)
    return report("a launch of an impossible size");
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
  if (grid.x % cluster || cluster > 16) return report("a cluster of an impossible size");
  const uint64_t together = whole_grid ? count : cluster;
  std::vector<uint64_t> order(count / together);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_order);
  if (count * threads >= UINT32_MAX - last_thread) throw std::length_error("shim: too many threads in all");
  launch_begin = last_thread + 1;
  block_threads = static_cast<uint32_t>(threads);
  block_size = block;
  cluster_blocks = cluster;
  running_kernel = &kernel;
  for (uint64_t group : order) {
    std::vector<uint3> indices;
    for (uint64_t i = group * together; i < (group + 1) * together; ++i)
      indices.push_back({static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                         static_cast<unsigned>(i / grid.x / grid.y)});
    run_group(indices, block, shared_bytes);
  }
}

}  // namespace shim
