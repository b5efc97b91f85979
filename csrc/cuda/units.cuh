// What a time step makes of some units, whoever multiplies: where it finds what is given, the cell's part, and what it
// leaves, forward and backward. A thread has `width` neighbouring units of one row.
#pragma once

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cells/saved.h"
#include "places.h"
#include "values.cuh"

namespace fusedrnn::cuda {

// Which rows take part in a step, and which of them start anew. Both arrays are on the device, or nullptr (params.h).
struct Rows {
  const int64_t* lengths;
  const uint8_t* resets;

  // No more than a step's number can be.
  FUSEDRNN_DEVICE int length(int b) const {
    constexpr int64_t most = INT32_MAX;
    return static_cast<int>(lengths && lengths[b] < most ? lengths[b] : most);
  }
  FUSEDRNN_DEVICE bool has(const Place& place, int b) const { return b < place.rows && place.t < length(b); }
  FUSEDRNN_DEVICE bool reset(const Place& place, int b) const { return reset_byte(place, b); }
  // As memory has it: whoever loads it ahead of its use does not wait for it.
  FUSEDRNN_DEVICE uint8_t reset_byte(const Place& place, int b) const { return resets ? resets[place.start + b] : 0; }
};

// The units of a thread: row b of the batch, units [j, j + width) of direction d.
struct Position {
  int b, j, d;
};

// Element j of a row of `stride` elements: with factors of 32 bits one multiplication.
template <class T>
FUSEDRNN_DEVICE T* element_of(T* base, int row, int stride, int j) {
  return base + (static_cast<int64_t>(row) * stride + j);
}

// Some units, of all rows, in an array of rows of `stride` elements, the first of which is first_row; or in no array. With
// numbers of 32 bits a loop over steps has the address of a row's by one multiplication.
template <class T>
class Column {
 public:
  Column() = default;
  FUSEDRNN_DEVICE Column(T* array, int stride, int j, int first_row = 0)
      : base_(array ? reinterpret_cast<Byte*>(array + j) - first_row * static_cast<int64_t>(stride * size) : nullptr) {}
  FUSEDRNN_DEVICE explicit operator bool() const { return base_; }
  FUSEDRNN_DEVICE T* at(int row, int stride) const {
    return reinterpret_cast<T*>(base_ + static_cast<uint64_t>(static_cast<uint32_t>(row)) *
                                            static_cast<uint32_t>(stride * size));
  }
  FUSEDRNN_DEVICE void keep() { base_ = kept(base_); }

 private:
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  static constexpr int size = sizeof(T);

  Byte* base_ = nullptr;  // of row 0, which need not be part of the array
};

// What the steps of a chunk have in common, and, for a kernel of one step, where that is.
template <class S>
struct ForwardStep {
  using A = Accumulator<S>;
  int B, H, directions;
  Rows rows;
  Place here[2];
  int first[2];       // row of the sequence that input[d] begins with
  const A* input[2];  // [rows of the chunk, gates*H] x·W_ih
  const A* hidden;    // [D, B, gates*H] h·W_hh
  const S* b_ih[2];   // [gates*H], or nullptr
  const S* b_hh[2];   // [gates*H], likewise
  const S* hx;        // [D, B, H] the state before the first of these steps, or nullptr where h and c have it
  const S* cx;        // [D, B, H] likewise
  S* y;               // [N, D*H]
  S* h;               // [D, B, H] the state, which the next product reads; h_n after the last step
  A* c;               // [D, B, H] the cell state, or nullptr where no other step needs it
  S* c_n;             // [D, B, H] the cell state as it is given back, or nullptr where that is c
  S* gates[2];        // [N, saved*H] by direction, or nullptr
  S* cells[2];        // [N, H], likewise
};

// Of some units of a row of the batch, the state before the first of the steps, and that after the last.
template <class A, int width>
struct State {
  Values<A, width> h{}, c{};
};

template <class Cell, class S, int width>
FUSEDRNN_DEVICE State<Accumulator<S>, width> load_state(const ForwardStep<S>& p, const Position& at) {
  const int64_t place = static_cast<int64_t>(at.d * p.B + at.b) * p.H + at.j;
  State<Accumulator<S>, width> state;
  state.h = load<width>((p.hx ? p.hx : p.h) + place);
  if constexpr (Cell::has_cell) state.c = p.hx ? load<width>(p.cx + place) : load<width>(p.c + place);
  return state;
}

template <class Cell, class S, int width>
FUSEDRNN_DEVICE void store_state(const ForwardStep<S>& p, const Position& at,
                                 const State<Accumulator<S>, width>& state) {
  const int64_t place = static_cast<int64_t>(at.d * p.B + at.b) * p.H + at.j;
  store<width>(p.h + place, state.h);
  if constexpr (Cell::has_cell) {
    if (p.c) store<width>(p.c + place, state.c);
    if (p.c_n) store<width>(p.c_n + place, state.c);
  }
}

// Both biases of every pre-activation, added.
template <class Cell, class S, int width>
FUSEDRNN_DEVICE void load_biases(const ForwardStep<S>& p, const Position& at,
                                 Values<Accumulator<S>, width> (&biases)[Cell::sums]) {
  const S *const b_ih = p.b_ih[at.d], *const b_hh = p.b_hh[at.d];
#pragma unroll
  for (int k = 0; k < Cell::sums; ++k) {
    biases[k] = {};
    if (!b_ih) continue;
    if (k >= Cell::input_sum) biases[k] += load<width>(b_ih + (k - Cell::input_sum) * p.H + at.j);
    if (k < Cell::gates) biases[k] += load<width>(b_hh + Cell::hidden_gate(k) * p.H + at.j);
  }
}

// Some units, of all rows of the sequence, in what forward reads and writes at every step but the state.
template <class Cell, class S>
struct ForwardColumns {
  int H, outputs;  // of a row of all directions
  Column<const Accumulator<S>> input;
  Column<S> y, cells, gates;  // the latter two where they are saved

  ForwardColumns() = default;
  FUSEDRNN_DEVICE ForwardColumns(const ForwardStep<S>& p, int j, int d)
      : H(p.H),
        outputs(p.directions * H),
        input(p.input[d], Cell::gates * H, j, p.first[d]),
        y(p.y, outputs, d * H + j) {
    if constexpr (Cell::has_cell) cells = {p.cells[d], H, j};
    if constexpr (Cell::saved > 0) gates = {p.gates[d], Cell::saved * H, j};
  }
  // For a loop over steps.
  FUSEDRNN_DEVICE void keep() {
    H = kept(H), outputs = kept(outputs), input.keep(), y.keep();
    if constexpr (Cell::has_cell) cells.keep();
    if constexpr (Cell::saved > 0) gates.keep();
  }
};

// What x makes of the pre-activations of some units.
template <class Cell, class S, int width>
FUSEDRNN_DEVICE void load_input(const ForwardColumns<Cell, S>& columns, int row,
                                Values<Accumulator<S>, width> (&input)[Cell::gates]) {
  const auto* const from = columns.input.at(row, Cell::gates * columns.H);
#pragma unroll
  for (int k = 0; k < Cell::gates; ++k) input[k] = load<width>(from + k * columns.H);
}

// What a step makes of some units.
template <class Cell, class A, int width>
struct Forwarded {
  Values<A, width> h, c, saved[Cell::saved + 1];  // + 1: no array has no element
};

// One step of some units of a row that takes part in it, from what the biases, x and h make of the pre-activations, the last
// by the gates of W_hh, and from the state, which a reset makes zero.
template <class Cell, class A, int width>
FUSEDRNN_DEVICE Forwarded<Cell, A, width> forward_units(const Values<A, width> (&biases)[Cell::sums],
                                                        const Values<A, width> (&input)[Cell::gates],
                                                        const Values<A, width> (&hidden)[Cell::gates],
                                                        const Values<A, width>& h, const Values<A, width>& c,
                                                        bool reset) {
  // What x makes goes to the last `gates` sums, what h makes to the first. A state of zero makes nothing.
  Values<A, width> sums[Cell::sums];
#pragma unroll
  for (int k = 0; k < Cell::sums; ++k) {
    sums[k] = biases[k];
    if (k >= Cell::input_sum) sums[k] += input[k - Cell::input_sum];
    if (k < Cell::gates) sums[k] += reset ? Values<A, width>{} : hidden[Cell::hidden_gate(k)];
  }
  Forwarded<Cell, A, width> made{};
  if (!reset) made.h = h, made.c = c;
#pragma unroll
  for (int i = 0; i < width; ++i) {
    A a[Cell::sums], gate[Cell::saved + 1];
#pragma unroll
    for (int k = 0; k < Cell::sums; ++k) a[k] = sums[k][i];
    Cell::activate(a);
    made.h[i] = Cell::forward(a, made.h[i], made.c[i], gate);
#pragma unroll
    for (int k = 0; k < Cell::saved; ++k) made.saved[k][i] = gate[k];
  }
  return made;
}

// All of it that outlives the step, but for the state.
template <class Cell, class S, int width>
FUSEDRNN_DEVICE void store_forward(const ForwardColumns<Cell, S>& columns, int row,
                                   const Forwarded<Cell, Accumulator<S>, width>& made) {
  store<width>(columns.y.at(row, columns.outputs), made.h);
  if constexpr (Cell::has_cell)
    if (columns.cells) store<width>(columns.cells.at(row, columns.H), made.c);
  if constexpr (Cell::saved > 0) {
    if (columns.gates) {
      S* const to = columns.gates.at(row, Cell::saved * columns.H);
#pragma unroll
      for (int k = 0; k < Cell::saved; ++k) {
        auto saved = made.saved[k];
#pragma unroll
        for (int i = 0; i < width; ++i) saved[i] = to_saved<Cell, S>(k, saved[i]);
        store<width>(to + k * columns.H, saved);
      }
    }
  }
}

// The output of a row that is absent from a step.
template <int width, class Cell, class S>
FUSEDRNN_DEVICE void forward_nothing(const ForwardColumns<Cell, S>& columns, int row) {
  store<width>(columns.y.at(row, columns.outputs), Values<Accumulator<S>, width>{});
}

// As for forward.
template <class S>
struct BackwardStep {
  using A = Accumulator<S>;
  int B, H, directions;
  Rows rows;
  Place previous[2], here[2], later[2];  // in the order of the direction; later is the step processed before
  int first[2];                          // row of the sequence that da[d] and h_previous[d] begin with
  const S* y;                            // [N, D*H]
  const S* hx;                           // [D, B, H]
  const S* cx;                           // [D, B, H]
  const S* gates[2];                     // [N, saved*H] by direction
  const S* cells[2];                     // [N, H] by direction
  const S* dy;                           // [N, D*H], or nullptr
  const S* dcells[2];                    // [N, H] by direction, or nullptr
  bool starts;                           // dh and dc hold nothing yet: the gradients are those of h_n and c_n
  const S *dh_n, *dc_n;                  // [D, B, H], or nullptr for zero
  A* product;                            // [D, B, H] what comes back through W_hh from the later step
  A* dh;                                 // [D, B, H] the rest of the gradient of the state, in and out
  A* dc;                                 // [D, B, H] the gradient of the cell state, in and out
  S* da[2];                              // [rows of the chunk, sums*H] gradients of the pre-activations
  S* h_previous[2];                      // [rows of the chunk, H] the state before the step, or nullptr
};

// Of some units of a row of the batch, the gradients of the state after the last of the steps, but for the product.
template <class Cell, class S, int width>
FUSEDRNN_DEVICE State<Accumulator<S>, width> load_gradients(const BackwardStep<S>& p, const Position& at) {
  const int64_t place = static_cast<int64_t>(at.d * p.B + at.b) * p.H + at.j;
  State<Accumulator<S>, width> state;
  if (!p.starts) {
    state.h = load<width>(p.dh + place);
    if constexpr (Cell::has_cell) state.c = load<width>(p.dc + place);
    return state;
  }
  if (p.dh_n) state.h = load<width>(p.dh_n + place);
  if constexpr (Cell::has_cell)
    if (p.dc_n) state.c = load<width>(p.dc_n + place);
  return state;
}

// Some units, of all rows of the sequence, in what backward reads and writes at every step but the gradients of the state;
// and, of all rows of the batch, in the state before the first step.
template <class Cell, class S>
struct BackwardColumns {
  int H, outputs;
  Column<const S> hx, cx, y, dy, cells, dcells, gates;  // hx where the state before a step is asked for
  Column<S> da, h_previous;

  BackwardColumns() = default;
  FUSEDRNN_DEVICE BackwardColumns(const BackwardStep<S>& p, int j, int d)
      : H(p.H),
        outputs(p.directions * H),
        y(p.y, outputs, d * H + j),
        dy(p.dy, outputs, d * H + j),
        da(p.da[d], Cell::sums * H, j, p.first[d]),
        h_previous(p.h_previous[d], H, j, p.first[d]) {
    if (Cell::needs_previous || h_previous) hx = {p.hx, H, j, -d * p.B};
    if constexpr (Cell::has_cell) cx = {p.cx, H, j, -d * p.B}, cells = {p.cells[d], H, j}, dcells = {p.dcells[d], H, j};
    if constexpr (Cell::saved > 0) gates = {p.gates[d], Cell::saved * H, j};
  }
  FUSEDRNN_DEVICE void keep() {
    H = kept(H), outputs = kept(outputs), hx.keep(), y.keep(), dy.keep(), da.keep(), h_previous.keep();
    if constexpr (Cell::has_cell) cx.keep(), cells.keep(), dcells.keep();
    if constexpr (Cell::saved > 0) gates.keep();
  }
};

// What forward left for some units of one step, and what comes from above, as memory has it: whoever loads it ahead of its use
// does not wait for it. What is not there is zero.
template <class Cell, class S, int width>
struct ForBackward {
  Pack<S, width> dy, dc, h, c, c_next, output, gates[Cell::saved + 1];
  uint8_t reset;  // whether h and c are zero, whatever they are here
};

// Of row b of the batch, which takes part in the step; the state before it is that after the previous step, if it is in that, or
// the first.
template <int width, class Cell, class S>
FUSEDRNN_DEVICE ForBackward<Cell, S, width> load_for_backward(const BackwardColumns<Cell, S>& columns, const Rows& rows,
                                                              const Place& previous, bool in_previous,
                                                              const Place& here, int b) {
  const int row = here.start + b, row_before = previous.start + b;
  ForBackward<Cell, S, width> v{};
  v.reset = rows.reset_byte(here, b);
  if (columns.dy) v.dy = load_pack<width>(columns.dy.at(row, columns.outputs));
  if (columns.hx)
    v.h = load_pack<width>(
        in_global(in_previous ? columns.y.at(row_before, columns.outputs) : columns.hx.at(b, columns.H)));
  if constexpr (Cell::has_cell) {
    v.c = load_pack<width>(
        in_global(in_previous ? columns.cells.at(row_before, columns.H) : columns.cx.at(b, columns.H)));
    v.c_next = load_pack<width>(columns.cells.at(row, columns.H));
    if (columns.dcells) v.dc = load_pack<width>(columns.dcells.at(row, columns.H));
  }
  if constexpr (Cell::needs_output) v.output = load_pack<width>(columns.y.at(row, columns.outputs));
  if constexpr (Cell::saved > 0) {
    const S* const gates = columns.gates.at(row, Cell::saved * columns.H);
#pragma unroll
    for (int k = 0; k < Cell::saved; ++k) v.gates[k] = load_pack<width>(gates + k * columns.H);
  }
  return v;
}

template <class Cell, class S, int width>
FUSEDRNN_DEVICE void store_gradients(const BackwardColumns<Cell, S>& columns, int row,
                                     const Values<Accumulator<S>, width> (&da)[Cell::sums],
                                     const Pack<S, width>& h_previous) {
  S* const to = columns.da.at(row, Cell::sums * columns.H);
#pragma unroll
  for (int k = 0; k < Cell::sums; ++k) store<width>(to + k * columns.H, da[k]);
  if (columns.h_previous) store_pack(columns.h_previous.at(row, columns.H), h_previous);
}

// One step of some units of a row that takes part in it: from dh and dc of the state after it, all told but dy and dcells, to da and
// to those of the state before it, but for what goes through W_hh. No gradient crosses a reset.
template <class Cell, class S, class A, int width>
FUSEDRNN_DEVICE void backward_units(ForBackward<Cell, S, width>& v, Values<A, width>& dh, Values<A, width>& dc,
                                    Values<A, width> (&da)[Cell::sums]) {
  if (v.reset) v.h = v.c = {};
  dh += widen(v.dy);
  if constexpr (Cell::has_cell) dc += widen(v.dc);
#pragma unroll
  for (int i = 0; i < width; ++i) {
    A gate[Cell::saved + 1], gradient[Cell::sums];
#pragma unroll
    for (int k = 0; k < Cell::saved; ++k) gate[k] = from_saved<Cell, S>(k, widen(v.gates[k].value[i]));
    const auto of = [&](const Pack<S, width>& pack) { return widen(pack.value[i]); };
    dh[i] = Cell::backward(gate, of(v.c), of(v.c_next), of(v.h), of(v.output), dh[i], dc[i], gradient);
#pragma unroll
    for (int k = 0; k < Cell::sums; ++k) da[k][i] = gradient[k];
  }
  if (v.reset) dh = dc = {};
}

// The gradients of a row that is absent from a step.
template <int width, class Cell, class S>
FUSEDRNN_DEVICE void backward_nothing(const BackwardColumns<Cell, S>& columns, int row) {
  const Values<Accumulator<S>, width> da[Cell::sums] = {};
  store_gradients(columns, row, da, Pack<S, width>{});
}

}  // namespace fusedrnn::cuda
