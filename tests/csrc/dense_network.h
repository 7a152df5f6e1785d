// A stem and FusedMBConv blocks of different kinds, whose last map is compared with naive loops.
#pragma once

#include "network_problem.h"

namespace effnet {
namespace driver {

struct DenseSizes {
  int64_t in, channels, out, kernel, stride;  // channels = out: no projection
  bool residual, same, projects;
};

struct DenseProblem {
  DenseSizes size;
  Folded dense, project;
  explicit DenseProblem(const DenseSizes& s)
      : size(s), dense(s.channels, s.in * s.kernel * s.kernel), project(s.out, s.channels) {}

  Maps run(Maps x) const {
    Maps y = convolve(x, dense, size.kernel, size.stride, size.same, false, true);
    if (size.projects) y = convolve(y, project, 1, 1, false, false, false);
    if (size.residual)
      for (size_t i = 0; i < y.data.size(); i++) y.data[i] += x.data[i];
    return y;
  }

  // The dense weight [out][in][taps] as [out][taps][in], in bf16 with whole blocks of a pixel.
  Doubles by_taps(const Packing& packing) const {
    const int64_t taps = size.kernel * size.kernel;
    const int64_t in = packing.bf16 ? packing.padded(size.in) : size.in;
    Doubles out(static_cast<size_t>(size.channels * taps * in));
    for (int64_t o = 0; o < size.channels; o++)
      for (int64_t i = 0; i < size.in; i++)
        for (int64_t tap = 0; tap < taps; tap++)
          out[(o * taps + tap) * in + i] = dense.weight[(o * size.in + i) * taps + tap];
    return out;
  }

  // finite: false for the road of infinite weights, which gives the same of finite ones.
  BlockLayer packed(Packed& to, int64_t tap, bool finite) const {
    const int64_t side = (size.kernel - 1) / 2;
    const Doubles weight = by_taps(to.packing);
    const auto shift = [&](const Folded& layer) {
      return to.rows(layer.shift, 1, to.packing.padded(layer.out));
    };
    BlockLayer layer = {};
    layer.in_channels = size.in, layer.channels = size.channels, layer.out_channels = size.out;
    layer.activation = activation;
    layer.kernel = size.kernel, layer.stride = size.stride;
    layer.padding = {size.same, side, side, side, side};
    layer.residual = size.residual;
    layer.is_dense = true, layer.projects = size.projects, layer.finite = finite;
    layer.dense = {static_cast<int64_t>(weight.size()) / size.channels, size.channels,
                   to.product(weight, size.channels), shift(dense)};
    if (size.projects)
      layer.project = {size.channels, size.out, to.product(project.weight, size.out),
                       shift(project)};
    layer.tap = tap;
    return layer;
  }
};

// l2: of which a quarter holds a row of the widest block, or only a piece of it.
inline void test_dense_network(bool bf16, bool amx, int64_t l2, int threads, bool finite = true) {
  constexpr int64_t kImages = 2, kHeight = 13, kWidth = 150, kColours = 3, kStem = 19;
  const DenseSizes sizes[] = {{kStem, kStem, kStem, 3, 1, true, false, false},
                              {kStem, 76, 40, 3, 2, false, true, true},
                              {40, 72, 40, 5, 1, true, false, true},
                              {40, 24, 24, 3, 2, false, false, false}};
  context =
      std::string("dense network ") + (bf16 ? "bf16" : "fp32") + " on " + std::to_string(threads);
  const Folded stem(kStem, kColours);
  const std::vector<DenseProblem> blocks(std::begin(sizes), std::end(sizes));
  Tensor x(kImages * kHeight * kWidth * kColours, DType::kFloat32, -2, 2);
  Maps image(kImages, kHeight, kWidth, kColours);
  for (int64_t i = 0; i < x.size(); i++) image.data[i] = x[i];
  Maps h = convolve(image, stem, 1, 1, false, false, true);
  for (const DenseProblem& block : blocks) h = block.run(h);

  Packed packed({bf16, kernels->network_tile_units()});
  const StemLayer stem_layer = packed_stem(packed, stem, 1, 1, finite);
  std::vector<BlockLayer> layers;
  for (const DenseProblem& block : blocks)
    layers.push_back(block.packed(packed, layers.size() + 1 == blocks.size() ? 0 : -1, finite));
  Tensor map(static_cast<int64_t>(h.data.size()));
  float* const taps[] = {map.floats()};
  NetworkArgs args = {};
  args.stem = &stem_layer;
  args.blocks = layers.data(), args.block_count = static_cast<int64_t>(layers.size());
  args.bf16 = bf16, args.amx = amx, args.l2 = l2;
  args.n = kImages, args.h = kHeight, args.w = kWidth;
  args.x = x.data(), args.x_dtype = DType::kFloat32;
  args.x_strides[0] = kHeight * kWidth * kColours, args.x_strides[1] = 1;
  args.x_strides[2] = kWidth * kColours, args.x_strides[3] = kColours;
  args.taps = taps, args.stem_tap = -1;
  args.workspace = workspace, args.threads = threads;
  launch("dense network", kernels->network, args);
  const double fp32 = tolerance_fp32;
  tolerance_fp32 = kNetworkLayers * (bf16 ? tolerance_bf16 : fp32);
  expect("map", map, h.data);
  tolerance_fp32 = fp32;
}

}  // namespace driver
}  // namespace effnet
