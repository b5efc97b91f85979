// What the resident schedules rest on, measured on a GPU: nvcc -std=c++20 -O3 -arch=native -Icsrc benchmarks/micro.cu
//
// Times are per round of a loop in one kernel, the smallest of some launches. Exchanges are those of csrc/cuda/exchange.cuh
// with a state of bfloat16: each block of a team hands 32 units of `rows` rows to all others, and takes in theirs.
#include <cooperative_groups.h>

#include <algorithm>
#include <cstdio>

#include "cuda/exchange.cuh"

using namespace fusedrnn::cuda;

namespace {

constexpr int rounds = 2000;

template <class P>
float microseconds(void (*kernel)(P), const Geometry& g, const P& p, int shared_bytes, Together together,
                   uint32_t* counters) {
  float best = 1e9f;
  cudaEvent_t begin, end;
  expect_success(cudaEventCreate(&begin));
  expect_success(cudaEventCreate(&end));
  for (int i = 0; i < 5; ++i) {
    zero(counters, 4096, nullptr);
    expect_success(cudaEventRecord(begin));
    launch(kernel, g, nullptr, p, shared_bytes, together);
    expect_success(cudaEventRecord(end));
    expect_success(cudaEventSynchronize(end));
    float milliseconds = 0;
    expect_success(cudaEventElapsedTime(&milliseconds, begin, end));
    best = std::min(best, milliseconds * 1e3f / rounds);
  }
  return best;
}

struct TeamParams {
  ResidentPlan plan;
  ResidentLayout layout;
  uint32_t *data, *counters;
};

// What a block hands on, as resident.cuh does; a piece by as many threads as there are.
template <class Exchange>
__device__ void send_all(const Exchange& exchange, const TeamParams& p, int round) {
  const int a_row = p.plan.units * 2 / static_cast<int>(sizeof(Words)), count = a_row * p.plan.rows;
  const int piece = threadIdx.x % count, number = threadIdx.x / count, copies = resident_threads / count;
  const int word = exchange.rank * p.plan.units / 2 + piece % a_row * piece_words;
  if (number < copies)
    exchange.send(0, round, place_in_operand(p.plan, p.layout, 0, piece / a_row, word), Words{}, number, copies);
  exchange.sent(0);
}

__global__ void __launch_bounds__(resident_threads, 1) exchange_in_cluster(const __grid_constant__ TeamParams p) {
#if FUSEDRNN_HAS_CLUSTERS
  FUSEDRNN_SHARED(memory);
  const ClusterExchange<true> exchange(p.plan, p.layout, memory, static_cast<int>(blockIdx.x), 1);
  exchange.begin();
  for (int round = 1; round <= rounds; ++round) {
    send_all(exchange, p, round);
    exchange.receive(0, round);
    __syncthreads();
  }
#endif
}

__global__ void __launch_bounds__(resident_threads, 1) exchange_in_grid(const __grid_constant__ TeamParams p) {
  FUSEDRNN_SHARED(memory);
  const int rank = blockIdx.x, team = blockIdx.y;
  const GridExchange<true> exchange{p.plan, p.layout, memory, rank, 1, team, 0, p.data, p.counters};
  for (int round = 1; round <= rounds; ++round) {
    send_all(exchange, p, round);
    exchange.receive(0, round);
  }
}

// Every word with the round that it belongs to, so that the data is its own flag.
__global__ void __launch_bounds__(resident_threads, 1) exchange_flagged(const __grid_constant__ TeamParams p) {
  const int count = p.plan.units / 2 * p.plan.rows, all = count * p.plan.blocks;
  auto* const words = reinterpret_cast<volatile unsigned long long*>(p.data) + blockIdx.y * 2 * all;
  for (unsigned long long round = 1; round <= rounds; ++round) {
    volatile unsigned long long* const at = words + round % 2 * all;
    for (int i = threadIdx.x; i < count; i += resident_threads) at[blockIdx.x * count + i] = round << 32;
    for (int i = threadIdx.x; i < all; i += resident_threads)
      while (at[i] >> 32 != round) {
      }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(resident_threads, 1) synchronize_grid(const __grid_constant__ TeamParams) {
  const auto grid = cooperative_groups::this_grid();
  for (int round = 0; round < rounds; ++round) grid.sync();
}

struct Pull {
  const uint32_t* from;
  uint32_t* to;
  int words;
};

__device__ Words load_from_l2(const uint32_t* from) {
  Words words;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(from));
  return words;
}

__global__ void __launch_bounds__(resident_threads, 1) pull(const __grid_constant__ Pull p) {
  uint32_t sum = 0;
  for (int round = 0; round < rounds; ++round)
#pragma unroll 8
    for (int i = threadIdx.x * 4; i < p.words; i += resident_threads * 4) sum += load_from_l2(p.from + i)[round & 3];
  if (sum == 1) *p.to = sum;
}

template <class Scalar>
__global__ void __launch_bounds__(resident_threads, 1) multiply(const __grid_constant__ Pull p) {
  typename TensorCores<Scalar>::Sum sums[2] = {};
  Fragment weights[2][register_groups];
  int place = 0;  // not twice the same weights: of equal products the compiler makes one
  for (auto& slot : weights)
    for (Fragment& a : slot) {
      a = {load_words(p.from + place), load_words(p.from + place + 4)};
      place += 8;
    }
  const Words b = load_words(p.from + 8);
  for (int round = 0; round < rounds; ++round)
#pragma unroll
    for (int group = 0; group < register_groups; ++group)
#pragma unroll
      for (int i = 0; i < 2; ++i) TensorCores<Scalar>::add(sums[i], weights[i][group], b);
  float all = 0;  // or the compiler leaves products out
  for (const auto& sum : sums)
    for (const auto& value : sum.value) all += value[0] + value[1] + value[2] + value[3];
  if (all == 1) *p.to = 1;
}

TeamParams make_team(int blocks, int rows, bool cluster, uint32_t* memory) {
  TeamParams team{};
  team.plan = {blocks, 32, rows, 1, 1, cluster, 1, 0};
  team.layout = resident_layout(team.plan, 4, false, true, 2);
  team.counters = memory;
  team.data = memory + 1024;
  return team;
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  cudaDeviceProp gpu;
  expect_success(cudaGetDeviceProperties(&gpu, 0));
  const int multiprocessors = gpu.multiProcessorCount, shared = static_cast<int>(gpu.sharedMemPerBlockOptin);
  std::printf("%s, %d multiprocessors, %d bytes of shared memory a block\n", gpu.name, multiprocessors, shared);
  uint32_t* memory;
  expect_success(cudaMalloc(&memory, 64 << 20));
  expect_success(cudaMemset(memory, 0, 64 << 20));

  if (gpu.major >= 9)
    for (int blocks = 2; blocks <= 16; blocks *= 2) {
      const Geometry all{blocks, 1, 1, resident_threads, 1};
      Launch<TeamParams> kernel(exchange_in_cluster, all, nullptr, shared, {blocks, false});
      const int active = kernel.active_blocks() / blocks;
      std::printf("clusters of %2d blocks with all shared memory: %d at once\n", blocks, active);
      for (const int rows : {1, 4, 8}) {
        if (!active) break;
        const TeamParams team = make_team(blocks, rows, true, memory);
        const Geometry full{blocks, static_cast<unsigned>(active), 1, resident_threads, 1};
        std::printf("  exchange of %d rows, all clusters: %.3f us\n", rows,
                    microseconds(exchange_in_cluster, full, team, team.layout.overflow, {blocks, false}, memory));
      }
    }
  for (const int blocks : {16, 32, 64, 128}) {
    if (blocks > multiprocessors) break;
    const unsigned teams = multiprocessors / blocks;
    const Geometry full{blocks, teams, 1, resident_threads, 1};
    const Together together{1, true};
    std::printf("grid of %u teams of %d blocks: barrier of the grid %.3f us\n", teams, blocks,
                microseconds(synchronize_grid, full, make_team(blocks, 8, false, memory), 0, together, memory));
    for (const int rows : {1, 8}) {
      const TeamParams team = make_team(blocks, rows, false, memory);
      const float counted = microseconds(exchange_in_grid, full, team, team.layout.overflow, together, memory);
      expect_success(cudaMemset(memory, 0, 64 << 20));
      std::printf("  exchange of %d rows: counter %.3f us, data as flag %.3f us\n", rows, counted,
                  microseconds(exchange_flagged, full, team, 0, together, memory));
      expect_success(cudaMemset(memory, 0, 64 << 20));
    }
  }
  const Geometry every{multiprocessors, 1, 1, resident_threads, 1};
  for (const int bytes : {16 << 10, 64 << 10, 128 << 10, 256 << 10}) {
    const float time = microseconds(pull, every, Pull{memory + 1024, memory, bytes / 4}, 0, {}, memory);
    std::printf("every multiprocessor reads the same %d KB of the L2: %.3f us, %.1f GB/s each\n", bytes >> 10, time,
                bytes / time / 1e3);
  }
  const double products = 2.0 * resident_warps * 2 * register_groups * 2 * 16 * 8;  // times the inner dimension
  const float half = microseconds(multiply<bfloat16>, every, Pull{memory + 1024, memory, 0}, 0, {}, memory);
  const float tf32 = microseconds(multiply<float>, every, Pull{memory + 1024, memory, 0}, 0, {}, memory);
  std::printf(
      "weights of 128 KB in registers times 8 columns: bfloat16 %.3f us, %.0f TFLOP/s; TF32 %.3f us, %.0f TFLOP/s\n",
      half, products * 16 * multiprocessors / half / 1e6, tf32, products * 8 * multiprocessors / tf32 / 1e6);
  return 0;
}
