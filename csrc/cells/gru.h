// Gated recurrent unit (torch.nn.GRU; Cho et al. 2014), the reset gate applied after the product ("linear before reset").
// torch's gate order is r z n. The candidate n keeps its two products apart, so that a unit has four pre-activations:
//   a_h = h·W_hn + b_hn
//   a_r = x·W_ir + b_ir + h·W_hr + b_hr
//   a_z = x·W_iz + b_iz + h·W_hz + b_hz
//   a_x = x·W_in + b_in
//   r = σ(a_r)   z = σ(a_z)   n = tanh(a_x + r∘a_h)
//   h' = (1-z)∘n + z∘h
// In this order what h makes is the first three, and what x makes the last three, which is torch's order.
// Backward:
//   da_x = dh'∘(1-z)∘(1-n²)   da_z = dh'∘(h-n)∘z(1-z)   da_r = da_x∘a_h∘r(1-r)   da_h = da_x∘r
//   dh = dh'∘z + (what comes back through W_hh)
// Saved: r z n a_h.
#pragma once

#include "activations.h"

namespace fusedrnn {

struct GRU {
  static constexpr int gates = 3;
  static constexpr int sums = 4;
  static constexpr int input_sum = 1;
  static constexpr int saved = 4;
  static constexpr bool has_cell = false;
  static constexpr bool needs_output = false;
  static constexpr bool needs_previous = true;

  static constexpr FUSEDRNN_INLINE int hidden_gate(int k) { return k == 0 ? 2 : k - 1; }
  static constexpr FUSEDRNN_INLINE bool saves_sigmoid(int k) { return k < 2; }

  template <class V>
  static FUSEDRNN_INLINE void activate(V (&a)[4]) {
    a[1] = sigmoid(a[1]), a[2] = sigmoid(a[2]);
  }

  template <class V>
  static FUSEDRNN_INLINE V forward(const V (&a)[4], V h, V&, V* gate) {
    const V r = a[1], z = a[2], n = tanh(a[3] + r * a[0]);
    gate[0] = r, gate[1] = z, gate[2] = n, gate[3] = a[0];
    return (V(1) - z) * n + z * h;
  }

  template <class V>
  static FUSEDRNN_INLINE V backward(const V* gate, V, V, V h, V, V dh, V&, V (&da)[4]) {
    const V r = gate[0], z = gate[1], n = gate[2], a_h = gate[3];
    da[3] = dh * (V(1) - z) * tanh_derivative(n);
    da[2] = dh * (h - n) * sigmoid_derivative(z);
    da[1] = da[3] * a_h * sigmoid_derivative(r);
    da[0] = da[3] * r;
    return dh * z;
  }
};

}  // namespace fusedrnn
