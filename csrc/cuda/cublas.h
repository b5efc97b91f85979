// The products on cuBLAS.
#pragma once

#include "blas.h"

namespace fusedrnn::cuda {

class CublasBlas final : public Blas {
 public:
  // A cublasHandle_t of torch's, with its stream and workspace; its math mode is put back at the end. tf32: whether
  // float32 factors may be rounded to TF32.
  CublasBlas(void* handle, bool tf32);
  ~CublasBlas();
  CublasBlas(const CublasBlas&) = delete;
  CublasBlas& operator=(const CublasBlas&) = delete;

  void multiply(const Product& product) override;

 private:
  void* const handle_;
  const bool tf32_;
  int math_mode_;
};

}  // namespace fusedrnn::cuda
