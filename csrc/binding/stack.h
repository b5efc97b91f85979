// A stack of layers with its weights packed once: what streams and prepacked layers call.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "arguments.h"
#include "cpu/cpu.h"
#include "threads.h"

namespace fusedrnn::binding {

// What kernels are given for weights of a dtype; float16 ones become float32 before.
inline ScalarKind scalar_named(const std::string& dtype) {
  return dtype == "float64"    ? ScalarKind::float64
         : dtype == "bfloat16" ? ScalarKind::float32_of_bfloat16
                               : ScalarKind::float32;
}

class Stack {
 public:
  // dtype is that of the weights. They are packed as is best for about B rows; a call may have others.
  Stack(const std::string& cell_name, const std::string& dtype, int64_t B, int64_t I, int64_t H, int64_t projection,
        int64_t layers, int directions)
      : kernels_(cpu::kernels()), layers_(layers), memory_(layers) {
    const CellInfo cell = cell_info(cell_name);
    for (int64_t layer = 0; layer < layers; ++layer) {
      ForwardParams& p = layers_[layer];
      p = {};
      p.cell = cell.kind;
      p.scalar = scalar_named(dtype);
      p.prepared_rows = B;
      p.H = H;
      p.projection = projection;
      p.I = layer ? directions * p.R() : I;
      p.directions = directions;
    }
  }

  Stack(const Stack&) = delete;

  // Packs weights: per layer and direction the addresses of w_ih, w_hh and perhaps b_ih and b_hh, and w_hr.
  void prepare(const std::vector<uintptr_t>& weights) {
    const pybind11::gil_scoped_release unlocked;
    const size_t each = weights.size() / (layers_.size() * layers_[0].directions);
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
      PrepareParams wanted{layers_[layer], nullptr, nullptr};
      wanted.sequence.B = layers_[layer].prepared_rows;
      for (int d = 0; d < wanted.directions; ++d) {
        const uintptr_t* const given = &weights[(layer * wanted.directions + d) * each];
        const auto weight = [&](size_t i, bool there = true) {
          return there ? reinterpret_cast<const void*>(given[i]) : nullptr;
        };
        const bool biases = each >= 4;
        wanted.weights[d] = {weight(0), weight(1), weight(2, biases), weight(3, biases),
                             weight(each - 1, wanted.projection > 0)};
      }
      const size_t bytes = bytes_for(layer, wanted.sequence.B);
      if (!memory_[layer]) memory_[layer] = Memory(cpu::borrow(bytes), {bytes});
      wanted.memory = layers_[layer].prepared = memory_[layer].get();
      kernels_.prepare(wanted, threads());
    }
  }

  int64_t outputs() const { return layers_[0].directions * layers_[0].R(); }

  bool is_current() const { return &kernels_ == &cpu::kernels(); }
  // Told by the size of what would be packed.
  bool suits(int64_t B) const {
    const int64_t own = layers_[0].prepared_rows;
    return is_current() && (B == own || bytes_for(0, B) == bytes_for(0, own));
  }
  const cpu::Kernels& kernels() const { return kernels_; }

  // Whether p is the first of these layers.
  bool fits(const Problem& p, int64_t layers) const {
    const ForwardParams& own = layers_[0];
    return layers == static_cast<int64_t>(layers_.size()) && p.cell == own.cell && p.scalar == own.scalar &&
           p.I == own.I && p.H == own.H && p.projection == own.projection && p.directions == own.directions;
  }
  // Gives a layer's pass its weights.
  void lend(int64_t layer, ForwardParams& p) const {
    p.prepared = layers_[layer].prepared;
    p.prepared_rows = layers_[layer].prepared_rows;
  }

  // x [T, B, I] to y [T, B, D*R], both of bfloat16 where narrow_x says so, resets [T, B] and lengths [B] or nullptr; or `rows` of
  // either, with batch_sizes [T]. From the states h [layers*D, B, R] and c (lstm) [layers*D, B, H] to h_n and c_n, which may be the same.
  void forward(int64_t T, int64_t B, uintptr_t x, uintptr_t y, uintptr_t h, uintptr_t c, uintptr_t h_n, uintptr_t c_n,
               bool narrow_x, bool narrow_states, uintptr_t resets, uintptr_t lengths, uintptr_t batch_sizes,
               int64_t rows) const {
    const pybind11::gil_scoped_release unlocked;
    Sequence sequence{T, B, nullptr, reinterpret_cast<const int64_t*>(lengths), reinterpret_cast<const bool*>(resets)};
    PackedRows packed(batch_sizes ? B : 0);
    if (batch_sizes) {
      for (int64_t t = 0; t < T; ++t) packed.add(reinterpret_cast<const int64_t*>(batch_sizes)[t]);
      FUSEDRNN_EXPECT(packed.offsets.back() == rows, "expected x of ", packed.offsets.back(),
                      " rows, the sum of batch_sizes, got ", rows);
      packed.set(sequence);
    }
    const int64_t last = static_cast<int64_t>(layers_.size()) - 1, D = layers_[0].directions, R = layers_[0].R(),
                  element = layers_[0].scalar == ScalarKind::float64 ? 8 : 4;
    const size_t bytes = sequence.start(T) * D * R * (narrow_x ? sizeof(uint16_t) : element);
    const int64_t state_row = D * B * (narrow_states ? sizeof(uint16_t) : element);  // bytes for each number of a state
    cpu::prefer_huge_pages(reinterpret_cast<void*>(y), bytes);
    Memory between[2];
    for (int i = 0; i < std::min<int64_t>(last, 2); ++i) between[i] = Memory(cpu::borrow(bytes), {bytes});
    const auto state = [&](uintptr_t first, int64_t layer, int64_t width) {
      return first ? reinterpret_cast<char*>(first) + layer * state_row * width : nullptr;
    };
    const void* in = reinterpret_cast<const void*>(x);
    for (int64_t layer = 0; layer <= last; ++layer) {
      ForwardParams p = layers_[layer];
      p.sequence = sequence;
      p.narrow_sequence = narrow_x;
      p.narrow_states = narrow_states;
      p.x = in;
      p.y = layer == last ? reinterpret_cast<void*>(y) : between[layer % 2].get();
      p.hx = state(h, layer, R);
      p.h_n = state(h_n, layer, R);
      p.cx = state(c, layer, p.H);
      p.c_n = state(c_n, layer, p.H);
      kernels_.forward(p, threads());
      in = p.y;
    }
  }

 private:
  struct Return {
    size_t bytes;
    void operator()(void* memory) const { cpu::give_back(memory, bytes); }
  };
  using Memory = std::unique_ptr<void, Return>;

  size_t bytes_for(int64_t layer, int64_t B) const {
    int64_t bytes = 0;
    PrepareParams wanted{layers_[layer], nullptr, &bytes};
    wanted.sequence.B = B;
    kernels_.prepare(wanted, threads());
    return bytes;
  }

  const cpu::Kernels& kernels_;  // of the instruction set for which the weights are packed
  std::vector<ForwardParams> layers_;
  std::vector<Memory> memory_;
};

}  // namespace fusedrnn::binding
