// Torch's tensors as C++ reads them without linking torch: DLPack's table of C functions, which
// torch.Tensor carries (https://dmlc.github.io/dlpack/latest/c_api.html). It does not show the bit
// in which torch keeps a sign: the dispatcher resolves that for ops, `inference/images.py` for
// images, and who takes tensors past the dispatcher asks for it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/member.h"

namespace effnet {

// DLTensor of DLPack 1.x; shape and strides belong to the tensor.
struct TensorView {
  void* data;
  int32_t device_type, device_index;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;  // strides in elements
  uint64_t byte_offset;

  int dtype() const { return lanes == 1 ? code << 8 | bits : -1; }
};

// DLManagedTensorVersioned: a tensor whose memory `deleter` ends.
struct ManagedTensor {
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  TensorView tensor;
};

constexpr int32_t kCpuDevice = 1;  // kDLCPU
constexpr int kFloat16 = 2 << 8 | 16, kFloat32 = 2 << 8 | 32, kFloat64 = 2 << 8 | 64;
constexpr int kBFloat16 = 4 << 8 | 16;

class TensorReader {
 public:
  // type: torch.Tensor; parameter: nn.Parameter.
  TensorReader(const pybind11::handle& type, const pybind11::handle& parameter)
      : tensor_(pybind11::reinterpret_borrow<pybind11::object>(type)),
        parameter_(pybind11::reinterpret_borrow<pybind11::object>(parameter)),
        table_(tensor_.attr("__dlpack_c_exchange_api__")),
        is_negative_(type, "is_neg") {
    const auto* const found =
        static_cast<const Table*>(PyCapsule_GetPointer(table_.ptr(), "dlpack_exchange_api"));
    if (!found) throw pybind11::error_already_set();
    if (found->major != 1 || !found->read || !found->wrap)
      throw std::runtime_error("DLPack 1.x is needed");
    read_ = found->read;
    wrap_ = found->wrap;
  }
  // Whether the object is a tensor of no subclass.
  bool is_plain(PyObject* object) const {
    const auto* const type = reinterpret_cast<const PyObject*>(Py_TYPE(object));
    return type == tensor_.ptr() || type == parameter_.ptr();
  }
  // Describes a plain tensor; false and a Python error where it has no memory of its own.
  bool read(PyObject* object, TensorView* out) const { return read_(object, out) == 0; }
  // A new torch.Tensor of this memory, a new reference; an error of Python's where there is none.
  void* wrap(ManagedTensor* managed) const {
    void* tensor = nullptr;
    if (wrap_(managed, &tensor) != 0 || !tensor) throw pybind11::error_already_set();
    return tensor;
  }
  // Whether torch keeps its sign in a bit.
  bool is_negative(PyObject* object) const { return is_negative_.of(object) != 0; }

 private:
  struct Table {  // DLPackExchangeAPI
    uint32_t major, minor;
    const void* older;
    const void *allocate, *share;
    int (*wrap)(ManagedTensor* managed, void** out);
    int (*read)(void* object, TensorView* out);
    const void* stream;
  };

  pybind11::object tensor_, parameter_, table_;
  Member is_negative_;
  int (*read_)(void*, TensorView*);
  int (*wrap_)(ManagedTensor*, void**);
};

}  // namespace effnet
