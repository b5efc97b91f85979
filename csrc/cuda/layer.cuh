// What every schedule has around its time loop, for one cell and scalar type: workspace, conversions, and the products
// with all rows of a chunk, for the input's part of the pre-activations and for the gradients of input and weights.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "biases.cuh"
#include "cuda.h"

namespace fusedrnn::cuda {

// Hands out parts of one block of memory; without a block it only counts.
class Room {
 public:
  explicit Room(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    T* const at = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    if (at) begin_array(at, bytes);
    used_ += (bytes + 255) / 256 * 256 + workspace_gap;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <class S>
constexpr Element element() {
  return std::is_same_v<S, float16>    ? Element::float16
         : std::is_same_v<S, bfloat16> ? Element::bfloat16
         : std::is_same_v<S, float>    ? Element::float32
                                       : Element::float64;
}

template <class T>
const T* as(const void* data) {
  return static_cast<const T*>(data);
}

template <class Cell, class S>
class Layer {
 protected:
  using A = Accumulator<S>;
  static constexpr bool same = std::is_same_v<S, A>;
  static constexpr int widest = vector_width(sizeof(A));

  Layer(const Problem& p, const Context& context)
      : p_(p),
        stream_(static_cast<cudaStream_t>(context.stream)),
        blas_(context.blas),
        D_(p.directions),
        B_(p.sequence.B),
        H_(p.H),
        N_(p.sequence.start(p.sequence.T)),
        chunk_bytes_(context.chunk_bytes) {}

  // A chunk's gradients of pre-activations, and what they become: sums over all chunks, in the accumulators' type. Those of a
  // lone chunk go to the gradients themselves.
  struct Gradients {
    int64_t rows;      // of the sequence in a chunk
    bool lone;         // whether that is all
    int slices;        // of them, for the biases
    S* da[2] = {};     // [rows, sums*H]
    S* h_previous[2];  // [rows, H] the state before each step
    S* x = nullptr;    // [rows, I] where rows of a padded batch may be absent
    A* biases;         // [D, slices, sums*H], nullptr where the sums are the result, too
    A* w_ih[2];        // [gates*H, I], nullptr where the product is the result
    A* w_hh[2];        // [gates*H, H], likewise

    Gradients(const Layer& layer, Room& room) {
      const int64_t sums = Cell::sums * layer.H_, gates = Cell::gates * layer.H_;
      rows = chunk_rows(layer.N_, layer.B_, layer.D_ * sums * sizeof(S), layer.chunk_bytes_);
      lone = rows >= layer.N_;
      const bool in_place = same || lone;
      slices = row_slices(rows);
      // The directions' arrays lie one behind the other: their distance is a batched product's stride.
      for (int d = 0; d < layer.D_; ++d) da[d] = room.take<S>(rows * sums);
      for (int d = 0; d < layer.D_; ++d) h_previous[d] = room.take<S>(rows * layer.H_);
      if (layer.p_.sequence.lengths) x = room.take<S>(rows * layer.p_.I);
      biases = lone && slices == 1 ? nullptr : room.take<A>(layer.D_ * slices * sums);
      for (int d = 0; d < layer.D_; ++d) {
        w_ih[d] = in_place ? nullptr : room.take<A>(gates * layer.p_.I);
        w_hh[d] = in_place ? nullptr : room.take<A>(gates * layer.H_);
      }
    }
  };

  void begin_gradients(const BackwardParams& p, const Gradients& g) {
    if (p.dx && D_ == 2 && !g.lone) zero(p.dx, N_ * p.I * sizeof(S), stream_);
  }

  // Adds a chunk's share to every gradient of input and weights that is asked for; the last chunk comes first.
  void add_gradients(const BackwardParams& p, const Gradients& g, const Chunk& chunk) {
    const int64_t sums = Cell::sums * H_, gates = Cell::gates * H_;
    const bool accumulate = chunk.end < p.sequence.T;
    for (int d = 0; d < D_; ++d) {
      const int64_t rows = chunk.rows[d], first = chunk.first[d];
      const WeightGradients& wanted = p.gradients[d];
      const S* const da_x = g.da[d] + Cell::input_sum * H_;
      const S* const x = as<S>(p.x) + first * p.I;
      const Factor w_ih{p.weights[d].w_ih, p.I}, h{g.h_previous[d], H_};
      if (p.dx) {
        S* const dx = static_cast<S*>(p.dx) + first * p.I;
        const bool adds = D_ == 2 && !(g.lone && d == 0);
        multiply({rows, p.I, gates, 1, {da_x, sums}, w_ih, dx, p.I, 0, element<S>(), element<S>(), adds});
      }
      // Rows of a gradient from `at` on, and where they are.
      const auto weight = [&](A* own, void* result, int64_t at, int64_t count, const S* from, const Factor& with) {
        const int64_t columns = with.ld;
        void* const to = own ? static_cast<void*>(own + at * columns) : static_cast<S*>(result) + at * columns;
        const Factor da{from, sums, 0, true};
        const Element out = own ? element<A>() : element<S>();
        multiply({count, columns, rows, 1, da, with, to, columns, 0, element<S>(), out, accumulate});
      };
      if (wanted.w_ih) {
        if (g.x) copy_present(g.x, x, first, rows);
        weight(g.w_ih[d], wanted.w_ih, 0, gates, da_x, {g.x ? g.x : x, p.I});
      }
      if (wanted.w_hh)
        for_gate_blocks([&](int sum, int gate, int count) {
          weight(g.w_hh[d], wanted.w_hh, gate * H_, count * H_, g.da[d] + sum * H_, h);
        });
    }
    if (wants_biases(p)) {
      ColumnSums<S> of{{g.da[0], g.da[1]}, {}, static_cast<int>(H_), g.slices, g.biases, accumulate, {}};
      for (int d = 0; d < D_; ++d) of.rows[d] = static_cast<int>(chunk.rows[d]), of.to[d] = biases_of(p, d);
      launch(sum_columns<Cell, S>, column_sums_geometry(sums, g.slices, D_), stream_, of,
             32 * column_warps * sizeof(A));
    }
  }

  // From the accumulators' type to the weights', and from sums to the biases that are part of them.
  void finish_gradients(const BackwardParams& p, const Gradients& g) {
    for (int d = 0; d < D_; ++d) {
      const WeightGradients& wanted = p.gradients[d];
      if (wanted.w_ih && g.w_ih[d]) convert(static_cast<S*>(wanted.w_ih), g.w_ih[d], Cell::gates * H_, p.I);
      if (wanted.w_hh && g.w_hh[d]) convert(static_cast<S*>(wanted.w_hh), g.w_hh[d], Cell::gates * H_, H_);
    }
    if (wants_biases(p) && g.biases) {
      SliceSums<S> of{g.biases, g.slices, static_cast<int>(H_), {}};
      for (int d = 0; d < D_; ++d) of.to[d] = biases_of(p, d);
      launch(add_slices<Cell, S>, elementwise_geometry(1, Cell::sums * H_, 1, D_), stream_, of);
    }
  }

  bool wants_biases(const BackwardParams& p) const {
    for (int d = 0; d < D_; ++d)
      if (p.gradients[d].b_ih || p.gradients[d].b_hh) return true;
    return false;
  }
  static BiasGradients<S> biases_of(const BackwardParams& p, int d) {
    return {static_cast<S*>(p.gradients[d].b_ih), static_cast<S*>(p.gradients[d].b_hh)};
  }

  // Calls f(first sum, its gate in w_hh, how many follow it there too) for the sums that h takes part in.
  template <class F>
  static void for_gate_blocks(const F& f) {
    for (int k = 0, count; k < Cell::gates; k += count) {
      count = 1;
      while (k + count < Cell::gates && Cell::hidden_gate(k + count) == Cell::hidden_gate(k) + count) ++count;
      f(k, Cell::hidden_gate(k), count);
    }
  }

  // Whether the units of all rows of these arrays can be taken `widest` at a time.
  bool vectors_for(std::initializer_list<const void*> arrays) const {
    if (H_ % widest) return false;
    for (const void* array : arrays)
      if (reinterpret_cast<uintptr_t>(array) % (widest * sizeof(S))) return false;
    return true;
  }

  // `wide` takes `widest` columns a thread, `narrow` one.
  template <class P>
  void elementwise(void (*wide)(P), void (*narrow)(P), bool vectors, int64_t rows, int64_t columns, const P& p,
                   int directions = 1) {
    if (rows == 0) return;
    launch(vectors ? wide : narrow, elementwise_geometry(rows, columns, vectors ? widest : 1, directions), stream_, p);
  }

  void copy_present(S* to, const S* from, int64_t first, int64_t rows) {
    const int64_t I = p_.I;
    const bool vectors = I % widest == 0 && reinterpret_cast<uintptr_t>(from) % (widest * sizeof(S)) == 0;
    const Rows present{p_.sequence.lengths, nullptr};
    elementwise(copy_present_rows<S, widest>, copy_present_rows<S, 1>, vectors, rows, I,
                PresentRows<S>{to, from, present, static_cast<int>(first), static_cast<int>(rows), static_cast<int>(B_),
                               static_cast<int>(I)});
  }

  template <class To, class From>
  void convert(To* to, const From* from, int64_t rows, int64_t columns) {
    if constexpr (std::is_same_v<To, From>) {
      copy(to, from, rows * columns * sizeof(To), stream_);
    } else {
      const bool vectors = columns % widest == 0 && reinterpret_cast<uintptr_t>(to) % (widest * sizeof(To)) == 0 &&
                           reinterpret_cast<uintptr_t>(from) % (widest * sizeof(From)) == 0;
      elementwise(convert_elements<To, From, widest>, convert_elements<To, From, 1>, vectors, rows, columns,
                  Conversion<To, From>{to, from, rows, columns});
    }
  }

  void multiply(const Product& product) {
    if (product.rows == 0 || product.columns == 0) return;
    if (product.inner) return blas_->multiply(product);
    // Only an empty batch's weight gradients are sums of nothing; they have no gaps.
    zero(product.c, product.rows * product.columns * (product.out == element<S>() ? sizeof(S) : sizeof(A)), stream_);
  }

  const Problem& p_;
  const cudaStream_t stream_;
  Blas* const blas_;
  const int D_;
  const int64_t B_, H_, N_;
  int64_t chunk_bytes_;
};

}  // namespace fusedrnn::cuda
