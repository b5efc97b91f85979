// The only file that knows torch. Operators are registered through LibTorch's stable ABI, so that one build
// serves every torch >= 2.10; the extension module itself is a plain pybind11 one, for what is no tensor
// operator.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cpu/cpu.h"

namespace {

namespace py = pybind11;
using namespace fusedrnn;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

// Gates, pre-activations and saved values of a unit, as the cells of csrc/cells state them.
struct CellInfo {
  CellKind kind;
  int64_t gates, sums, saved;
  bool has_cell;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "fusedrnn: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// The message is only made when it is needed.
#define FUSEDRNN_EXPECT(condition, ...)  \
  do {                                   \
    if (!(condition)) fail(__VA_ARGS__); \
  } while (false)

template <class Cell>
CellInfo info_of(CellKind kind) {
  return {kind, Cell::gates, Cell::sums, Cell::saved, Cell::has_cell};
}

CellInfo cell_info(const std::string& name) {
  if (name == "rnn_tanh") return info_of<RNN<false>>(CellKind::rnn_tanh);
  if (name == "rnn_relu") return info_of<RNN<true>>(CellKind::rnn_relu);
  if (name == "lstm") return info_of<LSTM>(CellKind::lstm);
  if (name == "gru") return info_of<GRU>(CellKind::gru);
  fail("expected cell to be rnn_tanh, rnn_relu, lstm or gru, got ", name);
}

std::string to_string(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

std::vector<int64_t> shape(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return sizes;
}

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// Checks t, and makes it contiguous where it is not.
template <class Sizes = std::initializer_list<int64_t>>
void check(Tensor& t, const char* name, ScalarType dtype, const Sizes& sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (int64_t size : sizes) same = same && t.size(i++) == size;
  FUSEDRNN_EXPECT(same, "expected ", name, " of shape ", to_string({sizes.begin(), sizes.end()}), ", got ",
                  to_string(shape(t)));
  FUSEDRNN_EXPECT(t.scalar_type() == dtype, "expected ", name, " of dtype ", dtype_name(dtype), ", got ",
                  dtype_name(t.scalar_type()));
  if (!t.is_contiguous()) t = torch::stable::contiguous(t);
}

const void* data(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// Where the batch's rows are, with the arrays that a Sequence points to. x is [T, B, ...], or [N, ...] with
// batch_sizes [T].
struct SequenceStorage {
  Sequence sequence{};
  std::vector<int64_t> offsets, lengths;

  SequenceStorage(const Tensor& x, int64_t B, MaybeTensor& batch_sizes, MaybeTensor& row_lengths, MaybeTensor& resets) {
    FUSEDRNN_EXPECT(!batch_sizes || batch_sizes->dim() == 1, "expected batch_sizes of shape [steps], got ",
                    to_string(shape(*batch_sizes)));
    sequence.T = batch_sizes ? batch_sizes->size(0) : x.size(0);
    sequence.B = B;
    if (batch_sizes) {
      FUSEDRNN_EXPECT(!row_lengths, "expected lengths or batch_sizes, got both");
      check(*batch_sizes, "batch_sizes", ScalarType::Long, {sequence.T});
      const int64_t* sizes = batch_sizes->const_data_ptr<int64_t>();
      offsets.assign(1, 0);
      lengths.assign(B, 0);
      for (int64_t t = 0; t < sequence.T; ++t) {
        FUSEDRNN_EXPECT(sizes[t] > 0 && sizes[t] <= (t ? sizes[t - 1] : B),
                        "expected batch_sizes to fall from at most ", B, " to at least 1, got ", sizes[t], " at step ",
                        t);
        offsets.push_back(offsets.back() + sizes[t]);
        for (int64_t b = 0; b < sizes[t]; ++b) lengths[b] = t + 1;
      }
      FUSEDRNN_EXPECT(offsets.back() == x.size(0), "expected x of ", offsets.back(),
                      " rows, the sum of batch_sizes, got ", x.size(0));
      sequence.offsets = offsets.data();
      sequence.lengths = lengths.data();
    } else {
      FUSEDRNN_EXPECT(x.size(1) == B, "expected x with a batch of ", B, ", got ", x.size(1));
      if (row_lengths) {
        check(*row_lengths, "lengths", ScalarType::Long, {B});
        sequence.lengths = row_lengths->const_data_ptr<int64_t>();
        for (int64_t b = 0; b < B; ++b)
          FUSEDRNN_EXPECT(sequence.lengths[b] >= 0 && sequence.lengths[b] <= sequence.T,
                          "expected lengths between 0 and ", sequence.T, ", got ", sequence.lengths[b]);
      }
    }
    if (resets) {
      check(*resets, "resets", ScalarType::Bool, leading(x));
      sequence.resets = static_cast<const bool*>(resets->const_data_ptr());
    }
  }

  static std::vector<int64_t> leading(const Tensor& x) {
    std::vector<int64_t> sizes = shape(x);
    sizes.pop_back();
    return sizes;
  }
};

int64_t sequence_rows(const Sequence& s) { return s.start(s.T); }

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes = SequenceStorage::leading(x);
  sizes.push_back(last);
  return sizes;
}

// torch::stable::new_empty, but by its own entry point: the general one looks the operator up by name, which
// takes a µs a tensor.
Tensor make(const Tensor& like, const std::vector<int64_t>& sizes) {
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()),
                                                          nullptr, nullptr, nullptr, 0, nullptr, &made));
  const Tensor tensor(made);
  cpu::prefer_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

ScalarKind scalar_kind(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  FUSEDRNN_EXPECT(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "expected float32 or float64 tensors, got ", dtype_name(dtype));
  return dtype == ScalarType::Float ? ScalarKind::float32 : ScalarKind::float64;
}

// A pool that queues tasks may run a team's members one after the other, which would wait for each other
// forever (see cpu/team.h).
std::atomic<bool> pool_runs_at_once{false};

cpu::Threads threads() {
  const int64_t count = pool_runs_at_once ? torch::stable::get_num_threads() : 1;
  return {count, [](int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
          }};
}

Problem make_problem(const CellInfo& cell, const Tensor& x, Tensor& hx, MaybeTensor& cx, const Sequence& sequence) {
  FUSEDRNN_EXPECT(hx.size(0) == 1 || hx.size(0) == 2, "expected hx of 1 or 2 directions, got ", hx.size(0));
  check(hx, "hx", x.scalar_type(), shape(hx));
  FUSEDRNN_EXPECT(cx.has_value() == cell.has_cell, "expected cx for lstm and for no other cell");
  if (cx) check(*cx, "cx", x.scalar_type(), shape(hx));
  Problem p{};
  p.cell = cell.kind;
  p.scalar = scalar_kind(x);
  p.sequence = sequence;
  p.H = hx.size(2);
  p.directions = static_cast<int>(hx.size(0));
  return p;
}

// Weights per direction: w_ih, w_hh and, with bias, b_ih and b_hh. x gives I and the dtype; bfloat16 weights may go with a
// float32 x.
void set_weights(Problem& p, const CellInfo& cell, const Tensor& x, Tensors& weights) {
  const int64_t D = p.directions, each = static_cast<int64_t>(weights.size()) / D;
  FUSEDRNN_EXPECT((each == 2 || each == 4) && each * D == static_cast<int64_t>(weights.size()),
                  "expected 2 weights (4 with bias) for each of ", D, " directions, got ", weights.size());
  p.I = x.size(x.dim() - 1);
  ScalarType dtype = x.scalar_type();
  if (dtype == ScalarType::Float && weights[0].scalar_type() == ScalarType::BFloat16) {
    dtype = ScalarType::BFloat16;
    p.scalar = ScalarKind::float32_of_bfloat16;
  }
  for (int64_t d = 0; d < D; ++d) {
    Tensor* w = &weights[d * each];
    check(w[0], "w_ih", dtype, {cell.gates * p.H, p.I});
    check(w[1], "w_hh", dtype, {cell.gates * p.H, p.H});
    p.weights[d].w_ih = w[0].const_data_ptr();
    p.weights[d].w_hh = w[1].const_data_ptr();
    if (each == 4) {
      check(w[2], "b_ih", dtype, {cell.gates * p.H});
      check(w[3], "b_hh", dtype, {cell.gates * p.H});
      p.weights[d].b_ih = w[2].const_data_ptr();
      p.weights[d].b_hh = w[3].const_data_ptr();
    }
  }
}

Tensors forward(std::string cell_name, Tensor x, Tensor hx, MaybeTensor cx, Tensors weights, MaybeTensor batch_sizes,
                MaybeTensor lengths, MaybeTensor resets, bool save) {
  const CellInfo cell = cell_info(cell_name);
  FUSEDRNN_EXPECT(hx.dim() == 3, "expected hx of shape [directions, batch, hidden], got ", to_string(shape(hx)));
  FUSEDRNN_EXPECT(x.dim() == (batch_sizes ? 2 : 3), "expected x [T, B, I], or [N, I] with batch_sizes, got ",
                  to_string(shape(x)));
  check(x, "x", x.scalar_type(), shape(x));
  const SequenceStorage storage(x, hx.size(1), batch_sizes, lengths, resets);
  ForwardParams p{};
  static_cast<Problem&>(p) = make_problem(cell, x, hx, cx, storage.sequence);
  set_weights(p, cell, x, weights);
  const int64_t D = p.directions, N = sequence_rows(p.sequence);
  Tensors results{make(x, with_last(x, D * p.H)), make(x, shape(hx))};
  p.x = x.const_data_ptr();
  p.hx = hx.const_data_ptr();
  p.cx = data(cx);
  p.y = results[0].mutable_data_ptr();
  p.h_n = results[1].mutable_data_ptr();
  const auto add = [&](const std::vector<int64_t>& sizes) {
    results.push_back(make(x, sizes));
    return results.back().mutable_data_ptr();
  };
  if (cell.has_cell) p.c_n = add(shape(hx));
  if (save && cell.saved) p.gates = add({D, N, cell.saved * p.H});
  if (save && cell.has_cell) p.cells = add({D, N, p.H});
  cpu::kernels().forward(p, threads());
  return results;
}

Tensors step(std::string cell_name, Tensor x, Tensor hx, MaybeTensor cx, Tensors weights) {
  const CellInfo cell = cell_info(cell_name);
  FUSEDRNN_EXPECT(x.dim() == 2 && hx.dim() == 2 && hx.size(0) == x.size(0), "expected x [B, I] and hx [B, H], got ",
                  to_string(shape(x)), " and ", to_string(shape(hx)));
  FUSEDRNN_EXPECT(cx.has_value() == cell.has_cell, "expected cx for lstm and for no other cell");
  check(x, "x", x.scalar_type(), shape(x));
  check(hx, "hx", x.scalar_type(), shape(hx));
  if (cx) check(*cx, "cx", x.scalar_type(), shape(hx));
  ForwardParams p{};
  p.cell = cell.kind;
  p.scalar = scalar_kind(x);
  p.sequence.T = 1;
  p.sequence.B = x.size(0);
  p.H = hx.size(1);
  p.directions = 1;
  set_weights(p, cell, x, weights);
  Tensors results{make(x, shape(hx))};
  if (cell.has_cell) results.push_back(make(x, shape(hx)));
  p.x = x.const_data_ptr();
  p.hx = hx.const_data_ptr();
  p.cx = data(cx);
  p.y = p.h_n = results[0].mutable_data_ptr();  // the only output is the last state, in the same places
  if (cell.has_cell) p.c_n = results[1].mutable_data_ptr();
  cpu::kernels().forward(p, threads());
  return results;
}

Tensors backward(std::string cell_name, MaybeTensor dy, MaybeTensor dh_n, MaybeTensor dc_n, Tensor x, Tensor y,
                 Tensor hx, MaybeTensor cx, Tensors saved, Tensors weights, MaybeTensor batch_sizes,
                 MaybeTensor lengths, MaybeTensor resets, std::vector<bool> wanted) {
  const CellInfo cell = cell_info(cell_name);
  FUSEDRNN_EXPECT(hx.dim() == 3, "expected hx of shape [directions, batch, hidden], got ", to_string(shape(hx)));
  FUSEDRNN_EXPECT(x.dim() == (batch_sizes ? 2 : 3), "expected x [T, B, I], or [N, I] with batch_sizes, got ",
                  to_string(shape(x)));
  const ScalarType dtype = x.scalar_type();
  check(x, "x", dtype, shape(x));
  const SequenceStorage storage(x, hx.size(1), batch_sizes, lengths, resets);
  BackwardParams p{};
  static_cast<Problem&>(p) = make_problem(cell, x, hx, cx, storage.sequence);
  set_weights(p, cell, x, weights);
  const int64_t D = p.directions, H = p.H, N = sequence_rows(p.sequence);
  check(y, "y", dtype, with_last(x, D * H));
  const size_t saved_count = (cell.saved ? 1 : 0) + (cell.has_cell ? 1 : 0);
  FUSEDRNN_EXPECT(saved.size() == saved_count, "expected ", saved_count, " saved tensors, got ", saved.size());
  if (cell.saved) {
    check(saved[0], "gates", dtype, {D, N, cell.saved * H});
    p.gates = saved[0].const_data_ptr();
  }
  if (cell.has_cell) {
    check(saved[1], "cells", dtype, {D, N, H});
    p.cells = saved[1].const_data_ptr();
  }
  if (dy) check(*dy, "dy", dtype, shape(y));
  if (dh_n) check(*dh_n, "dh_n", dtype, shape(hx));
  FUSEDRNN_EXPECT(!dc_n || cell.has_cell, "expected dc_n for lstm and for no other cell");
  if (dc_n) check(*dc_n, "dc_n", dtype, shape(hx));
  const size_t states = cell.has_cell ? 3 : 2;  // x, hx and perhaps cx come before the weights
  FUSEDRNN_EXPECT(wanted.size() == states + weights.size(), "expected wanted to hold ", states + weights.size(),
                  " values, got ", wanted.size());
  Tensors results;
  const auto result = [&](size_t i, const Tensor& like) -> void* {
    if (!wanted[i]) return nullptr;
    results.push_back(make(x, shape(like)));
    return results.back().mutable_data_ptr();
  };
  p.x = x.const_data_ptr();
  p.y = y.const_data_ptr();
  p.hx = hx.const_data_ptr();
  p.cx = data(cx);
  p.dy = data(dy);
  p.dh_n = data(dh_n);
  p.dc_n = data(dc_n);
  p.dx = result(0, x);
  p.dhx = result(1, hx);
  if (cx) p.dcx = result(2, *cx);
  const size_t each = weights.size() / D;
  for (int64_t d = 0; d < D; ++d) {
    const size_t i = d * each;
    p.gradients[d].w_ih = result(states + i, weights[i]);
    p.gradients[d].w_hh = result(states + i + 1, weights[i + 1]);
    if (each == 4) {
      p.gradients[d].b_ih = result(states + i + 2, weights[i + 2]);
      p.gradients[d].b_hh = result(states + i + 3, weights[i + 3]);
    }
  }
  cpu::kernels().backward(p, threads());
  return results;
}

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
                uintptr_t y, uintptr_t h_n, uintptr_t c_n) {
  const py::gil_scoped_release unlocked;
  const CellInfo cell = cell_info(cell_name);
  ForwardParams p{};
  p.cell = cell.kind;
  p.scalar = dtype == "float32"   ? ScalarKind::float32
             : dtype == "float64" ? ScalarKind::float64
                                  : ScalarKind::float32_of_bfloat16;
  p.sequence.T = T;
  p.sequence.B = B;
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

// Results, in this order: y, h_n, c_n (lstm), and with save what backward asks for as `saved`: gates (lstm,
// gru), cells (lstm). recurrence_backward: the gradients of x, hx, cx (lstm) and every weight, of those that
// are wanted. step is recurrence_forward for one step of [B, I], for inference: h and c (lstm).
STABLE_TORCH_LIBRARY(fusedrnn, m) {
  m.def(
      "recurrence_forward(str cell, Tensor x, Tensor hx, Tensor? cx, Tensor[] weights, Tensor? batch_sizes, "
      "Tensor? lengths, "
      "Tensor? resets, bool save) -> Tensor[]");
  m.def(
      "recurrence_backward(str cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor y, Tensor hx, "
      "Tensor? cx, Tensor[] saved, "
      "Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, bool[] wanted) -> Tensor[]");
  m.def("step(str cell, Tensor x, Tensor hx, Tensor? cx, Tensor[] weights) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("recurrence_forward", TORCH_BOX(&forward));
  m.impl("recurrence_backward", TORCH_BOX(&backward));
  m.impl("step", TORCH_BOX(&step));
}

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
        info["cuda_architectures"] = std::vector<std::string>{};
        return info;
      },
      "What this build was made with and for.");
  m.def("instruction_sets", &cpu::supported, "Instruction sets built that this processor has, best first.");
  m.def("instruction_set", [] { return cpu::kernels().name; }, "The one in use.");
  m.def("use", &cpu::use, py::arg("instruction_set"), "Choose one of instruction_sets(), or \"\" for the best.");
  m.def(
      "use_threads", [](bool at_once) { pool_runs_at_once = at_once; }, py::arg("at_once"),
      "Whether torch's thread pool runs the parts of a parallel loop at the same time (OpenMP does).");
  m.def("plan", &plan, py::arg("cell"), py::arg("is_double"), py::arg("backward"), py::arg("T"), py::arg("B"),
        py::arg("I"), py::arg("H"), py::arg("directions"),
        "How a pass over a padded batch would be carried out (csrc/cpu/tuning.h).");
  m.def("peak_flops", &peak_flops, "float32 operations per second from registers, all threads, measured.");
  m.def("read_bandwidth", &read_bandwidth, py::arg("bytes"),
        "Bytes per second at which all threads together read so many bytes again and again, measured.");
  m.def("pooled", &cpu::pooled, "Bytes of working memory that are kept for the next call.");
  m.def("forward_at", &forward_at,
        "forward_at(cell, dtype, T, B, I, H, directions, x, hx, cx, weights, y, h_n, c_n): a forward pass on the "
        "addresses of contiguous memory, unchecked.");
  m.def("evaluate", &evaluate_function, py::arg("function"), py::arg("x"),
        "sigmoid or tanh as the kernels compute them, of a float32 or float64 array.");
}
