// The matrix products that the schedules call: cuBLAS on a GPU (blas.cpp), plain loops in tests.
#pragma once

#include <cstdint>

namespace fusedrnn::cuda {

enum class Element { float16, bfloat16, float32, float64 };

// Row-major, `ld` elements from row to row, the matrices of a batch `stride` elements apart. Where `transposed` holds,
// what lies in memory is the transpose of what is multiplied.
struct Factor {
  const void* data;
  int64_t ld, stride;
  bool transposed;
};

// c [rows, columns] = a [rows, inner] · b [inner, columns], or added to what c holds; `count` times. Accumulates in
// float32 (float64 for float64). No size is zero.
struct Product {
  int64_t rows, columns, inner;
  int count;
  Factor a, b;
  void* c;
  int64_t ldc, stride_c;
  Element in, out;
  bool accumulate;
};

class Blas {
 public:
  virtual void multiply(const Product& product) = 0;

 protected:
  ~Blas() = default;
};

}  // namespace fusedrnn::cuda
