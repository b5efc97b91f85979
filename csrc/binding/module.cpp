// The extension module, for what is no tensor operator. Importing it registers the operators (operators.cpp).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "arguments.h"
#include "cpu/cpu.h"
#include "direct.h"
#include "dlpack.h"
#include "stack.h"
#include "threads.h"

namespace {

namespace py = pybind11;
using namespace fusedrnn;
using binding::cell_info, binding::threads;

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

py::dict plan(const std::string& cell, const std::string& dtype, bool backward, int64_t T, int64_t B, int64_t I,
              int64_t H, int directions, bool narrow, int64_t projection, const std::vector<int64_t>& batch_sizes) {
  Problem p{};
  p.cell = cell_info(cell).kind;
  p.scalar = binding::scalar_named(dtype);
  p.sequence.T = T;
  p.sequence.B = B;
  p.I = I;
  p.H = H;
  p.projection = projection;
  p.directions = directions;
  p.narrow_sequence = p.narrow_states = narrow && p.converts_weights();
  binding::PackedRows packed(batch_sizes.empty() ? 0 : B);
  for (const int64_t size : batch_sizes) packed.add(size);
  if (!batch_sizes.empty()) packed.set(p.sequence);
  const cpu::PlanInfo info = cpu::kernels().plan(p, backward, threads().count);
  py::dict named;
  named["teams"] = info.teams;
  named["members"] = info.members;
  named["row_blocks"] = info.row_blocks;
  named["packed"] = info.packed;
  named["tiled"] = info.tiled;
  named["step"] = info.step;
  return named;
}

template <class F>
double seconds_of(const F& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Floating-point operations per second from registers, all threads, of fused multiply-adds or, for bfloat16, of tiles where
// the processor multiplies them: the best of some tries.
double peak_flops(const std::string& dtype) {
  const py::gil_scoped_release unlocked;
  const cpu::Kernels& kernels = cpu::kernels();
  const bool tiles = dtype == "bfloat16" && kernels.multiply_tiles;
  double best = 0;
  for (int i = 0; i < 20; ++i) {
    double operations = 0;
    const double seconds = seconds_of([&] {
      operations = tiles ? kernels.multiply_tiles(200'000, threads()) : kernels.multiply_add(2'400'000, threads());
    });
    best = std::max(best, operations / seconds);
  }
  return best;
}

// Bytes per second at which all threads read so many bytes again and again, each its part.
double read_bandwidth(size_t bytes) {
  const py::gil_scoped_release unlocked;
  const auto give_back = [=](float* memory) { cpu::give_back(memory, bytes); };
  const std::unique_ptr<float, decltype(give_back)> memory(static_cast<float*>(cpu::borrow(bytes)), give_back);
  const int64_t count = bytes / sizeof(float), repeats = (32 << 20) / std::max<size_t>(bytes, 1) + 1;
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
  m.def(
      "plan", &plan, py::arg("cell"), py::arg("dtype"), py::arg("backward"), py::arg("T"), py::arg("B"), py::arg("I"),
      py::arg("H"), py::arg("directions"), py::arg("narrow") = true, py::arg("projection") = 0,
      py::arg("batch_sizes") = std::vector<int64_t>(),
      "How a pass with weights of a dtype would be carried out (csrc/cpu/tuning.h); narrow: with bfloat16 ones whether "
      "input and states are bfloat16, too; batch_sizes: of a packed batch.");
  m.def("peak_flops", &peak_flops, py::arg("dtype"),
        "Operations per second from registers, all threads, measured: of float32s, or of bfloat16s where the processor "
        "multiplies them.");
  m.def("read_bandwidth", &read_bandwidth, py::arg("bytes"),
        "Bytes per second at which all threads together read so many bytes again and again, measured.");
  m.def("pooled", &cpu::pooled, "Bytes of working memory that are kept for the next call.");
  py::class_<binding::Stack>(m, "Stack", "Layers with weights packed once, for inference; unchecked.")
      .def(py::init<const std::string&, const std::string&, int64_t, int64_t, int64_t, int64_t, int64_t, int>(),
           py::arg("cell"), py::arg("dtype"), py::arg("B"), py::arg("I"), py::arg("H"), py::arg("projection"),
           py::arg("layers"), py::arg("directions"))
      .def("prepare", &binding::Stack::prepare, py::arg("weights"),
           "Pack the weights of these addresses, per layer and direction.")
      .def_property_readonly("outputs", &binding::Stack::outputs, "D*R, the numbers of an output.")
      .def("is_current", &binding::Stack::is_current, "Whether it has packed for the instruction set in use.")
      .def("suits", &binding::Stack::suits, py::arg("B"), "Whether it has packed as is best there for B rows.")
      .def("forward", &binding::Stack::forward, py::arg("T"), py::arg("B"), py::arg("x"), py::arg("y"), py::arg("h"),
           py::arg("c"), py::arg("h_n"), py::arg("c_n"), py::arg("narrow_x"), py::arg("narrow_states"),
           py::arg("resets") = 0, py::arg("lengths") = 0, py::arg("batch_sizes") = 0, py::arg("rows") = 0,
           "T steps: x [T, B, I] to y [T, B, D*R], or of a packed batch's rows, by address; narrow: in bfloat16.");
  m.def("use_tensors", &binding::use_tensors, py::arg("tensor"), py::arg("parameter"),
        "Whether the next three can read tensors of these types; without it they must not be called.");
  m.def("fits", &binding::direct::fits, "fits(cell, x, hx, cx, weights): whether forward takes them, with save.");
  m.def("forward", &binding::direct::forward, py::arg("cell"), py::arg("x"), py::arg("hx"), py::arg("cx"),
        py::arg("weights"), py::arg("layers"), py::arg("save"), py::arg("lengths") = 0, py::arg("resets") = 0,
        py::arg("stack") = static_cast<const binding::Stack*>(nullptr),
        "y, h_n, c_n (lstm) and what is saved, or None; stack: what has packed these weights.");
  m.def("backward", &binding::direct::backward,
        "backward(cell, dy, dh_n, dc_n, x, y, hx, cx, saved, weights, wanted): gradients of x, hx, cx and weights, or "
        "None.");
  m.def("evaluate", &evaluate_function, py::arg("function"), py::arg("x"),
        "sigmoid or tanh as the kernels compute them, of a float32 or float64 array.");
}
