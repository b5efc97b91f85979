// Where a direction's steps are in the sequence, one by one and in chunks.
#pragma once

#include <cstdint>

#include "params.h"

namespace fusedrnn::cuda {

// Where a step's rows are; no row where there is no such step.
struct Place {
  int t, start, rows;
};

// Step `number` of direction d, which runs from the last step to the first where d is 1.
FUSEDRNN_INLINE Place place(const Sequence& s, int d, int64_t number) {
  if (number < 0 || number >= s.T) return {-1, 0, 0};
  const int64_t t = d ? s.T - 1 - number : number;
  return {static_cast<int>(t), static_cast<int>(s.start(t)), static_cast<int>(s.rows_at(t))};
}

// Steps of direction d one after the other, from `number` on and by 1 or -1, as far as [begin, end). What comes from memory,
// where the rows of a packed batch are, is on its way from look_ahead to next.
class Walk {
 public:
  FUSEDRNN_INLINE Walk(const Sequence& s, int d, int64_t begin, int64_t end, int64_t number, int by)
      : offsets_(s.offsets),
        B_(static_cast<int>(s.B)),
        by_(d ? -by : by),
        first_(static_cast<int>(d ? s.T - end : begin)),
        steps_(static_cast<int>(end - begin)),
        t_(static_cast<int>(d ? s.T - 1 - number : number)) {}

  FUSEDRNN_INLINE void look_ahead() {
    exists_ = static_cast<unsigned>(t_ - first_) < static_cast<unsigned>(steps_);
    start_ = t_ * B_, stop_ = start_ + B_;
    if (offsets_ && exists_) start_ = static_cast<int>(offsets_[t_]), stop_ = static_cast<int>(offsets_[t_ + 1]);
  }
  FUSEDRNN_INLINE Place next() {
    const Place next = exists_ ? Place{t_, start_, stop_ - start_} : Place{-1, 0, 0};
    t_ += by_;
    return next;
  }
  FUSEDRNN_INLINE Place next_at_once() {
    look_ahead();
    return next();
  }

 private:
  const int64_t* const offsets_;
  const int B_, by_, first_, steps_;
  int t_;
  int start_, stop_;  // of the next step's rows
  bool exists_;
};

// Steps [begin, end) in the order of each direction, and which rows of the sequence they are.
struct Chunk {
  int64_t begin, end, first[2], rows[2];
};

inline Chunk make_chunk(const Sequence& s, int64_t begin, int64_t end) {
  const int64_t mirrored = s.start(s.T - end);
  return {begin, end, {s.start(begin), mirrored}, {s.start(end) - s.start(begin), s.start(s.T - begin) - mirrored}};
}

inline bool fits(const Chunk& chunk, int directions, int64_t capacity) {
  return chunk.rows[0] <= capacity && (directions == 1 || chunk.rows[1] <= capacity);
}

// As many steps from `begin` on, or up to `end`, as have no more rows than `capacity` in each direction; at least one.
inline Chunk chunk_from(const Sequence& s, int directions, int64_t begin, int64_t capacity) {
  int64_t end = begin + 1;
  while (end < s.T && fits(make_chunk(s, begin, end + 1), directions, capacity)) ++end;
  return make_chunk(s, begin, end);
}

inline Chunk chunk_up_to(const Sequence& s, int directions, int64_t end, int64_t capacity) {
  int64_t begin = end - 1;
  while (begin > 0 && fits(make_chunk(s, begin - 1, end), directions, capacity)) --begin;
  return make_chunk(s, begin, end);
}

}  // namespace fusedrnn::cuda
