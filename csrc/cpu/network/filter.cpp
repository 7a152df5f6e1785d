// Expansion and depthwise convolution of a block in inference, by row bands that stay in cache. The
// first block without expansion forms the stem's rows for itself; a block without
// squeeze-and-excite projects its rows at once where one thread has all of their channels.
//
// Computes: y = act(dw(act(x W1 + b1)) + b2), BatchNorm folded into W1, dw and the shifts, and
//           the sums of y over the rows of each step
// Layout:   blocks of one cache line, see args.h; expanded rows fp32 in a ring per thread
// Bytes:    x once per group of channels, y once; the expanded tensor never leaves the L2 cache,
// nor
//           does y where it is projected at once
// FLOPs:    2 Cin + 2 K^2 + about 30 for two SiLU or 4 for two clamps, per expanded element
// Source:   original
// Truth:    effnet_fast/reference/{pointwise_bn_act,dwconv_bn_silu}.py
#include "cpu/network/stem.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

// Of a tile: as many chains of FMA, 5 weights and 2 operands in the registers.
constexpr int kMaxOutputs = kRegisters == 32 ? 14 : 8;

// Outputs [0, TILE) of one row and channel vector, stored as T kBlock apart; returns their sum
// where the block has squeeze-and-excite. rows[i]: row i of the window at the first column; TAPS =
// 0 takes the kernel size at run time.
template <int TAPS, int STEP, int TILE, typename T, typename A>
EFFNET_NOINLINE Vec filter_tile(T* out, const float* const* rows, int64_t column,
                                const float* weight, const float* shift, const BlockLayer& layer) {
  Vec sum[TILE];
  const Vec start = load(shift);
#pragma GCC unroll 16
  for (int t = 0; t < TILE; t++) sum[t] = start;
  const int64_t kernel = TAPS ? TAPS : layer.kernel;
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
  const A act(layer.activation);
  constexpr bool kHides = std::is_same_v<A, Silu>;  // the time of the sum, wanted or not
  Vec total = {};
#pragma GCC unroll 16
  for (int t = 0; t < TILE; t++) {
    const Vec y = activate_as<T>(act, sum[t]);
    store(out + t * kBlock<T>, y);
    if constexpr (kHides)
      total += y;
    else
      sum[t] = y;
  }
#pragma GCC unroll 16
  for (int t = 0; t < TILE && !kHides && layer.se_channels > 0; t++) total += sum[t];
  return total;
}

// A row's outputs one by one, each from its taps inside of the image: of an infinite weight 0 * x
// is NaN. Otherwise as filter_tile; top: the input row of rows[0].
template <typename T, typename A>
Vec filter_inside(T* out, const float* const* rows, int64_t top, const float* weight,
                  const float* shift, const BlockLayer& layer, const BlockShape& shape) {
  const A act(layer.activation);
  const int64_t kernel = layer.kernel;
  Vec total = {};
  for (int64_t p = 0; p < shape.horizontal.out; p++) {
    const int64_t left = p * layer.stride;  // in the ring; in the image it is less by the padding
    Vec sum = load(shift);
    for (int64_t i = 0; i < kernel * kernel; i++) {
      const int64_t row = top + i / kernel, column = left + i % kernel - shape.horizontal.before;
      if (row < 0 || row >= shape.h || column < 0 || column >= shape.w) continue;
      sum += load(weight + i * kUnit) * load(rows[i / kernel] + (left + i % kernel) * kUnit);
    }
    const Vec y = activate_as<T>(act, sum);
    store(out + p * kBlock<T>, y);
    total += y;
  }
  return total;
}

template <typename T>
using FilterTile = Vec (*)(T*, const float* const*, int64_t, const float*, const float*,
                           const BlockLayer&);

template <typename T, typename A, int TAPS, int STEP>
struct FilterTiles {
  template <int TILE>
  static constexpr FilterTile<T> of = filter_tile<TAPS, STEP, TILE, T, A>;
};

template <typename T, typename A, int TAPS, int STEP>
FilterTile<T> filter_tile_of(int64_t outputs) {
  using Outputs = std::make_integer_sequence<int, kMaxOutputs>;
  return tile_of_rows<FilterTile<T>, FilterTiles<T, A, TAPS, STEP>>(outputs, Outputs());
}

template <typename T>
using ChooseTile = FilterTile<T> (*)(int64_t);

template <typename T, typename A, int TAPS>
ChooseTile<T> tiles_of(int64_t stride) {
  return stride == 1 ? filter_tile_of<T, A, TAPS, 1> : filter_tile_of<T, A, TAPS, 2>;
}

template <typename T, typename A>
ChooseTile<T> tiles_for(int64_t kernel, int64_t stride) {
  // Hard-swish takes the kernel size at run time: tiles of its own would be as much code again.
  if constexpr (!std::is_same_v<A, HardSwish>) {
    if (kernel == 3) return tiles_of<T, A, 3>(stride);
    if (kernel == 5) return tiles_of<T, A, 5>(stride);
  }
  return tiles_of<T, A, 0>(stride);
}

// What a thread keeps while it goes down the rows of one image and group of channels.
template <typename T, typename A>
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
    const A act(layer.activation);
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
                                    activate_as<T>(act, load(in + part * kLanes)));
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

  // Output rows from the ring, to y, which begins with row `first`; the sums of y to partial.
  void filter(const Activations<T>& y, Range rows, int64_t first, float* partial) const {
    const int64_t kernel = layer.kernel, ow = shape.horizontal.out, stride = layer.stride;
    const ChooseTile<T> tile_of = tiles_for<T, A>(kernel, stride);
    const int64_t tiles = ceil_div(ow, kMaxOutputs), least = ow / tiles, larger = ow % tiles;
    const float* window[kMaxKernel];
    for (int64_t unit = group.begin; unit < group.end; unit++) {
      T* const out = y.unit(unit);
      if (unit >= units) {
        for (int64_t p = (rows.begin - first) * ow; p < (rows.end - first) * ow; p++)
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
          T* to = out + (row - first) * ow * kBlock<T> + lane;
          if (!layer.finite) {
            total += filter_inside<T, A>(to, window, top, weight + lane, shift, layer, shape);
            continue;
          }
          for (int64_t i = 0, column = 0; i < tiles; i++) {
            const int64_t outputs = least + (i < larger);
            total += tile_of(outputs)(to, window, column, weight + lane, shift, layer);
            to += outputs * kBlock<T>, column += outputs * stride * kUnit;
          }
        }
        store(partial + unit * kUnit + lane, total);
      }
    }
  }
};

template <typename T, typename A>
bool run(const BlockLayer& layer, const BlockShape& shape, Images<T> x, Images<T> y,
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
  const bool projects = groups == 1 && projects_rows<T>(layer);
  const Range part = team.part(groups * x.count * shape.steps);
  if (stem) stem->begin();
  for (int64_t i = part.begin, next_row = 0; i < part.end; i++) {
    const int64_t step = i % shape.steps, n = i / shape.steps % x.count;
    const Range of_group = part_of(panels, groups, i / shape.steps / x.count);
    const Range group = Panel::units_of(of_group, units);
    const Band<T, A> band = {layer,    shape, memory, stem, amx, ceil_div(layer.channels, kUnit),
                             of_group, group};
    const Range rows = {step * shape.rows, min_of(shape.vertical.out, (step + 1) * shape.rows)};
    const int64_t top = rows.begin * layer.stride - shape.vertical.before;
    const int64_t bottom = (rows.end - 1) * layer.stride - shape.vertical.before + layer.kernel;
    if (i == part.begin || step == 0) {
      band.clear_borders();
      next_row = top;
    }
    band.fill({x[n], shape.in_pixels(), layer.in_channels}, first + n, next_row, bottom);
    next_row = bottom;
    float* const partial = memory.partial + (n * shape.steps + step) * units * kUnit;
    if (!projects) {
      T* const filtered = memory.filtered + n * memory.filtered_size;
      band.filter({filtered, shape.pixels(), layer.channels}, rows, 0, partial);
      continue;
    }
    const int64_t ow = shape.horizontal.out;
    const Activations<T> filtered = {memory.rows, rows.size() * ow, layer.channels};
    band.filter(filtered, rows, rows.begin, partial);
    project_pixels<T>(layer, filtered, {x[n], shape.pixels(), layer.out_channels},
                      {y[n], shape.pixels(), layer.out_channels}, rows.begin * ow, amx);
  }
  return projects;
}

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
bool run_filter(const BlockLayer& layer, const BlockShape& shape, Images<T> x, Images<T> y,
                const BlockMemory<T>& memory, int64_t l2, bool amx, Team team, StemRows<T>* stem,
                int64_t first) {
  return with_activation(layer.activation, [&]<typename A>() {
    return run<T, A>(layer, shape, x, y, memory, l2, amx, team, stem, first);
  });
}

template bool run_filter(const BlockLayer&, const BlockShape&, Images<float>, Images<float>,
                         const BlockMemory<float>&, int64_t, bool, Team, StemRows<float>*, int64_t);
#if defined(__AVX512BF16__)
template bool run_filter(const BlockLayer&, const BlockShape&, Images<bf16>, Images<bf16>,
                         const BlockMemory<bf16>&, int64_t, bool, Team, StemRows<bf16>*, int64_t);
#endif

}  // namespace EFFNET_ISA
}  // namespace effnet
