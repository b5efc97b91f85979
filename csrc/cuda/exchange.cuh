// How the blocks of a team hand each other data while they run: the two ways, and all of their PTX.
//
// cluster (sm_90 on): a block writes into the shared memory of another, and the bytes that arrive are counted by a barrier
//   there (st.async, mbarrier). Nobody polls across the chip, and clusters know nothing of each other.
// grid: data through the L2, and a counter that each block of the team raises when its data is there. All blocks must run
//   at the same time.
#pragma once

#include "mma.cuh"

namespace fusedrnn::cuda {

#if defined(FUSEDRNN_HOSTCUDA)
#define FUSEDRNN_HAS_CLUSTERS 1
using ClusterAddress = uintptr_t;
FUSEDRNN_DEVICE void wait_for_cluster() { shim::synchronize_cluster(); }
FUSEDRNN_DEVICE ClusterAddress address_in(const void* own, int rank) { return shim::address_in(own, rank); }
FUSEDRNN_DEVICE void init_barrier(uint64_t* barrier) { shim::init_barrier(barrier, 1); }
FUSEDRNN_DEVICE void expect_bytes(uint64_t* barrier, int bytes) { shim::expect_bytes(barrier, bytes); }
FUSEDRNN_DEVICE bool phase_is_over(uint64_t* barrier, int parity) { return shim::phase_is_over(barrier, parity); }
FUSEDRNN_DEVICE void send_words(ClusterAddress to, const Words& words, ClusterAddress barrier) {
  shim::store_async(to, &words, sizeof(words), barrier);
}
template <int count>
FUSEDRNN_DEVICE void send_sums(ClusterAddress to, const Values<float, count>& sums, ClusterAddress barrier) {
  shim::store_async(to, &sums, sizeof(sums), barrier);
}
FUSEDRNN_DEVICE void raise(uint32_t* counter) { shim::add_release(counter, 1); }
FUSEDRNN_DEVICE uint32_t counted(const uint32_t* counter) { return shim::load_acquire(counter); }
FUSEDRNN_DEVICE void begin_copy(uint32_t* to, const uint32_t* from) { shim::begin_copy(to, from, sizeof(Words)); }
FUSEDRNN_DEVICE void end_copies() { shim::end_copies(); }
#else
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FUSEDRNN_HAS_CLUSTERS 1
#else
#define FUSEDRNN_HAS_CLUSTERS 0
#endif
FUSEDRNN_DEVICE uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

#if FUSEDRNN_HAS_CLUSTERS
using ClusterAddress = uint32_t;
FUSEDRNN_DEVICE void wait_for_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Of block `rank` of the cluster what `own` is of this one.
FUSEDRNN_DEVICE ClusterAddress address_in(const void* own, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
  return address;
}
// A phase takes one arrival: that of whoever says how many bytes it takes too. Others may send once they have waited for the
// cluster after this.
FUSEDRNN_DEVICE void init_barrier(uint64_t* barrier) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(barrier))
      : "memory");
}
FUSEDRNN_DEVICE void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Of the block's scope, for the bytes that are counted lie in its own shared memory. The memory model asks for the cluster's, whose
// acquire empties the L1; relaxed, with a fence for shared memory only, every load that is on its way would be waited for.
FUSEDRNN_DEVICE bool phase_is_over(uint64_t* barrier, int parity) {
  uint32_t over;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(over)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return over;
}
FUSEDRNN_DEVICE void send_words(ClusterAddress to, const Words& words, ClusterAddress barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(barrier)
               : "memory");
}
FUSEDRNN_DEVICE void send_sums(ClusterAddress to, const Values<float, 2>& sums, ClusterAddress barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to),
               "r"(bits_of(sums[0])), "r"(bits_of(sums[1])), "r"(barrier)
               : "memory");
}
FUSEDRNN_DEVICE void send_sums(ClusterAddress to, const Values<float, 4>& sums, ClusterAddress barrier) {
  send_words(to, {bits_of(sums[0]), bits_of(sums[1]), bits_of(sums[2]), bits_of(sums[3])}, barrier);
}
#endif

FUSEDRNN_DEVICE void raise(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
FUSEDRNN_DEVICE uint32_t counted(const uint32_t* counter) {
  uint32_t count;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  return count;
}
// From the L2 into shared memory, past the L1, which may have what was there before, and past registers, of which there are
// not enough for as many loads as keep the L2 busy.
FUSEDRNN_DEVICE void begin_copy(uint32_t* to, const uint32_t* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
FUSEDRNN_DEVICE void end_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif

constexpr int piece_words = sizeof(Words) / 4;

// Where a word of a gate and row is in an operand: [group][row][16 words].
FUSEDRNN_DEVICE int place_in_operand(const ResidentPlan& plan, const ResidentLayout& layout, int gate, int row,
                                     int word) {
  word += gate * layout.gate_words;
  return (word / group_words * plan.rows + row) * group_words + word % group_words;
}

// Where a unit and row of a block is in a share: [16 units][8][2 rows][2 units, 8 apart][2 rows], as a thread has them of a product,
// share_ld words to a unit.
FUSEDRNN_DEVICE int place_in_share(const ResidentLayout& layout, int unit, int row) {
  return (unit / 16 * 8 + unit % 8) * 2 * layout.share_ld + row / 2 * 4 + unit / 8 % 2 * 2 + row % 2;
}
// Of 16 units of a block from this on: what the block is sent with their sums; or of no unit.
constexpr int nowhere = -1;
FUSEDRNN_DEVICE int destination_of(int block, int unit, const ResidentLayout& layout) {
  return place_in_share(layout, unit, 0) << 8 | block;
}

// Rounds of a tile are counted from 1; what comes in by round r must be used before this block sends round r + 1, and then
// round r + 2 may arrive in its place.

#if FUSEDRNN_HAS_CLUSTERS
// Two barriers of a tile, each of which counts the bytes of every other round. keeps: there are registers to keep addresses in.
template <bool keeps>
struct ClusterBarriers {
  uint64_t* const first;
  const int tiles, bytes;  // of a round
  const bool expects;      // them, for its block

  FUSEDRNN_DEVICE ClusterBarriers(const ResidentLayout& layout, int tiles, unsigned char* memory, int bytes)
      : first(kept_if<keeps>(reinterpret_cast<uint64_t*>(memory + layout.barriers))),
        tiles(tiles),
        bytes(kept(bytes)),
        expects(threadIdx.x == 0) {}

  FUSEDRNN_DEVICE uint64_t* barrier(int tile, int round) const { return first + tile * 2 + (round & 1); }
  FUSEDRNN_DEVICE void begin() const {
    if (expects)
      for (int i = 0; i < 2 * tiles; ++i) {
        init_barrier(barrier(i / 2, i % 2));
        expect_bytes(barrier(i / 2, i % 2), bytes);
      }
    wait_for_cluster();
  }
  FUSEDRNN_DEVICE void wait(int tile, int round) const {
    while (!phase_is_over(barrier(tile, round), (round - 1) >> 1 & 1)) {
    }
    if (expects) expect_bytes(barrier(tile, round), bytes);  // of round + 2
  }
};

// What both ways of a cluster have in common.
template <bool keeps>
struct InCluster {
  const ResidentPlan& plan;
  const ResidentLayout& layout;
  unsigned char* const memory;
  const int rank;
  const ClusterBarriers<keeps> barriers;
  uint32_t* const operands;
  const int operand_words;

  FUSEDRNN_DEVICE InCluster(const ResidentPlan& plan, const ResidentLayout& layout, unsigned char* memory, int rank,
                            int bytes)
      : plan(plan),
        layout(layout),
        memory(memory),
        rank(kept_if<keeps>(rank)),
        barriers{layout, plan.tiles, memory, bytes},
        operands(kept_if<keeps>(reinterpret_cast<uint32_t*>(memory + layout.operand))),
        operand_words(kept_if<keeps>(layout.operand_words)) {}

  FUSEDRNN_DEVICE uint32_t* operand(int tile, int round) const {
    return operands + (tile * 2 + (round & 1)) * operand_words;
  }
  FUSEDRNN_DEVICE void begin() const { barriers.begin(); }
  FUSEDRNN_DEVICE void receive(int tile, int round) const { barriers.wait(tile, round); }
};

// All blocks of a cluster give each other all that they make.
template <bool keeps>
struct ClusterExchange : InCluster<keeps> {
  using Base = InCluster<keeps>;
  using Base::barriers, Base::operand, Base::plan, Base::rank;

  FUSEDRNN_DEVICE ClusterExchange(const ResidentPlan& plan, const ResidentLayout& layout, unsigned char* memory,
                                  int rank, int gates)
      : Base(plan, layout, memory, rank, gates * plan.rows * layout.gate_words * 4) {}

  // Words at a place of everyone's operand, by the `number`th of `copies` threads that have them.
  FUSEDRNN_DEVICE void send(int tile, int round, int place, const Words& words, int number, int copies) const {
    uint32_t* const at = operand(tile, round) + place;
    uint64_t* const barrier = barriers.barrier(tile, round);
#pragma unroll 1
    for (int i = number; i < plan.blocks; i += copies) {
      const int to = (i + rank) & (plan.blocks - 1);  // each begins with itself, not all with one
      send_words(address_in(at, to), words, address_in(barrier, to));
    }
  }
  FUSEDRNN_DEVICE void request(int, int) const {}
  FUSEDRNN_DEVICE void sent(int) const {}
};

// All blocks of a cluster share a product's inner dimension, of which each has what it makes itself, and send each other what
// that makes of the other's units.
template <bool keeps>
struct ClusterSums : InCluster<keeps> {
  using Base = InCluster<keeps>;
  using Base::barriers, Base::layout, Base::memory, Base::plan;

  FUSEDRNN_DEVICE ClusterSums(const ResidentPlan& plan, const ResidentLayout& layout, unsigned char* memory, int rank)
      : Base(plan, layout, memory, rank, plan.blocks * plan.units * ((plan.rows + 1) / 2) * 8) {}

  // Of the first tile's even rounds: [block][units and rows as place_in_share has them].
  FUSEDRNN_DEVICE float* shares() const { return reinterpret_cast<float*>(memory + layout.shares); }
  FUSEDRNN_DEVICE int share_of_block() const { return plan.units * layout.share_ld; }

  // Sums, to where `share` is in the block of a destination but for what that adds, in a round.
  template <int count>
  FUSEDRNN_DEVICE void send(int tile, int round, int destination, float* share,
                            const Values<float, count>& sums) const {
    const int to = destination & 0xff;
    send_sums(address_in(share + (destination >> 8), to), sums, address_in(barriers.barrier(tile, round), to));
  }
};

#endif

template <bool lone_tile>
struct GridExchange {
  const ResidentPlan& plan;
  const ResidentLayout& layout;
  unsigned char* const memory;
  const int rank, gates, team, first_group;  // of what this block multiplies
  uint32_t* const data;                      // [teams][tiles][2] operands of all groups, without zeros
  uint32_t* const counters;                  // [teams][tiles], zero before the launch

  FUSEDRNN_DEVICE uint32_t* operand(int, int) const { return reinterpret_cast<uint32_t*>(memory + layout.operand); }
  FUSEDRNN_DEVICE uint32_t* buffer(int tile, int round) const {
    const int64_t number = (team * plan.tiles + tile) * 2 + (round & 1);
    return data + number * (layout.all_groups * plan.rows * group_words);
  }
  FUSEDRNN_DEVICE uint32_t* counter(int tile) const { return counters + team * plan.tiles + tile; }

  FUSEDRNN_DEVICE void begin() const { __syncthreads(); }

  // By the warps that have no unit of the tile before, or by all, after its product, while the others make of it what it is to
  // be: this tile's counter was raised long ago, but asking for it and copying take as long as what they do. A lone tile is
  // asked for by all.
  FUSEDRNN_DEVICE void request(int tile, int round) const {
    const int of_units = (plan.rows * plan.units + 31) / 32 * 32 % resident_threads;
    const int busy = lone_tile || plan.tiles == 1 ? 0 : of_units, thread = threadIdx.x - busy;
    if (thread < 0) return;
    const uint32_t all = static_cast<uint32_t>(round) * plan.blocks;
    // The difference, for a counter that has gone around.
    while (static_cast<int32_t>(counted(counter(tile)) - all) < 0) {
    }
    // The groups of this block, without those pieces of the last that nobody makes.
    constexpr int group_pieces = group_words / piece_words;
    const int row_pieces = gates * layout.gate_words / piece_words;
    const int a_group = plan.rows * group_pieces, partly = row_pieces % group_pieces;
    int whole = row_pieces / group_pieces - first_group;
    const bool ends_partly = partly && whole >= 0 && whole < layout.groups;
    if (whole < 0) whole = 0;
    if (whole > layout.groups) whole = layout.groups;
    const int threads = resident_threads - busy;
    uint32_t* const to = operand(tile, round);
    const uint32_t* const from = buffer(tile, round) + first_group * plan.rows * group_words;
    const auto copy = [&](int i) {
      const uint32_t word = static_cast<uint32_t>(i) * piece_words;
      begin_copy(to + word, from + word);
    };
    int i = thread;
#pragma unroll 1
    for (; i + 3 * threads < whole * a_group; i += 4 * threads) {
#pragma unroll
      for (int k = 0; k < 4; ++k) copy(i + k * threads);
    }
#pragma unroll 1
    for (; i < whole * a_group; i += threads) copy(i);
    if (!ends_partly) return;
#pragma unroll 1
    for (; i < (whole + 1) * a_group; i += threads)
      if (i % group_pieces < partly) copy(i);
  }
  FUSEDRNN_DEVICE void receive(int tile, int round) const {
    if (lone_tile || plan.tiles == 1) request(tile, round);
    end_copies();
    __syncthreads();
  }

  FUSEDRNN_DEVICE void send(int tile, int round, int place, const Words& words, int number, int) const {
    if (number == 0) store_words(buffer(tile, round) + place, words);
  }
  // After all that a block has made. By the last warp, which seldom has stored anything that this would wait for.
  FUSEDRNN_DEVICE void sent(int tile) const {
    __syncthreads();
    if (threadIdx.x == resident_threads - 1) raise(counter(tile));
  }
};

// Sums of a product whose inner dimension neighbours in a grid share out, as a cluster: each sends the others what it has of
// their units. A round's are read before what is made of them is handed on, and thus before anyone sends the next.
#if FUSEDRNN_HAS_CLUSTERS
struct SharedSums {
  const ResidentPlan& plan;
  const ResidentLayout& layout;
  unsigned char* const memory;
  const int rank;  // in the team

  FUSEDRNN_DEVICE float* share(int tile, int member) const {
    return reinterpret_cast<float*>(memory + layout.shares) + (tile * plan.split + member) * plan.rows * plan.units;
  }
  FUSEDRNN_DEVICE uint64_t* barrier(int tile) const {
    return reinterpret_cast<uint64_t*>(memory + layout.barriers) + tile;
  }
  FUSEDRNN_DEVICE int bytes() const { return plan.split * plan.rows * plan.units * static_cast<int>(sizeof(float)); }

  FUSEDRNN_DEVICE void begin() const {
    if (threadIdx.x == 0)
      for (int tile = 0; tile < plan.tiles; ++tile) {
        init_barrier(barrier(tile));
        expect_bytes(barrier(tile), bytes());
      }
    wait_for_cluster();
  }

  // sum(row of the tile, row of the weights) is what this block has of 4 neighbours.
  template <class F>
  FUSEDRNN_DEVICE void exchange(int tile, int round, const F& sum) const {
    const int a_row = plan.units / piece_words, count = plan.rows * a_row, own = rank % split_blocks;
#pragma unroll 1
    for (int i = threadIdx.x; i < count * split_blocks; i += resident_threads) {
      const int to = i % split_blocks, piece = i / split_blocks, row = piece / a_row;
      const int unit = (piece - row * a_row) * piece_words;
      send_words(address_in(share(tile, own) + piece * piece_words, to), sum(row, to * plan.units + unit),
                 address_in(barrier(tile), to));
    }
    while (!phase_is_over(barrier(tile), (round - 1) % 2)) {
    }
    if (threadIdx.x == 0) expect_bytes(barrier(tile), bytes());  // of round + 1
  }
};
#endif

}  // namespace fusedrnn::cuda
