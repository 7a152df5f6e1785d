// A small network to run whole: stem, four blocks of different kinds, head and classifier, packed
// as cpu/network/args.h says, and the naive loops over the same weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "cpu/network/args.h"
#include "harness.h"

namespace effnet {
namespace driver {

struct BlockSizes {
  int64_t in, channels, out, squeeze, kernel, stride;  // squeeze = 0: no squeeze-and-excite
  bool residual, same;
};

constexpr int64_t kUnitChannels = 16;
constexpr int kNetworkLayers = 8;  // whose roundings add up

// How tensors are packed for one instruction set and dtype.
struct Packing {
  bool bf16;
  int64_t tile_units;
  int64_t padded(int64_t channels) const {
    const int64_t block = kUnitChannels * (bf16 ? 2 : 1);
    return (channels + block - 1) / block * block;
  }
};

// Keeps packed tensors alive, each in a heap block of exactly its size.
class Packed {
 public:
  explicit Packed(Packing packing) : packing(packing) {}
  // values [rows][columns] with zeros up to `width` columns.
  const float* rows(const Doubles& values, int64_t rows, int64_t width) {
    const int64_t columns = static_cast<int64_t>(values.size()) / rows;
    return keep(rows * width, [&](int64_t i) {
      return i % width < columns ? values[i / width * columns + i % width] : 0.0;
    });
  }
  // values [channels][n] as [units][n][16].
  const float* units(const Doubles& values, int64_t channels) {
    const int64_t n = static_cast<int64_t>(values.size()) / channels;
    return keep(packing.padded(channels) * n, [&](int64_t i) {
      const int64_t c = i / (n * kUnitChannels) * kUnitChannels + i % kUnitChannels;
      return c < channels ? values[c * n + i / kUnitChannels % n] : 0.0;
    });
  }
  // weight [out][in] by panels; `master` keeps pairs in fp32.
  const void* product(const Doubles& weight, int64_t out, bool master = false) {
    const int64_t in = static_cast<int64_t>(weight.size()) / out, width = packing.padded(out);
    const int64_t pair = packing.bf16 ? 2 : 1, words = packing.bf16 ? packing.padded(in) / 2 : in;
    const int64_t tile = packing.tile_units * kUnitChannels;
    const int64_t whole = std::max<int64_t>(0, width / tile - 1);
    const bool low = packing.bf16 && !master;
    return keep(
        width * words * pair,
        [&](int64_t i) {
          const int64_t panel = std::min(whole, i / (tile * words * pair));
          const int64_t columns = panel < whole ? tile : width - whole * tile;
          const int64_t at = i - panel * tile * words * pair;
          const int64_t o = panel * tile + at / pair % columns;
          const int64_t k = at / (columns * pair) * pair + at % pair;
          return o < out && k < in ? weight[o * in + k] : 0.0;
        },
        low ? DType::kBFloat16 : DType::kFloat32);
  }

  const Packing packing;

 private:
  template <typename F>
  const float* keep(int64_t size, const F& value, DType dtype = DType::kFloat32) {
    tensors_.push_back(std::make_unique<Tensor>(size, dtype));
    for (int64_t i = 0; i < size; i++) tensors_.back()->set(i, value(i));
    return tensors_.back()->floats();
  }
  std::vector<std::unique_ptr<Tensor>> tensors_;
};

inline Doubles random_doubles(int64_t size, double bound) {
  Doubles out(static_cast<size_t>(size));
  for (double& v : out) v = from_bf16(to_bf16(static_cast<float>(uniform(-bound, bound))));
  return out;
}

// A convolution's weight [out][in / groups][k][k] and shift, values of both exact in bf16.
struct Folded {
  int64_t out, in;
  Doubles weight, shift;
  Folded(int64_t out, int64_t in)
      : out(out),
        in(in),
        weight(random_doubles(out * in, 1.7 / std::sqrt(static_cast<double>(in)))),
        shift(random_doubles(out, 0.5)) {}
};

inline StemLayer packed_stem(Packed& to, const Folded& stem, int64_t kernel, int64_t stride,
                             bool finite) {
  const int64_t side = (kernel - 1) / 2, padded = to.packing.padded(stem.out);
  StemLayer layer = {};
  layer.in_channels = stem.in / (kernel * kernel), layer.out_channels = stem.out;
  layer.kernel_h = layer.kernel_w = kernel, layer.stride = stride;
  layer.padding = {false, side, side, side, side};
  layer.weight = to.units(stem.weight, stem.out), layer.shift = to.rows(stem.shift, 1, padded);
  layer.finite = finite, layer.activation = activation;
  return layer;
}

// Images [n][h][w][c] in double precision.
struct Maps {
  int64_t n, h, w, c;
  Doubles data;
  Maps(int64_t n, int64_t h, int64_t w, int64_t c)
      : n(n), h(h), w(w), c(c), data(static_cast<size_t>(n * h * w * c)) {}
  double& at(int64_t i, int64_t y, int64_t x, int64_t channel) {
    return data[((i * h + y) * w + x) * c + channel];
  }
};

inline void before_and_out(bool same, int64_t size, int64_t k, int64_t stride, int64_t& before,
                           int64_t& out) {
  before = (k - 1) / 2;
  out = (size + 2 * before - k) / stride + 1;
  if (!same) return;
  out = (size + stride - 1) / stride;
  before = std::max<int64_t>(0, (out - 1) * stride + k - size) / 2;
}

// A convolution of k x k, dense or depthwise, its shift, and the activation where wanted.
inline Maps convolve(Maps& x, const Folded& layer, int64_t k, int64_t stride, bool same,
                     bool depthwise, bool activates) {
  int64_t top, left, oh, ow;
  before_and_out(same, x.h, k, stride, top, oh);
  before_and_out(same, x.w, k, stride, left, ow);
  Maps y(x.n, oh, ow, layer.out);
  const int64_t kk = k * k, channels = layer.in / kk;
  for (int64_t p = 0; p < x.n * oh * ow; p++) {
    double* const sums = y.data.data() + p * layer.out;
    std::copy(layer.shift.begin(), layer.shift.end(), sums);
    for (int64_t tap = 0; tap < kk; tap++) {
      const int64_t row = p / ow % oh * stride - top + tap / k;
      const int64_t column = p % ow * stride - left + tap % k;
      if (row < 0 || row >= x.h || column < 0 || column >= x.w) continue;
      const double* const in = &x.at(p / (oh * ow), row, column, 0);
      for (int64_t o = 0; o < layer.out; o++) {
        const double* const weight = layer.weight.data() + o * layer.in + tap;
        if (depthwise) sums[o] += weight[0] * in[o];
        for (int64_t i = 0; !depthwise && i < channels; i++) sums[o] += weight[i * kk] * in[i];
      }
    }
    for (int64_t o = 0; activates && o < layer.out; o++) sums[o] = act(sums[o]);
  }
  return y;
}

inline Maps mean_of(const Maps& x) {
  Maps y(x.n, 1, 1, x.c);
  const int64_t pixels = x.h * x.w;
  for (int64_t i = 0; i < x.n * pixels * x.c; i++)
    y.data[i / (pixels * x.c) * x.c + i % x.c] += x.data[i] / static_cast<double>(pixels);
  return y;
}

struct BlockProblem {
  BlockSizes size;
  Folded expand, filter, reduce, excite, project;
  explicit BlockProblem(const BlockSizes& s)
      : size(s),
        expand(s.channels, s.in),
        filter(s.channels, s.kernel * s.kernel),
        reduce(s.squeeze, s.channels),
        excite(s.channels, s.squeeze),
        project(s.out, s.channels) {}
  bool expands() const { return size.in != size.channels; }

  Maps run(Maps x) const {
    Maps h = expands() ? convolve(x, expand, 1, 1, false, false, true) : x;
    h = convolve(h, filter, size.kernel, size.stride, size.same, true, true);
    if (size.squeeze > 0) {
      Maps pooled = mean_of(h);
      Maps hidden = convolve(pooled, reduce, 1, 1, false, false, true);
      const Maps gate = convolve(hidden, excite, 1, 1, false, false, false);
      for (int64_t i = 0; i < h.n * h.h * h.w * h.c; i++)
        h.data[i] *= gate_of(gate.data[i / (h.h * h.w * h.c) * h.c + i % h.c]);
    }
    Maps y = convolve(h, project, 1, 1, false, false, false);
    if (size.residual)
      for (size_t i = 0; i < y.data.size(); i++) y.data[i] += x.data[i];
    return y;
  }

  // finite: false for the road of infinite weights, which gives the same of finite ones.
  BlockLayer packed(Packed& to, int64_t tap, bool finite) const {
    const int64_t padded = to.packing.padded(size.channels), side = (size.kernel - 1) / 2;
    const int64_t out = to.packing.padded(size.out);
    BlockLayer layer = {};
    layer.in_channels = size.in, layer.channels = size.channels, layer.out_channels = size.out;
    layer.activation = activation;
    layer.kernel = size.kernel, layer.stride = size.stride;
    layer.padding = {size.same, side, side, side, side};
    layer.expands = expands(), layer.residual = size.residual;
    if (layer.expands)
      layer.expand = {size.in, size.channels, to.product(expand.weight, size.channels),
                      to.rows(expand.shift, 1, padded)};
    layer.filter = to.units(filter.weight, size.channels);
    layer.filter_shift = to.rows(filter.shift, 1, padded);
    layer.finite = finite;
    layer.se_channels = size.squeeze;
    if (size.squeeze > 0) {
      layer.se_activation = activation, layer.gate_kind = gate_kind;
      layer.se_reduce_weight = to.rows(reduce.weight, size.squeeze, padded);
      layer.se_reduce_bias = to.rows(reduce.shift, 1, size.squeeze);
      layer.se_expand_weight = to.units(excite.weight, size.channels);
      layer.se_expand_bias = to.rows(excite.shift, 1, padded);
    }
    layer.project = {size.channels, size.out, to.product(project.weight, size.out),
                     to.rows(project.shift, 1, out)};
    if (to.packing.bf16 && size.squeeze > 0)
      layer.project_master = static_cast<const float*>(to.product(project.weight, size.out, true));
    layer.tap = tap;
    return layer;
  }
};

// Runs the network on images in fp32 or bf16 and compares logits and two maps.
inline void test_network(DType dtype, bool bf16, bool amx, bool excites, int threads,
                         bool finite = true) {
  constexpr int64_t kImages = 3, kHeight = 45, kWidth = 50, kColours = 3, kStem = 19, kHead = 75;
  constexpr int64_t kClasses = 7;
  // The first goes through its ring in several steps, the last cuts K and shares the excitation.
  BlockSizes sizes[] = {{kStem, kStem, 12, 5, 3, 1, false, false},
                        {12, 72, 40, 3, 5, 2, false, true},
                        {40, 101, 40, 10, 5, 1, true, false},
                        {40, 1040, 40, 24, 5, 2, false, false}};
  for (BlockSizes& size : sizes) size.squeeze *= excites;
  context = std::string("network") + (excites ? "" : " without excitation") +
            (bf16 ? " bf16" : " fp32") + " on " + std::to_string(threads);
  const Folded stem(kStem, kColours * 9), head(kHead, 40), classifier(kClasses, kHead);
  const std::vector<BlockProblem> blocks(std::begin(sizes), std::end(sizes));

  Tensor x(kImages * kColours * kHeight * kWidth, dtype, -2, 2);  // [N,C,H,W]
  Maps image(kImages, kHeight, kWidth, kColours);
  constexpr int64_t kPixels = kHeight * kWidth;
  for (int64_t i = 0; i < x.size(); i++)
    image.data[(i / (kColours * kPixels) * kPixels + i % kPixels) * kColours +
               i / kPixels % kColours] = x[i];
  Maps h = convolve(image, stem, 3, 2, false, false, true);
  const Doubles stem_map = h.data;
  h = blocks[1].run(blocks[0].run(h));
  const Doubles block_map = h.data;
  h = blocks[3].run(blocks[2].run(h));
  Maps pooled = mean_of(convolve(h, head, 1, 1, false, false, true));
  const Maps logits = convolve(pooled, classifier, 1, 1, false, false, false);

  Packed packed({bf16, kernels->network_tile_units()});
  const auto product = [&](const Folded& layer) {
    return Product{layer.in, layer.out, packed.product(layer.weight, layer.out),
                   packed.rows(layer.shift, 1, packed.packing.padded(layer.out))};
  };
  const StemLayer stem_layer = packed_stem(packed, stem, 3, 2, finite);
  std::vector<BlockLayer> layers;
  for (const BlockProblem& block : blocks)
    layers.push_back(block.packed(packed, layers.size() == 1 ? 1 : -1, finite));
  const HeadLayer head_layer = {product(head), activation};
  const Product classifier_layer = product(classifier);
  Tensor y(kImages * kClasses), stem_tap(static_cast<int64_t>(stem_map.size()));
  Tensor block_tap(static_cast<int64_t>(block_map.size()));
  float* const taps[] = {stem_tap.floats(), block_tap.floats()};
  NetworkArgs args = {};
  args.stem = &stem_layer;
  args.blocks = layers.data(), args.block_count = static_cast<int64_t>(layers.size());
  args.head = &head_layer, args.classifier = &classifier_layer;
  args.bf16 = bf16, args.amx = amx;
  args.l2 = 512 << 10;
  args.n = kImages, args.h = kHeight, args.w = kWidth;
  args.x = x.data(), args.x_dtype = dtype;
  args.x_strides[0] = kColours * kPixels, args.x_strides[1] = kPixels;
  args.x_strides[2] = kWidth, args.x_strides[3] = 1;
  args.y = y.floats(), args.taps = taps, args.stem_tap = 0;
  args.workspace = workspace, args.threads = threads;
  launch("network", kernels->network, args);

  // Rounding adds up from layer to layer, and in bf16 outgrows what an element alone would allow.
  const double fp32 = tolerance_fp32;
  tolerance_fp32 = kNetworkLayers * (bf16 ? tolerance_bf16 : fp32);
  expect("stem", stem_tap, stem_map);
  expect("block", block_tap, block_map);
  expect("logits", y, logits.data);
  tolerance_fp32 = fp32;
}

}  // namespace driver
}  // namespace effnet
