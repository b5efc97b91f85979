// From torch's tensors to params.h: what is checked, what is made contiguous, and which results are made. Operators on
// any device go through here. Only files of this folder know torch, and only through its stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "params.h"

namespace fusedrnn::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

// What differs between devices.
struct Backend {
  // Says which kernels take an input, states and weights of these dtypes; fails where there are none.
  void (*set_types)(Problem& p, ScalarType x, ScalarType states, ScalarType weights);
  // An uninitialised tensor of another's dtype and device.
  Tensor (*make)(const Tensor& like, const std::vector<int64_t>& sizes);
  // Whether the kernels run where this code does, and want to know a packed batch's lengths. On a device, lengths
  // cannot be looked at without waiting for it: its kernels stop at T whatever they are.
  bool on_host;
};

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
inline CellInfo info_of(CellKind kind) {
  return {kind, Cell::gates, Cell::sums, Cell::saved, Cell::has_cell};
}

inline CellInfo cell_info(const std::string& name) {
  if (name == "rnn_tanh") return info_of<RNN<false>>(CellKind::rnn_tanh);
  if (name == "rnn_relu") return info_of<RNN<true>>(CellKind::rnn_relu);
  if (name == "lstm") return info_of<LSTM>(CellKind::lstm);
  if (name == "gru") return info_of<GRU>(CellKind::gru);
  fail("expected cell to be rnn_tanh, rnn_relu, lstm or gru, got ", name);
}

inline std::string to_string(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline std::vector<int64_t> shape(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return sizes;
}

inline const char* dtype_name(ScalarType dtype) {
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

// torch::stable::new_empty, but by its own entry point: the general one looks the operator up by name, which takes a µs a tensor.
inline Tensor new_empty_of(const Tensor& like, const std::vector<int64_t>& sizes, std::optional<int32_t> dtype) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()),
                                                   dtype ? &*dtype : nullptr, nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes) {
  return new_empty_of(like, sizes, std::nullopt);
}

inline void expect_dtype(const char* name, ScalarType dtype, ScalarType found) {
  FUSEDRNN_EXPECT(found == dtype, "expected ", name, " of dtype ", dtype_name(dtype), ", got ", dtype_name(found));
}

// Checks t, which lies where `like` does, and makes it contiguous where it is not.
template <class Sizes = std::initializer_list<int64_t>>
void check(Tensor& t, const char* name, const Tensor& like, ScalarType dtype, const Sizes& sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (int64_t size : sizes) same = same && t.size(i++) == size;
  FUSEDRNN_EXPECT(same, "expected ", name, " of shape ", to_string({sizes.begin(), sizes.end()}), ", got ",
                  to_string(shape(t)));
  expect_dtype(name, dtype, t.scalar_type());
  FUSEDRNN_EXPECT(t.device() == like.device(), "expected ", name, " on the device of x, got it elsewhere");
  if (!t.is_contiguous()) t = torch::stable::contiguous(t);
}

inline const void* data(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes = shape(x);
  sizes.back() = last;
  return sizes;
}

// The arrays that the Sequence of a packed batch of at most B rows points to, made from the rows of one step after the other.
struct PackedRows {
  std::vector<int64_t> offsets{0}, lengths;
  int64_t B;

  // Without lengths where a device's kernels are to run, who have no use for them.
  explicit PackedRows(int64_t B, bool with_lengths = true) : lengths(with_lengths ? B : 0), B(B) {}

  void add(int64_t size) {
    const int64_t t = static_cast<int64_t>(offsets.size()) - 1, most = t ? offsets[t] - offsets[t - 1] : B;
    FUSEDRNN_EXPECT(size > 0 && size <= most, "expected batch_sizes to fall from at most ", B, " to at least 1, got ",
                    size, " at step ", t);
    offsets.push_back(offsets.back() + size);
    for (int64_t b = 0; !lengths.empty() && b < size; ++b) lengths[b] = t + 1;
  }
  void set(Sequence& sequence) const {
    sequence.offsets = offsets.data();
    if (!lengths.empty()) sequence.lengths = lengths.data();
  }
};

// Where the batch's rows are, with the arrays that a Sequence points to. x is [T, B, ...], or [N, ...] with
// batch_sizes [T], which are on the host.
class SequenceStorage {
 public:
  Sequence sequence{};

  SequenceStorage(const Backend& backend, const Tensor& x, int64_t B, MaybeTensor& batch_sizes,
                  MaybeTensor& row_lengths, MaybeTensor& resets)
      : packed_(batch_sizes ? B : 0, backend.on_host) {
    FUSEDRNN_EXPECT(!batch_sizes || batch_sizes->dim() == 1, "expected batch_sizes of shape [steps], got ",
                    to_string(shape(*batch_sizes)));
    sequence.T = batch_sizes ? batch_sizes->size(0) : x.size(0);
    sequence.B = B;
    if (batch_sizes) {
      FUSEDRNN_EXPECT(!row_lengths, "expected lengths or batch_sizes, got both");
      FUSEDRNN_EXPECT(!batch_sizes->is_cuda(), "expected batch_sizes on the CPU");
      check(*batch_sizes, "batch_sizes", *batch_sizes, ScalarType::Long, {sequence.T});
      const int64_t* sizes = batch_sizes->const_data_ptr<int64_t>();
      for (int64_t t = 0; t < sequence.T; ++t) packed_.add(sizes[t]);
      FUSEDRNN_EXPECT(packed_.offsets.back() == x.size(0), "expected x of ", packed_.offsets.back(),
                      " rows, the sum of batch_sizes, got ", x.size(0));
      packed_.set(sequence);
    } else {
      FUSEDRNN_EXPECT(x.size(1) == B, "expected x with a batch of ", B, ", got ", x.size(1));
      if (row_lengths) {
        check(*row_lengths, "lengths", x, ScalarType::Long, {B});
        sequence.lengths = row_lengths->const_data_ptr<int64_t>();
        for (int64_t b = 0; backend.on_host && b < B; ++b)
          FUSEDRNN_EXPECT(sequence.lengths[b] >= 0 && sequence.lengths[b] <= sequence.T,
                          "expected lengths between 0 and ", sequence.T, ", got ", sequence.lengths[b]);
      }
    }
    if (resets) {
      std::vector<int64_t> leading = shape(x);
      leading.pop_back();
      check(*resets, "resets", x, ScalarType::Bool, leading);
      sequence.resets = static_cast<const bool*>(resets->const_data_ptr());
    }
  }

  int64_t rows() const { return sequence.start(sequence.T); }

 private:
  PackedRows packed_;
};

// How many weights each of `directions` directions has.
inline int64_t weights_each(const Tensors& weights, int64_t directions) {
  const int64_t count = static_cast<int64_t>(weights.size()), each = count / directions;
  FUSEDRNN_EXPECT(each >= 2 && each <= 5 && each * directions == count,
                  "expected 2 weights (4 with bias, and 1 more with a projection) for each of ", directions,
                  " directions, got ", count);
  return each;
}

inline Problem make_problem(const CellInfo& cell, const Tensor& x, Tensor& hx, MaybeTensor& cx, const Tensors& weights,
                            const Sequence& sequence) {
  FUSEDRNN_EXPECT(hx.size(0) == 1 || hx.size(0) == 2, "expected hx of 1 or 2 directions, got ", hx.size(0));
  check(hx, "hx", x, hx.scalar_type(), shape(hx));
  FUSEDRNN_EXPECT(cx.has_value() == cell.has_cell, "expected cx for lstm and for no other cell");
  Problem p{};
  p.cell = cell.kind;
  p.sequence = sequence;
  p.H = hx.size(2);
  p.directions = static_cast<int>(hx.size(0));
  if (weights_each(weights, p.directions) % 2) {
    FUSEDRNN_EXPECT(cell.has_cell, "expected a projection's weights for lstm and for no other cell");
    p.projection = p.H;
    p.H = cx->dim() ? cx->size(cx->dim() - 1) : 0;
    FUSEDRNN_EXPECT(p.projection <= p.H, "expected a projection of ", p.H, " units to at most as many, got ",
                    p.projection);
  }
  if (cx) check(*cx, "cx", x, cx->scalar_type(), {hx.size(0), hx.size(1), p.H});
  return p;
}

// Weights per direction: w_ih, w_hh, with bias b_ih and b_hh, and with a projection w_hr, all of one dtype. x gives I.
inline void set_weights(const Backend& backend, Problem& p, const CellInfo& cell, const Tensor& x, const Tensor& hx,
                        const MaybeTensor& cx, Tensors& weights) {
  const int64_t D = p.directions, each = weights_each(weights, D);
  FUSEDRNN_EXPECT(each % 2 == (p.projection ? 1 : 0), "expected 2 weights (4 with bias) without a projection, got ",
                  each);
  FUSEDRNN_EXPECT(!p.projection || backend.on_host, "expected no projection on a GPU");
  p.I = x.size(x.dim() - 1);
  const ScalarType dtype = weights[0].scalar_type();
  backend.set_types(p, x.scalar_type(), hx.scalar_type(), dtype);
  if (cx) expect_dtype("cx", hx.scalar_type(), cx->scalar_type());
  for (int64_t d = 0; d < D; ++d) {
    Tensor* w = &weights[d * each];
    check(w[0], "w_ih", x, dtype, {cell.gates * p.H, p.I});
    check(w[1], "w_hh", x, dtype, {cell.gates * p.H, p.R()});
    p.weights[d].w_ih = w[0].const_data_ptr();
    p.weights[d].w_hh = w[1].const_data_ptr();
    if (each >= 4) {
      check(w[2], "b_ih", x, dtype, {cell.gates * p.H});
      check(w[3], "b_hh", x, dtype, {cell.gates * p.H});
      p.weights[d].b_ih = w[2].const_data_ptr();
      p.weights[d].b_hh = w[3].const_data_ptr();
    }
    if (p.projection) {
      check(w[each - 1], "w_hr", x, dtype, {p.projection, p.H});
      p.weights[d].w_hr = w[each - 1].const_data_ptr();
    }
  }
}

inline void expect_ranks(const Tensor& x, const Tensor& hx, const MaybeTensor& batch_sizes) {
  FUSEDRNN_EXPECT(hx.dim() == 3, "expected hx of shape [directions, batch, hidden], got ", to_string(shape(hx)));
  FUSEDRNN_EXPECT(x.dim() == (batch_sizes ? 2 : 3), "expected x [T, B, I], or [N, I] with batch_sizes, got ",
                  to_string(shape(x)));
}

// Calls run(ForwardParams) and returns the results: y, h_n, c_n (lstm), and with save what backward asks for as `saved`:
// gates (lstm, gru), cells (lstm).
template <class Run>
Tensors forward(const Backend& backend, const std::string& cell_name, Tensor x, Tensor hx, MaybeTensor cx,
                Tensors weights, MaybeTensor batch_sizes, MaybeTensor lengths, MaybeTensor resets, bool save,
                const Run& run) {
  const CellInfo cell = cell_info(cell_name);
  expect_ranks(x, hx, batch_sizes);
  check(x, "x", x, x.scalar_type(), shape(x));
  const SequenceStorage storage(backend, x, hx.size(1), batch_sizes, lengths, resets);
  ForwardParams p{};
  static_cast<Problem&>(p) = make_problem(cell, x, hx, cx, weights, storage.sequence);
  set_weights(backend, p, cell, x, hx, cx, weights);
  const int64_t D = p.directions, N = storage.rows();
  Tensors results{backend.make(x, with_last(x, D * p.R())), backend.make(hx, shape(hx))};
  p.x = x.const_data_ptr();
  p.hx = hx.const_data_ptr();
  p.cx = data(cx);
  p.y = results[0].mutable_data_ptr();
  p.h_n = results[1].mutable_data_ptr();
  const auto add = [&](const Tensor& like, const std::vector<int64_t>& sizes) {
    results.push_back(backend.make(like, sizes));
    return results.back().mutable_data_ptr();
  };
  if (cell.has_cell) p.c_n = add(hx, shape(*cx));
  if (save && cell.saved) p.gates = add(weights[0], {D, N, cell.saved * p.H});
  if (save && cell.has_cell) p.cells = add(weights[0], {D, N, p.H});
  run(p);
  return results;
}

// Calls run(BackwardParams) and returns the gradients of x, hx, cx (lstm) and every weight, of those that are wanted.
template <class Run>
Tensors backward(const Backend& backend, const std::string& cell_name, MaybeTensor dy, MaybeTensor dh_n,
                 MaybeTensor dc_n, Tensor x, Tensor y, Tensor hx, MaybeTensor cx, Tensors saved, Tensors weights,
                 MaybeTensor batch_sizes, MaybeTensor lengths, MaybeTensor resets, const std::vector<bool>& wanted,
                 MaybeTensor dcells, const Run& run) {
  const CellInfo cell = cell_info(cell_name);
  expect_ranks(x, hx, batch_sizes);
  const ScalarType dtype = x.scalar_type();
  check(x, "x", x, dtype, shape(x));
  const SequenceStorage storage(backend, x, hx.size(1), batch_sizes, lengths, resets);
  BackwardParams p{};
  static_cast<Problem&>(p) = make_problem(cell, x, hx, cx, weights, storage.sequence);
  set_weights(backend, p, cell, x, hx, cx, weights);
  const int64_t D = p.directions, H = p.H, N = storage.rows();
  check(y, "y", x, dtype, with_last(x, D * p.R()));
  const ScalarType saved_dtype = weights[0].scalar_type();
  const size_t saved_count = (cell.saved ? 1 : 0) + (cell.has_cell ? 1 : 0);
  FUSEDRNN_EXPECT(saved.size() == saved_count, "expected ", saved_count, " saved tensors, got ", saved.size());
  if (cell.saved) {
    check(saved[0], "gates", x, saved_dtype, {D, N, cell.saved * H});
    p.gates = saved[0].const_data_ptr();
  }
  if (cell.has_cell) {
    check(saved[1], "cells", x, saved_dtype, {D, N, H});
    p.cells = saved[1].const_data_ptr();
  }
  if (dy) check(*dy, "dy", x, dtype, shape(y));
  if (dh_n) check(*dh_n, "dh_n", x, hx.scalar_type(), shape(hx));
  FUSEDRNN_EXPECT(!dc_n || cell.has_cell, "expected dc_n for lstm and for no other cell");
  if (dc_n) check(*dc_n, "dc_n", x, hx.scalar_type(), shape(*cx));
  FUSEDRNN_EXPECT(!dcells || cell.has_cell, "expected dcells for lstm and for no other cell");
  if (dcells) check(*dcells, "dcells", x, saved_dtype, {D, N, H});
  const size_t states = cell.has_cell ? 3 : 2;  // x, hx and perhaps cx come before the weights
  FUSEDRNN_EXPECT(wanted.size() == states + weights.size(), "expected wanted to hold ", states + weights.size(),
                  " values, got ", wanted.size());
  Tensors results;
  const auto result = [&](size_t i, const Tensor& like) -> void* {
    if (!wanted[i]) return nullptr;
    results.push_back(backend.make(like, shape(like)));
    return results.back().mutable_data_ptr();
  };
  p.x = x.const_data_ptr();
  p.y = y.const_data_ptr();
  p.hx = hx.const_data_ptr();
  p.cx = data(cx);
  p.dy = data(dy);
  p.dh_n = data(dh_n);
  p.dc_n = data(dc_n);
  p.dcells = data(dcells);
  p.dx = result(0, x);
  p.dhx = result(1, hx);
  if (cx) p.dcx = result(2, *cx);
  const size_t each = weights.size() / D;
  for (int64_t d = 0; d < D; ++d) {
    const size_t i = d * each;
    p.gradients[d].w_ih = result(states + i, weights[i]);
    p.gradients[d].w_hh = result(states + i + 1, weights[i + 1]);
    if (each >= 4) {
      p.gradients[d].b_ih = result(states + i + 2, weights[i + 2]);
      p.gradients[d].b_hh = result(states + i + 3, weights[i + 3]);
    }
    if (p.projection) p.gradients[d].w_hr = result(states + i + each - 1, weights[i + each - 1]);
  }
  run(p);
  return results;
}

}  // namespace fusedrnn::binding
