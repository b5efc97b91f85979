// Where a direction's steps are in the sequence, one by one and in chunks.
#pragma once

#include <cstdint>

#include "params.h"

namespace fusedrnn::cuda {

// Where a step's rows are; no row where there is no such step.
struct Place {
  int t, start, rows;
};

// One of two, value by value: a choice of which to read would put both into memory.
FUSEDRNN_INLINE Place either(bool first, const Place& a, const Place& b) {
  return {first ? a.t : b.t, first ? a.start : b.start, first ? a.rows : b.rows};
}

// Step `number` of direction d, which runs from the last step to the first where d is 1.
FUSEDRNN_INLINE Place place(const Sequence& s, int d, int64_t number) {
  if (number < 0 || number >= s.T) return {-1, 0, 0};
  const int64_t t = d ? s.T - 1 - number : number;
  return {static_cast<int>(t), static_cast<int>(s.start(t)), static_cast<int>(s.rows_at(t))};
}

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
