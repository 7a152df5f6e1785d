// What the layers of a network for inference share: see args.h for the layouts.
#pragma once

#include <omp.h>

#include <type_traits>

#include "cpu/network/args.h"
#include "cpu/network/product_amx.h"

namespace effnet {
namespace EFFNET_ISA {

// The threads that work on one thing, and which of them this is.
struct Team {
  int64_t index, size;
  Range part(int64_t total) const { return part_of(total, size, index); }
  // Until all are here; a team of one never waits, whatever other threads do.
  void wait() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
};

template <typename T>
constexpr int64_t kBlock = 64 / sizeof(T);  // channels of a cache line
template <typename T>
inline int64_t blocks_of(int64_t channels) {
  return ceil_div(channels, kBlock<T>);
}
// Units of a tensor's blocks: in bf16 an even number.
template <typename T>
inline int64_t units_of(int64_t channels) {
  return blocks_of<T>(channels) * (kBlock<T> / kUnit);
}
// Words of 32 bits that a product of this many channels adds up.
template <typename T>
inline int64_t words_of(int64_t channels) {
  return sizeof(T) == 4 ? channels : blocks_of<T>(channels) * kUnit;
}

// One image's activations.
template <typename T>
struct Activations {
  T* data;
  int64_t pixels, channels;
  // The first pixel of a unit; the next one is kBlock<T> elements further.
  T* unit(int64_t u) const {
    constexpr int64_t per_block = kBlock<T> / kUnit;
    return data + (u / per_block * pixels * per_block + u % per_block) * kUnit;
  }
  const float* words(int64_t pixel) const {
    return reinterpret_cast<const float*>(data) + pixel * kUnit;
  }
  int64_t words_step() const { return pixels * kUnit; }
  static int64_t size(int64_t pixels, int64_t channels) {
    return blocks_of<T>(channels) * kBlock<T> * pixels;
  }
};

// Panels of a product's output units.
struct Panel {
  int64_t unit, units;
  Panel(int64_t index, int64_t all)
      : unit(index * kTileUnits), units(index + 1 < count(all) ? kTileUnits : all - unit) {}
  int64_t width() const { return units * kUnit; }
  static int64_t count(int64_t units) { return max_of(1, units / kTileUnits); }
  // The units of panels [begin, end).
  static Range units_of(Range panels, int64_t all) {
    return {panels.begin * kTileUnits, panels.end < count(all) ? panels.end * kTileUnits : all};
  }
};

// Words [begin, end) of K, the pixels, and which output units of a product.
struct Part {
  Range k;  // begins at a multiple of 16
  Range pixels;
  Panel panel;
  bool amx;
  bool fetch;                // whether x comes from beyond the L2 cache
  int64_t tiles_before = 0;  // of the same panel and part of K
};

constexpr int64_t kAmxSlack = kAmxPixels - 1;  // pixels that `out` needs beyond those asked for

// out [pixels][panel width] = x times the panel's weights over a part of K, plus the shift where K
// begins and what is in `out` already where it goes on.
template <typename T>
EFFNET_INLINE void multiply(float* out, const Activations<T>& x, const Part& part,
                            const Product& product, const void* weight) {
  const int64_t words = words_of<T>(product.in_channels), width = part.panel.width();
  TileOperands tile;
  tile.a_step = x.words_step();
  const float* const b =
      static_cast<const float*>(weight) + part.panel.unit * words * kUnit + part.k.begin * width;
  const float* const shift = product.shift + part.panel.unit * kUnit;
  const float* const a = x.words(part.pixels.begin) + part.k.begin / kUnit * tile.a_step;
  const int64_t pixels = part.pixels.size();
  // The same part of the next panel is fetched while the first tiles run.
  const auto place = [&](int64_t pixel, int64_t k, int64_t words_here, int64_t tiles_done) {
    tile.out = out + pixel * width;
    const bool begins = part.k.begin + k == 0;
    tile.start = begins ? shift : tile.out;
    tile.start_step = begins ? 0 : width;
    tile.a = a + k / kUnit * tile.a_step + pixel * kUnit;
    tile.b = b + k * width;
    tile.k = words_here;
    const int64_t fetched = tiles_done * ceil_div(words_here, kUnit) * kAhead;
    tile.ahead = tile.b + words * width + (fetched < words_here * width ? fetched : 0);
  };
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2)
    if (part.amx && part.panel.units == 2) {
      for (int64_t p = 0; p < pixels; p += kAmxPixels) {
        place(p, 0, part.k.size(), part.tiles_before + p / kAmxPixels);
        if (pixels - p > kAmxPixels / 2)
          amx_tile_2(tile);
        else
          amx_tile_1(tile);
      }
      return;
    }
  using Multiply = std::conditional_t<sizeof(T) == 4, MultiplyFloat, MultiplyPairs>;
#else
  using Multiply = MultiplyFloat;
#endif
  ProductTile (*tile_of)(int64_t) = product_tile_of<Multiply, kTileUnits, false>;
  int64_t most = kTilePixels;
  if (part.fetch) tile_of = product_tile_of<Multiply, kTileUnits, true>;
  if (part.panel.units < kTileUnits) tile_of = product_tile_of<Multiply, 1, false>;
  if (part.panel.units > kTileUnits) {
    tile_of = part.fetch ? product_tile_of<Multiply, kMaxUnits, true>
                         : product_tile_of<Multiply, kMaxUnits, false>;
    most = kWidePixels;
  }
  // Tiles of nearly equal size; all of them by one part of K, whose weights stay in the L1 cache.
  const int64_t tiles = ceil_div(pixels, most);
  for (int64_t k = 0; k < part.k.size(); k += kChain) {
    const int64_t words_here = min_of(part.k.size() - k, kChain);
    for (int64_t i = 0; i < tiles; i++) {
      const Range own = part_of(pixels, tiles, i);
      place(own.begin, k, words_here, part.tiles_before + i);
      tile_of(own.size())(tile);
    }
  }
}

template <typename T>
constexpr int64_t kChunkPixels = sizeof(T) == 2 ? 64 : 64 / kTilePixels * kTilePixels;

// The same over the whole of K by chunks of pixels, whose results stay in the L1 cache: calls
// done(first pixel, count, results [count][panel width]).
template <typename T, typename Done>
EFFNET_INLINE void multiply_chunks(const Activations<T>& x, Range pixels, const Product& product,
                                   Panel panel, bool amx, bool fetch, const Done& done) {
  alignas(64) float results[(kChunkPixels<T> + kAmxSlack) * kMaxUnits * kUnit];
  const int64_t words = words_of<T>(product.in_channels);
  for (int64_t begin = pixels.begin; begin < pixels.end; begin += kChunkPixels<T>) {
    const Range chunk = {begin, min_of(pixels.end, begin + kChunkPixels<T>)};
    const int64_t tiles_before = (begin - pixels.begin) / (amx ? kAmxPixels : kTilePixels);
    multiply(results, x, {{0, words}, chunk, panel, amx, fetch, tiles_before}, product,
             product.weight);
    done(begin, chunk.size(), results);
  }
}

// Sizes of a convolution along one direction.
struct Sides {
  int64_t before, out;
  Sides(const Padding& padding, int64_t before, int64_t after, int64_t in, int64_t kernel,
        int64_t stride) {
    if (padding.same) {
      out = ceil_div(in, stride);
      before = max_of(0, (out - 1) * stride + kernel - in) / 2;
    } else {
      out = (in + before + after - kernel) / stride + 1;
    }
    this->before = before;
  }
};

// One image's part of a layer that only reads or writes the channels of its pixels: y = x * factor
// and the like are loops over a unit's pixels.
template <typename T, typename Change>
EFFNET_INLINE void for_unit(T* unit, int64_t pixels, const Change& change) {
  for (int64_t p = 0; p < pixels; p++, unit += kBlock<T>)
#pragma GCC unroll 4
    for (int part = 0; part < kParts; part++) change(unit + part * kLanes, part);
}

}  // namespace EFFNET_ISA
}  // namespace effnet
