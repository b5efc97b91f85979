// Activations and their derivatives, the derivatives in terms of the output (so that backward needs no
// pre-activation). A cell calls sigmoid, tanh and relu unqualified: scalars find the ones here, SIMD vectors
// those of cpu/simd.h.
#pragma once

#include <cmath>

#include "inline.h"

namespace fusedrnn {

#if defined(__CUDA_ARCH__) || defined(FUSEDRNN_HOSTCUDA)
// On a GPU without branches and calls, so that the functions of a step overlap and its code fits the instruction cache.
// Of a number that is not below 1: the special function unit's, one unit in the last place off, and a Newton step.
FUSEDRNN_INLINE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
#else
  const float y = 1.0f / x;
#endif
  return x < 1e38f ? ::fmaf(y, ::fmaf(-x, y, 1.0f), y) : y;  // of infinity 0
}

FUSEDRNN_INLINE float sigmoid(float x) { return reciprocal(1.0f + ::expf(-x)); }
FUSEDRNN_INLINE float tanh(float x) {
  // An odd polynomial, fitted to a relative error of 1.5e-8 up to 0.5, where the other form would cancel.
  const float square = x * x, magnitude = ::fabsf(x);
  const float near_zero =
      x + x * square * (-0.33333144f + square * (0.13325879f + square * (-0.05304549f + square * 0.01724148f)));
  const float far = 1.0f - 2.0f * reciprocal(1.0f + ::expf(2.0f * magnitude));
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
FUSEDRNN_INLINE float positive(float y) { return y > 0.0f ? 1.0f : 0.0f; }
FUSEDRNN_INLINE double positive(double y) { return y > 0.0 ? 1.0 : 0.0; }

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
