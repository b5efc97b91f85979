// A stack of layers in one direction with its weights packed once and its state in place: what a stream calls.
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
  // dtype is that of the weights, x and y; the states are float32 beside bfloat16 ones. h and c (lstm) are addresses of
  // [layers, B, R] and [layers, B, H], which every call reads and writes.
  Stack(const std::string& cell_name, const std::string& dtype, int64_t B, int64_t I, int64_t H, int64_t projection,
        int64_t layers, uintptr_t h, uintptr_t c)
      : kernels_(cpu::kernels()),
        element_(dtype == "float64"    ? 8
                 : dtype == "bfloat16" ? 2
                                       : 4),
        layers_(layers),
        memory_(layers) {
    const CellInfo cell = cell_info(cell_name);
    const int64_t state_row = B * std::max<int64_t>(element_, sizeof(float));
    for (int64_t layer = 0; layer < layers; ++layer) {
      ForwardParams& p = layers_[layer];
      p = {};
      p.cell = cell.kind;
      p.scalar = scalar_named(dtype);
      p.narrow_sequence = dtype == "bfloat16";
      p.sequence.B = B;
      p.H = H;
      p.projection = projection;
      p.I = layer ? p.R() : I;
      p.directions = 1;
      p.hx = p.h_n = reinterpret_cast<char*>(h) + layer * state_row * p.R();
      if (cell.has_cell) p.cx = p.c_n = reinterpret_cast<char*>(c) + layer * state_row * H;
    }
  }

  // Packs weights: per layer the addresses of w_ih, w_hh and perhaps b_ih and b_hh, and w_hr.
  void prepare(const std::vector<std::vector<uintptr_t>>& weights) {
    const pybind11::gil_scoped_release unlocked;
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
      ForwardParams& p = layers_[layer];
      const auto weight = [&](size_t i) {
        return i < weights[layer].size() ? reinterpret_cast<const void*>(weights[layer][i]) : nullptr;
      };
      const size_t biases = weights[layer].size() >= 4 ? 2 : weights[layer].size();  // where they would be
      p.weights[0] = {weight(0), weight(1), weight(biases), weight(biases + 1), nullptr};
      if (p.projection) p.weights[0].w_hr = weight(weights[layer].size() - 1);
      PrepareParams wanted{p, nullptr, nullptr};
      int64_t bytes = 0;
      wanted.bytes = &bytes;
      kernels_.prepare(wanted, threads());
      if (!memory_[layer]) memory_[layer] = Memory(cpu::borrow(bytes), {static_cast<size_t>(bytes)});
      wanted.memory = p.prepared = memory_[layer].get();
      kernels_.prepare(wanted, threads());
      p.weights[0] = {};  // a later call must not look at them
    }
  }

  // x [T, B, I] to y [T, B, R]; resets [T, B] or nullptr.
  void forward(int64_t T, uintptr_t x, uintptr_t y, uintptr_t resets) {
    const pybind11::gil_scoped_release unlocked;
    const int64_t last = static_cast<int64_t>(layers_.size()) - 1, B = layers_[0].sequence.B, R = layers_[0].R();
    const size_t bytes = T * B * R * element_;
    Memory between[2];
    for (int i = 0; i < std::min<int64_t>(last, 2); ++i) between[i] = Memory(cpu::borrow(bytes), {bytes});
    const void* in = reinterpret_cast<const void*>(x);
    for (int64_t layer = 0; layer <= last; ++layer) {
      ForwardParams& p = layers_[layer];
      p.sequence.T = T;
      p.sequence.resets = reinterpret_cast<const bool*>(resets);
      p.x = in;
      p.y = layer == last ? reinterpret_cast<void*>(y) : between[layer % 2].get();
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

  const cpu::Kernels& kernels_;  // of the instruction set for which the weights are packed
  int64_t element_;              // of x and y
  std::vector<ForwardParams> layers_;
  std::vector<Memory> memory_;
};

}  // namespace fusedrnn::binding
