// The input rows that an output row of the stem reads, laid out for its products.
#pragma once

#include "cpu/simd/moments.h"
#include "cpu/simd/tile.h"
#include "cpu/stem_args.h"

namespace effnet {
namespace EFFNET_ISA {

#if defined(__AVX512F__)
constexpr int kPixels = 14;  // of a tile, times 2 vectors: 28 accumulators of 32 registers
#elif defined(EFFNET_NEON)
constexpr int kPixels = 8;  // 16 accumulators and 8 operands by lane
#else
constexpr int kPixels = 6;
#endif

template <typename T>
EFFNET_INLINE const T* at(const void* data, int64_t i) {
  return static_cast<const T*>(data) + i;
}

// The input rows under a row of the output, [Kh][pixels][C] in fp32, zero where x has no pixel.
template <typename T>
class Rows {
 public:
  Rows(const StemConvShape& s, const StemImage& x, float* memory)
      : s_(s), x_(x), memory_(memory), length_(length(s)) {
    std::memset(memory, 0, sizeof(float) * static_cast<size_t>(floats(s)));
    held_ = reinterpret_cast<int64_t*>(memory + (s.kh + 1) * length_);
    forget();
  }
  static int64_t length(const StemConvShape& s) {
    // The last tile may be computed beyond the row's end.
    const int64_t reached = (s.ow + kPixels - 2) * s.stride_w + s.kw;
    return whole_lines(max_of(s.pad_l + s.w, reached) * s.c + kLanes);
  }
  static int64_t floats(const StemConvShape& s) {
    return (s.kh + 1) * length(s) + whole_lines(2 * s.kh);
  }
  // Makes row oy of image n the current one.
  void move_to(int64_t n, int64_t oy) {
    if (n != image_) forget();
    image_ = n, first_ = oy * s_.stride_h - s_.pad_t;
    for (int64_t iy = max_of(first_, 0); iy < min_of(first_ + s_.kh, s_.h); iy++) {
      const int64_t slot = iy % s_.kh;
      if (held_[slot] == iy) continue;
      held_[slot] = iy;
      copy(memory_ + slot * length_ + s_.pad_l * s_.c, n, iy);
    }
  }
  bool has(int64_t ky) const { return first_ + ky >= 0 && first_ + ky < s_.h; }
  // Row ky of the kernel over the current row, from its first output pixel's first tap.
  const float* operator[](int64_t ky) const {
    return memory_ + (has(ky) ? (first_ + ky) % s_.kh : s_.kh) * length_;
  }

 private:
  void forget() {
    for (int64_t i = 0; i < s_.kh; i++) held_[i] = -1;
  }
  void copy(float* to, int64_t n, int64_t iy) const {
    const T* from = at<T>(x_.data, n * x_.n_stride + iy * x_.h_stride);
    const int64_t count = s_.w * s_.c;
    if (x_.w_stride == s_.c && (x_.c_stride == 1 || s_.c == 1)) {
      for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t lanes = min_of(kLanes, count - i);
        store_n(to + i, load_n(from + i, lanes), lanes);
      }
      return;
    }
    for (int64_t c = 0; c < s_.c; c++)
      for (int64_t i = 0; i < s_.w; i++)
        to[i * s_.c + c] = load_scalar(from + c * x_.c_stride, sizeof(T) == 2, i * x_.w_stride);
  }

  const StemConvShape& s_;
  const StemImage& x_;
  float* memory_;
  int64_t* held_;  // which input row each slot has
  int64_t length_, image_ = -1, first_ = 0;
};

}  // namespace EFFNET_ISA
}  // namespace effnet
