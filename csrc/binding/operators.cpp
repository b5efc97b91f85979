// The operators and their implementations on CPUs.
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "cpu/cpu.h"
#include "threads.h"

namespace fusedrnn::binding {

std::atomic<bool> pool_runs_at_once{false};

cpu::Threads threads() {
  const int64_t count = pool_runs_at_once ? torch::stable::get_num_threads() : 1;
  return {count, [](int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
          }};
}

}  // namespace fusedrnn::binding

namespace {

using namespace fusedrnn;
using namespace fusedrnn::binding;

Tensor make(const Tensor& like, const std::vector<int64_t>& sizes) {
  const Tensor tensor = new_empty(like, sizes);
  cpu::prefer_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

// Beside bfloat16 weights x and the states may be float32, each for themselves.
void set_types(Problem& p, ScalarType x, ScalarType states, ScalarType weights) {
  const auto either = [](ScalarType dtype) { return dtype == ScalarType::Float || dtype == ScalarType::BFloat16; };
  if (weights == ScalarType::BFloat16 && either(x) && either(states)) {
    p.scalar = ScalarKind::float32_of_bfloat16;
    p.narrow_sequence = x == weights;
    p.narrow_states = states == weights;
    return;
  }
  FUSEDRNN_EXPECT(x == ScalarType::Float || x == ScalarType::Double || x == ScalarType::BFloat16,
                  "expected float32, float64 or bfloat16 tensors, got ", dtype_name(x));
  expect_dtype("hx", x, states);
  expect_dtype("weights", x, weights);
  p.scalar = x == ScalarType::Float ? ScalarKind::float32 : ScalarKind::float64;
}

constexpr Backend backend{&set_types, &make, true};

Tensors forward_on_cpu(std::string cell, Tensor x, Tensor hx, MaybeTensor cx, Tensors weights, MaybeTensor batch_sizes,
                       MaybeTensor lengths, MaybeTensor resets, bool save, bool) {
  return forward(backend, cell, x, hx, cx, weights, batch_sizes, lengths, resets, save,
                 [](const ForwardParams& p) { cpu::kernels().forward(p, threads()); });
}

Tensors backward_on_cpu(std::string cell, MaybeTensor dy, MaybeTensor dh_n, MaybeTensor dc_n, Tensor x, Tensor y,
                        Tensor hx, MaybeTensor cx, Tensors saved, Tensors weights, MaybeTensor batch_sizes,
                        MaybeTensor lengths, MaybeTensor resets, std::vector<bool> wanted, bool, MaybeTensor dcells) {
  return backward(backend, cell, dy, dh_n, dc_n, x, y, hx, cx, saved, weights, batch_sizes, lengths, resets, wanted,
                  dcells, [](const BackwardParams& p) { cpu::kernels().backward(p, threads()); });
}

Tensors step(std::string cell_name, Tensor x, Tensor hx, MaybeTensor cx, Tensors weights) {
  const CellInfo cell = cell_info(cell_name);
  FUSEDRNN_EXPECT(x.dim() == 2 && hx.dim() == 2 && hx.size(0) == x.size(0), "expected x [B, I] and hx [B, H], got ",
                  to_string(shape(x)), " and ", to_string(shape(hx)));
  FUSEDRNN_EXPECT(cx.has_value() == cell.has_cell, "expected cx for lstm and for no other cell");
  check(x, "x", x, x.scalar_type(), shape(x));
  check(hx, "hx", x, x.scalar_type(), shape(hx));
  if (cx) check(*cx, "cx", x, x.scalar_type(), shape(hx));
  ForwardParams p{};
  p.cell = cell.kind;
  p.sequence.T = 1;
  p.sequence.B = x.size(0);
  p.H = hx.size(1);
  p.directions = 1;
  set_weights(backend, p, cell, x, hx, cx, weights);
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

}  // namespace

// recurrence_forward gives y, h_n, c_n (lstm), and with save what backward asks for as `saved`: gates (lstm, gru), cells
// (lstm). recurrence_backward: the gradients of x, hx, cx (lstm) and every weight, of those that are wanted; dcells is the
// gradient of `cells`, where somebody used them. tf32: whether
// a GPU may round float32 factors to TF32. step is recurrence_forward for one step of [B, I], for inference: h and c
// (lstm).
STABLE_TORCH_LIBRARY(fusedrnn, m) {
  m.def(
      "recurrence_forward(str cell, Tensor x, Tensor hx, Tensor? cx, Tensor[] weights, Tensor? batch_sizes, "
      "Tensor? lengths, Tensor? resets, bool save, bool tf32=False) -> Tensor[]");
  m.def(
      "recurrence_backward(str cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor y, Tensor hx, "
      "Tensor? cx, Tensor[] saved, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, "
      "bool[] wanted, bool tf32=False, Tensor? dcells=None) -> Tensor[]");
  m.def("step(str cell, Tensor x, Tensor hx, Tensor? cx, Tensor[] weights) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("recurrence_forward", TORCH_BOX(&forward_on_cpu));
  m.impl("recurrence_backward", TORCH_BOX(&backward_on_cpu));
  m.impl("step", TORCH_BOX(&step));
}
