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
#include "cpu/training/pair_product.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

template <typename T>
using ProductOf = typename ProductFor<T>::type;
template <typename T>
using OperandOf = typename ProductOf<T>::Operand;

// Forms dz of a chunk; du(z, scale, channel, pixel, lanes).
template <typename T, typename F>
EFFNET_INLINE void stage_dz_of(const OperandOf<T>& to, const T* z, int64_t pixels, int64_t c,
                               const GradVectors& vectors, float row_scale, const F& du) {
  if (!vectors.slope) {
    ProductOf<T>::form(to, pixels, c, nullptr, [&](int64_t i, int64_t p, int64_t lanes, int64_t) {
      const Vec value = load_n(z + p * c + i, lanes), scale = load_n(vectors.scale + i, lanes);
      return du(value, scale, i, p, lanes) * (scale * row_scale);
    });
    return;
  }
  ProductOf<T>::form(to, pixels, c, nullptr, [&](int64_t i, int64_t p, int64_t lanes, int64_t) {
    const Vec value = load_n(z + p * c + i, lanes), scale = load_n(vectors.scale + i, lanes);
    const Vec centred = value - load_n(vectors.mean + i, lanes);
    return du(value, scale, i, p, lanes) * (scale * row_scale) +
           (centred * load_n(vectors.slope + i, lanes) + load_n(vectors.offset + i, lanes));
  });
}

// With du as it lies in memory.
template <typename T>
void stage_dz(const OperandOf<T>& to, const T* grad, const T* z, int64_t pixels, int64_t c,
              const GradVectors& vectors, float row_scale) {
  stage_dz_of<T>(to, z, pixels, c, vectors, row_scale,
                 [&](Vec, Vec, int64_t i, int64_t p, int64_t lanes) {
                   return load_n(grad + p * c + i, lanes);
                 });
}

// With du = q * act'(z * scale + shift), q [C] of the chunk's image.
template <typename T, typename A>
void stage_dz_pooled(const OperandOf<T>& to, const float* q, const T* z, int64_t pixels,
                     const ExpandBackwardArgs& args) {
  const A act(args.activation);
  const float* const shift = args.shift;
  stage_dz_of<T>(to, z, pixels, args.out, args.grad, 1.0f,
                 [&](Vec value, Vec scale, int64_t i, int64_t, int64_t lanes) {
                   const Vec u = value * scale + load_n(shift + i, lanes);
                   return act.gradient(load_n(q + i, lanes), u);
                 });
}

// Forms a = act(u), times the gate [C] or null where it is summed over pixels, and where wanted its
// slope act'(u).
template <typename T, typename A>
void stage_activated(const OperandOf<T>& to, float* slope, const float* gate, const T* z,
                     int64_t pixels, const ProjectBackwardArgs& args) {
  const int64_t c = args.c;
  const NormVectors& norm = args.norm;
  const A act(args.activation);
  ProductOf<T>::form(to, pixels, c, gate, [&](int64_t i, int64_t p, int64_t lanes, int64_t at) {
    const Vec u = load_n(z + p * c + i, lanes) * load_n(norm.scale + i, lanes) +
                  load_n(norm.shift + i, lanes);
    const ValueAndSlope activated = act.both(u);
    if (slope) store(slope + at, activated.slope);
    return activated.value;
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

template <typename P>
struct ProjectScratch {
  typename P::Gradient gradient;  // of dz and a
  float *slope, *panel, *gate;
  ProjectScratch(Carver& take, const ProjectBackwardArgs& args, const P& product)
      : gradient(take, args.out, args.c, product, {args.e != nullptr, false, args.e != nullptr},
                 args.grad_weight),
        slope(take(args.e ? P::max_pixels() * padded(args.c) : 0)),
        panel(take(P::panel_floats())),
        gate(take(padded(args.c))) {}
  static int64_t floats(const ProjectBackwardArgs& args, const P& product) {
    Carver count = {nullptr};
    const ProjectScratch counted(count, args, product);
    return count.used;
  }
};

// The pixels [own.begin, own.end) of image n.
template <typename T>
using StageActivated = void (*)(const OperandOf<T>&, float*, const float*, const T*, int64_t,
                                const ProjectBackwardArgs&);

template <typename T, typename P>
void project_image(const ProjectBackwardArgs& args, const P& product, StageActivated<T> stage,
                   const float* packed, ProjectScratch<P>& at, int64_t n, Range own, float* sums,
                   bool stream) {
  const int64_t c = args.c, out = args.out, size = P::chunk(own.size(), c);
  const float row_scale = args.row_scale ? args.row_scale[n] : 1.0f;
  for (int64_t i = 0; args.gate && i < c; i += kLanes)
    store(at.gate + i, load_n(args.gate + n * c + i, min_of(kLanes, c - i)));
  const float* const gate = args.gate ? at.gate : nullptr;
  if (args.e) std::memset(sums, 0, sizeof(float) * static_cast<size_t>(3 * c));
  for (int64_t begin = own.begin; begin < own.end; begin += size) {
    const int64_t pixels = min_of(size, own.end - begin), first = n * args.hw + begin;
    const int64_t next = first + pixels, end = min_of(next + size, args.n * args.hw);
    Ahead ahead;
    ahead.add(static_cast<const T*>(args.z2), next, end, c);
    ahead.add(static_cast<const T*>(args.z3), next, end, out);
    ahead.add(static_cast<const T*>(args.grad_y), next, end, out);
    ahead.start((args.e ? P::tiles(pixels, out, c) : 0) +
                (args.grad_weight ? P::Gradient::tiles(out, c) : 0));
    at.gradient.make_room(pixels);
    stage_dz<T>(at.gradient.narrow, static_cast<const T*>(args.grad_y) + first * out,
                static_cast<const T*>(args.z3) + first * out, pixels, out, args.grad, row_scale);
    stage(at.gradient.wide, args.e ? at.slope : nullptr, gate,
          static_cast<const T*>(args.z2) + first * c, pixels, args);
    if (args.e)
      for_panels(packed, P::depth(out), c, [&]<int VECS>(int64_t v, const float* weight) {
        product.template multiply<VECS>(at.panel, at.gradient.narrow, pixels, weight, out, ahead);
        finish_e<T, VECS>(at.panel, args, first, pixels, v, at.gradient.wide.values, at.slope, sums,
                          stream);
      });
    if (args.grad_weight) at.gradient.add(pixels, gate, ahead);
  }
}

template <typename T>
bool project(const ProjectBackwardArgs& args) {
  using P = ProductOf<T>;
  const int64_t c = args.c, out = args.out, partial = padded(out) * padded(c);
  const WeightSplit split(args.n, args.hw, partial);
  const P product(args.amx);
  const int64_t weight_floats = whole_lines(P::weight_floats(out, c));
  const int64_t floats = ProjectScratch<P>::floats(args, product);
  float* const packed = args.workspace(weight_floats + args.threads * floats);
  if (!packed) return false;
  const bool stream = streams<T>(args.e, args.n * args.hw * c, c);
  const StageActivated<T> stage =
      with_activation(args.activation, []<typename A>() { return &stage_activated<T, A>; });
#pragma omp parallel num_threads(args.threads)
  {
    const typename P::Unit unit(args.amx);
    Carver take = {packed + weight_floats + omp_get_thread_num() * floats};
    ProjectScratch<P> at(take, args, product);
    if (args.e) pack_weight<P>(packed, args.weight, args.weight_dtype, out, c, false);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < split.tasks(); task++) {
      at.gradient.start(args.grad_weight ? args.grad_weight + task * partial : nullptr);
      const Range images = part_of(args.n, split.groups, task / split.parts);
      const int64_t part = task % split.parts;
      for (int64_t n = images.begin; n < images.end; n++)
        project_image<T>(args, product, stage, packed, at, n, part_of(args.hw, split.parts, part),
                         args.sums + (n * split.parts + part) * 3 * c, stream);
      at.gradient.finish();
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

template <typename P>
struct ExpandScratch {
  typename P::Gradient gradient;  // of x and dz
  float* panel;
  ExpandScratch(Carver& take, const ExpandBackwardArgs& args, const P& product)
      : gradient(take, args.c, args.out, product, {false, args.grad_x != nullptr, false},
                 args.grad_weight),
        panel(take(P::panel_floats())) {}
  static int64_t floats(const ExpandBackwardArgs& args, const P& product) {
    Carver count = {nullptr};
    const ExpandScratch counted(count, args, product);
    return count.used;
  }
};

template <typename T>
using StagePooled = void (*)(const OperandOf<T>&, const float*, const T*, int64_t,
                             const ExpandBackwardArgs&);

template <typename T, typename P>
void expand_image(const ExpandBackwardArgs& args, const P& product, StagePooled<T> stage,
                  const float* packed, ExpandScratch<P>& at, int64_t n, Range own) {
  const int64_t c = args.c, out = args.out, size = P::chunk(own.size(), out);
  for (int64_t begin = own.begin; begin < own.end; begin += size) {
    const int64_t pixels = min_of(size, own.end - begin), first = n * args.hw + begin;
    const int64_t next = first + pixels, end = min_of(next + size, args.n * args.hw);
    const T* z = static_cast<const T*>(args.z1);
    const T* f = static_cast<const T*>(args.f);
    Ahead ahead;
    ahead.add(static_cast<const T*>(args.x), next, end, c);
    ahead.add(z, next, end, out);
    if (f) ahead.add(f, next, end, out);
    ahead.start((args.grad_x ? P::tiles(pixels, out, c) : 0) +
                (args.grad_weight ? P::Gradient::tiles(c, out) : 0));
    at.gradient.make_room(pixels);
    if (args.q)
      stage(at.gradient.wide, args.q + n * out, z + first * out, pixels, args);
    else
      stage_dz<T>(at.gradient.wide, f + first * out, z + first * out, pixels, out, args.grad, 1.0f);
    if (args.grad_x)
      for_panels(packed, P::depth(out), c, [&]<int VECS>(int64_t v, const float* weight) {
        product.template multiply<VECS>(at.panel, at.gradient.wide, pixels, weight, out, ahead);
        finish_grad_x<T, VECS>(at.panel, args, first, pixels, v);
      });
    if (!args.grad_weight) continue;
    const T* x = static_cast<const T*>(args.x) + first * c;
    P::form(
        at.gradient.narrow, pixels, c, nullptr,
        [&](int64_t i, int64_t p, int64_t lanes, int64_t) { return load_n(x + p * c + i, lanes); });
    at.gradient.add(pixels, nullptr, ahead);
  }
}

template <typename T>
bool expand(const ExpandBackwardArgs& args) {
  using P = ProductOf<T>;
  const int64_t c = args.c, out = args.out, partial = padded(c) * padded(out);
  const WeightSplit split(args.n, args.hw, partial);
  const P product(args.amx);
  const int64_t weight_floats = whole_lines(P::weight_floats(out, c));
  const int64_t floats = ExpandScratch<P>::floats(args, product);
  const StagePooled<T> stage =
      with_activation(args.activation, []<typename A>() { return &stage_dz_pooled<T, A>; });
  float* const packed = args.workspace(weight_floats + args.threads * floats);
  if (!packed) return false;
#pragma omp parallel num_threads(args.threads)
  {
    const typename P::Unit unit(args.amx);
    Carver take = {packed + weight_floats + omp_get_thread_num() * floats};
    ExpandScratch<P> at(take, args, product);
    if (args.grad_x) pack_weight<P>(packed, args.weight, args.weight_dtype, out, c, false);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < split.tasks(); task++) {
      at.gradient.start(args.grad_weight ? args.grad_weight + task * partial : nullptr);
      const Range images = part_of(args.n, split.groups, task / split.parts);
      const Range own = part_of(args.hw, split.parts, task % split.parts);
      for (int64_t n = images.begin; n < images.end; n++)
        expand_image<T>(args, product, stage, packed, at, n, own);
      at.gradient.finish();
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
