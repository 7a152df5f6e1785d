// FusedMBConv in inference: dense convolution, activation and projection row by row, in one pass.
//
// Computes: y = act(conv(x, W1) + b1) W2 + b2 [+ x], or y = act(conv(x, W1) + b1) [+ x] where there
//           is no projection; BatchNorm folded into weights and shifts
// Layout:   blocks of one cache line, see args.h; W1 as a product's weights with K = taps * Cin
// Tiling:   a thread owns output rows. The input rows under one of them lie with their zeros in a
//           ring; from there register tiles of pixels times output channels are multiplied, tap by
//           tap. The expanded pixels of a row, or of as much of it as a quarter of the L2 cache
//           holds, are projected before the next ones are computed
// Bytes:    x once from memory and once more from cache where it is added, y once; weights from the
//           L2 cache, once per row
// FLOPs:    2 K^2 Cin + 2 Cout + about 15 for SiLU or 2 for clamp, per expanded element
// Source:   original
// Truth:    effnet_fast/reference/{stem_conv_bn_silu,pointwise_bn_act}.py
#include "cpu/network/dense_tile.h"
#include "cpu/network/layers.h"
#include "cpu/network/silu.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

// Where a thread's memory has what: all sizes in floats, which are words of 32 bits.
template <typename T>
struct DensePlan {
  int64_t blocks;  // cache lines of an input pixel
  int64_t line;    // from one block of a row in the ring to the next
  int64_t taps;
  int64_t ring, table, pixel;  // pixel: expanded, and its results of one panel
  static constexpr int64_t kLeastPixels = 64;

  DensePlan(const BlockLayer& layer, const BlockShape& shape)
      : blocks(blocks_of<T>(layer.in_channels)),
        line(shape.columns * kUnit),
        taps(layer.kernel * layer.kernel),
        // The tile unit reads whole tiles of pixels beyond the last row.
        ring(layer.kernel * blocks * line + kAmxPixels * layer.stride * kUnit),
        table(ceil_div(taps * blocks * static_cast<int64_t>(sizeof(KBlock)), 64) * kUnit),
        pixel(kMaxUnits * kUnit + (layer.projects ? blocks_of<T>(layer.channels) * kUnit : 0)) {}
  // Beside what grows with the pixels: whole tiles of results, and of expanded pixels.
  int64_t fixed() const { return ring + table + kAmxPixels * (kMaxUnits + 1) * kUnit; }
  int64_t least() const { return fixed() + kLeastPixels * pixel; }
  // Pixels of a row at a time.
  int64_t pixels(int64_t floats, int64_t l2) const {
    return min_of((floats - fixed()) / pixel, max_of(kLeastPixels, l2 / 4 / 4 / pixel));
  }
};

struct Linear {  // no activation
  EFFNET_INLINE Vec value(Vec u) const { return u; }
};

// Results of one panel, [count][width], to pixels from `first` on.
template <typename T, bool RESIDUAL, typename A>
EFFNET_INLINE void store_results(const A& act, const Activations<T>& y, const Activations<T>& x,
                                 Panel panel, int64_t first, int64_t count, const float* results) {
  for (int64_t u = 0; u < panel.units; u++) {
    const float* in = results + u * kUnit;
    T* to = y.unit(panel.unit + u) + first * kBlock<T>;
    const T* added = RESIDUAL ? x.unit(panel.unit + u) + first * kBlock<T> : nullptr;
    for (int64_t p = 0; p < count; p++, in += panel.width(), to += kBlock<T>)
#pragma GCC unroll 4
      for (int part = 0; part < kParts; part++) {
        Vec v = activate_as<T>(act, load(in + part * kLanes));
        if constexpr (RESIDUAL) v += load(added + p * kBlock<T> + part * kLanes);
        store(to + part * kLanes, v);
      }
  }
}

// A thread on its way down the rows of an image.
template <typename T, typename A>
struct DenseRows {
#if defined(__AVX512BF16__)
  using Multiply = std::conditional_t<sizeof(T) == 4, MultiplyFloat, MultiplyPairs>;
#else
  using Multiply = MultiplyFloat;
#endif
  using TileOf = DenseTile (*)(int64_t);  // by the number of pixels

  const BlockLayer& layer;
  const BlockShape& shape;
  const DensePlan<T>& plan;
  bool amx;
  float *ring, *expanded, *results;
  KBlock* table;
  int64_t top = 0;  // the input row where an output row's window begins

  DenseRows(const BlockLayer& layer, const BlockShape& shape, const DensePlan<T>& plan, bool amx,
            float* memory, int64_t most)
      : layer(layer), shape(shape), plan(plan), amx(amx), ring(memory) {
    table = reinterpret_cast<KBlock*>(memory + plan.ring);
    results = memory + plan.ring + plan.table;
    expanded = results + (most + kAmxPixels) * kMaxUnits * kUnit;
  }

  float* line(int64_t row, int64_t block) const {
    return ring + (floor_mod(row, layer.kernel) * plan.blocks + block) * plan.line;
  }

  void clear_borders() const {
    const int64_t left = shape.horizontal.before, right = left + shape.w;
    for (int64_t row = 0; row < layer.kernel; row++)
      for (int64_t block = 0; block < plan.blocks; block++) {
        float* const to = line(row, block);
        std::memset(to, 0, sizeof(float) * left * kUnit);
        if (right < shape.columns)
          std::memset(to + right * kUnit, 0, sizeof(float) * (shape.columns - right) * kUnit);
      }
  }

  // Puts input rows [begin, end) into the ring, those outside of the image as zeros.
  void fill(const Activations<T>& x, int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; row++)
      for (int64_t block = 0; block < plan.blocks; block++) {
        float* const to = line(row, block);
        if (row < 0 || row >= shape.h)
          std::memset(to, 0, sizeof(float) * plan.line);
        else
          std::memcpy(to + shape.horizontal.before * kUnit,
                      x.words(row * shape.w) + block * x.words_step(),
                      sizeof(float) * shape.w * kUnit);
      }
  }

  // Where the words of K lie for an output row whose window begins at this input row.
  void place(int64_t first) {
    top = first;
    const int64_t last = words_of<T>(layer.in_channels) - (plan.blocks - 1) * kUnit;
    KBlock* to = table;
    int64_t before = 0;
    for (int64_t i = 0; i < plan.taps; i++)
      for (int64_t block = 0; block < plan.blocks; block++, to++) {
        const float* const at = line(top + i / layer.kernel, block) + i % layer.kernel * kUnit;
        *to = {at - ring, block + 1 < plan.blocks ? kUnit : last, before};
        before += to->words;
      }
  }

  const float* weights_of(Panel panel) const {
    const int64_t words = words_of<T>(layer.in_channels) * plan.taps;
    return static_cast<const float*>(layer.dense.weight) + panel.unit * words * kUnit;
  }

  template <int STEP>
  static TileOf tile_of(Panel panel) {
    if (panel.units < kTileUnits) return dense_tile_of<Multiply, STEP, 1>;
    if (panel.units > kTileUnits) return dense_tile_of<Multiply, STEP, kMaxUnits>;
    return dense_tile_of<Multiply, STEP, kTileUnits>;
  }

  // results [count][panel width] of output pixels from `first` on.
  template <int STEP>
  void convolve(Panel panel, int64_t first, int64_t count) const {
    if (!layer.finite) return convolve_inside<STEP>(panel, first, count);
    const int64_t blocks = plan.taps * plan.blocks, width = panel.width();
    const float* const b = weights_of(panel);
    const float* const shift = layer.dense.shift + panel.unit * kUnit;
    DenseOperands tile;
    const auto at = [&](int64_t pixel, int64_t begin, int64_t end) {
      tile.out = results + pixel * width;
      tile.start = begin == 0 ? shift : tile.out;
      tile.start_step = begin == 0 ? 0 : width;
      tile.a = ring + (first + pixel) * STEP * kUnit;
      tile.k = table + begin, tile.k_end = table + end;
      tile.b = b + table[begin].before * width;
    };
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2)
      if (amx && panel.units == 2) {
        for (int64_t p = 0; p < count; p += kAmxPixels) {
          at(p, 0, blocks);
          if (count - p > kAmxPixels / 2)
            amx_dense_tile<STEP, 2>(tile);
          else
            amx_dense_tile<STEP, 1>(tile);
        }
        return;
      }
#endif
    const TileOf tile_of_size = tile_of<STEP>(panel);
    // As `multiply`: tiles of nearly equal size, all by one part of K.
    const int64_t tiles = ceil_div(count, panel.units > kTileUnits ? kWidePixels : kTilePixels);
    for (int64_t k = 0; k < blocks; k += kChain / kUnit)
      for (int64_t i = 0; i < tiles; i++) {
        const Range own = part_of(count, tiles, i);
        at(own.begin, k, min_of(blocks, k + kChain / kUnit));
        tile_of_size(own.size())(tile);
      }
  }

  // The same, each pixel from its taps inside of the image: of an infinite weight 0 * x is NaN.
  template <int STEP>
  void convolve_inside(Panel panel, int64_t first, int64_t count) const {
    const DenseTile add_tap = tile_of<STEP>(panel)(1);
    const int64_t width = panel.width();
    DenseOperands tile;
    tile.out = results, tile.start_step = 0;
    for (int64_t p = first; p < first + count; p++, tile.out += width) {
      std::memcpy(tile.out, layer.dense.shift + panel.unit * kUnit, sizeof(float) * width);
      tile.start = tile.out;
      tile.a = ring + p * STEP * kUnit;
      for (int64_t i = 0; i < plan.taps; i++) {
        const int64_t row = top + i / layer.kernel;
        const int64_t column = p * STEP - shape.horizontal.before + i % layer.kernel;
        if (row < 0 || row >= shape.h || column < 0 || column >= shape.w) continue;
        tile.k = table + i * plan.blocks, tile.k_end = tile.k + plan.blocks;
        tile.b = weights_of(panel) + tile.k->before * width;
        add_tap(tile);
      }
    }
  }

  // Output pixels [first, first + count) of a row; x and y: of the whole image, where the row
  // begins at pixel `offset`.
  void run(const Activations<T>& x, const Activations<T>& y, int64_t offset, int64_t first,
           int64_t count) const {
    const int64_t units = units_of<T>(layer.channels);
    const A act(layer.activation);
    const Activations<T> inner = {reinterpret_cast<T*>(expanded), count, layer.channels};
    for (int64_t i = 0; i < Panel::count(units); i++) {
      const Panel panel(i, units);
      if (layer.stride == 1)
        convolve<1>(panel, first, count);
      else
        convolve<2>(panel, first, count);
      if (layer.projects)
        store_results<T, false>(act, inner, x, panel, 0, count, results);
      else if (layer.residual)
        store_results<T, true>(act, y, x, panel, offset + first, count, results);
      else
        store_results<T, false>(act, y, x, panel, offset + first, count, results);
    }
    if (!layer.projects) return;
    const int64_t out = units_of<T>(layer.out_channels), words = words_of<T>(layer.channels);
    for (int64_t i = 0; i < Panel::count(out); i++) {
      const Panel panel(i, out);
      multiply(results, inner, {{0, words}, {0, count}, panel, amx, false}, layer.project,
               layer.project.weight);
      if (layer.residual)
        store_results<T, true>(Linear(), y, x, panel, offset + first, count, results);
      else
        store_results<T, false>(Linear(), y, x, panel, offset + first, count, results);
    }
  }
};

template <typename T, typename A>
void run_rows(const BlockLayer& layer, const BlockShape& shape, Images<T> x, Images<T> y,
              const BlockMemory<T>& memory, int64_t l2, bool amx, Team team) {
  const DensePlan<T> plan(layer, shape);
  const int64_t height = shape.vertical.out, width = shape.horizontal.out;
  const int64_t chunks = ceil_div(width, plan.pixels(memory.ring_floats, l2));
  DenseRows<T, A> rows(layer, shape, plan, amx, memory.ring, ceil_div(width, chunks));
  const Range part = team.part(x.count * height);
  for (int64_t i = part.begin, next = 0; i < part.end; i++) {
    const int64_t n = i / height, row = i % height;
    const int64_t top = row * layer.stride - shape.vertical.before;
    const Activations<T> in = {x[n], shape.in_pixels(), layer.in_channels};
    const Activations<T> out = {y[n], shape.pixels(), layer.out_channels};
    if (i == part.begin || row == 0) {
      rows.clear_borders();
      next = top;
    }
    rows.fill(in, max_of(next, top), top + layer.kernel);
    next = top + layer.kernel;
    rows.place(top);
    for (int64_t c = 0; c < chunks; c++) {
      const Range chunk = part_of(width, chunks, c);
      rows.run(in, out, row * width, chunk.begin, chunk.size());
    }
  }
}

}  // namespace

template <typename T>
int64_t dense_floats(const BlockLayer& layer, const BlockShape& shape) {
  return DensePlan<T>(layer, shape).least();
}

template <typename T>
void run_dense(const BlockLayer& layer, const BlockShape& shape, Images<T> x, Images<T> y,
               const BlockMemory<T>& memory, int64_t l2, bool amx, Team team) {
  with_activation(layer.activation,
                  [&]<typename A>() { run_rows<T, A>(layer, shape, x, y, memory, l2, amx, team); });
}

#define EFFNET_DENSE(T)                                                               \
  template int64_t dense_floats<T>(const BlockLayer&, const BlockShape&);             \
  template void run_dense(const BlockLayer&, const BlockShape&, Images<T>, Images<T>, \
                          const BlockMemory<T>&, int64_t, bool, Team);
EFFNET_DENSE(float)
#if defined(__AVX512BF16__)
EFFNET_DENSE(bf16)
#endif

}  // namespace EFFNET_ISA
}  // namespace effnet
