// What of a tensor can be compared without asking it.
#pragma once

#include <array>
#include <cstring>

#include "bindings/parts.h"

namespace effnet {

// Torch's own object behind a tensor, which holds its sizes, strides, dtype and bits.
struct Behind {
  static constexpr uint64_t kBytes = 176, kCounts = 16;  // of torch 2.13's; of references

  explicit Behind(const py::object& tensor) {
    if (!py::hasattr(tensor, "_cdata")) return;
    address = tensor.attr("_cdata").cast<uint64_t>();
    std::memcpy(bytes.data(), at(address), kBytes);
    // The word of the Python object that leads there, so that no call has to ask for it.
    const auto* const words = reinterpret_cast<const uint64_t*>(tensor.ptr());
    const uint64_t count = static_cast<uint64_t>(Py_TYPE(tensor.ptr())->tp_basicsize) / 8;
    for (uint64_t i = sizeof(PyObject) / 8; i < count && !word; i++)
      if (words[i] == address) word = words + i;
  }
  // Whether it is the same to the byte; it may change in ways that mean nothing.
  bool is_unchanged() const {
    return word && *word == address &&
           std::memcmp(bytes.data() + kCounts, at<const char>(address) + kCounts,
                       kBytes - kCounts) == 0;
  }

  uint64_t address = 0;
  const uint64_t* word = nullptr;
  std::array<char, kBytes> bytes = {};
};

}  // namespace effnet
