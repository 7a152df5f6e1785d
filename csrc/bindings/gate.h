// The check of gate.cpp for bindings that take tensors themselves, and what it saw of them.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "bindings/parts.h"

namespace effnet {

// What a check saw of a call's arguments.
struct Seen {
  struct Tensor {
    Address address = 0;  // 0 for None
    bool is_bf16 = false;
  };
  std::vector<Tensor> tensors;  // in the order of the rules; those of an empty list are None
  std::array<int64_t, 26> sizes;
  std::array<int64_t, 4> padding;  // left, right, top, bottom
  int64_t stride = 0;
  bool image_bf16 = false, residual = false;

  int64_t of(char letter) const { return sizes[static_cast<size_t>(letter - 'A')]; }
};

class Gate;

std::shared_ptr<const Gate> gate_of(const std::string& op, const py::dict& rules,
                                    const std::vector<std::string>& devices,
                                    const std::vector<std::string>& dtypes,
                                    const py::handle& tensor, const py::handle& parameter);

// Whether kernels may see the arguments; what is no tensor and of the wrong type raises.
bool passes(const Gate& gate, const py::tuple& args, Seen* seen);

}  // namespace effnet
