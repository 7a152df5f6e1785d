// Expansion and depthwise convolution of a block in inference, by row bands that stay in cache; the
// first block without expansion forms the stem's rows for itself.
//
// Computes: y = silu(dw(silu(x W1 + b1)) + b2), BatchNorm folded into W1, dw and the shifts, and
//           the sums of y over the rows of each step
// Layout:   blocks of one cache line, see args.h; expanded rows fp32 in a ring per thread
// Bytes:    x once per group of channels, y once; the expanded tensor never leaves the L2 cache
// FLOPs:    2 Cin + 2 K^2 + about 30 for two SiLU, per expanded element
// Source:   original
// Truth:    effnet_fast/reference/{pointwise_bn_act,dwconv_bn_silu}.py
#include "cpu/network/stem.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kMaxOutputs = 14;  // of a tile: as many chains of FMA, 5 weights, 2 operands
#else
constexpr int kMaxOutputs = 8;
#endif

// Outputs [0, TILE) of one row and channel vector, stored as T kBlock apart; returns their sum.
// rows[i]: row i of the window at the first column; TAPS = 0 takes the kernel size at run time.
template <int TAPS, int STEP, int TILE, typename T>
EFFNET_NOINLINE Vec filter_tile(T* out, const float* const* rows, int64_t column,
                                const float* weight, const float* shift, int64_t taps) {
  Vec sum[TILE];
  const Vec start = load(shift);
#pragma GCC unroll 16
  for (int t = 0; t < TILE; t++) sum[t] = start;
  const int64_t kernel = TAPS ? TAPS : taps;
  for (int64_t i = 0; i < kernel; i++, weight += kernel * kUnit) {
    const float* const in = rows[i] + column;
    if constexpr (TAPS > 0) {
      Vec w[TAPS];
#pragma GCC unroll 8
      for (int j = 0; j < TAPS; j++) w[j] = in_register(load(weight + j * kUnit));
#pragma GCC unroll 32
      for (int c = 0; c < (TILE - 1) * STEP + TAPS; c++) {
        const Vec x = in_register(load(in + c * kUnit));
#pragma GCC unroll 8
        for (int j = 0; j < TAPS; j++) {
          const int t = (c - j) / STEP;
          if (c >= j && (c - j) % STEP == 0 && t < TILE) sum[t] += w[j] * x;
        }
      }
    } else {
      for (int64_t j = 0; j < kernel; j++) {
        const Vec w = load(weight + j * kUnit);
#pragma GCC unroll 16
        for (int t = 0; t < TILE; t++) sum[t] += w * load(in + (t * STEP + j) * kUnit);
      }
    }
  }
  Vec total = {};
#pragma GCC unroll 16
  for (int t = 0; t < TILE; t++) {
    const Vec y = silu_as<T>(sum[t]);
    store(out + t * kBlock<T>, y);
    total += y;
  }
  return total;
}

template <typename T>
using FilterTile = Vec (*)(T*, const float* const*, int64_t, const float*, const float*, int64_t);

template <typename T, int TAPS, int STEP>
FilterTile<T> filter_tile_of(int64_t outputs) {
#define EFFNET_TILE(n) filter_tile<TAPS, STEP, n, T>
  static constexpr FilterTile<T> tiles[] = {
      EFFNET_TILE(1),  EFFNET_TILE(2),  EFFNET_TILE(3),  EFFNET_TILE(4),
      EFFNET_TILE(5),  EFFNET_TILE(6),  EFFNET_TILE(7),  EFFNET_TILE(8),
#if defined(__AVX512F__)
      EFFNET_TILE(9),  EFFNET_TILE(10), EFFNET_TILE(11), EFFNET_TILE(12),
      EFFNET_TILE(13), EFFNET_TILE(14),
#endif
  };
#undef EFFNET_TILE
  return tiles[outputs - 1];
}

template <typename T>
using ChooseTile = FilterTile<T> (*)(int64_t);

template <typename T>
ChooseTile<T> tiles_for(int64_t kernel, int64_t stride) {
  if (kernel == 3) return stride == 1 ? filter_tile_of<T, 3, 1> : filter_tile_of<T, 3, 2>;
  if (kernel == 5) return stride == 1 ? filter_tile_of<T, 5, 1> : filter_tile_of<T, 5, 2>;
  return stride == 1 ? filter_tile_of<T, 0, 1> : filter_tile_of<T, 0, 2>;
}

// What a thread keeps while it goes down the rows of one image and group of channels.
template <typename T>
struct Band {
  const BlockLayer& layer;
  const BlockShape& shape;
  const BlockMemory<T>& memory;
  StemRows<T>* stem;  // of which x are the rows, or null
  bool amx;
  int64_t units;        // of the layer, those that only fill a block left out
  Range panels, group;  // panels of the expansion, and their units

  float* unit_ring(int64_t unit) const {
    return memory.ring + (unit - group.begin) * shape.unit_ring();
  }
  int64_t row_offset(int64_t row) const {
    return floor_mod(row, shape.slots) * shape.columns * kUnit;
  }

  void clear_borders() const {
    const int64_t right = shape.horizontal.before + shape.w;
    for (int64_t unit = group.begin; unit < group.end; unit++)
      for (int64_t slot = 0; slot < shape.slots; slot++) {
        float* const row = unit_ring(unit) + slot * shape.columns * kUnit;
        std::memset(row, 0, sizeof(float) * shape.horizontal.before * kUnit);
        if (right < shape.columns)
          std::memset(row + right * kUnit, 0, sizeof(float) * (shape.columns - right) * kUnit);
      }
  }

  // Puts input rows [begin, end) into the ring, those outside of the image as zeros.
  // image: of the stem.
  void fill(const Activations<T>& x, int64_t image, int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; row++)
      if (row < 0 || row >= shape.h)
        for (int64_t unit = group.begin; unit < group.end; unit++)
          std::memset(unit_ring(unit) + row_offset(row), 0, sizeof(float) * shape.columns * kUnit);
    begin = max_of(begin, 0), end = min_of(end, shape.h);
    if (stem)
      for (int64_t row = begin; row < end; row++) {
        stem->read(image, row);
        stem->write({group.begin, min_of(group.end, units)}, kUnit, [&](int64_t unit) {
          return unit_ring(unit) + row_offset(row) + shape.horizontal.before * kUnit;
        });
      }
    if (stem || begin >= end) return;
    int32_t* const offsets = reinterpret_cast<int32_t*>(memory.ring + memory.ring_floats);
    const Range pixels = {begin * shape.w, end * shape.w};
    for (int64_t row = begin, i = 0; row < end; row++) {
      const int64_t first = row_offset(row) + shape.horizontal.before * kUnit;
      for (int64_t column = 0; column < shape.w; column++, i++)
        offsets[i] = static_cast<int32_t>(first + column * kUnit);
    }
    if (layer.expands)
      expand(x, pixels, offsets);
    else
      copy(x, pixels, offsets);
  }

  // Narrow inputs by pieces that stay in the L1 cache while the weights pass by, wide ones as a
  // whole, panel by panel.
  void expand(const Activations<T>& x, Range pixels, const int32_t* offsets) const {
    constexpr int64_t kPieceBytes = 24 << 10;
    const int64_t chunks = kPieceBytes / 4 / words_of<T>(layer.in_channels) / kChunkPixels<T>;
    const int64_t piece = chunks ? chunks * kChunkPixels<T> : pixels.size();
    for (int64_t begin = pixels.begin; begin < pixels.end; begin += piece)
      expand_piece(x, {begin, min_of(pixels.end, begin + piece)}, chunks == 0,
                   offsets + begin - pixels.begin);
  }

  void expand_piece(const Activations<T>& x, Range pixels, bool fetch,
                    const int32_t* offsets) const {
    for (int64_t i = panels.begin; i < panels.end; i++) {
      const Panel panel(i, units_of<T>(layer.channels));
      float* const ring = unit_ring(panel.unit);
      const int64_t real = min_of(panel.units, units - panel.unit);
      multiply_chunks(x, pixels, layer.expand, panel, amx, fetch || i == panels.begin,
                      [&](int64_t first, int64_t count, const float* results) {
                        const int32_t* const to = offsets + first - pixels.begin;
                        for (int64_t u = 0; u < real; u++) {
                          float* const out = ring + u * shape.unit_ring();
                          const float* in = results + u * kUnit;
                          for (int64_t p = 0; p < count; p++, in += panel.units * kUnit)
#pragma GCC unroll 4
                            for (int part = 0; part < kParts; part++)
                              store(out + to[p] + part * kLanes,
                                    silu_as<T>(load(in + part * kLanes)));
                        }
                      });
    }
  }

  void copy(const Activations<T>& x, Range pixels, const int32_t* offsets) const {
    const int64_t ahead = pixels.size() * kBlock<T>;  // the rows of the next step
    for (int64_t unit = group.begin; unit < min_of(group.end, units); unit++) {
      const T* in = x.unit(unit) + pixels.begin * kBlock<T>;
      float* const out = unit_ring(unit);
      for (int64_t p = 0; p < pixels.size(); p++, in += kBlock<T>) {
        fetch<1>(in + ahead);
#pragma GCC unroll 4
        for (int part = 0; part < kParts; part++)
          store(out + offsets[p] + part * kLanes, load(in + part * kLanes));
      }
    }
  }

  // Output rows of one step from the ring.
  void filter(const Activations<T>& y, int64_t step, float* partial) const {
    const int64_t kernel = layer.kernel, ow = shape.horizontal.out, stride = layer.stride;
    const Range rows = {step * shape.rows, min_of(shape.vertical.out, (step + 1) * shape.rows)};
    const ChooseTile<T> tile_of = tiles_for<T>(kernel, stride);
    const int64_t tiles = ceil_div(ow, kMaxOutputs), least = ow / tiles, larger = ow % tiles;
    const float* window[kMaxKernel];
    for (int64_t unit = group.begin; unit < group.end; unit++) {
      T* const out = y.unit(unit);
      if (unit >= units) {
        for (int64_t p = rows.begin * ow; p < rows.end * ow; p++)
          std::memset(out + p * kBlock<T>, 0, sizeof(T) * kUnit);
        std::memset(partial + unit * kUnit, 0, sizeof(float) * kUnit);
        continue;
      }
      const float* const weight = layer.filter + unit * kernel * kernel * kUnit;
      for (int part = 0; part < kParts; part++) {
        const int64_t lane = part * kLanes;
        const float* const shift = layer.filter_shift + unit * kUnit + lane;
        Vec total = {};
        for (int64_t row = rows.begin; row < rows.end; row++) {
          const int64_t top = row * stride - shape.vertical.before;
          for (int64_t i = 0; i < kernel; i++)
            window[i] = unit_ring(unit) + row_offset(top + i) + lane;
          T* to = out + row * ow * kBlock<T> + lane;
          for (int64_t i = 0, column = 0; i < tiles; i++) {
            const int64_t outputs = least + (i < larger);
            total += tile_of(outputs)(to, window, column, weight + lane, shift, kernel);
            to += outputs * kBlock<T>, column += outputs * stride * kUnit;
          }
        }
        store(partial + unit * kUnit + lane, total);
      }
    }
  }
};

}  // namespace

BlockShape::BlockShape(const BlockLayer& layer, int64_t h, int64_t w)
    : h(h),
      w(w),
      vertical(layer.padding, layer.padding.top, layer.padding.bottom, h, layer.kernel,
               layer.stride),
      horizontal(layer.padding, layer.padding.left, layer.padding.right, w, layer.kernel,
                 layer.stride) {
  // Rows enough for a product's tiles to be full; small images as a whole.
  constexpr int64_t kPixels = 256;
  rows = min_of(vertical.out, ceil_div(kPixels, w * layer.stride));
  if (vertical.out * horizontal.out <= 2 * kPixels) rows = vertical.out;
  steps = ceil_div(vertical.out, rows);
  rows = ceil_div(vertical.out, steps);
  steps = ceil_div(vertical.out, rows);
  slots = (rows - 1) * layer.stride + layer.kernel;
  columns = max_of((horizontal.out - 1) * layer.stride + layer.kernel, horizontal.before + w);
}

template <typename T>
void run_filter(const BlockLayer& layer, const BlockShape& shape, Images<T> x,
                const BlockMemory<T>& memory, int64_t l2, bool amx, Team team, StemRows<T>* stem,
                int64_t first) {
  const int64_t units = units_of<T>(layer.channels), panels = Panel::count(units);
  // As many channels as the L2 cache has room for beside a step's rows of x. Where rows are few, a
  // team divides the channels: dividing rows computes the halo twice.
  const int64_t rows_of_x = shape.slots * shape.w * words_of<T>(layer.in_channels);
  const int64_t room = max_of(l2 / 8, l2 * 5 / 8 - rows_of_x * 4) / 4;
  const int64_t fitting = min_of(room, memory.ring_floats) / shape.unit_ring();  // units
  int64_t groups = ceil_div(panels, max_of(1, (fitting - kMaxUnits) / kTileUnits + 1));
  const int64_t halo = layer.kernel - layer.stride;
  const bool few_rows = shape.h < 12 * halo * team.size || shape.steps < team.size;
  if (x.count % team.size && few_rows) groups = ceil_div(groups, team.size) * team.size;
  groups = min_of(groups, panels);
  const Range part = team.part(groups * x.count * shape.steps);
  if (stem) stem->begin();
  for (int64_t i = part.begin, next_row = 0; i < part.end; i++) {
    const int64_t step = i % shape.steps, n = i / shape.steps % x.count;
    const Range of_group = part_of(panels, groups, i / shape.steps / x.count);
    const Range group = Panel::units_of(of_group, units);
    const Band<T> band = {layer,    shape, memory, stem, amx, ceil_div(layer.channels, kUnit),
                          of_group, group};
    const int64_t top = step * shape.rows * layer.stride - shape.vertical.before;
    const int64_t last = min_of(shape.vertical.out, (step + 1) * shape.rows) - 1;
    const int64_t bottom = last * layer.stride - shape.vertical.before + layer.kernel;
    if (i == part.begin || step == 0) {
      band.clear_borders();
      next_row = top;
    }
    band.fill({x[n], shape.in_pixels(), layer.in_channels}, first + n, next_row, bottom);
    next_row = bottom;
    band.filter({memory.filtered + n * memory.filtered_size, shape.pixels(), layer.channels}, step,
                memory.partial + (n * shape.steps + step) * units * kUnit);
  }
}

template void run_filter(const BlockLayer&, const BlockShape&, Images<float>,
                         const BlockMemory<float>&, int64_t, bool, Team, StemRows<float>*, int64_t);
#if defined(__AVX512BF16__)
template void run_filter(const BlockLayer&, const BlockShape&, Images<bf16>,
                         const BlockMemory<bf16>&, int64_t, bool, Team, StemRows<bf16>*, int64_t);
#endif

}  // namespace EFFNET_ISA
}  // namespace effnet
