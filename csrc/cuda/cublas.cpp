#include "cublas.h"

#include <cublas_v2.h>

#include <stdexcept>
#include <string>

namespace fusedrnn::cuda {
namespace {

void expect_success(cublasStatus_t status) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string("fusedrnn: cuBLAS says: ") + cublasGetStatusString(status));
}

cudaDataType type(Element element) {
  switch (element) {
    case Element::float16:
      return CUDA_R_16F;
    case Element::bfloat16:
      return CUDA_R_16BF;
    case Element::float32:
      return CUDA_R_32F;
    default:
      return CUDA_R_64F;
  }
}

}  // namespace

void CublasBlas::begin() {
  void* const handle = get_handle_();
  const auto cublas = static_cast<cublasHandle_t>(handle);
  cublasMath_t mode;
  expect_success(cublasGetMathMode(cublas, &mode));
  math_mode_ = mode;
  handle_ = handle;
  // No partial sum in half precision; torch's own mode is about its matmul, not about its RNNs.
  expect_success(cublasSetMathMode(
      cublas, static_cast<cublasMath_t>(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
}

CublasBlas::~CublasBlas() {
  if (handle_) cublasSetMathMode(static_cast<cublasHandle_t>(handle_), static_cast<cublasMath_t>(math_mode_));
}

// cuBLAS counts columns first: a row-major c = a·b is its cᵀ = bᵀ·aᵀ, on the same memory.
void CublasBlas::multiply(const Product& p) {
  if (!handle_) begin();
  const double one = 1, beta = p.accumulate ? 1 : 0;
  const float one_float = 1, beta_float = static_cast<float>(beta);
  const bool is_double = p.in == Element::float64;
  const cublasComputeType_t compute = is_double                           ? CUBLAS_COMPUTE_64F
                                      : p.in == Element::float32 && tf32_ ? CUBLAS_COMPUTE_32F_FAST_TF32
                                                                          : CUBLAS_COMPUTE_32F;
  const void* const scales[] = {is_double ? static_cast<const void*>(&one) : &one_float,
                                is_double ? static_cast<const void*>(&beta) : &beta_float};
  const auto operation = [](const Factor& f) { return f.transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
  const auto cublas = static_cast<cublasHandle_t>(handle_);
  if (p.count == 1)
    expect_success(cublasGemmEx_64(cublas, operation(p.b), operation(p.a), p.columns, p.rows, p.inner, scales[0],
                                   p.b.data, type(p.in), p.b.ld, p.a.data, type(p.in), p.a.ld, scales[1], p.c,
                                   type(p.out), p.ldc, compute, CUBLAS_GEMM_DEFAULT));
  else
    expect_success(cublasGemmStridedBatchedEx_64(cublas, operation(p.b), operation(p.a), p.columns, p.rows, p.inner,
                                                 scales[0], p.b.data, type(p.in), p.b.ld, p.b.stride, p.a.data,
                                                 type(p.in), p.a.ld, p.a.stride, scales[1], p.c, type(p.out), p.ldc,
                                                 p.stride_c, p.count, compute, CUBLAS_GEMM_DEFAULT));
}

}  // namespace fusedrnn::cuda
