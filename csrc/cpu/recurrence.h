// What the passes over a sequence on a CPU share: who works on what, and where its rows are.
//
// The batch's rows and the directions make jobs; teams of threads take jobs; the members of a team share out the hidden
// units in panels of N and meet once per step, twice where the hidden state is projected.
#pragma once

#include <array>
#include <memory>
#include <tuple>
#include <utility>

#include "../params.h"
#include "gemm.h"
#include "memory.h"
#include "team.h"
#include "tuning.h"

namespace fusedrnn::cpu {
namespace {

// Rows of at least so many numbers, an odd number of cache lines apart: at an even distance of some KiB they would push
// each other out of the first-level cache.
template <class S>
constexpr int64_t row_stride(int64_t numbers) {
  constexpr int64_t line = 64 / sizeof(S);
  return ((numbers + line - 1) / line | 1) * line;
}

// One direction of one block of rows, and its steps in the order in which forward takes them.
struct Job {
  const Sequence& sequence;
  int64_t direction, row_begin, row_end;
  int64_t T;    // steps, those of its longest row where the batch is packed
  int64_t set;  // of packed weights
  bool first;   // of its team's jobs in this direction

  bool reverse() const { return direction == 1; }
  int64_t step(int64_t s) const { return reverse() ? T - 1 - s : s; }
  int64_t rows_end(int64_t t) const { return std::min(row_end, sequence.rows_at(t)); }
  int64_t first_step(int64_t b) const { return reverse() ? sequence.length(b) - 1 : 0; }
  int64_t last_step(int64_t b) const { return reverse() ? 0 : sequence.length(b) - 1; }
  int64_t previous(int64_t t) const { return reverse() ? t + 1 : t - 1; }
  int64_t next(int64_t t) const { return reverse() ? t - 1 : t + 1; }
  bool reset_at(int64_t t, int64_t b) const { return sequence.resets && sequence.resets[sequence.start(t) + b]; }
};

// One member of a team: slices [from, to) of `slices`, of the hidden units panels [begin, end), and of a hidden state's numbers, which
// are fewer where it is projected, panels [state_begin, state_end). Where a step is too little work to share, the first slice has all of
// them, and the others join in between steps only.
struct Member {
  int64_t from, to, slices, begin, end, state_begin, state_end;
  bool shares_steps;
  Arrivals* arrivals;  // of the team's slices
  int64_t generation = 0;
  std::array<bool, 2> started{};  // the sums of a direction's gradients (gradients.h)

  std::pair<int64_t, int64_t> share(int64_t n) const { return {n * from / slices, n * to / slices}; }
  void meet() {
    if (to - from < slices) cpu::meet(arrivals, from, to, slices, ++generation);
  }
  void meet_in_step() {
    if (shares_steps) meet();
  }
};

inline Call call_of(const Problem& p, Pass pass, int64_t gates, int64_t vector, int64_t threads) {
  const Sequence& s = p.sequence;
  return {.pass = pass,
          .T = s.T,
          .B = s.B,
          .rows = s.start(s.T),
          .I = p.I,
          .H = p.H,
          .projection = p.projection,
          .directions = p.directions,
          .converted = p.converts_weights(),
          .gates = gates,
          .vector = vector,
          .threads = threads,
          .pairs = packed_pairs(p),
          .slow_cache = p.slow_cache};
}

template <class Cell, class S, int N>
struct Recurrence {
  using V = vec<S, N>;
  static constexpr int gates = Cell::gates, sums = Cell::sums, saved = Cell::saved;

  const Problem& problem;
  const Sequence& sequence = problem.sequence;
  const int64_t B = sequence.B, H = problem.H, R = problem.R(), rows = sequence.start(sequence.T);
  const int64_t panels = (H + N - 1) / N, padded_H = row_stride<S>(panels * N);  // of a row of cell states
  const int64_t state_panels = (R + N - 1) / N,
                padded_R = row_stride<S>(state_panels * N);  // of a row of hidden states
  const Plan plan;
  // Whether each member packs what it reads of the weights; or else they are packed before, by all threads.
  const bool own_weights;
  const int64_t weight_sets = own_weights ? std::max<int64_t>(plan.groups, problem.directions) : problem.directions;
  const Scratch<int64_t> cuts = cut();
  const int64_t block_rows = most_rows();

  Recurrence(const Problem& p, const Threads& threads, Pass pass, bool prepared = false)
      : problem(p),
        plan(make_plan(call_of(p, pass, gates, N, threads.count))),
        own_weights(plan.own_weights && !prepared) {}

  int units(int64_t panel) const { return static_cast<int>(std::min<int64_t>(N, H - panel * N)); }
  int numbers(int64_t state_panel) const { return static_cast<int>(std::min<int64_t>(N, R - state_panel * N)); }

  // Runs f(job, member, team, slice) for all jobs on all threads of all teams.
  template <class F>
  void run(const Threads& threads, const F& f) const {
    const auto arrivals = std::make_unique<Arrivals[]>(plan.groups * plan.slices);
    threads.parallel(plan.groups * plan.slices, [&](int64_t begin, int64_t end) {
      for (int64_t slice = begin; slice < end;) {
        const int64_t team = slice / plan.slices, origin = team * plan.slices;
        const int64_t stop = std::min(end, origin + plan.slices);
        Member member{slice - origin, stop - origin, plan.slices, 0, 0, 0, 0, plan.share_units, &arrivals[origin]};
        if (plan.share_units) {
          std::tie(member.begin, member.end) = member.share(panels);
          std::tie(member.state_begin, member.state_end) = member.share(state_panels);
        } else if (member.from == 0) {
          member.end = panels;
          member.state_end = state_panels;
        }
        for (int64_t j = team; j < problem.directions * plan.row_blocks; j += plan.groups) {
          const int64_t block = j / problem.directions, direction = j % problem.directions, begin = first_row(block);
          f(Job{sequence, direction, begin, first_row(block + 1), steps_of(begin),
                own_weights && plan.groups > 1 ? team : direction,
                j < std::max<int64_t>(plan.groups, problem.directions)},
            member, team, slice);
        }
        slice = stop;
      }
    });
  }

  // Rows of a packed batch fall in length: blocks are cut so that each has as many of the sequence's rows, and one at least of
  // the batch's. Nothing where blocks are of one size.
  Scratch<int64_t> cut() const {
    const int64_t blocks = plan.row_blocks;
    Scratch<int64_t> first = scratch<int64_t>(sequence.offsets && blocks > 1 ? blocks + 1 : 0);
    int64_t row = 0, before = 0;
    for (int64_t block = 0; first && block < blocks; ++block) {
      for (; row < B && before * blocks < rows * block; ++row) before += sequence.length(row);
      first[block] = std::clamp(row, block, B - (blocks - block));
    }
    if (first) first[blocks] = B;
    return first;
  }
  int64_t first_row(int64_t block) const { return cuts ? cuts[block] : B * block / plan.row_blocks; }
  int64_t most_rows() const {
    int64_t most = 0;
    for (int64_t block = 0; block < plan.row_blocks; ++block)
      most = std::max(most, first_row(block + 1) - first_row(block));
    return most;
  }
  // The steps of a block that begins with `row`; one at least, so that every team's gradients have a value.
  int64_t steps_of(int64_t row) const {
    return sequence.offsets && row < B ? std::min(sequence.T, std::max<int64_t>(sequence.length(row), 1)) : sequence.T;
  }

  // Element `unit` of row b in a [D, B, width] state, and of a sequence row in a [D, rows, width] array.
  int64_t state_at(const Job& job, int64_t b, int64_t width, int64_t unit) const {
    return (job.direction * B + b) * width + unit;
  }
  int64_t sequence_at(const Job& job, int64_t row, int64_t width) const { return (job.direction * rows + row) * width; }

  // The state before step t of row b: the initial one, the step before's, or none after a reset, where it is zero.
  // `outputs` has one row of `width` for every row of the sequence, of which the state is a part, `initial_width` wide.
  template <class Given>
  Given before(const Job& job, int64_t t, int64_t b, Given outputs, int64_t width, const void* initial,
               int64_t initial_width) const {
    if (job.reset_at(t, b)) return {};
    if (t == job.first_step(b)) return Given::at(initial, problem.narrow_states) + state_at(job, b, initial_width, 0);
    return outputs + (sequence.start(job.previous(t)) + b) * width;
  }
};

}  // namespace
}  // namespace fusedrnn::cpu
