// Products of bf16 pairs for training, by the tile unit (AMX) or by vdpbf16ps: the interface of
// FloatProduct in panel_product.h.
//
// A word of 32 bits holds two bf16 numbers. An operand of P pixels with C channels lies
//   as rows,  for products by a weight:  [C / 32][P][16 words], a word being two channels
//   as pairs, for sums over pixels:      [C / 16][pairs][16 words], a word being two pixels
// and weights [k / 2][16 words], a word being two of k. Both operands are zero beyond C, k and the
// last pixel: a zero in one of them alone would make NaN of the other's infinity. Sums are fp32.
#pragma once

#include "cpu/training/panel_product.h"

namespace effnet {
namespace EFFNET_ISA {

template <typename T>
struct ProductFor {
  using type = FloatProduct;
};

#if defined(__AVX512BF16__)

constexpr int64_t kTileSide = 16;          // rows of a tile, and words of a row
constexpr int64_t kMaxPairPixels = 128;    // of a chunk
constexpr int64_t kPairBytes = 384 << 10;  // of the wide operand that waits for its sums

// Two channels of one pixel side by side: `low` the first 16, `high` the next 16.
EFFNET_INLINE Vec channel_pairs(Vec low, Vec high) {
  return (Vec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

// The words of 32 bf16 of each of two rows, interleaved: its first 16 and its last 16.
struct RowPairs {
  Vec low, high;
  EFFNET_INLINE RowPairs(Vec first, Vec second) {
    typedef uint16_t Halves __attribute__((vector_size(64)));
    Halves from_low, from_high;
    for (int i = 0; i < 32; i++) {
      from_low[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
      from_high[i] = static_cast<uint16_t>(from_low[i] + 16);
    }
    low = (Vec)__builtin_shuffle((Halves)first, (Halves)second, from_low);
    high = (Vec)__builtin_shuffle((Halves)first, (Halves)second, from_high);
  }
};

// The first n lanes, the others zero; n may be beyond either end.
EFFNET_INLINE Vec first_lanes(Vec v, int64_t n) {
  const int64_t kept = n < 0 ? 0 : min_of(n, kLanes);
  return (Vec)_mm512_maskz_mov_ps(static_cast<__mmask16>((1u << kept) - 1), (__m512)v);
}
template <typename W>
EFFNET_INLINE Vec load_up_to(const W* p, int64_t n) {
  return n > 0 ? load_n(p, n) : Vec{};
}

// Operands of sums of 16 * ROWS by 16 * VECS numbers, each 16 words of K at a time. Steps in words.
struct TileSums {
  float* out;
  int64_t out_step;  // from row to row
  const float* a;    // rows of 16 words, one after another
  int64_t a_step;    // to the next words of K
  const float* b;
  int64_t b_row, b_vec, b_step;  // to the next word of K, the next 16 columns, the next 16 of K
  int64_t blocks;                // of 16 words of K
  bool add;                      // to what is in out
};

// Tiles 0-3 are the sums, 4-5 of A, 6-7 of B.
template <int ROWS, int VECS>
EFFNET_NOINLINE void amx_tile(const TileSums& t) {
  const int64_t out_bytes = t.out_step * 4, b_bytes = t.b_row * 4;
  float* const below = t.out + kTileSide * t.out_step;
  __asm__ volatile("" ::: "memory");  // the loads below do not tell the compiler what they read
  if (t.add) {
    _tile_loadd(0, t.out, out_bytes);
    if constexpr (VECS == 2) _tile_loadd(1, t.out + kTileSide, out_bytes);
    if constexpr (ROWS == 2) _tile_loadd(2, below, out_bytes);
    if constexpr (ROWS == 2 && VECS == 2) _tile_loadd(3, below + kTileSide, out_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const float *a = t.a, *b = t.b;
  for (int64_t i = 0; i < t.blocks; i++, a += t.a_step, b += t.b_step) {
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (VECS == 2) {
      _tile_loadd(7, b + t.b_vec, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (ROWS == 2) {
      _tile_loadd(5, a + kTileSide * kTileSide, 64);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (ROWS == 2 && VECS == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, t.out, out_bytes);
  if constexpr (VECS == 2) _tile_stored(1, t.out + kTileSide, out_bytes);
  if constexpr (ROWS == 2) _tile_stored(2, below, out_bytes);
  if constexpr (ROWS == 2 && VECS == 2) _tile_stored(3, below + kTileSide, out_bytes);
}

// All `rows` rows, whole tiles, of one or two vectors of columns.
template <int VECS>
inline void amx_rows(TileSums t, int64_t rows, Ahead& ahead) {
  for (; rows > 0; rows -= 2 * kTileSide) {
    ahead.next_tile();
    if (rows > kTileSide)
      amx_tile<2, VECS>(t);
    else
      amx_tile<1, VECS>(t);
    t.a += 2 * kTileSide * kTileSide;
    t.out += 2 * kTileSide * t.out_step;
  }
}

struct PairProduct {
  bool amx;
  explicit PairProduct(bool amx) : amx(amx) {}

  // Lends the tile unit to the thread.
  struct Unit {
    const bool amx;
    explicit Unit(bool amx) : amx(amx) {
      if (amx) amx_begin();
    }
    ~Unit() {
      if (amx) amx_end();
    }
    Unit(const Unit&) = delete;
  };

  static int64_t max_pixels() { return kMaxPairPixels + kTileSide; }
  static int64_t height(int64_t pixels) { return ceil_div(pixels, kTileSide) * kTileSide; }
  static int64_t panel_floats() { return max_pixels() * kPanelVecs * kLanes; }
  static int64_t depth(int64_t k) { return ceil_div(k, 2 * kTileSide) * kTileSide; }  // words
  static int64_t weight_floats(int64_t k, int64_t columns) { return depth(k) * padded(columns); }
  static int64_t chunk(int64_t pixels, int64_t channels) {
    constexpr int64_t kStep = 2 * kTileSide;
    const int64_t fit = kChunkBytes / (padded(channels) * 4) / kStep * kStep;
    const int64_t most = min_of(kMaxPairPixels, max_of(kStep, fit));
    return pixels <= most + kTileSide / 2 ? pixels : most;
  }
  static int64_t tiles(int64_t pixels, int64_t, int64_t columns) {
    return ceil_div(padded(columns), kPanelVecs * kLanes) * ceil_div(pixels, 2 * kTileSide);
  }

  // One operand of a chunk, in the forms that are wanted; the others are null.
  struct Operand {
    float *values, *rows;    // values: fp32 in panels, as FloatProduct has them
    float* pairs = nullptr;  // where the chunk's begin
    int64_t step = 0;        // words from 16 channels' pairs to the next
    Operand(Carver& take, int64_t c, bool kept, bool multiplied)
        : values(kept ? take(max_pixels() * padded(c)) : nullptr),
          rows(multiplied ? take(max_pixels() * depth(c)) : nullptr) {}
  };

  template <typename W>
  static void pack(float* packed, const W* weight, int64_t k, int64_t columns, bool transposed,
                   int64_t index) {
    const int64_t first = index * kPanelVecs;
    const int64_t vecs = min_of(kPanelVecs, ceil_div(columns, kLanes) - first);
    float* const out = packed + first * kLanes * depth(k);
    for (int64_t v = 0; v < vecs; v++)
      for (int64_t word = 0; word < depth(k); word += kTileSide) {
        const int64_t c = (first + v) * kLanes, lanes = min_of(kLanes, columns - c);
        Vec rows[kTileSide];
        for (int64_t l = 0; l < kTileSide; l++) {
          const int64_t begin = 2 * (transposed ? word : word + l), left = k - begin;
          if (transposed) {
            const W* from = weight + (c + l) * k + begin;
            rows[l] = l < lanes ? channel_pairs(load_up_to(from, left),
                                                load_up_to(from + kLanes, left - kLanes))
                                : Vec{};
          } else {
            const W* from = weight + begin * columns + c;
            const Vec upper = left > 0 ? load_n(from, lanes) : Vec{};
            const Vec lower = left > 1 ? load_n(from + columns, lanes) : Vec{};
            rows[l] = RowPairs(channel_pairs(upper, Vec{}), channel_pairs(lower, Vec{})).low;
          }
        }
        if (transposed) transpose(rows);
        for (int64_t l = 0; l < kTileSide; l++)
          store(out + ((word + l) * vecs + v) * kLanes, rows[l]);
      }
  }

  // As FloatProduct's; the factor is multiplied in before rounding.
  template <typename F>
  static EFFNET_INLINE void form(const Operand& to, int64_t pixels, int64_t c, const float* factor,
                                 const F& value) {
    const int64_t high = height(pixels);
    const auto formed = [&](int64_t i, int64_t p, int64_t lanes) {
      const int64_t at = i * pixels + p * kLanes;
      const Vec v = value(i, p, lanes, at);
      if (to.values) store(to.values + at, v);
      return factor ? v * load_n(factor + i, lanes) : v;
    };
    const auto place = [&](int64_t i, int64_t p, Vec first, Vec second) {
      if (to.rows) {
        float* const row = to.rows + (i / 2 * high + p * kLanes);
        store(row, first);
        store(row + kLanes, second);
      }
      if (!to.pairs) return;
      const RowPairs words(first, second);
      float* const pair = to.pairs + i / kLanes * to.step + p / 2 * kLanes;
      store(pair, words.low);
      if (i + kLanes < c) store(pair + to.step, words.high);
    };
    for (int64_t p = 0; p < pixels; p += 2) {
      int64_t i = 0;
      for (; p + 1 < pixels && i + 2 * kLanes <= c; i += 2 * kLanes) {
        const Vec a = formed(i, p, kLanes), b = formed(i + kLanes, p, kLanes);
        const Vec d = formed(i, p + 1, kLanes), e = formed(i + kLanes, p + 1, kLanes);
        place(i, p, channel_pairs(a, b), channel_pairs(d, e));
      }
      for (; i < c; i += 2 * kLanes) {
        Vec parts[4] = {};
#pragma GCC unroll 1
        for (int64_t j = 0; j < 4; j++) {
          const int64_t channel = i + j % 2 * kLanes, pixel = p + j / 2, left = c - channel;
          if (left > 0 && pixel < pixels) {
            const int64_t lanes = min_of(left, kLanes);
            parts[j] = first_lanes(formed(channel, pixel, lanes), lanes);
          }
        }
        place(i, p, channel_pairs(parts[0], parts[1]), channel_pairs(parts[2], parts[3]));
      }
    }
  }

  template <int VECS>
  void multiply(float* out, const Operand& a, int64_t pixels, const float* b, int64_t k,
                Ahead& ahead) const {
    const int64_t high = height(pixels);
    if (!amx)
      return multiply_panel<MultiplyPairs, VECS>(out, a.rows, pixels, high, b, depth(k), ahead);
    constexpr int64_t kWidth = VECS * kLanes;
    const TileSums t = {out,
                        kWidth,
                        a.rows,
                        high * kTileSide,
                        b,
                        kWidth,
                        kLanes,
                        kTileSide * kWidth,
                        depth(k) / kTileSide,
                        false};
    amx_rows<VECS>(t, pixels, ahead);
  }

  // Gathers the pairs of many chunks, and multiplies them when the memory is full: each product
  // reads and writes all sums.
  struct Gradient {
    Operand narrow, wide;
    int64_t rows, columns, capacity;  // capacity in pairs
    bool amx;
    float *narrow_pairs, *wide_pairs, *transposed;
    float* sum = nullptr;
    bool started = false;
    int64_t count = 0;  // pairs so far

    Gradient(Carver& take, int64_t rows, int64_t columns, const PairProduct& product,
             const OperandUses& uses, bool wanted)
        : narrow(take, rows, false, uses.narrow_multiplied),
          wide(take, columns, uses.wide_kept, uses.wide_multiplied),
          rows(rows),
          columns(columns),
          capacity(pair_capacity(columns)),
          amx(product.amx),
          narrow_pairs(wanted ? take(capacity * padded(rows)) : nullptr),
          wide_pairs(wanted ? take(capacity * padded(columns)) : nullptr),
          transposed(wanted && amx ? take(capacity * padded(rows)) : nullptr) {}

    static int64_t pair_capacity(int64_t columns) {
      const int64_t most = 4 * kMaxPairPixels, fit = kPairBytes / (padded(columns) * 4);
      return ceil_div(max_of(chunk(most, columns) / 2 + kTileSide, min_of(most, fit)), kTileSide) *
             kTileSide;
    }
    static int64_t tiles(int64_t, int64_t) { return 0; }  // they come once in a few chunks

    void start(float* of) { sum = of, started = false, count = 0; }
    // For the pairs of a chunk that is to be formed.
    void make_room(int64_t pixels) {
      if (!sum) return;
      if (count + ceil_div(pixels, 2) > capacity) finish();
      place(narrow, narrow_pairs);
      place(wide, wide_pairs);
    }
    void add(int64_t pixels, const float*, Ahead&) { count += ceil_div(pixels, 2); }
    void finish() {
      if (!sum || count == 0) return;
      Ahead ahead;
      if (amx)
        multiply_tiles(ahead);
      else
        add_grad_weight<MultiplyPairs>(sum, narrow_pairs, rows, wide_pairs, columns, count,
                                       capacity * kLanes, nullptr, started, ahead);
      started = true, count = 0;
    }

   private:
    void place(Operand& operand, float* pairs) const {
      operand.pairs = pairs + count * kLanes, operand.step = capacity * kLanes;
    }
    void multiply_tiles(Ahead& ahead) {
      const int64_t step = capacity * kLanes, blocks = ceil_div(count, kTileSide);
      const int64_t beyond = (blocks * kTileSide - count) * kLanes, height = padded(rows);
      for (int64_t i = 0; i < padded(columns); i += kLanes)
        std::memset(wide_pairs + i / kLanes * step + count * kLanes, 0,
                    sizeof(float) * static_cast<size_t>(beyond));
      for (int64_t i = 0; i < height; i += kLanes) {
        const float* from = narrow_pairs + i / kLanes * step;
        for (int64_t block = 0; block < blocks; block++) {
          Vec words[kTileSide];
#pragma GCC unroll 16
          for (int l = 0; l < kTileSide; l++) {
            const int64_t pair = block * kTileSide + l;
            words[l] = pair < count ? load(from + pair * kLanes) : Vec{};
          }
          transpose(words);
#pragma GCC unroll 16
          for (int l = 0; l < kTileSide; l++)
            store(transposed + (block * height + i + l) * kTileSide, words[l]);
        }
      }
      const int64_t width = padded(columns);
      TileSums t = {sum,        width,  transposed, height * kTileSide,
                    wide_pairs, kLanes, step,       kTileSide * kLanes,
                    blocks,     started};
      for (int64_t c = 0; c < width; c += 2 * kLanes, t.out += 2 * kLanes, t.b += 2 * step) {
        if (c + kLanes < width)
          amx_rows<2>(t, height, ahead);
        else
          amx_rows<1>(t, height, ahead);
      }
    }
  };
};

template <>
struct ProductFor<bf16> {
  using type = PairProduct;
};

#endif

}  // namespace EFFNET_ISA
}  // namespace effnet
