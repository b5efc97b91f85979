// The extension module, for what is no tensor operator. Importing it registers the operators (operators.cpp).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "arguments.h"
#include "cpu/cpu.h"
#include "stack.h"
#include "threads.h"

namespace {

namespace py = pybind11;
using namespace fusedrnn;
using binding::CellInfo, binding::cell_info, binding::threads;

// bfloat16 is the upper half of a float.
void widen(const void* from, float* to, int64_t count) {
  const uint16_t* halves = static_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = std::bit_cast<float>(static_cast<uint32_t>(halves[i]) << 16);
}

// To the nearest, ties to even; a NaN stays one.
void narrow(const float* from, void* to, int64_t count) {
  uint16_t* halves = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(from[i]);
    halves[i] = from[i] != from[i] ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

// A forward pass without autograd, on memory that the caller has checked: contiguous tensors of one dtype and of the shapes
// that ForwardParams states. Small layers spend more time on their way through torch's dispatcher than in their kernel.
void forward_at(const std::string& cell_name, const std::string& dtype, int64_t T, int64_t B, int64_t I, int64_t H,
                int directions, uintptr_t x, uintptr_t hx, uintptr_t cx, const std::vector<uintptr_t>& weights,
                uintptr_t y, uintptr_t h_n, uintptr_t c_n, uintptr_t lengths, uintptr_t resets) {
  const py::gil_scoped_release unlocked;
  const CellInfo cell = cell_info(cell_name);
  ForwardParams p{};
  p.cell = cell.kind;
  p.scalar = binding::scalar_named(dtype);
  p.sequence.T = T;
  p.sequence.B = B;
  p.sequence.lengths = reinterpret_cast<const int64_t*>(lengths);
  p.sequence.resets = reinterpret_cast<const bool*>(resets);
  p.I = I;
  p.H = H;
  p.directions = directions;
  const size_t each = weights.size() / directions;
  const auto weight = [&](int d, size_t i) {
    return i < each ? reinterpret_cast<const void*>(weights[d * each + i]) : nullptr;
  };
  for (int d = 0; d < directions; ++d) p.weights[d] = {weight(d, 0), weight(d, 1), weight(d, 2), weight(d, 3)};
  p.x = reinterpret_cast<const void*>(x);
  p.hx = reinterpret_cast<const void*>(hx);
  p.cx = reinterpret_cast<const void*>(cx);
  p.y = reinterpret_cast<void*>(y);
  p.h_n = reinterpret_cast<void*>(h_n);
  p.c_n = reinterpret_cast<void*>(c_n);
  if (p.scalar != ScalarKind::float32_of_bfloat16) return cpu::kernels().forward(p, threads());
  // Everything but the weights is float32 inside: room for x, hx, cx, y, h_n, c_n.
  const int64_t states = directions * B * H, inputs = T * B * I, outputs = T * directions * B * H;
  const size_t bytes = (inputs + 4 * states + outputs) * sizeof(float);
  const auto give_back = [=](float* room) { cpu::give_back(room, bytes); };
  const std::unique_ptr<float, decltype(give_back)> room(static_cast<float*>(cpu::borrow(bytes)), give_back);
  float *own_x = room.get(), *own_hx = own_x + inputs, *own_cx = own_hx + states, *own_h = own_cx + states,
        *own_c = own_h + states, *own_y = y == h_n ? own_h : own_c + states;
  widen(p.x, own_x, inputs);
  widen(p.hx, own_hx, states);
  if (cell.has_cell) widen(p.cx, own_cx, states);
  ForwardParams wide = p;
  wide.x = own_x, wide.hx = own_hx, wide.cx = own_cx, wide.y = own_y, wide.h_n = own_h, wide.c_n = own_c;
  cpu::kernels().forward(wide, threads());
  narrow(own_h, p.h_n, states);
  if (y != h_n) narrow(own_y, p.y, outputs);
  if (cell.has_cell) narrow(own_c, p.c_n, states);
}

template <class S>
using Array = py::array_t<S, py::array::c_style | py::array::forcecast>;

template <class S>
Array<S> evaluate(void (*function)(int, const S*, S*, int64_t), int which, const Array<S>& x) {
  Array<S> y(x.size());
  function(which, x.data(), y.mutable_data(), x.size());
  return y;
}

py::array evaluate_function(const std::string& name, const py::array& x) {
  const int which = name == "sigmoid" ? 0 : name == "tanh" ? 1 : -1;
  if (which < 0) throw py::value_error("expected sigmoid or tanh, got " + name);
  if (py::isinstance<py::array_t<float>>(x)) return evaluate<float>(cpu::kernels().functions_float, which, x);
  return evaluate<double>(cpu::kernels().functions_double, which, x);
}

py::dict plan(const std::string& cell, bool is_double, bool backward, int64_t T, int64_t B, int64_t I, int64_t H,
              int directions) {
  Problem p{};
  p.cell = cell_info(cell).kind;
  p.scalar = is_double ? ScalarKind::float64 : ScalarKind::float32;
  p.sequence.T = T;
  p.sequence.B = B;
  p.I = I;
  p.H = H;
  p.directions = directions;
  const cpu::PlanInfo info = cpu::kernels().plan(p, backward, threads().count);
  py::dict named;
  named["teams"] = info.teams;
  named["members"] = info.members;
  named["row_blocks"] = info.row_blocks;
  named["share_units"] = info.share_units;
  named["packed"] = info.packed;
  named["step"] = info.step;
  return named;
}

template <class F>
double seconds_of(const F& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Floating-point operations per second of fused multiply-adds from registers, all threads: the best of some tries.
double peak_flops() {
  const py::gil_scoped_release unlocked;
  double best = 0;
  for (int i = 0; i < 20; ++i) {
    double operations = 0;
    const double seconds = seconds_of([&] { operations = cpu::kernels().multiply_add(2'400'000, threads()); });
    best = std::max(best, operations / seconds);
  }
  return best;
}

// Bytes per second at which all threads read so many bytes again and again, each its part.
double read_bandwidth(size_t bytes) {
  const py::gil_scoped_release unlocked;
  const auto give_back = [=](float* memory) { cpu::give_back(memory, bytes); };
  const std::unique_ptr<float, decltype(give_back)> memory(static_cast<float*>(cpu::borrow(bytes)), give_back);
  const int64_t count = bytes / sizeof(float), repeats = std::max<int64_t>(1, (32 << 20) / bytes);
  std::fill_n(memory.get(), count, 1.0f);
  double best = 0;
  for (int i = 0; i < 10; ++i) {
    const double seconds = seconds_of([&] { cpu::kernels().read_all(memory.get(), count, repeats, threads()); });
    best = std::max(best, static_cast<double>(bytes) * repeats / seconds);
  }
  return best;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fusedrnn's compiled part: importing it registers torch.ops.fusedrnn.";
  cpu::use("");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = FUSEDRNN_TORCH_VERSION;
        info["compiler"] = FUSEDRNN_COMPILER;
        info["instruction_sets"] = cpu::built();
        return info;
      },
      "What this build was made with and for.");
  m.def("instruction_sets", &cpu::supported, "Instruction sets built that this processor has, best first.");
  m.def("instruction_set", [] { return cpu::kernels().name; }, "The one in use.");
  m.def("use", &cpu::use, py::arg("instruction_set"), "Choose one of instruction_sets(), or \"\" for the best.");
  m.def(
      "use_threads", [](bool at_once) { binding::pool_runs_at_once = at_once; }, py::arg("at_once"),
      "Whether torch's thread pool runs the parts of a parallel loop at the same time (OpenMP does).");
  m.def("plan", &plan, py::arg("cell"), py::arg("is_double"), py::arg("backward"), py::arg("T"), py::arg("B"),
        py::arg("I"), py::arg("H"), py::arg("directions"),
        "How a pass over a padded batch would be carried out (csrc/cpu/tuning.h).");
  m.def("peak_flops", &peak_flops, "float32 operations per second from registers, all threads, measured.");
  m.def("read_bandwidth", &read_bandwidth, py::arg("bytes"),
        "Bytes per second at which all threads together read so many bytes again and again, measured.");
  m.def("pooled", &cpu::pooled, "Bytes of working memory that are kept for the next call.");
  m.def("forward_at", &forward_at, py::arg("cell"), py::arg("dtype"), py::arg("T"), py::arg("B"), py::arg("I"),
        py::arg("H"), py::arg("directions"), py::arg("x"), py::arg("hx"), py::arg("cx"), py::arg("weights"),
        py::arg("y"), py::arg("h_n"), py::arg("c_n"), py::arg("lengths") = 0, py::arg("resets") = 0,
        "A forward pass on the addresses of contiguous memory, unchecked.");
  py::class_<binding::Stack>(m, "Stack",
                             "Layers in one direction with weights packed once and a state in place, unchecked.")
      .def(py::init<const std::string&, const std::string&, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t>(),
           py::arg("cell"), py::arg("dtype"), py::arg("B"), py::arg("I"), py::arg("H"), py::arg("layers"), py::arg("h"),
           py::arg("c"))
      .def("prepare", &binding::Stack::prepare, py::arg("weights"), "Pack the weights of these addresses, per layer.")
      .def("forward", &binding::Stack::forward, py::arg("T"), py::arg("x"), py::arg("y"), py::arg("resets"),
           "T steps: x [T, B, I] to y [T, B, H], by address.");
  m.def("evaluate", &evaluate_function, py::arg("function"), py::arg("x"),
        "sigmoid or tanh as the kernels compute them, of a float32 or float64 array.");
}
