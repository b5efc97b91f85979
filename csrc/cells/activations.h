// Activations and their derivatives, the derivatives in terms of the output (so that backward needs no
// pre-activation). A cell calls sigmoid, tanh and relu unqualified: scalars find the ones here, SIMD vectors
// those of cpu/simd.h.
#pragma once

#include <cmath>

#include "inline.h"

namespace fusedrnn {

FUSEDRNN_INLINE float tanh(float x) { return ::tanhf(x); }
FUSEDRNN_INLINE double tanh(double x) { return ::tanh(x); }
FUSEDRNN_INLINE float sigmoid(float x) { return 1.0f / (1.0f + ::expf(-x)); }
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
