// Pointwise convolutions of MBConv in training, forward: expansion and projection.
//
// Computes: z = conv(a, weight), a = x, or act(x * scale + shift), or that times the image's gate;
//           (mean, M2) of z - pivot, as stored, over each task, with the pivot, where wanted
// Layout:   channels-last without gaps
// Tiling:   a task owns a part of one image's pixels and goes through chunks of a few dozen. A
//           chunk's operand is formed once, in the order of addresses, into panels in the L2 cache;
//           panels of 2 vectors of output channels are multiplied from there
// Bytes:    x once, z once
// FLOPs:    2 * C * out per pixel, about 20 per element of an activated x, 4 with
//           clamp
// Source:   original
// Truth:    tests/support/reference_passes.py (expand, project)
#include "cpu/simd/activations.h"
#include "cpu/simd/moments.h"
#include "cpu/training/kernels.h"
#include "cpu/training/pair_product.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

template <typename T>
using OperandOf = typename ProductFor<T>::type::Operand;

// Forms the operand of a chunk of pixels that begins at x; gate [C] of its image or null.
template <typename T>
using Stage = void (*)(const OperandOf<T>& to, const T* x, int64_t pixels,
                       const PointwiseForwardArgs& args, const float* gate);

template <typename T>
void stage_as_it_is(const OperandOf<T>& to, const T* x, int64_t pixels,
                    const PointwiseForwardArgs& args, const float*) {
  const int64_t c = args.c;
  ProductFor<T>::type::form(
      to, pixels, c, nullptr,
      [&](int64_t i, int64_t p, int64_t lanes, int64_t) { return load_n(x + p * c + i, lanes); });
}

template <typename T, typename A>
void stage_activated(const OperandOf<T>& to, const T* x, int64_t pixels,
                     const PointwiseForwardArgs& args, const float* gate) {
  const int64_t c = args.c;
  const A act(args.activation);
  ProductFor<T>::type::form(
      to, pixels, c, nullptr, [&](int64_t i, int64_t p, int64_t lanes, int64_t) {
        const Vec u = load_n(x + p * c + i, lanes) * load_n(args.norm.scale + i, lanes) +
                      load_n(args.norm.shift + i, lanes);
        Vec a = act.value(u);
        if (gate) a *= load_n(gate + i, lanes);
        return a;
      });
}

// Calls f(pixel, pixel % SUMS).
template <int SUMS, typename F>
EFFNET_INLINE void for_pixels(int64_t pixels, const F& f) {
  int64_t p = 0;
  for (; p + SUMS <= pixels; p += SUMS)
#pragma GCC unroll 8
    for (int i = 0; i < SUMS; i++) f(p + i, i);
  for (int i = 0; p + i < pixels; i++) f(p + i, i);
}

// Stores a panel of VECS vectors, and takes its moments where they are wanted.
template <typename T, int VECS>
void finish_panel(const float* panel, T* z, int64_t pixels, int64_t out, int64_t first,
                  Moments* moments, bool fresh, bool stream) {
  for (int64_t v = 0; v < VECS; v++) {
    const int64_t c = (first + v) * kLanes, lanes = min_of(kLanes, out - c);
    const float* from = panel + v * kLanes;
    if (!moments) {
      for (int64_t p = 0; p < pixels; p++)
        store_n(z + p * out + c, load(from + p * VECS * kLanes), lanes, stream);
      continue;
    }
    const Vec pivot = moments[first + v].begin(as_stored<T>(load(from)), fresh);
    // Four sums each: one of all pixels would lose digits.
    constexpr int kSums = 4;
    Vec totals[kSums] = {}, squares[kSums] = {};
    for_pixels<kSums>(pixels, [&](int64_t p, int sum) {
      const Vec stored = as_stored<T>(load(from + p * VECS * kLanes));
      store_n(z + p * out + c, stored, lanes, stream);
      totals[sum] += stored - pivot;
    });
    const Vec total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
    const Vec mean = total * (1.0f / static_cast<float>(pixels));
    for_pixels<kSums>(pixels, [&](int64_t p, int sum) {
      const Vec d = as_stored<T>(load(from + p * VECS * kLanes)) - pivot - mean;
      squares[sum] += d * d;
    });
    const Vec m2 = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    moments[first + v].take(total, m2, pixels);
  }
}

template <typename P>
struct ForwardScratch {
  Moments* moments;
  typename P::Operand operand;
  float* panel;
  ForwardScratch(Carver& take, const PointwiseForwardArgs& args)
      : moments(reinterpret_cast<Moments*>(
            args.partial ? take(ceil_div(args.out, kLanes) * kMomentFloats) : nullptr)),
        operand(take, args.c, false, true),
        panel(take(P::panel_floats())) {}
  static int64_t floats(const PointwiseForwardArgs& args) {
    Carver count = {nullptr};
    const ForwardScratch counted(count, args);
    return count.used;
  }
};

// The pixels `own` of image n.
template <typename T, typename P>
void multiply_part(const PointwiseForwardArgs& args, const P& product, Stage<T> stage,
                   const float* packed, const ForwardScratch<P>& at, int64_t n, Range own,
                   bool stream) {
  const int64_t c = args.c, out = args.out, size = P::chunk(own.size(), c);
  const float* gate = args.gate ? args.gate + n * c : nullptr;
  for (int64_t begin = own.begin; begin < own.end; begin += size) {
    const int64_t pixels = min_of(size, own.end - begin), first = n * args.hw + begin;
    stage(at.operand, static_cast<const T*>(args.x) + first * c, pixels, args, gate);
    const int64_t next = first + pixels, end = min_of(next + size, args.n * args.hw);
    Ahead ahead;
    ahead.add(static_cast<const T*>(args.x), next, end, c);
    ahead.start(P::tiles(pixels, c, out));
    T* z = static_cast<T*>(args.z) + first * out;
    for_panels(packed, P::depth(c), out, [&]<int VECS>(int64_t v, const float* weight) {
      product.template multiply<VECS>(at.panel, at.operand, pixels, weight, c, ahead);
      finish_panel<T, VECS>(at.panel, z, pixels, out, v, at.moments, begin == own.begin, stream);
    });
  }
}

template <typename T>
bool run(const PointwiseForwardArgs& args) {
  using P = typename ProductFor<T>::type;
  const int64_t out = args.out, parts = pointwise_parts(args.hw);
  const int64_t weight_floats = whole_lines(P::weight_floats(args.c, out));
  const int64_t floats = ForwardScratch<P>::floats(args);
  float* const packed = args.workspace(weight_floats + args.threads * floats);
  if (!packed) return false;
  const bool stream = streams<T>(args.z, args.n * args.hw * out, out);
  const P product(args.amx);
  Stage<T> stage = stage_as_it_is<T>;
  if (args.norm.scale)
    stage = with_activation(args.activation, []<typename A>() { return &stage_activated<T, A>; });
#pragma omp parallel num_threads(args.threads)
  {
    const typename P::Unit unit(args.amx);
    Carver take = {packed + weight_floats + omp_get_thread_num() * floats};
    const ForwardScratch<P> at(take, args);
    pack_weight<P>(packed, args.weight, args.weight_dtype, args.c, out, true);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < args.n * parts; task++) {
      const Range own = part_of(args.hw, parts, task % parts);
      multiply_part<T>(args, product, stage, packed, at, task / parts, own, stream);
      for (int64_t v = 0; at.moments && v < ceil_div(out, kLanes); v++)
        at.moments[v].write(args.partial + task * 3 * out + v * kLanes, out,
                            min_of(kLanes, out - v * kLanes), own.size());
    }
    end_streams();
  }
  return true;
}

}  // namespace

bool mbconv_pointwise_forward(const PointwiseForwardArgs& args) {
  return args.dtype == DType::kFloat32 ? run<float>(args) : run<bf16>(args);
}

}  // namespace EFFNET_ISA
}  // namespace effnet
