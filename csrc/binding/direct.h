// Passes on Python's tensors, without torch's dispatcher: small layers spend more time on their way through it than in their
// kernel. What is not for them, by shape, dtype, layout or place, is given back with None: the caller takes the operators,
// which say what is wrong, if anything is.
//
// Padded batches x [T, B, I] with states [layers*D, B, H], or one step of x [B, I] with states [B, H]; where an LSTM's hidden state
// is projected, it has R numbers. Weights are torch.nn's flat list.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cpu/cpu.h"
#include "dlpack.h"
#include "stack.h"
#include "threads.h"

namespace fusedrnn::binding::direct {

// What forward and backward are given alike.
struct Call {
  CellInfo cell;
  ScalarKind scalar;  // of all tensors
  bool step;
  bool projected;
  int64_t layers, T, B, I, H, R, D, element;
  void *x, *hx, *cx = nullptr;
  std::vector<Weights> weights;  // per layer and direction

  int64_t state(int64_t width) const { return D * B * width * element; }  // bytes of one layer's

  ForwardParams problem(int64_t layer) const {
    ForwardParams p{};
    p.cell = cell.kind;
    p.narrow_sequence = p.narrow_states = scalar == ScalarKind::bfloat16;
    p.scalar = p.narrow_states ? ScalarKind::float32_of_bfloat16 : scalar;
    p.sequence.T = T;
    p.sequence.B = B;
    p.I = layer ? D * R : I;
    p.H = H;
    p.projection = projected ? R : 0;
    p.directions = static_cast<int>(D);
    std::copy_n(&weights[layer * D], D, p.weights);
    return p;
  }
};

inline std::optional<Call> call(const std::string& name, pybind11::handle x, pybind11::handle hx, pybind11::handle cx,
                                const pybind11::sequence& weights, int64_t layers) {
  Call c{cell_info(name)};
  const std::optional<View> input = view(x), h = view(hx);
  if (!input || !h || input->rank != h->rank || input->rank < 2 || input->rank > 3) return {};
  c.step = h->rank == 2;
  c.scalar = input->scalar;
  c.element = c.scalar == ScalarKind::float64 ? 8 : c.scalar == ScalarKind::float32 ? 4 : 2;
  const int64_t rows = c.step ? 1 : h->sizes[0];
  c.layers = layers;
  c.D = rows / layers;
  c.T = c.step ? 1 : input->sizes[0];
  c.B = h->sizes[h->rank - 2];
  c.H = c.R = h->sizes[h->rank - 1];
  c.I = input->sizes[input->rank - 1];
  if (c.D * layers != rows || c.D < 1 || c.D > 2 || input->sizes[input->rank - 2] != c.B || h->scalar != c.scalar)
    return {};
  c.x = input->data;
  c.hx = h->data;
  if (c.cell.has_cell == cx.is_none()) return {};
  if (c.cell.has_cell) {
    const std::optional<View> cells = view(cx);
    if (!cells || cells->scalar != c.scalar || cells->rank != h->rank ||
        !std::equal(h->sizes, h->sizes + h->rank - 1, cells->sizes))
      return {};
    c.cx = cells->data;
    c.H = cells->sizes[h->rank - 1];
  }
  const int64_t count = static_cast<int64_t>(weights.size()), each = count / rows, sums = c.cell.gates * c.H;
  c.projected = each % 2;
  if (each * rows != count || each < 2 || each > 5) return {};
  if (c.projected ? !c.cell.has_cell || c.step || c.R < 1 || c.R > c.H : c.R != c.H) return {};
  for (int64_t row = 0; row < rows; ++row) {
    const void* data[5] = {};
    for (int64_t i = 0; i < each; ++i) {
      const std::optional<View> w = view(pybind11::object(weights[row * each + i]));
      const bool projection = c.projected && i == each - 1;
      const int64_t inputs = i ? c.R : row < c.D ? c.I : c.D * c.R;
      if (!w || !(projection ? w->is(c.scalar, {c.R, c.H})
                  : i < 2    ? w->is(c.scalar, {sums, inputs})
                             : w->is(c.scalar, {sums})))
        return {};
      data[projection ? 4 : i] = w->data;
    }
    c.weights.push_back({data[0], data[1], data[2], data[3], data[4]});
  }
  return c;
}

inline bool fits(const std::string& name, pybind11::handle x, pybind11::handle hx, pybind11::handle cx,
                 const pybind11::sequence& weights) {
  return call(name, x, hx, cx, weights, 1).has_value();
}

using Sizes = std::initializer_list<int64_t>;

// A new tensor as torch.Tensor.new_empty makes it, and its memory.
inline std::pair<pybind11::object, void*> make(pybind11::handle like, const Call& c, Sizes sizes) {
  static PyObject* const new_empty = PyUnicode_InternFromString("new_empty");
  std::array<pybind11::int_, 3> owned;
  std::array<PyObject*, 4> arguments{like.ptr()};
  size_t count = 0;
  int64_t bytes = c.element;
  for (int64_t size : sizes) {
    owned[count] = pybind11::int_(size);
    arguments[count + 1] = owned[count].ptr();
    ++count;
    bytes *= size;
  }
  auto made = pybind11::reinterpret_steal<pybind11::object>(
      PyObject_VectorcallMethod(new_empty, arguments.data(), count + 1, nullptr));
  if (!made) throw pybind11::error_already_set();
  const std::optional<View> memory = view(made);
  if (!memory) throw std::runtime_error("fusedrnn: expected torch.Tensor.new_empty to give a dense tensor");
  cpu::prefer_huge_pages(memory->data, bytes);
  return {std::move(made), memory->data};
}

// What only backward reads.
inline std::pair<pybind11::object, void*> make_saved(pybind11::handle like, const Call& c, int64_t width) {
  constexpr int64_t worth_a_pool = 1 << 20;  // bytes; malloc keeps pages for smaller ones
  const int64_t rows = c.T * c.B;
  return c.D * rows * width * c.element < worth_a_pool ? make(like, c, {c.D, rows, width})
                                                       : borrowed(c.scalar, {c.D, rows, width});
}

// (y, h_n, c_n of an LSTM) and, with save, what backward asks for: gates and cells where the cell has them. y of a step is
// h_n itself, but with save, where h_n may be written to before backward reads y. lengths and resets are addresses of what
// params.h says, checked by the caller, or 0. stack: what has packed these weights, or nullptr.
inline pybind11::object forward(const std::string& name, pybind11::handle x, pybind11::handle hx, pybind11::handle cx,
                                const pybind11::sequence& weights, int64_t layers, bool save, uintptr_t lengths,
                                uintptr_t resets, const Stack* stack) {
  const std::optional<Call> given = call(name, x, hx, cx, weights, layers);
  if (!given || (stack && !stack->fits(given->problem(0), layers))) return pybind11::none();
  const Call& c = *given;
  const auto state = [&](int64_t width) {
    return c.step ? make(x, c, {c.B, width}) : make(x, c, {layers * c.D, c.B, width});
  };
  std::pair<pybind11::object, void*> y, h_n = state(c.R), c_n, gates, cells;
  if (c.cell.has_cell) c_n = state(c.H);
  if (save && c.cell.saved) gates = make_saved(x, c, c.cell.saved * c.H);
  if (save && c.cell.has_cell) cells = make_saved(x, c, c.H);
  const auto part = [](void* of_all, int64_t offset) { return of_all ? static_cast<char*>(of_all) + offset : nullptr; };
  for (int64_t layer = 0; layer < layers; ++layer) {
    ForwardParams p = c.problem(layer);
    p.sequence.lengths = reinterpret_cast<const int64_t*>(lengths);
    p.sequence.resets = reinterpret_cast<const bool*>(resets);
    p.x = layer ? y.second : c.x;
    const pybind11::object input = std::move(y.first);
    y = !c.step ? make(x, c, {c.T, c.B, c.D * c.R}) : save ? state(c.R) : h_n;
    p.y = y.second;
    p.hx = part(c.hx, layer * c.state(c.R));
    p.cx = part(c.cx, layer * c.state(c.H));
    p.h_n = part(h_n.second, layer * c.state(c.R));
    p.c_n = part(c_n.second, layer * c.state(c.H));
    p.gates = gates.second;
    p.cells = cells.second;
    if (stack) stack->lend(layer, p);
    const cpu::Kernels& kernels = stack ? stack->kernels() : cpu::kernels();
    const pybind11::gil_scoped_release unlocked;
    kernels.forward(p, threads());
  }
  pybind11::list results;
  for (const auto& result : {y, h_n, c_n, gates, cells})
    if (result.first) results.append(result.first);
  return std::move(results);
}

// The gradient of x, hx, cx and each weight, None where it is not wanted. Of a step there is no dy.
inline pybind11::object backward(const std::string& name, pybind11::handle dy, pybind11::handle dh_n,
                                 pybind11::handle dc_n, pybind11::handle x, pybind11::handle y, pybind11::handle hx,
                                 pybind11::handle cx, const pybind11::sequence& saved,
                                 const pybind11::sequence& weights, const pybind11::sequence& wanted) {
  const std::optional<Call> given = call(name, x, hx, cx, weights, 1);
  if (!given) return pybind11::none();
  const Call& c = *given;
  bool fit = true;
  const auto read = [&](pybind11::handle tensor, Sizes sizes) -> const void* {
    if (tensor.is_none()) return nullptr;
    const std::optional<View> v = view(tensor);
    fit = fit && v && v->is(c.scalar, sizes);
    return fit ? v->data : nullptr;
  };
  const auto read_state = [&](pybind11::handle tensor, int64_t width) {
    return c.step ? read(tensor, {c.B, width}) : read(tensor, {c.D, c.B, width});
  };
  const auto read_output = [&](pybind11::handle tensor) {
    return c.step ? read(tensor, {c.B, c.R}) : read(tensor, {c.T, c.B, c.D * c.R});
  };
  BackwardParams p{};
  static_cast<Problem&>(p) = c.problem(0);
  p.x = c.x;
  p.hx = c.hx;
  p.cx = c.cx;
  p.y = read_output(y);
  p.dy = read_output(dy);
  p.dh_n = read_state(dh_n, c.R);
  p.dc_n = read_state(dc_n, c.H);
  const size_t expected = (c.cell.saved ? 1 : 0) + (c.cell.has_cell ? 1 : 0), count = 3 + weights.size();
  if (saved.size() != expected || wanted.size() != count) return pybind11::none();
  if (c.cell.saved) p.gates = read(pybind11::object(saved[0]), {c.D, c.T * c.B, c.cell.saved * c.H});
  if (c.cell.has_cell) p.cells = read(pybind11::object(saved[1]), {c.D, c.T * c.B, c.H});
  if (!fit) return pybind11::none();
  pybind11::list results(count);
  std::vector<void*> places(count);
  const auto want = [&](size_t i, Sizes sizes) {
    pybind11::object result = pybind11::none();
    if (pybind11::object(wanted[i]).ptr() == Py_True) std::tie(result, places[i]) = make(x, c, sizes);
    results[i] = result;
    return places[i];
  };
  p.dx = c.step ? want(0, {c.B, c.I}) : want(0, {c.T, c.B, c.I});
  p.dhx = c.step ? want(1, {c.B, c.R}) : want(1, {c.D, c.B, c.R});
  p.dcx = c.step ? want(2, {c.B, c.H}) : want(2, {c.D, c.B, c.H});
  const int64_t each = weights.size() / c.D, sums = c.cell.gates * c.H;
  for (int64_t d = 0; d < c.D; ++d) {
    const size_t i = 3 + d * each;
    p.gradients[d].w_ih = want(i, {sums, c.I});
    p.gradients[d].w_hh = want(i + 1, {sums, c.R});
    if (each >= 4) {
      p.gradients[d].b_ih = want(i + 2, {sums});
      p.gradients[d].b_hh = want(i + 3, {sums});
    }
    if (c.projected) p.gradients[d].w_hr = want(i + each - 1, {c.R, c.H});
  }
  {
    const pybind11::gil_scoped_release unlocked;
    cpu::kernels().backward(p, threads());
  }
  return std::move(results);
}

}  // namespace fusedrnn::binding::direct
