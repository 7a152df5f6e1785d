// What the layers of a network for inference share: see network.h for the layouts.
#pragma once

#include <omp.h>

#include <type_traits>

#include "cpu/network.h"
#include "cpu/product_amx.h"

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

constexpr int64_t kChunkPixels = 64;  // of a product's results at a time: they stay in L1
struct alignas(64) ChunkBuffer {
  float data[kChunkPixels * kTileUnits * kUnit];
};

// Panels of a product's output units.
struct Panel {
  int64_t unit, units;
  Panel(int64_t index, int64_t all)
      : unit(index * kTileUnits), units(min_of(kTileUnits, all - unit)) {}
  static int64_t count(int64_t units) { return ceil_div(units, kTileUnits); }
};

// Calls done(first pixel, count, results [count][panel.units * 16]) for pixels [begin, end) of x
// times the panel's weights plus their shift.
template <typename T, typename Done>
EFFNET_INLINE void multiply(const Activations<T>& x, Range range, const Product& product,
                            const void* weight, Panel panel, bool amx, const Done& done) {
  ChunkBuffer buffer;
  const int64_t words = words_of<T>(product.in_channels), step = x.words_step();
  const float* const b = static_cast<const float*>(weight) + panel.unit * words * kUnit;
  const float* const shift = product.shift + panel.unit * kUnit;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2)
    if (amx && panel.units == 2) {
      for (int64_t begin = range.begin; begin < range.end; begin += kChunkPixels) {
        const int64_t count = min_of(kChunkPixels, range.end - begin);
        for (int64_t p = 0; p < count; p += kAmxPixels) {
          float* const out = buffer.data + p * 2 * kUnit;
          if (count - p > kAmxPixels / 2)
            amx_tile_2(out, x.words(begin + p), step, b, shift, words);
          else
            amx_tile_1(out, x.words(begin + p), step, b, shift, words);
        }
        done(begin, count, buffer.data);
      }
      return;
    }
#else
  (void)amx;
#endif
#if defined(__AVX512BF16__)
  using Multiply = std::conditional_t<sizeof(T) == 4, MultiplyFloat, MultiplyPairs>;
#else
  using Multiply = MultiplyFloat;
#endif
  // Tiles of nearly equal size, and as many of them as the buffer holds at a time.
  const int64_t tiles = ceil_div(range.size(), kTilePixels);
  const int64_t least = range.size() / tiles, larger = range.size() % tiles;
  constexpr int64_t kAtOnce = kChunkPixels / kTilePixels;
  for (int64_t tile = 0, begin = range.begin; tile < tiles;) {
    int64_t count = 0;
    for (const int64_t last = min_of(tiles, tile + kAtOnce); tile < last; tile++) {
      const int64_t pixels = least + (tile < larger);
      const ProductTile run = panel.units == 1 ? product_tile_of<Multiply, 1>(pixels)
                                               : product_tile_of<Multiply, kTileUnits>(pixels);
      run(buffer.data + count * panel.units * kUnit, x.words(begin + count), step, b, shift, words);
      count += pixels;
    }
    done(begin, count, buffer.data);
    begin += count;
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
