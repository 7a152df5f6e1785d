// What every part of the bindings uses: addresses, checks, scratch memory.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <stdexcept>

#include "cpu/args.h"

namespace py = pybind11;

namespace effnet {
namespace {

using Address = uintptr_t;
template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

DType dtype_of(bool is_bf16) { return is_bf16 ? DType::kBFloat16 : DType::kFloat32; }

// See Workspace in cpu/args.h; freed when the thread ends.
float* workspace(int64_t floats) {
  struct Buffer {
    float* data = nullptr;
    int64_t floats = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (floats > buffer.floats) {
    std::free(buffer.data);
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, bytes));
    buffer.floats = buffer.data ? floats : 0;
  }
  return buffer.data;
}

// Runs a kernel with the GIL released.
template <typename Args>
void launch(bool (*kernel)(const Args&), const Args& args) {
  bool ok;
  {
    py::gil_scoped_release release;
    ok = kernel(args);
  }
  if (!ok) throw std::bad_alloc();
}

int thread_count(int threads) {
  require(threads >= 1, "threads must be at least 1");
  return threads;
}

}  // namespace
}  // namespace effnet
