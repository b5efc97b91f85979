// The kernel that runs all steps of a chunk, if there is one for a problem, and its launch:
//   block    where a step has few weights to read from shared memory, or nothing else is there
//   cluster  where the weights fit the registers and shared memory of a cluster
//   grid     where they fit those of the whole GPU
// Of the last two that whose steps take less time (tuning.h). What none of them takes is left to the step schedule.
#pragma once

#include "block.cuh"
#include "layer.cuh"
#include "resident.cuh"

namespace fusedrnn::cuda {

template <class Cell, class S>
class ChunkKernel {
  static constexpr bool is_double = sizeof(Accumulator<S>) == 8;  // float64 is for checks of gradients

 public:
  ChunkKernel(const Problem& p, const Limits& limits, bool tf32, bool backward) : p_(p), backward_(backward) {
    if constexpr (!is_double) {
      const Sequence& s = p.sequence;
      block_ = block_plan(limits, s.T, s.B, p.H, p.directions, Cell::gates, Cell::has_cell, sizeof(S), sizeof(float));
      exact_ = sizeof(S) == 4 && !tf32;
      if (block_.rows && Cell::gates * p.H * p.H * static_cast<int64_t>(sizeof(S)) <= block_weight_bytes) return;
      ResidentPlan best{};
      for (const Team team : {Team::cluster, Team::split_grid, Team::grid})
        if (choose(limits, team) && (!best.blocks || plan_.cycles < best.cycles)) best = plan_;
      plan_ = best;
      if (plan_.blocks) layout_ = layout();
    }
  }

  // "step" where there is no such kernel.
  const char* name() const {
    return plan_.blocks ? (plan_.cluster ? "cluster" : "grid") : block_.rows ? "block" : "step";
  }
  explicit operator bool() const { return plan_.blocks || block_.rows; }

  int64_t chunk_bytes(int64_t bytes) const { return plan_.blocks ? resident_chunk_factor * bytes : bytes; }

  void take(Room& room) {
    if (!plan_.blocks || plan_.cluster) return;
    const int64_t tiles = static_cast<int64_t>(p_.directions) * plan_.teams * plan_.tiles;
    data_ = room.template take<uint32_t>(tiles * 2 * layout_.all_groups * plan_.rows * group_words);
    counters_ = room.template take<uint32_t>(tiles);
    counter_bytes_ = tiles * 4;
  }

  void forward(const ForwardStep<S>& step, const Chunk& chunk, const Sequence& sequence, cudaStream_t stream) const {
    if constexpr (!is_double) {
      if (plan_.blocks)
        launch_resident(forward_kernel(), step, chunk, sequence, stream);
      else
        launch_block(block_forward<Cell, S, 1>, block_forward<Cell, S, 2>, block_forward<Cell, S, 4>,
                     BlockForward<S>{step, chunk.begin, chunk.end, sequence, {w_hh(0), w_hh(1)}}, stream);
    }
  }

  void backward(const BackwardStep<S>& step, const Chunk& chunk, const Sequence& sequence, cudaStream_t stream) const {
    if constexpr (!is_double) {
      if (plan_.blocks)
        launch_resident(backward_kernel(), step, chunk, sequence, stream);
      else
        launch_block(block_backward<Cell, S, 1>, block_backward<Cell, S, 2>, block_backward<Cell, S, 4>,
                     BlockBackward<S>{step, chunk.begin, chunk.end, sequence, {w_hh(0), w_hh(1)}}, stream);
    }
  }

 private:
  const S* w_hh(int d) const { return as<S>(p_.weights[d].w_hh); }

  Geometry resident_geometry() const {
    return {plan_.blocks, static_cast<unsigned>(plan_.teams), static_cast<unsigned>(p_.directions), resident_threads,
            1};
  }
  Together together() const { return plan_.cluster ? Together{plan_.blocks, false} : Together{plan_.split, true}; }

  ResidentLayout layout() const { return resident_layout(plan_, Cell::gates, backward_, Cell::has_cell, sizeof(S)); }

  auto forward_kernel() const {
    using Tensor = TensorCores<S>;
    const bool cluster = plan_.cluster;
    if constexpr (sizeof(S) == 4)
      if (exact_) return cluster ? cluster_forward<Cell, Fma, false> : grid_forward<Cell, Fma, false>;
    if (is_compact(plan_, layout()))
      return cluster ? cluster_forward<Cell, Tensor, true> : grid_forward<Cell, Tensor, true>;
    return cluster ? cluster_forward<Cell, Tensor, false> : grid_forward<Cell, Tensor, false>;
  }
  auto backward_kernel() const {
    using Tensor = TensorCores<S>;
    const bool cluster = plan_.cluster;
    if constexpr (sizeof(S) == 4)
      if (exact_) return cluster ? cluster_backward<Cell, Fma, false> : grid_backward<Cell, Fma, false>;
    if (is_compact(plan_, layout()))
      return cluster ? cluster_backward<Cell, Tensor, true> : grid_backward<Cell, Tensor, true>;
    return cluster ? cluster_backward<Cell, Tensor, false> : grid_backward<Cell, Tensor, false>;
  }

  // A plan is for the multiprocessors that there are. The device knows how many of them a kernel can fill, which clusters do
  // not: they lie within the parts that it is made of. What it says may lead to another plan, of which it is asked again: one for
  // smaller clusters, where it has no room for one so large.
  bool choose(Limits limits, Team team) {
    const Sequence& s = p_.sequence;
    int room = 0;
    for (int asked = 0; asked < 2;) {
      plan_ =
          resident_plan(limits, team, s.T, s.B, p_.H, p_.directions, Cell::gates, backward_, Cell::has_cell, sizeof(S));
      if (!plan_.blocks) return false;
      room = backward_ ? room_for(backward_kernel()) : room_for(forward_kernel());
      if (plan_.cluster && !room)
        limits.largest_cluster = plan_.blocks / 2;
      else
        limits.multiprocessors = std::min(limits.multiprocessors, room), ++asked;
    }
    if (room < (plan_.cluster ? 1 : plan_.teams * p_.directions) * plan_.blocks) plan_ = {};
    return plan_.blocks;
  }
  template <class Kernel>
  int room_for(Kernel kernel) const {
    return active_blocks(kernel, resident_geometry(), plan_.shared_bytes, together());
  }

  template <class P, class Step>
  void launch_resident(void (*kernel)(P), const Step& step, const Chunk& chunk, const Sequence& sequence,
                       cudaStream_t stream) const {
    zero(counters_, counter_bytes_, stream);
    const P p{step, chunk.begin, chunk.end, sequence, {w_hh(0), w_hh(1)}, plan_, layout_, data_, counters_};
    launch(kernel, resident_geometry(), stream, p, plan_.shared_bytes, together());
  }

  // By the rows of a block.
  template <class P>
  void launch_block(void (*one)(P), void (*two)(P), void (*four)(P), const P& p, cudaStream_t stream) const {
    const int rows = block_.rows;
    const Geometry geometry{(p_.sequence.B + rows - 1) / rows, static_cast<unsigned>(p_.directions), 1,
                            static_cast<unsigned>(block_.threads), 1};
    launch(rows == 1 ? one : rows == 2 ? two : four, geometry, stream, p, block_.shared_bytes);
  }

  const Problem& p_;
  const bool backward_;
  bool exact_ = false;  // float32 that may not be rounded to TF32
  BlockPlan block_{};
  ResidentPlan plan_{};
  ResidentLayout layout_{};
  uint32_t *data_ = nullptr, *counters_ = nullptr;
  int64_t counter_bytes_ = 0;
};

}  // namespace fusedrnn::cuda
