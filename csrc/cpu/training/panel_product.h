// Products of a few dozen pixels at a time, from panels in the L2 cache.
//
// A chunk of P pixels with C channels lies in panels [C / kLanes][P][kLanes] of fp32, zero in lanes
// beyond C. Its panels serve both products: as rows of pixels, and as what is summed over pixels.
// The tiles know words of 32 bits alone: pair_product.h has panels of bf16 pairs for them.
#pragma once

#include "cpu/args.h"
#include "cpu/simd/moments.h"
#include "cpu/simd/tile.h"

#include "common/mbconv_split.h"

namespace effnet {
namespace EFFNET_ISA {

constexpr int kPanelVecs = 2;  // vectors of output channels side by side
#if defined(__AVX512F__)
// 28 and 24 accumulators of 32 registers.
constexpr int kTileRows = 14, kGradRows = 8, kGradVecs = 3;
#else
// NEON: 16 accumulators and 8 operands by lane.
constexpr int kTileRows = kRegisters == 32 ? 8 : 6, kGradRows = 4, kGradVecs = 3;
#endif
constexpr int64_t kDepth = 128;      // products added up in one chain: longer ones lose digits
constexpr int64_t kMaxPixels = 112;  // of a chunk
constexpr int64_t kChunkBytes = 320 << 10;  // of a chunk's widest panels

EFFNET_INLINE int64_t padded(int64_t c) { return ceil_div(c, kLanes) * kLanes; }

// Takes pieces out of a block, one after another, in whole cache lines; without a block it counts.
struct Carver {
  float* block;
  int64_t used = 0;
  float* operator()(int64_t floats) {
    float* const at = block ? block + used : nullptr;
    used += whole_lines(floats);
    return at;
  }
};

// Pixels of the chunks that `pixels` are cut into: few enough for the L2 cache, whole tiles.
inline int64_t chunk_pixels(int64_t pixels, int64_t channels) {
  const int64_t fit = kChunkBytes / (padded(channels) * 4) / kTileRows * kTileRows;
  const int64_t most = min_of(kMaxPixels / kTileRows * kTileRows, max_of(kTileRows, fit));
  if (pixels <= most + kTileRows / 2) return pixels;
  const int64_t even = ceil_div(pixels, ceil_div(pixels, most));
  return min_of(most, ceil_div(even, kTileRows) * kTileRows);
}
inline int64_t max_chunk_pixels() { return kMaxPixels + kTileRows; }

// What the next chunk reads, fetched into the L2 cache while this one is multiplied: a few lines
// per register tile, because more at once would wait for each other.
class Ahead {
 public:
  // Pixels [begin, end) of an image [..][c]; up to three of them.
  template <typename T>
  void add(const T* image, int64_t begin, int64_t end, int64_t c) {
    const int64_t bytes = (end - begin) * c * static_cast<int64_t>(sizeof(T));
    if (bytes <= 0) return;
    ranges_[count_++] = {reinterpret_cast<const char*>(image + begin * c), bytes};
    left_ += ceil_div(bytes, kLine);
  }
  // Deals the lines out to the tiles that are to come.
  void start(int64_t tiles) { share_ = ceil_div(left_, max_of(1, tiles)); }
  void next_tile() {
    for (int64_t i = 0; i < share_ && count_ > 0; i++) {
      LineRange& range = ranges_[count_ - 1];
      __builtin_prefetch(range.at, 0, 2);
      range.at += kLine;
      range.bytes -= kLine;
      if (range.bytes <= 0) count_--;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct LineRange {
    const char* at;
    int64_t bytes;
  };
  LineRange ranges_[3] = {};
  int64_t count_ = 0, left_ = 0, share_ = 0;
};

// out [ROWS][VECS * kLanes] = or += A [ROWS][k] B [k][VECS * kLanes]; A in panels, `step` floats
// apart.
template <typename Multiply, int ROWS, int VECS>
EFFNET_NOINLINE void panel_tile(float* out, const float* a, int64_t step, const float* b, int64_t k,
                                bool add) {
  Vec sum[ROWS][VECS] = {};
  for (; k > 0; k -= kLanes, a += step)
    b = add_products<Multiply>(sum, a, kLanes, b, min_of(k, kLanes));
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; v++) {
      float* const to = out + (r * VECS + v) * kLanes;
      store(to, add ? load(to) + sum[r][v] : sum[r][v]);
    }
}

using PanelTile = void (*)(float*, const float*, int64_t, const float*, int64_t, bool);

template <typename Multiply, int VECS>
struct PanelTiles {
  template <int ROWS>
  static constexpr PanelTile of = panel_tile<Multiply, ROWS, VECS>;
};

template <typename Multiply, int VECS>
inline PanelTile panel_tile_of(int64_t rows) {
  using Rows = std::make_integer_sequence<int, kTileRows>;
  return tile_of_rows<PanelTile, PanelTiles<Multiply, VECS>>(rows, Rows());
}

// out [pixels][VECS * kLanes] = A B, A in panels of `height` pixels, B [k][VECS * kLanes]. All
// tiles by one part of B, which stays in the L1 cache.
template <typename Multiply, int VECS>
inline void multiply_panel(float* out, const float* a, int64_t pixels, int64_t height,
                           const float* b, int64_t k, Ahead& ahead) {
  const int64_t tiles = ceil_div(pixels, kTileRows);
  for (int64_t begin = 0; begin < k; begin += kDepth)
    for (int64_t i = 0; i < tiles; i++) {
      const Range rows = part_of(pixels, tiles, i);
      ahead.next_tile();
      panel_tile_of<Multiply, VECS>(rows.size())(
          out + rows.begin * VECS * kLanes, a + begin * height + rows.begin * kLanes,
          height * kLanes, b + begin * VECS * kLanes, min_of(kDepth, k - begin), begin > 0);
    }
}

// Calls f.template operator()<VECS>(first vector, B's panel) for the panels of `columns` columns.
template <typename F>
EFFNET_INLINE void for_panels(const float* packed, int64_t k, int64_t columns, const F& f) {
  const int64_t vecs = ceil_div(columns, kLanes);
  for (int64_t v = 0; v < vecs; v += kPanelVecs) {
    if (v + kPanelVecs <= vecs)
      f.template operator()<kPanelVecs>(v, packed + v * kLanes * k);
    else
      f.template operator()<1>(v, packed + v * kLanes * k);
  }
}

// Tiles of the products of a chunk: by B [k][columns], and a gradient of `rows` x `columns`.
inline int64_t product_tiles(int64_t pixels, int64_t k, int64_t columns) {
  return ceil_div(ceil_div(columns, kLanes), kPanelVecs) * ceil_div(k, kDepth) *
         ceil_div(pixels, kTileRows);
}
inline int64_t grad_tiles(int64_t rows, int64_t columns) {
  return ceil_div(ceil_div(columns, kLanes), kGradVecs) * ceil_div(rows, kGradRows);
}

// Floats of B [k][columns] in panels.
EFFNET_INLINE int64_t packed_floats(int64_t k, int64_t columns) { return k * padded(columns); }

// Panel `index` of B from the weight [k][columns], or from its transpose [columns][k].
template <typename W>
void pack_panel(float* packed, const W* weight, int64_t k, int64_t columns, bool transposed,
                int64_t index) {
  const int64_t first = index * kPanelVecs,
                vecs = min_of(kPanelVecs, ceil_div(columns, kLanes) - first);
  float* out = packed + first * kLanes * k;
  for (int64_t v = 0; v < vecs; v++) {
    const int64_t c = (first + v) * kLanes, lanes = min_of(kLanes, columns - c);
    if (!transposed) {
      for (int64_t i = 0; i < k; i++)
        store(out + (i * vecs + v) * kLanes, load_n(weight + i * columns + c, lanes));
      continue;
    }
    for (int64_t begin = 0; begin < k; begin += kLanes) {
      const int64_t words = min_of(kLanes, k - begin);
      Vec rows[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; l++)
        rows[l] = l < lanes ? load_n(weight + (c + l) * k + begin, words) : Vec{};
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++)
        if (i < words) store(out + ((begin + i) * vecs + v) * kLanes, rows[i]);
    }
  }
}

// sum [ROWS][columns] = or += factor * sum over pixels of a[p][r] * b[p][.]; a points at its first
// row within a panel, b at panels `step` floats apart.
template <typename Multiply, int VECS>
EFFNET_NOINLINE void grad_tile(float* sum, int64_t columns, const float* a, const float* b,
                               int64_t step, int64_t pixels, const float* factor, bool add) {
  Vec acc[kGradRows][VECS] = {};
  for (int64_t p = 0; p < pixels; p++, a += kLanes, b += kLanes) {
    Vec x[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; v++) x[v] = in_register(load(b + v * step));
#pragma GCC unroll 8
    for (int r = 0; r < kGradRows; r++) {
      const Vec g = in_register(broadcast(a + r));
#pragma GCC unroll 4
      for (int v = 0; v < VECS; v++) acc[r][v] = Multiply::add(acc[r][v], g, x[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < VECS; v++) {
    const Vec scale = factor ? load(factor + v * kLanes) : splat(1.0f);
#pragma GCC unroll 8
    for (int r = 0; r < kGradRows; r++) {
      float* to = sum + r * columns + v * kLanes;
      store(to, add ? load(to) + acc[r][v] * scale : acc[r][v] * scale);
    }
  }
}

// sum [rows padded][columns padded] = or += factor * A^T B over `pixels` pixels, both in panels
// `step` words apart.
template <typename Multiply>
inline void add_grad_weight(float* sum, const float* a, int64_t rows, const float* b,
                            int64_t columns, int64_t pixels, int64_t step, const float* factor,
                            bool add, Ahead& ahead) {
  const int64_t vecs = ceil_div(columns, kLanes), width = vecs * kLanes;
  for (int64_t v = 0; v < vecs; v += kGradVecs)
    for (int64_t r = 0; r < rows; r += kGradRows) {
      ahead.next_tile();
      float* to = sum + r * width + v * kLanes;
      const float* from = a + r / kLanes * step + r % kLanes;
      const float* scale = factor ? factor + v * kLanes : nullptr;
      const float* panels = b + v * step;
      if (vecs - v >= 3)
        grad_tile<Multiply, 3>(to, width, from, panels, step, pixels, scale, add);
      else if (vecs - v == 2)
        grad_tile<Multiply, 2>(to, width, from, panels, step, pixels, scale, add);
      else
        grad_tile<Multiply, 1>(to, width, from, panels, step, pixels, scale, add);
    }
}

// Calls f(vector, pixel, lanes, offset in the panels) in the order of addresses.
template <typename F>
EFFNET_INLINE void for_vectors(int64_t pixels, int64_t c, const F& f) {
  constexpr int64_t kBlock = 4;
  for (int64_t begin = 0; begin < pixels; begin += kBlock) {
    const int64_t end = min_of(pixels, begin + kBlock);
    for (int64_t i = 0; i < c; i += kLanes) {
      const int64_t lanes = min_of(kLanes, c - i);
      for (int64_t p = begin; p < end; p++) f(i, p, lanes, i * pixels + p * kLanes);
    }
  }
}

// What else the operands of a weight gradient serve: products by a weight, and sums that read them
// as fp32.
struct OperandUses {
  bool narrow_multiplied, wide_multiplied, wide_kept;
};

// Products in fp32, of images of either dtype. pair_product.h has the same for pairs of bf16.
struct FloatProduct {
  explicit FloatProduct(bool) {}

  // What a thread holds while it multiplies: nothing.
  struct Unit {
    explicit Unit(bool) {}
  };

  // One operand of a chunk: its panels.
  struct Operand {
    float* values;
    Operand(Carver& take, int64_t c, [[maybe_unused]] bool kept, [[maybe_unused]] bool multiplied)
        : values(take(max_chunk_pixels() * padded(c))) {}
  };

  static int64_t max_pixels() { return max_chunk_pixels(); }
  static int64_t chunk(int64_t pixels, int64_t channels) { return chunk_pixels(pixels, channels); }
  static int64_t panel_floats() { return max_chunk_pixels() * kPanelVecs * kLanes; }
  static int64_t weight_floats(int64_t k, int64_t columns) { return packed_floats(k, columns); }
  static int64_t depth(int64_t k) { return k; }
  static int64_t tiles(int64_t pixels, int64_t k, int64_t columns) {
    return product_tiles(pixels, k, columns);
  }

  template <typename W>
  static void pack(float* packed, const W* weight, int64_t k, int64_t columns, bool transposed,
                   int64_t index) {
    pack_panel(packed, weight, k, columns, transposed, index);
  }

  // Forms an operand: value(channel, pixel, lanes, place in fp32 panels) of all vectors. A factor
  // [C] of its products over pixels, or null, comes with them: Gradient::add takes it.
  template <typename F>
  static EFFNET_INLINE void form(const Operand& to, int64_t pixels, int64_t c, const float*,
                                 const F& value) {
    for_vectors(pixels, c, [&](int64_t i, int64_t p, int64_t lanes, int64_t at) {
      store(to.values + at, value(i, p, lanes, at));
    });
  }

  // out [pixels][VECS * kLanes] = A B.
  template <int VECS>
  void multiply(float* out, const Operand& a, int64_t pixels, const float* b, int64_t k,
                Ahead& ahead) const {
    multiply_panel<MultiplyFloat, VECS>(out, a.values, pixels, pixels, b, k, ahead);
  }

  // sum [rows padded][columns padded] of products over the pixels of a task, chunk by chunk.
  struct Gradient {
    Operand narrow, wide;  // of `rows` and of `columns` channels
    int64_t rows, columns;
    float* sum = nullptr;  // null: not wanted
    bool started = false;

    // Which operands are multiplied by weights too, or read as values.
    Gradient(Carver& take, int64_t rows, int64_t columns, const FloatProduct&,
             const OperandUses& uses, [[maybe_unused]] bool wanted)
        : narrow(take, rows, false, uses.narrow_multiplied),
          wide(take, columns, uses.wide_kept, uses.wide_multiplied),
          rows(rows),
          columns(columns) {}
    static int64_t tiles(int64_t rows, int64_t columns) { return grad_tiles(rows, columns); }
    void start(float* of) { sum = of, started = false; }
    void make_room(int64_t) {}
    void add(int64_t pixels, const float* factor, Ahead& ahead) {
      add_grad_weight<MultiplyFloat>(sum, narrow.values, rows, wide.values, columns, pixels,
                                     pixels * kLanes, factor, started, ahead);
      started = true;
    }
    void finish() {}
  };
};

// Packs all panels of a weight; called by every thread of a team, ends in a barrier.
template <typename P>
inline void pack_weight(float* packed, const void* weight, DType dtype, int64_t k, int64_t columns,
                        bool transposed) {
  const int64_t panels = ceil_div(ceil_div(columns, kLanes), kPanelVecs);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < panels; i++) {
    if (dtype == DType::kFloat32)
      P::pack(packed, static_cast<const float*>(weight), k, columns, transposed, i);
    else
      P::pack(packed, static_cast<const bf16*>(weight), k, columns, transposed, i);
  }
}

}  // namespace EFFNET_ISA
}  // namespace effnet
