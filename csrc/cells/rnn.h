// The Elman network (torch.nn.RNN), with tanh or relu:
//   h' = act(x·W_ih + b_ih + h·W_hh + b_hh)
// Backward, with h' the step's own output:
//   da = dh' · act'(a)         (1 - h'² for tanh, [h' > 0] for relu)
// Nothing is saved: the output says it all.
#pragma once

#include "activations.h"

namespace fusedrnn {

template <bool is_relu>
struct RNN {
  static constexpr int gates = 1;          // blocks of H rows in w_ih and w_hh
  static constexpr int sums = 1;           // pre-activations a hidden unit has
  static constexpr int input_sum = 0;      // x·W_ih goes to sums [input_sum, input_sum + gates), h·W_hh to [0, gates)
  static constexpr int saved = 0;          // activated values kept for backward
  static constexpr bool has_cell = false;  // a cell state beside the hidden state
  static constexpr bool needs_output = true;     // backward reads h'
  static constexpr bool needs_previous = false;  // backward reads h

  // The block of w_hh that goes to sum k.
  static constexpr FUSEDRNN_INLINE int hidden_gate(int) { return 0; }
  // Whether saved value k is a sigmoid.
  static constexpr FUSEDRNN_INLINE bool saves_sigmoid(int) { return false; }

  // A step is two calls, activate and forward, for the sake of processors: the long chains of a cell's functions then
  // overlap from row to row.
  template <class V>
  static FUSEDRNN_INLINE void activate(V (&)[1]) {}

  template <class V>
  static FUSEDRNN_INLINE V forward(const V (&a)[1], V, V&, V*) {
    return is_relu ? relu(a[0]) : tanh(a[0]);
  }

  template <class V>
  static FUSEDRNN_INLINE V backward(const V*, V, V, V, V output, V dh, V&, V (&da)[1]) {
    da[0] = is_relu ? zero_unless_positive(output, dh) : dh * tanh_derivative(output);
    return V(0);
  }
};

}  // namespace fusedrnn
