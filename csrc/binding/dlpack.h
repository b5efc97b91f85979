// Tensors as Python has them, read through DLPack's C exchange interface (github.com/dmlc/dlpack, version 1.x), which torch
// offers from 2.10 on: the parts of it that are used, as its ABI fixes them. torch's own copy of the header is closed to
// users of the stable ABI.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <utility>

#include "cpu/cpu.h"
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

constexpr int32_t on_host = 1;                  // DLTensor::device_type
constexpr uint8_t is_float = 2, is_bfloat = 4;  // DLTensor::code

// A tensor whose memory has an owner.
struct DLManagedTensor {
  uint32_t major, minor;
  void* context;
  void (*deleter)(DLManagedTensor* self);
  uint64_t flags;
  DLTensor tensor;
};

struct DLPackExchange {
  uint32_t major, minor;
  void* previous;
  void *allocate, *managed_from_object;
  int (*object_from_managed)(DLManagedTensor* tensor, void** object);  // takes it over; -1 with an error of Python's
  int (*tensor_from_object)(void* object, DLTensor* out);              // borrows; the same
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
  if (exchange->major != 1 || !exchange->tensor_from_object || !exchange->object_from_managed) return false;
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
  if (!t.data || t.device_type != on_host || t.rank == 0) return {};
  // Of a lone element every stride counts: an imaginary part, whose sign may still be to change, is told by one of 2.
  const bool lone = std::all_of(t.sizes, t.sizes + t.rank, [](int64_t size) { return size == 1; });
  int64_t stride = 1;
  for (int32_t i = t.rank - 1; i >= 0; --i) {
    if (t.strides[i] != stride && (t.sizes[i] != 1 || lone)) return {};
    stride *= t.sizes[i];
  }
  void* const data = static_cast<char*>(t.data) + t.byte_offset;
  if (t.code == is_float && t.bits == 32) return View{data, t.rank, t.sizes, ScalarKind::float32};
  if (t.code == is_float && t.bits == 64) return View{data, t.rank, t.sizes, ScalarKind::float64};
  if (t.code == is_bfloat && t.bits == 16) return View{data, t.rank, t.sizes, ScalarKind::bfloat16};
  return {};
}

// A new tensor of 3 dimensions whose memory is the kernels' (cpu::borrow) and goes back to them with it: large
// ones would have fresh pages every time, which the system clears first. Throws Python's error.
inline std::pair<pybind11::object, void*> borrowed(ScalarKind scalar, std::initializer_list<int64_t> shape) {
  struct Borrowed {
    DLManagedTensor managed{1, 0, this, [](DLManagedTensor* self) { delete static_cast<Borrowed*>(self->context); }};
    int64_t sizes[3], strides[3];
    size_t bytes;
    ~Borrowed() {
      if (managed.tensor.data) cpu::give_back(managed.tensor.data, bytes);
    }
  };
  auto own = std::make_unique<Borrowed>();
  std::copy(shape.begin(), shape.end(), own->sizes);
  own->strides[2] = 1;
  own->strides[1] = own->sizes[2];
  own->strides[0] = own->sizes[1] * own->sizes[2];
  const int size = scalar == ScalarKind::float64 ? 8 : scalar == ScalarKind::float32 ? 4 : 2;
  const uint8_t code = scalar == ScalarKind::bfloat16 ? is_bfloat : is_float;
  own->bytes = own->sizes[0] * own->strides[0] * size;
  void* const data = cpu::borrow(own->bytes);
  own->managed.tensor = {data, on_host, 0, 3, code, static_cast<uint8_t>(8 * size), 1, own->sizes, own->strides, 0};
  void* object = nullptr;
  // Where this fails nobody says who has the memory: better lost than freed twice.
  if (torch_types.exchange->object_from_managed(&own.release()->managed, &object)) throw pybind11::error_already_set();
  return {pybind11::reinterpret_steal<pybind11::object>(static_cast<PyObject*>(object)), data};
}

}  // namespace fusedrnn::binding
