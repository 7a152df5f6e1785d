// Whether the memory that a network was given is as large as its layers say, and whether the layers
// follow one another: what comes from Python is compared with the sizes that the kernels go by.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

#include "bindings/parts.h"
#include "cpu/network/args.h"

namespace effnet {

// The bytes that pointers point to.
using Sizes = std::map<const void*, int64_t>;

class NetworkChecks {
 public:
  explicit NetworkChecks(bool bf16) : block_(bf16 ? 32 : 16), bf16_(bf16) {}

  void stem(const StemLayer& layer, const Sizes& bytes) const {
    const int64_t out = padded(layer.out_channels);
    holds(bytes, layer.weight, out * layer.in_channels * layer.kernel_h * layer.kernel_w);
    holds(bytes, layer.shift, out);
  }
  void product(const Product& layer, const Sizes& bytes) const {
    const int64_t out = padded(layer.out_channels);
    const int64_t in = bf16_ ? padded(layer.in_channels) / 2 : layer.in_channels;
    holds(bytes, layer.weight, out * in);
    holds(bytes, layer.shift, out);
  }
  void block(const BlockLayer& layer, const Sizes& bytes) const {
    const int64_t channels = padded(layer.channels), hidden = layer.se_channels;
    if (layer.expands) {
      product(layer.expand, bytes);
      follows(layer.expand, layer.in_channels, layer.channels);
    }
    holds(bytes, layer.filter, channels * layer.kernel * layer.kernel);
    holds(bytes, layer.filter_shift, channels);
    if (hidden > 0) {
      holds(bytes, layer.se_reduce_weight, hidden * channels);
      holds(bytes, layer.se_reduce_bias, hidden);
      holds(bytes, layer.se_expand_weight, channels * hidden);
      holds(bytes, layer.se_expand_bias, channels);
    }
    product(layer.project, bytes);
    follows(layer.project, layer.channels, layer.out_channels);
    const bool gated_bf16 = bf16_ && hidden > 0;
    require(gated_bf16 == (layer.project_master != nullptr),
            "network: project_master is for bf16 with squeeze-and-excite");
    if (gated_bf16)
      holds(bytes, layer.project_master, padded(layer.out_channels) * padded(layer.channels));
    require(!layer.residual || (layer.stride == 1 && layer.in_channels == layer.out_channels),
            "network: a residual needs a stride of 1 and as many channels out as in");
  }
  static void follows(const Product& layer, int64_t in, int64_t out) {
    require(layer.in_channels == in && (out == 0 || layer.out_channels == out),
            "network: a layer does not fit the one before it");
  }

 private:
  int64_t padded(int64_t channels) const { return (channels + block_ - 1) / block_ * block_; }
  // words: of four bytes.
  static void holds(const Sizes& bytes, const void* at, int64_t words) {
    require(bytes.at(at) == words * 4, "network: a tensor is not as large as its layer says");
  }
  int64_t block_;
  bool bf16_;
};

// The size of the maps on their way through a network.
struct MapSize {
  int64_t h, w;

  void pass(int64_t kernel_h, int64_t kernel_w, int64_t stride, const Padding& padding) {
    h = out(h, kernel_h, stride, padding.same, padding.top + padding.bottom);
    w = out(w, kernel_w, stride, padding.same, padding.left + padding.right);
    require(h > 0 && w > 0, "network: the images are too small");
  }

 private:
  static int64_t out(int64_t size, int64_t kernel, int64_t stride, bool same, int64_t sides) {
    if (same) return (size + stride - 1) / stride;
    return size + sides < kernel ? 0 : (size + sides - kernel) / stride + 1;
  }
};

// Memory that a call writes to, and whether it has room for so many floats.
struct Result {
  Address address;
  int64_t bytes;

  float* data(int64_t images, int64_t floats) const {
    require(address && bytes == images * floats * 4, "network: a result is of another size");
    return at<float>(address);
  }
};

// Products of sizes below are computed in 64 bits; no memory holds images of such sizes, but an
// expanded tensor has them.
inline void require_possible(int64_t n, int64_t h, int64_t w) {
  constexpr int64_t kSide = int64_t{1} << 31, kPixels = int64_t{1} << 40;
  require(n > 0 && h > 0 && w > 0, "network: every size must be positive");
  require(n < kSide && h < kSide && w < kSide && h * w <= kPixels / n,
          "network: the images are too large");
}

}  // namespace effnet
