// Rows of the stem's output in inference, for the pass that wants them: into memory, or into the
// ring of the first block.
#pragma once

#include "cpu/network/layers.h"
#include "cpu/network/silu.h"

namespace effnet {
namespace EFFNET_ISA {

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
inline void copy_row(float* out, const S* in, int64_t w, int64_t stride) {
  if (stride == 1)
    for (int64_t i = 0; i < w; i++) out[i] = load_scalar(in, sizeof(S) == 2, i);
  else
    for (int64_t i = 0; i < w; i++) out[i] = load_scalar(in, sizeof(S) == 2, i * stride);
}

inline int64_t row_floats(const StemLayer& layer, const StemShape& shape) {
  // The last tile may be computed beyond the row's end.
  return (shape.horizontal.out + kTilePixels) * layer.stride + layer.kernel_w +
         shape.horizontal.before;
}

template <typename T>
class StemRows {
 public:
  // scratch: shape.scratch(layer) floats of this thread.
  StemRows(const NetworkArgs& args, const StemShape& shape, float* scratch)
      : args_(args),
        layer_(*args.stem),
        shape_(shape),
        scratch_(scratch),
        rows_(layer_.in_channels * layer_.kernel_h),
        length_(row_floats(layer_, shape)),
        taps_(rows_ * layer_.kernel_w) {
    float* const behind = scratch + rows_ * length_;
    const uintptr_t unaligned = reinterpret_cast<uintptr_t>(behind) + sizeof(float*) - 1;
    tap_ = reinterpret_cast<const float**>(unaligned / sizeof(float*) * sizeof(float*));
  }

  // Before the first row; the scratch memory is nobody else's then.
  void begin() const {
    for (int64_t i = 0; i < taps_; i++)
      tap_[i] = scratch_ + i / layer_.kernel_w * length_ + i % layer_.kernel_w;
    std::memset(scratch_, 0, sizeof(float) * rows_ * length_);
  }

  // Takes the rows of image n that row oy of the output reads.
  void read(int64_t n, int64_t oy) {
    top_ = oy * layer_.stride - shape_.vertical.before;
    const int64_t element = args_.x_dtype == DType::kFloat32 ? 4 : 2;
    for (int64_t r = 0; r < rows_; r++) {
      const int64_t row = top_ + r % layer_.kernel_h;
      float* const to = scratch_ + r * length_ + shape_.horizontal.before;
      if (row < 0 || row >= shape_.h) {
        std::memset(to, 0, sizeof(float) * shape_.w);
        continue;
      }
      const char* const from =
          static_cast<const char*>(args_.x) +
          element * (n * args_.x_strides[0] + r / layer_.kernel_h * args_.x_strides[1] +
                     row * args_.x_strides[2]);
      if (element == 4)
        copy_row(to, reinterpret_cast<const float*>(from), shape_.w, args_.x_strides[3]);
      else
        copy_row(to, reinterpret_cast<const bf16*>(from), shape_.w, args_.x_strides[3]);
    }
  }

  // Writes units [begin, end) of the row: pixels `step` elements apart from row_of(unit) on.
  template <typename RowOf>
  void write(Range units, int64_t step, const RowOf& row_of) const {
    with_activation(layer_.activation,
                    [&]<typename A>() { write_with(A(layer_.activation), units, step, row_of); });
  }

 private:
  template <typename A, typename RowOf>
  void write_with(const A& act, Range units, int64_t step, const RowOf& row_of) const {
    alignas(64) float buffer[kTilePixels * kTileUnits * kUnit];
    const int64_t ow = shape_.horizontal.out;
    for (int64_t p = 0; p < ow; p += kTilePixels)
      for (int64_t unit = units.begin; unit < units.end; unit += kTileUnits) {
        const int64_t at_once = min_of(kTileUnits, units.end - unit);
        const auto run =
            at_once == 1 ? stem_tile<kTilePixels, 1> : stem_tile<kTilePixels, kTileUnits>;
        run(buffer, tap_, taps_, p * layer_.stride, layer_.stride,
            layer_.weight + unit * taps_ * kUnit, taps_ * kUnit, layer_.shift + unit * kUnit);
        for (int64_t u = 0; u < at_once && !layer_.finite; u++)
          for (int64_t i = 0; i < min_of(kTilePixels, ow - p); i++)
            without_padding(buffer + (i * at_once + u) * kUnit, unit + u, p + i);
        for (int64_t u = 0; u < at_once; u++) {
          const float* in = buffer + u * kUnit;
          auto* to = row_of(unit + u) + p * step;
          for (int64_t i = 0; i < min_of(kTilePixels, ow - p); i++) {
#pragma GCC unroll 4
            for (int part = 0; part < kParts; part++)
              store(to + part * kLanes, activate_as<T>(act, load(in + part * kLanes)));
            in += at_once * kUnit, to += step;
          }
        }
      }
  }

  // A pixel from its taps inside of the image: of an infinite weight 0 * x is NaN.
  void without_padding(float* out, int64_t unit, int64_t pixel) const {
    const float* weight = layer_.weight + unit * taps_ * kUnit;
    std::memcpy(out, layer_.shift + unit * kUnit, sizeof(float) * kUnit);
    for (int64_t i = 0; i < taps_; i++, weight += kUnit) {
      const int64_t row = top_ + i / layer_.kernel_w % layer_.kernel_h;
      const int64_t column = pixel * layer_.stride - shape_.horizontal.before + i % layer_.kernel_w;
      if (row < 0 || row >= shape_.h || column < 0 || column >= shape_.w) continue;
      for (int64_t l = 0; l < kUnit; l++) out[l] += weight[l] * tap_[i][pixel * layer_.stride];
    }
  }

  const NetworkArgs& args_;
  const StemLayer& layer_;
  const StemShape& shape_;
  float* scratch_;
  int64_t rows_, length_, taps_, top_ = 0;
  const float** tap_;
};

}  // namespace EFFNET_ISA
}  // namespace effnet
