// What every part of the bindings uses: addresses, checks, scratch memory.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

// Memory on a cache line, from 4 MiB on by pages of 2 MiB where the system lends them: a product
// that reads 15 MB of weights and activations by pages of 4 KiB takes two and a half times as long.
class Memory {
 public:
  explicit Memory(int64_t bytes) {
    constexpr int64_t kHuge = 2 << 20, kFrom = 4 << 20;
    const int64_t page = bytes >= kFrom ? kHuge : 64;
    const int64_t rounded = (bytes + page - 1) / page * page;
    data_ = std::aligned_alloc(static_cast<size_t>(page), static_cast<size_t>(rounded));
#if defined(__linux__)
    if (data_ && page == kHuge) madvise(data_, static_cast<size_t>(rounded), MADV_HUGEPAGE);
#endif
  }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

// See Workspace in cpu/args.h; freed when the thread ends.
float* workspace(int64_t floats) {
  static thread_local std::unique_ptr<Memory> memory;
  static thread_local int64_t held = 0;
  if (floats > held) {
    memory.reset();  // before the larger one is there
    memory = std::make_unique<Memory>(floats * static_cast<int64_t>(sizeof(float)));
    held = memory->data() ? floats : 0;
  }
  return static_cast<float*>(memory ? memory->data() : nullptr);
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
