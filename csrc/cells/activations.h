// Activations and their derivatives, the derivatives in terms of the output (so that backward needs no
// pre-activation). A cell calls sigmoid, tanh and relu unqualified: scalars find the ones here, SIMD vectors
// those of cpu/functions.h.
#pragma once

#include <cmath>

#include "inline.h"

namespace fusedrnn {

#if defined(__CUDA_ARCH__) || defined(FUSEDRNN_HOSTCUDA)
// On a GPU without branches, calls and predicates, so that the functions of a step overlap: a step waits for each of its
// instructions. 1 / (1 + e^x) from the special function units' powers of two and reciprocals, whose errors are 2^-22.5 and
// 2^-23 of the result (PTX ISA); rounding x / ln 2 adds x 2^-24, of which a large x leaves nothing to be seen. Worked out for
// the worst of these, sigmoid and tanh below are off by at most 1.9 of float32's eps (1.2e-7).
FUSEDRNN_INLINE float falling_sigmoid(float x) {
  constexpr float log2_e = 1.44269504f;
#if defined(__CUDA_ARCH__)
  float power, y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * log2_e));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + power));
  return y;
#else
  return 1.0f / (1.0f + ::exp2f(x * log2_e));
#endif
}

FUSEDRNN_INLINE float sigmoid(float x) { return falling_sigmoid(-x); }
FUSEDRNN_INLINE float tanh(float x) {
  // An odd polynomial, fitted to a relative error of 1.5e-8 up to 0.5, where the other form would cancel.
  const float square = x * x, magnitude = ::fabsf(x);
  const float near_zero =
      x + x * square * (-0.33333144f + square * (0.13325879f + square * (-0.05304549f + square * 0.01724148f)));
  const float far = 1.0f - 2.0f * falling_sigmoid(2.0f * magnitude);
  return magnitude < 0.5f ? near_zero : ::copysignf(far, x);  // far, and so NaN, where x is NaN
}
#else
FUSEDRNN_INLINE float tanh(float x) { return ::tanhf(x); }
FUSEDRNN_INLINE float sigmoid(float x) { return 1.0f / (1.0f + ::expf(-x)); }
#endif
FUSEDRNN_INLINE double tanh(double x) { return ::tanh(x); }
FUSEDRNN_INLINE double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }
FUSEDRNN_INLINE float relu(float x) { return x < 0.0f ? 0.0f : x; }  // written so that NaN passes through
FUSEDRNN_INLINE double relu(double x) { return x < 0.0 ? 0.0 : x; }
// relu's gradient where its output is y. No product: that of zero and an infinite gradient would be NaN. A NaN in y counts as positive.
FUSEDRNN_INLINE float zero_unless_positive(float y, float dy) { return y <= 0.0f ? 0.0f : dy; }
FUSEDRNN_INLINE double zero_unless_positive(double y, double dy) { return y <= 0.0 ? 0.0 : dy; }

// dσ/dx = σ(1-σ),  d tanh/dx = 1 - tanh²
template <class V>
FUSEDRNN_INLINE V sigmoid_derivative(V s) {
  return s * (V(1) - s);
}
template <class V>
FUSEDRNN_INLINE V tanh_derivative(V t) {
  return V(1) - t * t;
}

}  // namespace fusedrnn
