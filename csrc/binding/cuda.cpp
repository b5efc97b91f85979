// The operators' implementations on NVIDIA GPUs: an extension of its own, so that the one for CPUs needs no CUDA.
// Importing it registers them; _C, which states their schemas, must be loaded before.
#include "cuda/cuda.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "arguments.h"
#include "cuda/cublas.h"

namespace {

namespace py = pybind11;
using namespace fusedrnn;
using namespace fusedrnn::binding;

void set_types(Problem& p, ScalarType x, ScalarType states, ScalarType weights) {
  expect_dtype("hx", x, states);
  expect_dtype("weights", x, weights);
  switch (x) {
    case ScalarType::Float:
      p.scalar = ScalarKind::float32;
      break;
    case ScalarType::Double:
      p.scalar = ScalarKind::float64;
      break;
    case ScalarType::Half:
      p.scalar = ScalarKind::float16;
      break;
    case ScalarType::BFloat16:
      p.scalar = ScalarKind::bfloat16;
      break;
    default:
      fail("expected float32, float64, float16 or bfloat16 tensors, got ", dtype_name(x));
  }
}

// Besides the step schedule, which runs anything.
std::atomic<unsigned> allowed_schedules{cuda::all_schedules};

cuda::Limits limits_of(int device) {
  cuda::Limits limits = cuda::limits_of(device);
  limits.schedules &= allowed_schedules;
  return limits;
}

constexpr Backend backend{&set_types, &new_empty, false};

void* cublas_handle() {
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  return handle;
}

// On torch's current stream and cuBLAS handle of x's device; the workspace is torch's to use again as soon as what is
// enqueued here has run.
template <class Params>
void run(void (*pass)(const Params&, const cuda::Context&), const Params& p, const Tensor& x, bool backward,
         bool tf32) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  cuda::use_device(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  cuda::CublasBlas blas(&cublas_handle, tf32);
  cuda::Context context{stream, &blas, nullptr, limits_of(x.get_device_index()), tf32};
  MaybeTensor workspace;
  if (const int64_t bytes = cuda::workspace_bytes(p, backward, context)) {
    workspace = new_empty_of(x, {bytes}, aoti_torch_dtype_uint8());
    context.workspace = workspace->mutable_data_ptr();
  }
  pass(p, context);
}

Tensors forward_on_gpu(std::string cell, Tensor x, Tensor hx, MaybeTensor cx, Tensors weights, MaybeTensor batch_sizes,
                       MaybeTensor lengths, MaybeTensor resets, bool save, bool tf32) {
  return forward(backend, cell, x, hx, cx, weights, batch_sizes, lengths, resets, save,
                 [&](const ForwardParams& p) { run(&cuda::forward, p, x, false, tf32); });
}

Tensors backward_on_gpu(std::string cell, MaybeTensor dy, MaybeTensor dh_n, MaybeTensor dc_n, Tensor x, Tensor y,
                        Tensor hx, MaybeTensor cx, Tensors saved, Tensors weights, MaybeTensor batch_sizes,
                        MaybeTensor lengths, MaybeTensor resets, std::vector<bool> wanted, bool tf32,
                        MaybeTensor dcells) {
  return backward(backend, cell, dy, dh_n, dc_n, x, y, hx, cx, saved, weights, batch_sizes, lengths, resets, wanted,
                  dcells, [&](const BackwardParams& p) { run(&cuda::backward, p, x, true, tf32); });
}

std::string schedule(const std::string& cell, const std::string& dtype, int64_t T, int64_t B, int64_t H, int directions,
                     bool has_lengths, int device, bool tf32, bool backward) {
  static const int64_t some_lengths = 0;
  Problem p{};
  p.cell = cell_info(cell).kind;
  p.scalar = dtype == "float32"   ? ScalarKind::float32
             : dtype == "float64" ? ScalarKind::float64
             : dtype == "float16" ? ScalarKind::float16
                                  : ScalarKind::bfloat16;
  p.sequence.T = T;
  p.sequence.B = B;
  p.sequence.lengths = has_lengths ? &some_lengths : nullptr;
  p.H = H;
  p.directions = directions;
  const torch::stable::accelerator::DeviceGuard guard(device);
  return cuda::schedule(p, limits_of(device), tf32, backward);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) {
  m.impl("recurrence_forward", TORCH_BOX(&forward_on_gpu));
  m.impl("recurrence_backward", TORCH_BOX(&backward_on_gpu));
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fusedrnn's GPU kernels: importing it gives torch.ops.fusedrnn its implementations for CUDA tensors.";
  m.def(
      "use_schedules", [](unsigned which) { allowed_schedules = which; }, py::arg("which"),
      "Which schedules may run besides the step schedule (block 1, cluster 2, grid 4, split grid 8, added up).");
  m.def("schedule", &schedule, py::arg("cell"), py::arg("dtype"), py::arg("T"), py::arg("B"), py::arg("H"),
        py::arg("directions"), py::arg("has_lengths"), py::arg("device"), py::arg("tf32"), py::arg("backward"),
        "How the time steps of a layer would be run.");
  m.def(
      "architectures", [] { return std::string(FUSEDRNN_CUDA_ARCHITECTURES); }, "What the kernels were compiled for.");
}
