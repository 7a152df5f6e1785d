// A depthwise convolution to run: its sizes, its input, and the naive loops over its products.
#pragma once

#include <cstdint>

#include "cpu/args.h"
#include "harness.h"

namespace effnet {
namespace driver {

struct Case {
  int64_t n, c, h, w, k, stride, left, right, top, bottom;
};

// A depthwise convolution's sizes, and its input among NaN.
struct Problem {
  Case p;
  DType dtype;
  int64_t oh, ow, pixel, row, image;  // strides of x in elements
  Tensor x, weight;

  Problem(const Case& c, DType dtype, DType weight_dtype)
      : p(c),
        dtype(dtype),
        oh((c.h + c.top + c.bottom - c.k) / c.stride + 1),
        ow((c.w + c.left + c.right - c.k) / c.stride + 1),
        pixel(c.c + 2),
        row(c.w * pixel + 1),
        image(c.h * row + 3),
        x((c.n - 1) * image + (c.h - 1) * row + (c.w - 1) * pixel + c.c, dtype),
        weight(c.c * c.k * c.k, weight_dtype, -0.5, 0.5) {
    for (int64_t n = 0; n < c.n; n++)
      for (int64_t h = 0; h < c.h; h++)
        for (int64_t w = 0; w < c.w; w++)
          for (int64_t i = 0; i < c.c; i++) x.set(x_index(n, h, w) + i, uniform(-2, 2));
  }
  int64_t x_index(int64_t n, int64_t h, int64_t w) const { return n * image + h * row + w * pixel; }
  int64_t out_size() const { return p.n * oh * ow * p.c; }
  DwconvShape shape() const { return {p.n, p.c, p.h, p.w, oh, ow, p.k, p.stride, p.left, p.top}; }
  Image x_image() const { return {x.data(), image, row, pixel}; }
  Image out_image(const Tensor& y) const { return {y.data(), oh * ow * p.c, ow * p.c, p.c}; }

  // Calls f(x index, weight index, output index) for every product of the convolution.
  template <typename F>
  void for_products(const F& f) const {
    for (int64_t o = 0; o < p.n * oh * ow; o++)
      for (int64_t kh = 0; kh < p.k; kh++)
        for (int64_t kw = 0; kw < p.k; kw++) {
          const int64_t h = o / ow % oh * p.stride - p.top + kh;
          const int64_t w = o % ow * p.stride - p.left + kw;
          if (h < 0 || h >= p.h || w < 0 || w >= p.w) continue;
          for (int64_t i = 0; i < p.c; i++)
            f(x_index(o / (oh * ow), h, w) + i, (i * p.k + kh) * p.k + kw, o * p.c + i);
        }
  }
};

// Mean and biased variance [c] of values [pixels, c].
inline void moments(const Tensor& values, int64_t c, Doubles& mean, Doubles& var) {
  const int64_t count = values.size() / c;
  mean.assign(c, 0), var.assign(c, 0);
  for (int64_t i = 0; i < values.size(); i++) mean[i % c] += values[i] / count;
  for (int64_t i = 0; i < values.size(); i++)
    var[i % c] += (values[i] - mean[i % c]) * (values[i] - mean[i % c]) / count;
}

}  // namespace driver
}  // namespace effnet
