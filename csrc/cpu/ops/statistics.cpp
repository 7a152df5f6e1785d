// Folds of partial sums and statistics in a fixed order, and the reductions of BatchNorm's
// backward.
//
// Computes: sums; Chan's merge of (count, mean, M2); sum du and sum du * zh over all pixels with
//           du = grad_y * act'(z * scale + shift), zh = (z - mean) * rstd
// Layout:   partials [parts,C], tensors contiguous channels-last
// Source:   Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance"
#include "cpu/kernels.h"
#include "cpu/simd/activations.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

template <typename T, typename A>
bool reduce(const BnReduceArgs& args) {
  const int64_t c = args.shape.c, pixels = args.shape.hw;
  const int64_t chunks = pixel_chunks(pixels);
  const T* const all_z = static_cast<const T*>(args.z);
  const T* const all_dy = static_cast<const T*>(args.grad_y);
  const A act(args.activation);
  constexpr int64_t kBlock = 8;  // pixels per visit of a channel vector: as many open streams
#pragma omp parallel for num_threads(args.threads) schedule(static)
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    float* sums = args.partial + chunk * 2 * c;
    std::memset(sums, 0, sizeof(float) * 2 * c);
    const Range own = part_of(pixels, chunks, chunk);
    const int64_t end = own.end;
    for (int64_t begin = own.begin; begin < end; begin += kBlock) {
      const int64_t stop = min_of(end, begin + kBlock);
      for (int64_t i = 0; i < c; i += kLanes) {
        const int64_t lanes = min_of(kLanes, c - i);
        const Vec scale = load_n(args.scale + i, lanes), shift = load_n(args.shift + i, lanes);
        const Vec mean = load_n(args.mean + i, lanes), rstd = load_n(args.rstd + i, lanes);
        fetch<kBlock>(all_z + stop * c + i * kBlock);
        fetch<kBlock>(all_dy + stop * c + i * kBlock);
        Vec du_sum = {}, duzh_sum = {};
        for (int64_t p = begin; p < stop; p++) {
          const Vec z = load_n(all_z + p * c + i, lanes);
          const Vec dy = load_n(all_dy + p * c + i, lanes);
          const Vec du = act.gradient(dy, z * scale + shift);
          du_sum += du;
          duzh_sum += du * ((z - mean) * rstd);
        }
        store_n(sums + i, load_n(sums + i, lanes) + du_sum, lanes);
        store_n(sums + c + i, load_n(sums + c + i, lanes) + duzh_sum, lanes);
      }
    }
  }
  return true;
}

}  // namespace

bool bn_backward_reduce(const BnReduceArgs& args) {
  return with_activation(args.activation, [&]<typename A>() {
    return args.dtype == DType::kFloat32 ? reduce<float, A>(args) : reduce<bf16, A>(args);
  });
}

bool fold_sum(const FoldArgs& args) {
  constexpr int64_t kSumBlock = 16;  // partials summed apart: long chains lose digits
  const int64_t vecs = ceil_div(args.c, kLanes);
  const bool large = args.outer * args.parts * args.c > 16384;
#pragma omp parallel for num_threads(args.threads) schedule(static) if (large)
  for (int64_t index = 0; index < args.outer * vecs; index++) {
    const int64_t outer = index / vecs, i = index % vecs * kLanes;
    const int64_t lanes = min_of(kLanes, args.c - i);
    const float* partial = args.partial + outer * args.parts * args.c + i;
    Vec sum = {};
    for (int64_t begin = 0; begin < args.parts; begin += kSumBlock) {
      Vec block = {};
      for (int64_t p = begin; p < min_of(args.parts, begin + kSumBlock); p++)
        block += load_n(partial + p * args.c, lanes);
      sum += block;
    }
    store_n(args.out + outer * args.c + i, sum * args.factor, lanes);
  }
  return true;
}

bool merge_moments(const MergeMomentsArgs& args) {
  const int64_t vecs = ceil_div(args.c, kLanes);
  const bool large = args.n * args.chunks * args.c > 16384;
#pragma omp parallel for num_threads(args.threads) schedule(static) if (large)
  for (int64_t v = 0; v < vecs; v++) {
    const int64_t i = v * kLanes, lanes = min_of(kLanes, args.c - i);
    const Vec pivot = load_n(args.partial + 2 * args.c + i, lanes);
    Vec mean = {}, m2 = {};  // of z - pivot, the first part's
    int64_t total = 0;
    for (int64_t p = 0; p < args.n * args.chunks; p++) {
      const int64_t count = part_of(args.oh, args.chunks, p % args.chunks).size() * args.ow;
      const float* part = args.partial + p * 3 * args.c + i;
      const Vec delta = (load_n(part + 2 * args.c, lanes) - pivot) + load_n(part, lanes) - mean;
      const float share = static_cast<float>(count) / static_cast<float>(total + count);
      mean += delta * share;
      m2 += load_n(part + args.c, lanes) + delta * delta * (share * static_cast<float>(total));
      total += count;
    }
    store_n(args.mean + i, mean + pivot, lanes);
    store_n(args.var + i, m2 * (1.0f / static_cast<float>(total)), lanes);
  }
  return true;
}

}  // namespace EFFNET_ISA
}  // namespace effnet
