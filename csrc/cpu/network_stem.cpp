// The stem: a small dense convolution of the image, BatchNorm and SiLU.
//
// Computes: y = silu(conv(x, W) + b), BatchNorm folded in
// Layout:   x [N,Cin,H,W] with any strides, fp32 or bf16; W [units][Cin * Kh * Kw][16]; y in blocks
//           of one cache line, see network.h
// Bytes:    x about once, y once
// FLOPs:    2 Cin Kh Kw + about 15 per element of y
// Source:   original
// Truth:    effnet_fast/reference/pointwise_bn_act.py, as conv2d + batch_norm + silu
#include "cpu/network_layers.h"
#include "cpu/network_silu.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

// sum[p][v] over the taps: taps[i] points to the input of pixel 0, the next pixel's is `step`
// floats further.
template <int PIXELS, int UNITS>
EFFNET_NOINLINE void stem_tile(float* out, const float* const* taps, int64_t count, int64_t column,
                               int64_t step, const float* weight, int64_t unit_step,
                               const float* shift) {
  constexpr int kVecs = UNITS * kParts;
  Vec sum[PIXELS][kVecs];
#pragma GCC unroll 16
  for (int p = 0; p < PIXELS; p++)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++) sum[p][v] = load(shift + v * kLanes);
  for (int64_t i = 0; i < count; i++, weight += kUnit) {
    Vec w[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++)
      w[v] = in_register(load(weight + v / kParts * unit_step + v % kParts * kLanes));
    const float* const in = taps[i] + column;
#pragma GCC unroll 16
    for (int p = 0; p < PIXELS; p++) {
      const Vec x = in_register(broadcast(in + p * step));
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; v++) sum[p][v] += x * w[v];
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < PIXELS; p++)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++) store(out + (p * kVecs + v) * kLanes, sum[p][v]);
}

template <typename S>
void copy_row(float* out, const S* in, int64_t w, int64_t stride) {
  if (stride == 1)
    for (int64_t i = 0; i < w; i++) out[i] = load_scalar(in, sizeof(S) == 2, i);
  else
    for (int64_t i = 0; i < w; i++) out[i] = load_scalar(in, sizeof(S) == 2, i * stride);
}

int64_t row_floats(const StemLayer& layer, const StemShape& shape) {
  // The last tile may be computed beyond the row's end.
  return (shape.horizontal.out + kTilePixels) * layer.stride + layer.kernel_w +
         shape.horizontal.before;
}

}  // namespace

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
  const StemLayer& layer = *args.stem;
  const int64_t rows = layer.in_channels * layer.kernel_h, length = row_floats(layer, shape);
  const int64_t taps = rows * layer.kernel_w, ow = shape.horizontal.out;
  const int64_t units = units_of<T>(layer.out_channels);
  const float** const tap = reinterpret_cast<const float**>(
      (reinterpret_cast<uintptr_t>(scratch + rows * length) + sizeof(float*) - 1) / sizeof(float*) *
      sizeof(float*));
  for (int64_t i = 0; i < taps; i++)
    tap[i] = scratch + i / layer.kernel_w * length + i % layer.kernel_w;
  std::memset(scratch, 0, sizeof(float) * rows * length);
  const int64_t element = args.x_dtype == DType::kFloat32 ? 4 : 2;
  alignas(64) float buffer[kTilePixels * kTileUnits * kUnit];
  const Range part = team.part(y.count * shape.vertical.out);
  for (int64_t i = part.begin; i < part.end; i++) {
    const int64_t n = i / shape.vertical.out, oy = i % shape.vertical.out;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = oy * layer.stride - shape.vertical.before + r % layer.kernel_h;
      float* const to = scratch + r * length + shape.horizontal.before;
      if (row < 0 || row >= shape.h) {
        std::memset(to, 0, sizeof(float) * shape.w);
        continue;
      }
      const char* const from =
          static_cast<const char*>(args.x) +
          element * ((first + n) * args.x_strides[0] + r / layer.kernel_h * args.x_strides[1] +
                     row * args.x_strides[2]);
      if (element == 4)
        copy_row(to, reinterpret_cast<const float*>(from), shape.w, args.x_strides[3]);
      else
        copy_row(to, reinterpret_cast<const bf16*>(from), shape.w, args.x_strides[3]);
    }
    const Activations<T> out = {y[n], shape.pixels(), layer.out_channels};
    for (int64_t p = 0; p < ow; p += kTilePixels)
      for (int64_t unit = 0; unit < units; unit += kTileUnits) {
        const int64_t at_once = min_of(kTileUnits, units - unit);
        const auto run =
            at_once == 1 ? stem_tile<kTilePixels, 1> : stem_tile<kTilePixels, kTileUnits>;
        run(buffer, tap, taps, p * layer.stride, layer.stride, layer.weight + unit * taps * kUnit,
            taps * kUnit, layer.shift + unit * kUnit);
        for (int64_t u = 0; u < at_once; u++) {
          const float* in = buffer + u * kUnit;
          for_unit(out.unit(unit + u) + (oy * ow + p) * kBlock<T>, min_of(kTilePixels, ow - p),
                   [&](T* at, int v) {
                     store(at, silu_as<T>(load(in + v * kLanes)));
                     if (v == kParts - 1) in += at_once * kUnit;
                   });
        }
      }
  }
}

template void run_stem(const NetworkArgs&, const StemShape&, int64_t, Images<float>, float*, Team);
#if defined(__AVX512BF16__)
template void run_stem(const NetworkArgs&, const StemShape&, int64_t, Images<bf16>, float*, Team);
#endif

}  // namespace EFFNET_ISA
}  // namespace effnet
