// Pointwise convolutions of MBConv, backward: projection and expansion, data and weight in one
// pass.
//
// Computes: project  dz3 = scale * (row_scale * grad_y) + (z3 - mean) * slope + offset,
//                    e = dz3 W3, per (n,c) the sums of e * a2, e * act'(u2), e * act'(u2) * zh2,
//                    dW3 = sum over pixels of dz3 (g * a2)^T
//           expand   dz1 likewise of f and z1, dx = dz1 W1 + residual, dW1 = sum of dz1 x^T; for
//                    the head f = q * act'(u1) with a q for each image and channel
// Layout:   channels-last without gaps
// Tiling:   a task owns a group of images, or a part of one, and a weight gradient of its own; it
//           goes through chunks of a few dozen pixels, whose operands are formed once, in the order
//           of addresses, into panels in the L2 cache that serve all products
// Bytes:    project: grad_y, z3, z2 once, e once; expand: f, z1, x, residual once, dx once;
//           the head has no f
// FLOPs:    4 * C * out per pixel, about 30 per element of z2, 12 with clamp
// Source:   original; Ioffe and Szegedy 2015, section 3, for the gradient through BatchNorm
// Truth:    tests/support/reference_passes.py (project_backward,
//           expand_backward, pooled_backward)
#include "cpu/simd/activations.h"
#include "cpu/training/kernels.h"
#include "cpu/training/panel_product.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

// dz of a chunk into panels; du(z, scale, channel, pixel, lanes).
template <typename T, typename F>
EFFNET_INLINE void stage_dz_of(float* panels, const T* z, int64_t pixels, int64_t c,
                               const GradVectors& vectors, float row_scale, const F& du) {
  if (!vectors.slope) {
    for_vectors(pixels, c, [&](int64_t i, int64_t p, int64_t lanes, int64_t at) {
      const Vec value = load_n(z + p * c + i, lanes), scale = load_n(vectors.scale + i, lanes);
      store(panels + at, du(value, scale, i, p, lanes) * (scale * row_scale));
    });
    return;
  }
  for_vectors(pixels, c, [&](int64_t i, int64_t p, int64_t lanes, int64_t at) {
    const Vec value = load_n(z + p * c + i, lanes), scale = load_n(vectors.scale + i, lanes);
    const Vec centred = value - load_n(vectors.mean + i, lanes);
    store(panels + at,
          du(value, scale, i, p, lanes) * (scale * row_scale) +
              (centred * load_n(vectors.slope + i, lanes) + load_n(vectors.offset + i, lanes)));
  });
}

// With du as it lies in memory.
template <typename T>
void stage_dz(float* panels, const T* grad, const T* z, int64_t pixels, int64_t c,
              const GradVectors& vectors, float row_scale) {
  stage_dz_of(panels, z, pixels, c, vectors, row_scale,
              [&](Vec, Vec, int64_t i, int64_t p, int64_t lanes) {
                return load_n(grad + p * c + i, lanes);
              });
}

// With du = q * act'(z * scale + shift), q [C] of the chunk's image.
template <typename T, typename A>
void stage_dz_pooled(float* panels, const float* q, const T* z, int64_t pixels,
                     const ExpandBackwardArgs& args) {
  const A act(args.activation);
  const float* const shift = args.shift;
  stage_dz_of(panels, z, pixels, args.out, args.grad, 1.0f,
              [&](Vec value, Vec scale, int64_t i, int64_t, int64_t lanes) {
                const Vec u = value * scale + load_n(shift + i, lanes);
                return act.gradient(load_n(q + i, lanes), u);
              });
}

// a = act(u) into panels, and where wanted its slope act'(u).
template <typename T, typename A>
void stage_activated(float* a, float* slope, const T* z, int64_t pixels,
                     const ProjectBackwardArgs& args) {
  const int64_t c = args.c;
  const NormVectors& norm = args.norm;
  const A act(args.activation);
  for_vectors(pixels, c, [&](int64_t i, int64_t p, int64_t lanes, int64_t at) {
    const Vec u = load_n(z + p * c + i, lanes) * load_n(norm.scale + i, lanes) +
                  load_n(norm.shift + i, lanes);
    const ValueAndSlope activated = act.both(u);
    store(a + at, activated.value);
    if (slope) store(slope + at, activated.slope);
  });
}

constexpr int64_t kShortChain = 8;  // pixels added up in a row: longer sums lose digits

// Stores a panel of e and adds to the sums [3][C].
template <typename T, int VECS>
void finish_e(const float* panel, const ProjectBackwardArgs& args, int64_t first, int64_t pixels,
              int64_t vec, const float* a, const float* slope, float* sums, bool stream) {
  const int64_t c = args.c;
  for (int64_t v = 0; v < VECS; v++) {
    const int64_t i = (vec + v) * kLanes, lanes = min_of(kLanes, c - i);
    const Vec mean = load_n(args.norm.mean + i, lanes), rstd = load_n(args.norm.rstd + i, lanes);
    const T* z = static_cast<const T*>(args.z2) + first * c + i;
    T* e = static_cast<T*>(args.e) + first * c + i;
    const float *values = a + i * pixels, *slopes = slope + i * pixels;
    Vec sum0 = {}, sum1 = {}, sum2 = {};
    for (int64_t begin = 0; begin < pixels; begin += kShortChain) {
      Vec short0 = {}, short1 = {}, short2 = {};
      for (int64_t p = begin; p < min_of(pixels, begin + kShortChain); p++) {
        const Vec stored = as_stored<T>(load(panel + (p * VECS + v) * kLanes));
        store_n(e + p * c, stored, lanes, stream);
        const Vec term = stored * load(slopes + p * kLanes);
        short0 += stored * load(values + p * kLanes);
        short1 += term;
        short2 += term * ((load_n(z + p * c, lanes) - mean) * rstd);
      }
      sum0 += short0, sum1 += short1, sum2 += short2;
    }
    store_n(sums + i, load_n(sums + i, lanes) + sum0, lanes);
    store_n(sums + c + i, load_n(sums + c + i, lanes) + sum1, lanes);
    store_n(sums + 2 * c + i, load_n(sums + 2 * c + i, lanes) + sum2, lanes);
  }
}

struct ProjectScratch {
  float *dz, *a, *slope, *panel, *gate;
  ProjectScratch(float* at, int64_t c, int64_t out)
      : dz(at),
        a(dz + max_chunk_pixels() * padded(out)),
        slope(a + max_chunk_pixels() * padded(c)),
        panel(slope + max_chunk_pixels() * padded(c)),
        gate(panel + max_chunk_pixels() * kPanelVecs * kLanes) {}
  static int64_t floats(int64_t c, int64_t out) {
    return max_chunk_pixels() * (padded(out) + 2 * padded(c) + kPanelVecs * kLanes) + padded(c);
  }
};

// The pixels [own.begin, own.end) of image n.
template <typename T>
using StageActivated = void (*)(float*, float*, const T*, int64_t, const ProjectBackwardArgs&);

template <typename T>
void project_image(const ProjectBackwardArgs& args, StageActivated<T> stage, const float* packed,
                   const ProjectScratch& at, int64_t n, Range own, float* sums, float* grad_weight,
                   bool fresh, bool stream) {
  const int64_t c = args.c, out = args.out, size = chunk_pixels(own.size(), c);
  const float row_scale = args.row_scale ? args.row_scale[n] : 1.0f;
  for (int64_t i = 0; args.gate && i < c; i += kLanes)
    store(at.gate + i, load_n(args.gate + n * c + i, min_of(kLanes, c - i)));
  if (args.e) std::memset(sums, 0, sizeof(float) * static_cast<size_t>(3 * c));
  for (int64_t begin = own.begin; begin < own.end; begin += size) {
    const int64_t pixels = min_of(size, own.end - begin), first = n * args.hw + begin;
    const int64_t next = first + pixels, end = min_of(next + size, args.n * args.hw);
    Ahead ahead;
    ahead.add(static_cast<const T*>(args.z2), next, end, c);
    ahead.add(static_cast<const T*>(args.z3), next, end, out);
    ahead.add(static_cast<const T*>(args.grad_y), next, end, out);
    ahead.start((args.e ? product_tiles(pixels, out, c) : 0) +
                (grad_weight ? grad_tiles(out, c) : 0));
    stage_dz(at.dz, static_cast<const T*>(args.grad_y) + first * out,
             static_cast<const T*>(args.z3) + first * out, pixels, out, args.grad, row_scale);
    stage(at.a, args.e ? at.slope : nullptr, static_cast<const T*>(args.z2) + first * c, pixels,
          args);
    if (args.e)
      for_panels(packed, out, c, [&]<int VECS>(int64_t v, const float* weight) {
        product_panel<VECS>(at.panel, at.dz, pixels, weight, out, ahead);
        finish_e<T, VECS>(at.panel, args, first, pixels, v, at.a, at.slope, sums, stream);
      });
    if (grad_weight)
      add_grad_weight(grad_weight, at.dz, out, at.a, c, pixels, args.gate ? at.gate : nullptr,
                      !fresh || begin > own.begin, ahead);
  }
}

template <typename T>
bool project(const ProjectBackwardArgs& args) {
  const int64_t c = args.c, out = args.out, partial = padded(out) * padded(c);
  const WeightSplit split(args.n, args.hw, partial);
  const int64_t weight_floats = packed_floats(out, c), floats = ProjectScratch::floats(c, out);
  float* const packed = args.workspace(weight_floats + args.threads * floats);
  if (!packed) return false;
  const bool stream = streams<T>(args.e, args.n * args.hw * c, c);
  const StageActivated<T> stage =
      with_activation(args.activation, []<typename A>() { return &stage_activated<T, A>; });
#pragma omp parallel num_threads(args.threads)
  {
    const ProjectScratch at(packed + weight_floats + omp_get_thread_num() * floats, c, out);
    if (args.e) pack_weight_panels(packed, args.weight, args.weight_dtype, out, c, false);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < split.tasks(); task++) {
      float* grad_weight = args.grad_weight ? args.grad_weight + task * partial : nullptr;
      const Range images = part_of(args.n, split.groups, task / split.parts);
      const int64_t part = task % split.parts;
      for (int64_t n = images.begin; n < images.end; n++)
        project_image<T>(args, stage, packed, at, n, part_of(args.hw, split.parts, part),
                         args.sums + (n * split.parts + part) * 3 * c, grad_weight,
                         n == images.begin, stream);
    }
    end_streams();
  }
  return true;
}

// Stores a panel of grad_x, the residual added.
template <typename T, int VECS>
void finish_grad_x(const float* panel, const ExpandBackwardArgs& args, int64_t first,
                   int64_t pixels, int64_t vec) {
  const int64_t c = args.c;
  const T* residual = static_cast<const T*>(args.residual);
  for (int64_t p = 0; p < pixels; p++)
    for (int64_t v = 0; v < VECS; v++) {
      const int64_t i = (vec + v) * kLanes, lanes = min_of(kLanes, c - i), at = (first + p) * c + i;
      Vec value = load(panel + (p * VECS + v) * kLanes);
      if (residual) value += load_n(residual + at, lanes);
      store_n(static_cast<T*>(args.grad_x) + at, value, lanes);
    }
}

struct ExpandScratch {
  float *dz, *x, *panel;
  ExpandScratch(float* at, int64_t c, int64_t out)
      : dz(at),
        x(dz + max_chunk_pixels() * padded(out)),
        panel(x + max_chunk_pixels() * padded(c)) {}
  static int64_t floats(int64_t c, int64_t out) {
    return max_chunk_pixels() * (padded(out) + padded(c) + kPanelVecs * kLanes);
  }
};

template <typename T>
using StagePooled = void (*)(float*, const float*, const T*, int64_t, const ExpandBackwardArgs&);

template <typename T>
void expand_image(const ExpandBackwardArgs& args, StagePooled<T> stage, const float* packed,
                  const ExpandScratch& at, int64_t n, Range own, float* grad_weight, bool fresh) {
  const int64_t c = args.c, out = args.out, size = chunk_pixels(own.size(), out);
  for (int64_t begin = own.begin; begin < own.end; begin += size) {
    const int64_t pixels = min_of(size, own.end - begin), first = n * args.hw + begin;
    const int64_t next = first + pixels, end = min_of(next + size, args.n * args.hw);
    const T* z = static_cast<const T*>(args.z1);
    const T* f = static_cast<const T*>(args.f);
    Ahead ahead;
    ahead.add(static_cast<const T*>(args.x), next, end, c);
    ahead.add(z, next, end, out);
    if (f) ahead.add(f, next, end, out);
    ahead.start((args.grad_x ? product_tiles(pixels, out, c) : 0) +
                (grad_weight ? grad_tiles(c, out) : 0));
    if (args.q)
      stage(at.dz, args.q + n * out, z + first * out, pixels, args);
    else
      stage_dz(at.dz, f + first * out, z + first * out, pixels, out, args.grad, 1.0f);
    if (args.grad_x)
      for_panels(packed, out, c, [&]<int VECS>(int64_t v, const float* weight) {
        product_panel<VECS>(at.panel, at.dz, pixels, weight, out, ahead);
        finish_grad_x<T, VECS>(at.panel, args, first, pixels, v);
      });
    if (!grad_weight) continue;
    const T* x = static_cast<const T*>(args.x) + first * c;
    for_vectors(pixels, c, [&](int64_t i, int64_t p, int64_t lanes, int64_t to) {
      store(at.x + to, load_n(x + p * c + i, lanes));
    });
    add_grad_weight(grad_weight, at.x, c, at.dz, out, pixels, nullptr, !fresh || begin > own.begin,
                    ahead);
  }
}

template <typename T>
bool expand(const ExpandBackwardArgs& args) {
  const int64_t c = args.c, out = args.out, partial = padded(c) * padded(out);
  const WeightSplit split(args.n, args.hw, partial);
  const int64_t weight_floats = packed_floats(out, c), floats = ExpandScratch::floats(c, out);
  const StagePooled<T> stage =
      with_activation(args.activation, []<typename A>() { return &stage_dz_pooled<T, A>; });
  float* const packed = args.workspace(weight_floats + args.threads * floats);
  if (!packed) return false;
#pragma omp parallel num_threads(args.threads)
  {
    const ExpandScratch at(packed + weight_floats + omp_get_thread_num() * floats, c, out);
    if (args.grad_x) pack_weight_panels(packed, args.weight, args.weight_dtype, out, c, false);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < split.tasks(); task++) {
      float* grad_weight = args.grad_weight ? args.grad_weight + task * partial : nullptr;
      const Range images = part_of(args.n, split.groups, task / split.parts);
      const Range own = part_of(args.hw, split.parts, task % split.parts);
      for (int64_t n = images.begin; n < images.end; n++)
        expand_image<T>(args, stage, packed, at, n, own, grad_weight, n == images.begin);
    }
  }
  return true;
}

}  // namespace

bool mbconv_project_backward(const ProjectBackwardArgs& args) {
  return args.dtype == DType::kFloat32 ? project<float>(args) : project<bf16>(args);
}

bool mbconv_expand_backward(const ExpandBackwardArgs& args) {
  return args.dtype == DType::kFloat32 ? expand<float>(args) : expand<bf16>(args);
}

bool mbconv_fold_weight(const FoldWeightArgs& args) {
  const int64_t width = padded(args.columns), part = padded(args.rows) * width;
  const int64_t across = width / kLanes, blocks = ceil_div(args.rows, kLanes) * across;
#pragma omp parallel for num_threads(args.threads) schedule(static) if (args.parts * part > 16384)
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t r = block / across * kLanes, c = block % across * kLanes;
    const int64_t rows = min_of(kLanes, args.rows - r), lanes = min_of(kLanes, args.columns - c);
    Vec sums[kLanes] = {};
    for (int64_t i = 0; i < args.parts; i++)
      for (int64_t l = 0; l < rows; l++)
        sums[l] += load(args.partial + i * part + (r + l) * width + c);
    if (!args.transposed) {
      for (int64_t l = 0; l < rows; l++)
        store_n(args.out + (r + l) * args.columns + c, sums[l], lanes);
      continue;
    }
    transpose(sums);
    for (int64_t l = 0; l < lanes; l++) store_n(args.out + (c + l) * args.rows + r, sums[l], rows);
  }
  return true;
}

}  // namespace EFFNET_ISA
}  // namespace effnet
