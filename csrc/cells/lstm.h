// Long short-term memory (torch.nn.LSTM; Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al.
// 2000). With a = x·W_ih + b_ih + h·W_hh + b_hh in torch's gate order i f g o:
//   i = σ(a_i)   f = σ(a_f)   g = tanh(a_g)   o = σ(a_o)
//   c' = f∘c + i∘g            h' = o∘tanh(c')
// Backward:
//   dc' += dh'∘o∘(1 - tanh²c')
//   da_i = dc'∘g∘i(1-i)   da_f = dc'∘c∘f(1-f)   da_g = dc'∘i∘(1-g²)   da_o = dh'∘tanh(c')∘o(1-o)
//   dc = dc'∘f
// Saved: i f g o, and every c.
#pragma once

#include "activations.h"

namespace fusedrnn {

struct LSTM {
  static constexpr int gates = 4;
  static constexpr int sums = 4;
  static constexpr int input_sum = 0;
  static constexpr int saved = 4;
  static constexpr bool has_cell = true;
  static constexpr bool needs_output = false;
  static constexpr bool needs_previous = false;

  static constexpr FUSEDRNN_INLINE int hidden_gate(int k) { return k; }
  static constexpr FUSEDRNN_INLINE bool saves_sigmoid(int k) { return k != 2; }

  // Pre-activations to activated gates, in place.
  template <class V>
  static FUSEDRNN_INLINE void activate(V (&a)[4]) {
    a[0] = sigmoid(a[0]), a[1] = sigmoid(a[1]), a[2] = tanh(a[2]), a[3] = sigmoid(a[3]);
  }

  // In: what activate left, h, and c. Out: the values to save, c' in place of c; returns h'.
  template <class V>
  static FUSEDRNN_INLINE V forward(const V (&a)[4], V, V& c, V* gate) {
    for (int k = 0; k < 4; ++k) gate[k] = a[k];
    c = a[1] * c + a[0] * a[2];
    return output(a, c);
  }

  // h' from the activated gates and c'.
  template <class V>
  static FUSEDRNN_INLINE V output(const V* gate, V c) {
    return gate[3] * tanh(c);
  }

  // In: the activated gates, c, c', h, h', dh', and dc'. Out: da, dc in place of dc'; returns what of dh does
  // not go through W_hh.
  template <class V>
  static FUSEDRNN_INLINE V backward(const V* gate, V c, V c_next, V, V, V dh, V& dc, V (&da)[4]) {
    const V i = gate[0], f = gate[1], g = gate[2], o = gate[3];
    const V tanh_c = tanh(c_next);
    dc = dc + dh * o * tanh_derivative(tanh_c);
    da[0] = dc * g * sigmoid_derivative(i);
    da[1] = dc * c * sigmoid_derivative(f);
    da[2] = dc * i * tanh_derivative(g);
    da[3] = dh * tanh_c * sigmoid_derivative(o);
    dc = dc * f;
    return V(0);
  }
};

}  // namespace fusedrnn
