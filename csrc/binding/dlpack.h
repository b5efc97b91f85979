// Tensors as Python has them, read through DLPack's C exchange interface (github.com/dmlc/dlpack, version 1.x), which torch
// offers from 2.10 on: the parts of it that are used, as its ABI fixes them. torch's own copy of the header is closed to
// users of the stable ABI.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "params.h"

namespace fusedrnn::binding {

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t rank;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *sizes, *strides;
  uint64_t byte_offset;
};

struct DLPackExchange {
  uint32_t major, minor;
  void* previous;
  void *allocate, *managed_from_object, *object_from_managed;
  int (*tensor_from_object)(void* object, DLTensor* out);  // borrows; -1 with an error of Python's
};

// What torch's Python side offers, given once by use_tensors.
struct Torch {
  const DLPackExchange* exchange = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
};

inline Torch torch_types;

// False where this torch has no interface that can be used.
inline bool use_tensors(const pybind11::type& tensor, const pybind11::type& parameter) {
  const pybind11::object capsule = pybind11::getattr(tensor, "__dlpack_c_exchange_api__", pybind11::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
  const auto* exchange = static_cast<DLPackExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (exchange->major != 1 || !exchange->tensor_from_object) return false;
  torch_types = {exchange, reinterpret_cast<PyTypeObject*>(tensor.ptr()),
                 reinterpret_cast<PyTypeObject*>(parameter.ptr())};
  return true;
}

// A dense tensor on the host, as long as its owner leaves it as it is.
struct View {
  void* data;
  int64_t rank;
  const int64_t* sizes;
  ScalarKind scalar;

  bool is(ScalarKind wanted, std::initializer_list<int64_t> shape) const {
    return scalar == wanted && std::equal(shape.begin(), shape.end(), sizes, sizes + rank);
  }
};

// Nothing for what is empty, or lies elsewhere or not densely, or is of another dtype, or no torch.Tensor or
// torch.nn.Parameter itself: a subclass has a say in what is done with it.
inline std::optional<View> view(pybind11::handle object) {
  if (Py_TYPE(object.ptr()) != torch_types.tensor && Py_TYPE(object.ptr()) != torch_types.parameter) return {};
  DLTensor t;
  if (torch_types.exchange->tensor_from_object(object.ptr(), &t)) {
    PyErr_Clear();
    return {};
  }
  if (!t.data || t.device_type != 1 || t.rank == 0) return {};  // 1: the host
  int64_t stride = 1;
  for (int32_t i = t.rank - 1; i >= 0; --i) {
    // The last stride counts even where there is one element only: an imaginary part, whose sign may still be to change,
    // is told by it.
    if (t.strides[i] != stride && (t.sizes[i] != 1 || i == t.rank - 1)) return {};
    stride *= t.sizes[i];
  }
  void* const data = static_cast<char*>(t.data) + t.byte_offset;
  constexpr uint8_t is_float = 2, is_bfloat = 4;
  if (t.code == is_float && t.bits == 32) return View{data, t.rank, t.sizes, ScalarKind::float32};
  if (t.code == is_float && t.bits == 64) return View{data, t.rank, t.sizes, ScalarKind::float64};
  if (t.code == is_bfloat && t.bits == 16) return View{data, t.rank, t.sizes, ScalarKind::bfloat16};
  return {};
}

}  // namespace fusedrnn::binding
