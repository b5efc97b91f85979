// What passes between threads: within a warp, by counted bytes into a cluster's shared memory, by counters in a grid.
#include <algorithm>
#include <cstring>
#include <map>
#include <string>

#include "threads.h"

namespace shim {

namespace {

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

std::vector<Flight> flights;
std::map<const void*, ByteBarrier> byte_barriers;
std::map<const void*, View> counters;  // what those that raised one had seen

void wake_pollers() {
  for (Fiber* fiber : fibers)
    if (fiber->state == State::polling) wake(fiber);
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
  // As if before the phase, but after the one before: whoever sees the bytes counted may read them, though that of the sending is not over.
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

}  // namespace

bool any_in_flight() { return !flights.empty(); }

void land_one() {
  std::swap(flights[random_order() % flights.size()], flights.back());
  Flight flight = std::move(flights.back());
  flights.pop_back();
  land(std::move(flight));
}

void forget_exchange() {
  flights.clear();
  byte_barriers.clear();
  counters.clear();
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

uint32_t from_lane(uint32_t x, int lane) { return meet_warp({x})[static_cast<uint32_t>(lane) % warp_threads][0]; }

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

}  // namespace shim
