#include "threads.h"

#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <numeric>
#include <stdexcept>
#include <string>

#include "device_memory.h"

namespace shim {

uint3 thread_index, block_index, block_size;
int active_blocks = 1 << 30;
int64_t enqueued = 0;

std::vector<Fiber*> fibers;  // of the running group
std::vector<Block> blocks;
Fiber* current = nullptr;
uint32_t cluster_blocks = 1;
std::mt19937_64 random_order;

namespace {

uint32_t last_thread = 0;
std::deque<Fiber> pool;  // a context must not move
std::vector<Fiber*> ready;
jmp_buf scheduler;
const std::function<void()>* running_kernel = nullptr;

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

// All threads of `members` go on, knowing what each of them knew; a new phase begins. Those between are for what is sent.
void release(const std::vector<uint32_t>& members) {
  View all;
  const auto for_members = [&](const auto& f) {
    for (uint32_t i : members)
      for (uint32_t k = 0; k < block_threads; ++k) f(fibers[i * block_threads + k]);
  };
  for_members([&](const Fiber* fiber) { join(all, fiber->view); });
  for (uint32_t i : members) {
    all[i] = blocks[i].phase += 2;
    blocks[i].waiting = blocks[i].waiting_for_cluster = 0;
  }
  for_members([&](Fiber* fiber) {
    fiber->view = all;
    wake(fiber);
  });
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
  forget_exchange();
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
  while (!ready.empty() || any_in_flight()) {
    if (any_in_flight() && (ready.empty() || random_order() % 64 == 0)) {
      land_one();
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

void leave(State state) {
  current->state = state;
  if (state == State::ready) ready.push_back(current);
  jump_to_scheduler();
}

void wake(Fiber* fiber) {
  fiber->state = State::ready;
  ready.push_back(fiber);
}

void join(View& view, const View& other) {
  view.resize(std::max(view.size(), other.size()));
  for (size_t i = 0; i < other.size(); ++i) view[i] = std::max(view[i], other[i]);
}

View released() {
  View view = current->view;
  view[current->block] = own_block().phase;
  return view;
}

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

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel, unsigned cluster,
            bool whole_grid) {
  ++enqueued;
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
