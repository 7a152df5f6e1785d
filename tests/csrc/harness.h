// What the driver's tests hold their data in: tensors of fp32 or bf16 in heap blocks of exactly
// their size, so that a sanitizer sees a step beyond, and a workspace of the same kind.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/args.h"

namespace effnet {
namespace driver {

inline double uniform(double low, double high) {
  static uint64_t state = 0x9e3779b97f4a7c15u;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return low + (high - low) * static_cast<double>(state >> 11) / 9007199254740992.0;
}

inline uint16_t to_bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (v != v) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

// Elements of one dtype in a heap block of exactly their size, as torch aligns them where they are
// many; NaN until set.
class Tensor {
 public:
  Tensor(int64_t size, DType dtype = DType::kFloat32)
      : size_(size), dtype_(dtype), bytes_(size * (dtype == DType::kFloat32 ? 4 : 2)) {
    data_ = bytes_ < 1 << 20 ? std::malloc(bytes_) : std::aligned_alloc(64, bytes_);
    for (int64_t i = 0; i < size; i++) set(i, std::numeric_limits<double>::quiet_NaN());
  }
  Tensor(int64_t size, DType dtype, double low, double high) : Tensor(size, dtype) {
    for (int64_t i = 0; i < size; i++) set(i, uniform(low, high));
  }
  Tensor(const Tensor& other) : Tensor(other.size_, other.dtype_) {
    std::memcpy(data_, other.data_, bytes_);
  }
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() { std::free(data_); }

  void set(int64_t i, double v) {
    if (dtype_ == DType::kFloat32)
      static_cast<float*>(data_)[i] = static_cast<float>(v);
    else
      static_cast<uint16_t*>(data_)[i] = to_bf16(static_cast<float>(v));
  }
  double operator[](int64_t i) const {
    return dtype_ == DType::kFloat32 ? static_cast<float*>(data_)[i]
                                     : from_bf16(static_cast<uint16_t*>(data_)[i]);
  }
  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }
  int64_t size() const { return size_; }
  DType dtype() const { return dtype_; }

 private:
  int64_t size_;
  DType dtype_;
  size_t bytes_;
  void* data_;
};

// A workspace of exactly the size asked for, NaN at every call.
inline float* workspace(int64_t floats) {
  static thread_local float* block = nullptr;
  std::free(block);
  void* fresh = nullptr;
  if (posix_memalign(&fresh, 64, static_cast<size_t>(floats) * sizeof(float))) return nullptr;
  block = static_cast<float*>(fresh);
  for (int64_t i = 0; i < floats; i++) block[i] = std::numeric_limits<float>::quiet_NaN();
  return block;
}

constexpr int kMessages = 20;  // the first failures tell enough

inline const Kernels* kernels = nullptr;
inline bool bf16_products = false, amx = false;  // of bf16 in training; whether by the tile unit
inline double tolerance_fp32, tolerance_bf16;
inline int failures = 0, comparisons = 0;
inline std::string context;  // the case that runs, for messages

using Doubles = std::vector<double>;

// `largest` is the least that counts as the tensor's largest value: what its sums are made of.
// `besides` is allowed to every element.
inline void expect(const char* what, const Tensor& actual, const Doubles& exact, double largest = 0,
                   double besides = 0) {
  for (double v : exact) largest = std::fmax(largest, std::fabs(v));
  const double relative = actual.dtype() == DType::kFloat32 ? 0 : tolerance_bf16;
  comparisons++;
  for (int64_t i = 0; i < actual.size(); i++) {
    const double error = std::fabs(actual[i] - exact[i]);
    if (error <= tolerance_fp32 * largest + relative * std::fabs(exact[i]) + besides) continue;
    if (failures++ < kMessages)
      std::printf("%s: %s[%lld] is %.9g, not %.9g\n", context.c_str(), what,
                  static_cast<long long>(i), actual[i], exact[i]);
    return;
  }
}

template <typename Args>
void launch(const char* what, bool (*kernel)(const Args&), const Args& args) {
  if (kernel(args)) return;
  std::printf("%s: %s got no memory\n", context.c_str(), what);
  failures++;
}

// Activations whose tests follow those of SiLU: a clamp, ReLU, hard-swish.
constexpr float kUnbounded = std::numeric_limits<float>::quiet_NaN();
constexpr Activation kOtherActivations[] = {
    {kClamp, -0.3f, 0.9f}, {kClamp, 0.0f, kUnbounded}, {kHardSwish, kUnbounded, kUnbounded}};

// The activation and the gate of the kernels that run now.
inline Activation activation = {kSilu, kUnbounded, kUnbounded};
inline int gate_kind = kSigmoid;

inline double sigmoid(double u) { return 1 / (1 + std::exp(-u)); }
inline double hard_sigmoid(double u) { return std::fmin(std::fmax(u + 3, 0), 6) / 6; }
inline double act(double u) {
  if (activation.kind == kSilu) return u * sigmoid(u);
  if (activation.kind == kHardSwish) return u * hard_sigmoid(u);
  return u < activation.lo ? activation.lo : u > activation.hi ? activation.hi : u;
}
inline double act_slope(double u) {
  if (activation.kind == kSilu) return sigmoid(u) * (1 + u * (1 - sigmoid(u)));
  if (activation.kind == kHardSwish) return u <= -3 ? 0 : u < 3 ? u / 3 + 0.5 : 1;
  return u <= activation.lo || u >= activation.hi ? 0 : 1;
}
inline double gate_of(double x) { return gate_kind == kHardSigmoid ? hard_sigmoid(x) : sigmoid(x); }
// The gate's slope, of the gate.
inline double gate_slope(double gate) {
  if (gate_kind == kHardSigmoid) return gate > 0 && gate < 1 ? 1.0 / 6 : 0;
  return gate * (1 - gate);
}

}  // namespace driver
}  // namespace effnet
