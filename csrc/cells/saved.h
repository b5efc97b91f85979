// What a cell saves for backward, as it is kept in a type W. In one of 16 bits an f or z of 0.9985 would be 1: a state that is kept
// for long would have a gradient of zero, or one that is off by more at every step. So a sigmoid is folded: above a half it is kept
// as its distance from 1, with a minus.
#pragma once

#include "activations.h"

namespace fusedrnn {

// Scalars find these, SIMD vectors those of cpu/functions.h.
FUSEDRNN_INLINE float fold(float x) { return x > 0.5f ? -(1.0f - x) : x; }
FUSEDRNN_INLINE float unfold(float x) { return x + (0.5f - ::copysignf(0.5f, x)); }  // by the sign, which 1 has as -0

// Value k of what a cell saves, to memory and from it.
template <class Cell, class W, class V>
FUSEDRNN_INLINE V to_saved(int k, V x) {
  if constexpr (sizeof(W) == 2) return Cell::saves_sigmoid(k) ? fold(x) : x;
  return x;
}
template <class Cell, class W, class V>
FUSEDRNN_INLINE V from_saved(int k, V x) {
  if constexpr (sizeof(W) == 2) return Cell::saves_sigmoid(k) ? unfold(x) : x;
  return x;
}

}  // namespace fusedrnn
