// The stem: a small dense convolution of the image, its statistics or BatchNorm with an activation,
// and its weight gradient.
//
// Computes: forward   z = conv(x, weight) and (mean, M2) of z - pivot, as stored, over each task;
//                     or y = act(z * scale + shift)
//           backward  dweight = sum over pixels of dz x^T with
//                     dz = scale * grad_y * act'(u) + (z - mean) * slope + offset
// Layout:   x with any strides; z, y, grad_y channels-last without gaps
// Tiling:   a task owns output rows. The input rows under one of them are laid out in fp32, pixel
//           by pixel with their zeros around, in a ring that the next row goes on with; a tile of
//           pixels times 2 vectors of output channels, or of taps times 2 vectors, is multiplied
//           from there
// Bytes:    forward x once, z once; backward grad_y, z, x once
// FLOPs:    2 * C * Kh * Kw per element of z; about 25 for SiLU or its slope, 4 for clamp
// Source:   original; Ioffe and Szegedy 2015, section 3, for the gradient through BatchNorm
// Truth:    effnet_fast/reference/stem_conv_bn_silu.py
#include "cpu/kernels.h"
#include "cpu/ops/stem_rows.h"
#include "cpu/simd/activations.h"

#include "common/stem_split.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

constexpr int kVecs = 2;                          // vectors of output channels side by side
constexpr int kTaps = kRegisters == 32 ? 12 : 5;  // 24 accumulators of 32 registers, 10 of 16
constexpr int64_t kChain = 128;  // products added up in one chain: longer ones lose digits
constexpr int64_t kBlock = 8;    // pixels per visit of a channel vector

EFFNET_INLINE int64_t padded(int64_t c) { return ceil_div(c, kLanes) * kLanes; }

// Calls f.template operator()<VECS>(first vector) for groups of the output channels' vectors.
template <typename F>
EFFNET_INLINE void for_groups(int64_t out, const F& f) {
  const int64_t vecs = ceil_div(out, kLanes);
  for (int64_t v = 0; v < vecs; v += kVecs) {
    if (v + kVecs <= vecs)
      f.template operator()<kVecs>(v);
    else
      f.template operator()<1>(v);
  }
}

bool is_finite(const StemForwardArgs& args) {
  const StemConvShape& s = args.shape;
  float zero = 0.0f;
  for (int64_t i = 0; i < s.out * s.c * s.kh * s.kw; i++)
    zero += 0.0f * load_scalar(args.weight, args.weight_dtype == DType::kBFloat16, i);
  return zero == 0.0f;
}

// Weight [out,C,Kh,Kw] as [group of vectors][Kh][Kw][C][VECS * kLanes]; called by every thread of a
// team, ends in a barrier.
void pack_weight(float* packed, const StemForwardArgs& args) {
  const StemConvShape& s = args.shape;
  const int64_t taps = s.kh * s.kw, depth = taps * s.c, vecs = ceil_div(s.out, kLanes);
#pragma omp for schedule(static)
  for (int64_t v = 0; v < vecs; v++) {
    const int64_t first = v / kVecs * kVecs, width = min_of(kVecs, vecs - first) * kLanes;
    float* const to = packed + first * kLanes * depth + (v - first) * kLanes;
    for (int64_t i = 0; i < depth; i++)
      for (int64_t l = 0; l < kLanes; l++) {
        const int64_t o = v * kLanes + l, from = (o * s.c + i % s.c) * taps + i / s.c;
        const bool bf16_weight = args.weight_dtype == DType::kBFloat16;
        to[i * width + l] = o < s.out ? load_scalar(args.weight, bf16_weight, from) : 0.0f;
      }
  }
}

// out [kPixels][VECS * kLanes] = or += the products of `count` consecutive floats under each pixel,
// `step` floats apart, with weight [count][VECS * kLanes].
template <int VECS>
EFFNET_NOINLINE void conv_tile(float* out, const float* x, int64_t step, const float* weight,
                               int64_t count, bool add) {
  Vec sum[kPixels][VECS];
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; p++)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; v++) sum[p][v] = add ? load(out + (p * VECS + v) * kLanes) : Vec{};
  add_products<MultiplyFloat>(sum, x, step, weight, count);
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; p++)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; v++) store(out + (p * VECS + v) * kLanes, sum[p][v]);
}

// Stores the first `pixels` of a tile, and takes their moments where they are wanted.
template <typename T, int VECS>
EFFNET_INLINE void finish_tile(const float* tile, T* y, int64_t pixels, const StemForwardArgs& args,
                               int64_t first, Moments* moments, bool fresh) {
  const int64_t out = args.shape.out;
  for (int64_t v = 0; v < VECS; v++) {
    const int64_t c = (first + v) * kLanes, lanes = min_of(kLanes, out - c);
    const float* from = tile + v * kLanes;
    if (args.scale) {
      const Vec scale = load_n(args.scale + c, lanes), shift = load_n(args.shift + c, lanes);
      with_activation(args.activation, [&]<typename A>() {
        const A act(args.activation);
        for (int64_t p = 0; p < pixels; p++)
          store_n(y + p * out + c, act.value(load(from + p * VECS * kLanes) * scale + shift),
                  lanes);
      });
      continue;
    }
    if (!moments) {
      for (int64_t p = 0; p < pixels; p++)
        store_n(y + p * out + c, load(from + p * VECS * kLanes), lanes);
      continue;
    }
    const Vec pivot = moments[first + v].begin(as_stored<T>(load(from)), fresh);
    Vec total = {}, m2 = {};
    for (int64_t p = 0; p < pixels; p++) {
      const Vec stored = as_stored<T>(load(from + p * VECS * kLanes));
      store_n(y + p * out + c, stored, lanes);
      total += stored - pivot;
    }
    const Vec mean = total * (1.0f / static_cast<float>(pixels));
    for (int64_t p = 0; p < pixels; p++) {
      const Vec d = as_stored<T>(load(from + p * VECS * kLanes)) - pivot - mean;
      m2 += d * d;
    }
    moments[first + v].take(total, m2, pixels);
  }
}

// The current row of the output, to y. Of an infinite weight 0 * x is NaN: there the pixels go one
// by one, each without its taps in the padding.
template <typename T>
void forward_row(const StemForwardArgs& args, const Rows<T>& rows, const float* packed, float* tile,
                 T* y, Moments* moments, bool fresh, bool finite) {
  const StemConvShape& s = args.shape;
  const int64_t run = s.kw * s.c, depth = s.kh * run, step = s.stride_w * s.c;
  const int64_t pixels = finite ? kPixels : 1;
  for (int64_t p = 0; p < s.ow; p += pixels) {
    const int64_t left = s.pad_l * s.c - p * step, right = left + s.w * s.c;
    const Range taps = finite ? Range{0, run} : Range{max_of(0, left), min_of(run, right)};
    for_groups(s.out, [&]<int VECS>(int64_t v) {
      const float* const weight = packed + v * kLanes * depth;
      bool add = false;
      for (int64_t ky = 0; ky < s.kh; ky++)
        for (int64_t i = taps.begin; i < taps.end && (finite || rows.has(ky)); i += kChain) {
          conv_tile<VECS>(tile, rows[ky] + p * step + i, step,
                          weight + (ky * run + i) * VECS * kLanes, min_of(kChain, taps.end - i),
                          add);
          add = true;
        }
      if (!add) std::memset(tile, 0, sizeof(float) * VECS * kLanes);
      finish_tile<T, VECS>(tile, y + p * s.out, min_of(pixels, s.ow - p), args, v, moments,
                           fresh && p == 0);
    });
  }
}

template <typename T>
bool forward(const StemForwardArgs& args) {
  const StemConvShape& s = args.shape;
  const int64_t chunks = row_chunks(s.oh), vecs = ceil_div(s.out, kLanes);
  const int64_t weight_floats = padded(s.out) * s.kh * s.kw * s.c;
  const int64_t moment_floats = vecs * kMomentFloats, row_floats = Rows<T>::floats(s);
  const int64_t floats = moment_floats + row_floats + whole_lines(kPixels * kVecs * kLanes);
  float* const packed = args.workspace(whole_lines(weight_floats) + args.threads * floats);
  if (!packed) return false;
  const bool finite = is_finite(args);
#pragma omp parallel num_threads(args.threads)
  {
    float* const memory = packed + whole_lines(weight_floats) + omp_get_thread_num() * floats;
    Moments* const moments = args.partial ? reinterpret_cast<Moments*>(memory) : nullptr;
    Rows<T> rows(s, args.x, memory + moment_floats);
    float* const tile = memory + moment_floats + row_floats;
    pack_weight(packed, args);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < s.n * chunks; task++) {
      const int64_t n = task / chunks;
      const Range own = part_of(s.oh, chunks, task % chunks);
      for (int64_t oy = own.begin; oy < own.end; oy++) {
        rows.move_to(n, oy);
        T* y = static_cast<T*>(args.y) + (n * s.oh + oy) * s.ow * s.out;
        forward_row(args, rows, packed, tile, y, moments, oy == own.begin, finite);
      }
      for (int64_t v = 0; moments && v < vecs; v++)
        moments[v].write(args.partial + task * 3 * s.out + v * kLanes, s.out,
                         min_of(kLanes, s.out - v * kLanes), own.size() * s.ow);
    }
  }
  return true;
}

// dz of a row of `pixels` into groups [pixels][VECS * kLanes], zero in lanes beyond the channels.
template <typename T, typename A, bool BY_BATCH>
void form_dz(float* dz, const StemBackwardArgs& args, const T* grad_y, const T* z, int64_t pixels) {
  const int64_t out = args.shape.out, vecs = ceil_div(out, kLanes);
  const A act(args.activation);
  for (int64_t begin = 0; begin < pixels; begin += kBlock) {
    const int64_t end = min_of(pixels, begin + kBlock);
    for (int64_t v = 0; v < vecs; v++) {
      const int64_t c = v * kLanes, lanes = min_of(kLanes, out - c), first = v / kVecs * kVecs;
      const int64_t width = min_of(kVecs, vecs - first) * kLanes;
      float* const to = dz + first * kLanes * pixels + (v - first) * kLanes;
      const Vec scale = load_n(args.grad.scale + c, lanes), shift = load_n(args.shift + c, lanes);
      const Vec mean = load_n(args.grad.mean + c, lanes);
      const Vec slope = BY_BATCH ? load_n(args.grad.slope + c, lanes) : Vec{};
      const Vec offset = BY_BATCH ? load_n(args.grad.offset + c, lanes) : Vec{};
      fetch<kBlock>(z + end * out + v * kLanes * kBlock);
      fetch<kBlock>(grad_y + end * out + v * kLanes * kBlock);
      for (int64_t p = begin; p < end; p++) {
        const Vec value = load_n(z + p * out + c, lanes);
        const Vec du = act.gradient(load_n(grad_y + p * out + c, lanes), value * scale + shift);
        const Vec means = BY_BATCH ? (value - mean) * slope + offset : Vec{};
        store(to + p * width, du * scale + means);
      }
    }
  }
}

// sum [TAPS][columns] += sum over pixels of x[p][tap] * dz[p][.].
template <int TAPS, int VECS>
EFFNET_NOINLINE void grad_tile(float* sum, int64_t columns, const float* x, int64_t step,
                               const float* dz, int64_t pixels) {
  Vec acc[TAPS][VECS] = {};
  for (int64_t p = 0; p < pixels; p++, x += step, dz += VECS * kLanes) {
    Vec g[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; v++) g[v] = in_register(load(dz + v * kLanes));
#pragma GCC unroll 16
    for (int t = 0; t < TAPS; t++) {
      const Vec value = in_register(broadcast(x + t));
#pragma GCC unroll 4
      for (int v = 0; v < VECS; v++) acc[t][v] += value * g[v];
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < TAPS; t++)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; v++) {
      float* const to = sum + t * columns + v * kLanes;
      store(to, load(to) + acc[t][v]);
    }
}

using GradTile = void (*)(float*, int64_t, const float*, int64_t, const float*, int64_t);

template <int VECS>
struct GradTiles {
  template <int TAPS>
  static constexpr GradTile of = grad_tile<TAPS, VECS>;
};

template <int VECS>
GradTile grad_tile_of(int64_t taps) {
  using Taps = std::make_integer_sequence<int, kTaps>;
  return tile_of_rows<GradTile, GradTiles<VECS>>(taps, Taps());
}

// Adds the current row's products to grad [Kh][Kw][C][out padded].
template <typename T>
void backward_row(float* grad, const StemConvShape& s, const Rows<T>& rows, const float* dz) {
  const int64_t run = s.kw * s.c, step = s.stride_w * s.c, columns = padded(s.out);
  const int64_t tiles = ceil_div(run, kTaps), chains = ceil_div(s.ow, kChain);
  for_groups(s.out, [&]<int VECS>(int64_t v) {
    for (int64_t chain = 0; chain < chains; chain++) {
      const Range own = part_of(s.ow, chains, chain);
      const float* const g = dz + v * kLanes * s.ow + own.begin * VECS * kLanes;
      for (int64_t ky = 0; ky < s.kh; ky++)
        for (int64_t i = 0; i < tiles; i++) {
          const Range taps = part_of(run, tiles, i);
          grad_tile_of<VECS>(taps.size())(grad + (ky * run + taps.begin) * columns + v * kLanes,
                                          columns, rows[ky] + own.begin * step + taps.begin, step,
                                          g, own.size());
        }
    }
  });
}

template <typename T>
bool backward(const StemBackwardArgs& args) {
  const StemConvShape& s = args.shape;
  const int64_t size = s.kh * s.kw * s.c * padded(s.out), row_floats = Rows<T>::floats(s);
  const int64_t tasks = stem_weight_tasks(s.n * s.oh, size);
  const int64_t floats = row_floats + whole_lines(s.ow * padded(s.out));
  float* const memory = args.workspace(args.threads * floats);
  if (!memory) return false;
  const auto form = with_activation(args.activation, [&]<typename A>() {
    return args.grad.slope ? &form_dz<T, A, true> : &form_dz<T, A, false>;
  });
#pragma omp parallel num_threads(args.threads)
  {
    float* const own_memory = memory + omp_get_thread_num() * floats;
    Rows<T> rows(s, args.x, own_memory);
    float* const dz = own_memory + row_floats;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; task++) {
      float* const grad = args.grad_weight + task * size;
      std::memset(grad, 0, sizeof(float) * static_cast<size_t>(size));
      const Range own = part_of(s.n * s.oh, tasks, task);
      for (int64_t row = own.begin; row < own.end; row++) {
        const int64_t first = row * s.ow * s.out;
        form(dz, args, at<T>(args.grad_y, first), at<T>(args.z, first), s.ow);
        rows.move_to(row / s.oh, row % s.oh);
        backward_row(grad, s, rows, dz);
      }
    }
  }
  return true;
}

}  // namespace

bool stem_forward(const StemForwardArgs& args) {
  return args.dtype == DType::kFloat32 ? forward<float>(args) : forward<bf16>(args);
}

bool stem_backward(const StemBackwardArgs& args) {
  return args.dtype == DType::kFloat32 ? backward<float>(args) : backward<bf16>(args);
}

}  // namespace EFFNET_ISA
}  // namespace effnet
