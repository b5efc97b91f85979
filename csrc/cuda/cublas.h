// The products on cuBLAS.
#pragma once

#include "blas.h"

namespace fusedrnn::cuda {

class CublasBlas final : public Blas {
 public:
  // get_handle gives a cublasHandle_t of torch's, with its stream and workspace, and is called by the first product; the handle's
  // math mode is put back at the end. tf32: whether float32 factors may be rounded to TF32.
  CublasBlas(void* (*get_handle)(), bool tf32) : get_handle_(get_handle), tf32_(tf32) {}
  ~CublasBlas();
  CublasBlas(const CublasBlas&) = delete;
  CublasBlas& operator=(const CublasBlas&) = delete;

  void multiply(const Product& product) override;

 private:
  void begin();

  void* (*const get_handle_)();
  const bool tf32_;
  void* handle_ = nullptr;
  int math_mode_ = 0;
};

}  // namespace fusedrnn::cuda
