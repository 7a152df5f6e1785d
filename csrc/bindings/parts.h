// What every part of the bindings uses: addresses, shapes, checks, scratch memory, launches.
#pragma once

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <optional>
#include <stdexcept>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#define EFFNET_NAMESPACE host
#include "common/activation.h"
#include "common/geometry.h"
#include "cpu/args.h"

namespace py = pybind11;

namespace effnet {

using Address = uintptr_t;
template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline DType dtype_of(bool is_bf16) { return is_bf16 ? DType::kBFloat16 : DType::kFloat32; }

// (kind, lo, hi), see common/activation.h.
using ActivationTuple = std::tuple<int, float, float>;

inline Activation activation_of(const ActivationTuple& given) {
  const auto [kind, lo, hi] = given;
  require(kind == kSilu || kind == kClamp || kind == kHardSwish,
          "the kind of an activation must be 0 (silu), 1 (clamp) or 2 (hardswish)");
  return {kind, lo, hi};
}

inline int gate_kind_of(int kind) {
  require(kind == kSigmoid || kind == kHardSigmoid,
          "the kind of a gate must be 0 (sigmoid) or 1 (hardsigmoid)");
  return kind;
}

// Addresses of a BatchNorm's fp32 vectors [C]: weight, bias, mean, variance. 0 stands for a weight
// of 1, a bias of 0; in training without mean and variance the batch's are taken.
using BatchNorm = std::array<Address, 4>;

template <size_t N>
void require_positive(const std::array<int64_t, N>& sizes) {
  for (int64_t size : sizes) require(size > 0, "every size must be positive");
}

// (n, c, h, w, oh, ow, k, stride, pad_left, pad_top)
using ShapeTuple = std::array<int64_t, 10>;

inline DwconvShape dwconv_shape(const ShapeTuple& s) {
  const DwconvShape shape = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9]};
  require(shape.n > 0 && shape.c > 0 && shape.h > 0 && shape.w > 0 && shape.oh > 0 && shape.ow > 0,
          "dwconv: every size must be positive");
  require(shape.k > 0 && shape.k % 2 == 1, "dwconv: the kernel size must be odd");
  require(shape.stride == 1 || shape.stride == 2, "dwconv: the stride must be 1 or 2");
  require(shape.pad_l >= 0 && shape.pad_t >= 0, "dwconv: the padding must not be negative");
  return shape;
}

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

// A block of memory that grows as it is asked for, and is kept from call to call.
class Scratch {
 public:
  // What an earlier call gave ends here; null where there is none to be had.
  float* get(int64_t floats) {
    if (floats > held_) {
      trim(0);  // before the larger one is there
      memory_.emplace(floats * static_cast<int64_t>(sizeof(float)));
      held_ = memory_->data() ? floats : 0;
    }
    return static_cast<float*>(memory_ ? memory_->data() : nullptr);
  }
  // Frees the block where it holds more floats than these.
  void trim(int64_t most) {
    if (held_ <= most) return;
    held_ = 0;
    memory_.reset();
  }
  int64_t held() const { return held_; }

 private:
  std::optional<Memory> memory_;
  int64_t held_ = 0;
};

constexpr int64_t kKeptFloats = (128 << 20) / sizeof(float);  // of each block, between calls

// Each freed when its thread ends.
inline Scratch& kernel_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}
inline Scratch& partial_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// See Workspace in cpu/args.h.
inline float* workspace(int64_t floats) { return kernel_scratch().get(floats); }

// Memory for the partial sums of one call, of which a thread has one at a time.
class Partials {
 public:
  explicit Partials(int64_t floats) {
    if (floats > 0 && !(data_ = partial_scratch().get(floats))) throw std::bad_alloc();
  }
  ~Partials() { partial_scratch().trim(kKeptFloats); }
  Partials(const Partials&) = delete;
  Partials& operator=(const Partials&) = delete;
  float* data() const { return data_; }

 private:
  float* data_ = nullptr;
};

// Calls that run at this moment share the cores instead of multiplying teams: threads that wait for
// each other on fewer cores than they are slow all of them down. No result depends on their number.
class Share {
 public:
  explicit Share(int threads) : threads_(std::max(1, threads / ++calls())) {}
  ~Share() { --calls(); }
  Share(const Share&) = delete;
  Share& operator=(const Share&) = delete;
  int threads() const { return threads_; }
  static std::atomic<int>& calls() {
    static std::atomic<int> count{0};
    return count;
  }

 private:
  int threads_;
};

// Runs a kernel with the GIL released, where the caller has not done so, on this call's share of
// its threads.
template <typename Args>
void launch(bool (*kernel)(const Args&), Args args) {
  bool ok;
  {
    std::optional<py::gil_scoped_release> release;
    if (PyGILState_Check()) release.emplace();
    const Share share(args.threads);
    args.threads = share.threads();
    ok = kernel(args);
  }
  kernel_scratch().trim(kKeptFloats);
  if (!ok) throw std::bad_alloc();
}

inline int thread_count(int threads) {
  require(threads >= 1, "threads must be at least 1");
  return threads;
}

}  // namespace effnet
