// The stem: a small dense convolution of the image, BatchNorm and activation.
//
// Computes: y = act(conv(x, W) + b), BatchNorm folded in
// Layout:   x [N,Cin,H,W] with any strides, fp32 or bf16; W [units][Cin * Kh * Kw][16]; y in blocks
//           of one cache line, see args.h
// Bytes:    x about once, y once; y never reaches memory where the first block takes its rows
// FLOPs:    2 Cin Kh Kw + about 15 per element of y with SiLU, 2 with clamp
// Source:   original
// Truth:    effnet_fast/reference/pointwise_bn_act.py, as conv2d + batch_norm + activation
#include "cpu/network/stem.h"

namespace effnet {
namespace EFFNET_ISA {

StemShape::StemShape(const StemLayer& layer, int64_t h, int64_t w)
    : h(h),
      w(w),
      vertical(layer.padding, layer.padding.top, layer.padding.bottom, h, layer.kernel_h,
               layer.stride),
      horizontal(layer.padding, layer.padding.left, layer.padding.right, w, layer.kernel_w,
                 layer.stride) {}

int64_t StemShape::scratch(const StemLayer& layer) const {
  const int64_t rows = layer.in_channels * layer.kernel_h;
  return rows * row_floats(layer, *this) + 2 * (rows * layer.kernel_w + 1);
}

template <typename T>
void run_stem(const NetworkArgs& args, const StemShape& shape, int64_t first, Images<T> y,
              float* scratch, Team team) {
  StemRows<T> stem(args, shape, scratch);
  stem.begin();
  const int64_t channels = args.stem->out_channels, ow = shape.horizontal.out;
  const Range part = team.part(y.count * shape.vertical.out);
  for (int64_t i = part.begin; i < part.end; i++) {
    const int64_t n = i / shape.vertical.out, oy = i % shape.vertical.out;
    const Activations<T> out = {y[n], shape.pixels(), channels};
    stem.read(first + n, oy);
    stem.write({0, units_of<T>(channels)}, kBlock<T>,
               [&](int64_t unit) { return out.unit(unit) + oy * ow * kBlock<T>; });
  }
}

template void run_stem(const NetworkArgs&, const StemShape&, int64_t, Images<float>, float*, Team);
#if defined(__AVX512BF16__)
template void run_stem(const NetworkArgs&, const StemShape&, int64_t, Images<bf16>, float*, Team);
#endif

}  // namespace EFFNET_ISA
}  // namespace effnet
