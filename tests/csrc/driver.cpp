// Runs every kernel of one instruction set against naive loops in double precision.
//
// No torch and no Python: it runs under an emulated CPU and under the sanitizers. Tensors lie in
// heap blocks of their exact size, outputs and workspaces start as NaN, inputs have NaN in their
// gaps.
//
// Usage: driver ISA TOLERANCE_FP32 TOLERANCE_BF16
//   an error may be TOLERANCE_FP32 of the tensor's largest value, and for a tensor in bf16 besides
//   TOLERANCE_BF16 of the element. Exit status 1 and a line per tensor where one is larger.
// Compile with -D'DRIVER_ISAS=ISA(generic) ISA(avx2)' and link the objects of these sets.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#define EFFNET_NAMESPACE host
#include "checksum.h"
#include "common/geometry.h"
#include "cpu/args.h"
#include "cpu/isa_dispatch.h"
#include "dense_network.h"
#include "excite.h"
#include "mbconv.h"
#include "mbconv_depthwise.h"
#include "network_problem.h"
#include "problem.h"
#include "special.h"
#include "stem.h"

using namespace effnet;
using namespace effnet::driver;
using namespace effnet::host;

#define ISA(name)               \
  namespace effnet {            \
  namespace name {              \
  extern const Kernels kernels; \
  }                             \
  }
DRIVER_ISAS
#undef ISA

namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16};
constexpr int kThreads[] = {1, 3}, kNetworkThreads[] = {1, 2, 4};

void fold_sum(const Tensor& partial, int64_t outer, int64_t parts, int64_t c, float factor,
              Tensor& out, int threads) {
  FoldArgs args = {partial.floats(), outer, parts, c, factor, out.floats(), threads};
  launch("fold_sum", kernels->fold_sum, args);
}

const Case kCases[] = {
    {2, 3, 5, 7, 3, 1, 1, 1, 1, 1},   {1, 21, 7, 6, 3, 2, 1, 1, 1, 1},
    {2, 35, 4, 9, 5, 1, 2, 2, 2, 2},  {1, 19, 9, 8, 5, 2, 1, 2, 1, 2},
    {1, 16, 2, 3, 5, 1, 2, 2, 2, 2},  {3, 9, 1, 1, 3, 1, 1, 1, 1, 1},
    {1, 5, 6, 5, 7, 2, 3, 3, 3, 3},   {2, 4, 5, 4, 1, 2, 0, 0, 0, 0},
    {1, 3, 37, 4, 3, 1, 1, 1, 1, 1},  {1, 1, 35, 3, 5, 2, 2, 2, 2, 2},
    {1, 7, 3, 4, 3, 2, 5, 4, 6, 3},   {1, 150, 3, 21, 3, 1, 0, 1, 1, 0},
    {1, 17, 64, 5, 3, 1, 1, 1, 1, 1}, {1, 6, 120, 4, 5, 2, 2, 2, 2, 2},
};

void test_dwconv_forward(const Problem& problem, bool training, int threads) {
  const Case& p = problem.p;
  const int64_t chunks = row_chunks(problem.oh);
  Doubles exact(problem.out_size());
  problem.for_products([&](int64_t x, int64_t weight, int64_t out) {
    exact[out] += problem.x[x] * problem.weight[weight];
  });
  Tensor scale(p.c, DType::kFloat32, 0.5, 1.5), shift(p.c, DType::kFloat32, -1, 1);
  Tensor y(problem.out_size(), problem.dtype), partial(p.n * chunks * (training ? 3 : 1) * p.c);
  DwconvForwardArgs args = {problem.shape(),
                            problem.dtype,
                            problem.weight.dtype(),
                            problem.x_image(),
                            problem.out_image(y),
                            problem.weight.data(),
                            training ? nullptr : scale.floats(),
                            training ? nullptr : shift.floats(),
                            partial.floats(),
                            training,
                            activation,
                            workspace,
                            threads};
  launch("dwconv_forward", kernels->dwconv_forward, args);
  if (!training)
    for (int64_t i = 0; i < y.size(); i++)
      exact[i] = act(exact[i] * scale[i % p.c] + shift[i % p.c]);
  expect(training ? "z" : "y", y, exact);
  if (training) {
    Doubles exact_mean, exact_var;
    moments(y, p.c, exact_mean, exact_var);
    Tensor mean(p.c), var(p.c);
    MergeMomentsArgs fold = {partial.floats(), p.n,           chunks,       p.c,    problem.oh,
                             problem.ow,       mean.floats(), var.floats(), threads};
    launch("merge_moments", kernels->merge_moments, fold);
    expect("mean", mean, exact_mean, 1);
    expect("var", var, exact_var);
  } else {
    Tensor pooled(p.n * p.c);
    const int64_t pixels = problem.oh * problem.ow;
    fold_sum(partial, p.n, chunks, p.c, 1.0f / static_cast<float>(pixels), pooled, threads);
    Doubles exact_pooled(p.n * p.c);
    for (int64_t i = 0; i < y.size(); i++)
      exact_pooled[i / (pixels * p.c) * p.c + i % p.c] += y[i] / pixels;
    expect("pooled", pooled, exact_pooled);
  }
}

void test_dwconv_backward(const Problem& problem, bool training, bool data, bool weight,
                          int threads) {
  const Case& p = problem.p;
  const int64_t pixels = p.n * problem.oh * problem.ow, kk = p.k * p.k;
  Tensor z(problem.out_size(), problem.dtype, -2, 2),
      grad_y(problem.out_size(), problem.dtype, -1, 1);
  Tensor scale(p.c, DType::kFloat32, 0.5, 1.5), shift(p.c, DType::kFloat32, -1, 1);
  Tensor mean(p.c, DType::kFloat32, -1, 1), rstd(p.c, DType::kFloat32, 0.5, 2);

  const int64_t parts = pixel_chunks(pixels);
  Tensor partial(parts * 2 * p.c), sums(2 * p.c), means(2 * p.c);
  BnReduceArgs reduce = {{1, p.c, pixels}, problem.dtype,  z.data(),      grad_y.data(),
                         scale.floats(),   shift.floats(), mean.floats(), rstd.floats(),
                         partial.floats(), activation,     threads};
  launch("bn_backward_reduce", kernels->bn_backward_reduce, reduce);
  fold_sum(partial, 1, parts, 2 * p.c, 1, sums, threads);
  Doubles exact_sums(2 * p.c), dz(z.size()), zh(z.size());
  for (int64_t i = 0; i < z.size(); i++) {
    const int64_t c = i % p.c;
    dz[i] = grad_y[i] * act_slope(z[i] * scale[c] + shift[c]);
    zh[i] = (z[i] - mean[c]) * rstd[c];
    exact_sums[c] += dz[i];
    exact_sums[p.c + c] += dz[i] * zh[i];
  }
  expect("sums", sums, exact_sums);
  for (int64_t i = 0; i < 2 * p.c; i++) means.set(i, sums[i] / pixels);
  for (int64_t i = 0; i < z.size(); i++) {
    const int64_t c = i % p.c;
    if (training) dz[i] -= means[c] + zh[i] * means[p.c + c];
    dz[i] *= scale[c];
  }

  const int64_t groups = weight_groups(p.n, problem.oh, problem.ow) * row_chunks(problem.oh);
  Tensor grad_x(data ? p.n * p.h * p.w * p.c : 0, problem.dtype);
  Tensor grad_parts(weight ? groups * p.c * kk : 0), grad_weight(weight ? p.c * kk : 0);
  Image grad_image = {data ? grad_x.data() : nullptr, p.h * p.w * p.c, p.w * p.c, p.c};
  DwconvBackwardArgs args = {problem.shape(),
                             problem.dtype,
                             problem.weight.dtype(),
                             problem.x_image(),
                             problem.out_image(z),
                             problem.out_image(grad_y),
                             grad_image,
                             problem.weight.data(),
                             scale.floats(),
                             shift.floats(),
                             mean.floats(),
                             rstd.floats(),
                             training ? means.floats() : nullptr,
                             training ? means.floats() + p.c : nullptr,
                             weight ? grad_parts.floats() : nullptr,
                             activation,
                             workspace,
                             threads};
  launch("dwconv_backward", kernels->dwconv_backward, args);

  Doubles exact_x(problem.x.size()), exact_weight(p.c * kk), dense;
  problem.for_products([&](int64_t x, int64_t tap, int64_t out) {
    exact_x[x] += dz[out] * problem.weight[tap];
    exact_weight[tap] += dz[out] * problem.x[x];
  });
  if (data) {
    for (int64_t n = 0; n < p.n; n++)
      for (int64_t h = 0; h < p.h; h++)
        for (int64_t w = 0; w < p.w; w++)
          for (int64_t i = 0; i < p.c; i++) dense.push_back(exact_x[problem.x_index(n, h, w) + i]);
    expect("grad_x", grad_x, dense);
  }
  if (weight) {
    fold_sum(grad_parts, 1, groups, p.c * kk, 1, grad_weight, threads);
    expect("grad_weight", grad_weight, exact_weight);
  }
}

void test_dwconv(DType dtype, DType weight_dtype, int threads) {
  for (const Case& c : kCases) {
    context = "dwconv " + std::to_string(c.n) + "x" + std::to_string(c.c) + "x" +
              std::to_string(c.h) + "x" + std::to_string(c.w) + " k" + std::to_string(c.k) + " s" +
              std::to_string(c.stride) + (dtype == DType::kFloat32 ? " fp32" : " bf16") + " on " +
              std::to_string(threads);
    const Problem problem(c, dtype, weight_dtype);
    for (bool training : {false, true}) {
      test_dwconv_forward(problem, training, threads);
      test_dwconv_backward(problem, training, true, true, threads);
    }
    test_dwconv_backward(problem, true, true, false, threads);
    test_dwconv_backward(problem, true, false, true, threads);
    for (bool activated : {false, true}) test_depthwise(problem, activated, kEverything, threads);
    if (&c != kCases) continue;
    for (bool activated : {false, true})
      for (const Wanted& wanted : kWanted) test_depthwise(problem, activated, wanted, threads);
  }
}

// As test_streams.
void test_depthwise_streams(int threads) {
  const Problem problem({1, 96, 120, 120, 3, 1, 1, 1, 1, 1}, DType::kFloat32, DType::kFloat32);
  context = "depthwise 1x120x120x96";
  test_depthwise(problem, true, kEverything, threads);
}

const PlaneShape kPlanes[] = {{2, 3, 5}, {1, 37, 11}, {3, 16, 1}, {1, 9, 1030}, {2, 200, 49}};

void test_planes(const PlaneShape& s, DType dtype, int threads) {
  context = "plane " + std::to_string(s.n) + "x" + std::to_string(s.hw) + "x" +
            std::to_string(s.c) + (dtype == DType::kFloat32 ? " fp32" : " bf16");
  const int64_t size = s.n * s.hw * s.c, chunks = pixel_chunks(s.hw);
  Tensor x(size, dtype, -3, 3), other(size, dtype, -1, 1);
  Tensor scale(s.c, DType::kFloat32, 0.5, 1.5), shift(s.c, DType::kFloat32, -1, 1);
  for (bool add : {false, true}) {
    Tensor y(x);  // in place
    AffineActArgs args = {{1, s.c, s.n * s.hw},
                          dtype,
                          y.data(),
                          add ? other.data() : nullptr,
                          scale.floats(),
                          shift.floats(),
                          y.data(),
                          activation,
                          threads};
    launch("affine_act", kernels->affine_act, args);
    Doubles exact(size);
    for (int64_t i = 0; i < size; i++) {
      const double u = x[i] * scale[i % s.c] + shift[i % s.c];
      exact[i] = act(u) + (add ? other[i] : 0);
    }
    expect("affine_act", y, exact);
  }
  Tensor gate(s.n * s.c, DType::kFloat32, 0, 1), offset(s.n * s.c, DType::kFloat32, -1, 1);
  for (bool product : {false, true}) {
    Tensor partial(s.n * chunks * s.c), sums(s.n * s.c), y(size, dtype);
    SqueezeArgs args = {s,      dtype, x.data(), product ? other.data() : nullptr, partial.floats(),
                        threads};
    launch("squeeze", kernels->squeeze, args);
    fold_sum(partial, s.n, chunks, s.c, 0.25f, sums, threads);
    GateArgs gate_args = {
        s, dtype, x.data(), gate.floats(), product ? offset.floats() : nullptr, y.data(), threads};
    launch("gate", kernels->gate, gate_args);
    Doubles exact_sums(s.n * s.c), exact(size);
    for (int64_t i = 0; i < size; i++) {
      const int64_t nc = i / (s.hw * s.c) * s.c + i % s.c;
      exact_sums[nc] += 0.25 * x[i] * (product ? other[i] : 1);
      exact[i] = x[i] * gate[nc] + (product ? offset[nc] : 0);
    }
    expect("squeeze", sums, exact_sums);
    expect("gate", y, exact);
  }
}

// What SiLU has been tested with, on fewer threads.
void test_other_activations() {
  constexpr int kFew = 2;
  for (int i = 0; i < 3; i++) {
    activation = kOtherActivations[i];
    gate_kind = i % 2 ? kSigmoid : kHardSigmoid;
    for (DType dtype : kDTypes) {
      test_dwconv(dtype, dtype, kFew);
      test_mbconv(dtype, kFew);
      for (const PlaneShape& shape : kPlanes) test_planes(shape, dtype, kFew);
      test_excite(dtype, kFew);
      test_stem(dtype, dtype, kFew);
      const bool narrow = dtype == DType::kBFloat16;
      for (bool excites : {false, true})
        test_network(dtype, narrow && bf16_products, narrow && amx, excites, kFew);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4)
    return std::fprintf(stderr, "usage: driver ISA TOLERANCE_FP32 TOLERANCE_BF16\n"), 2;
  amx = std::string(argv[1]) == "amx";
  const std::string isa = amx ? "avx512_bf16" : argv[1];
#define ISA(name) \
  if (isa == #name) kernels = &effnet::name::kernels;
  DRIVER_ISAS
#undef ISA
  if (amx && !missing_amx().empty()) return std::fprintf(stderr, "%s\n", missing_amx().c_str()), 2;
  if (!kernels) return std::fprintf(stderr, "%s is not in this driver\n", argv[1]), 2;
  bf16_products = isa == "avx512_bf16";
  tolerance_fp32 = std::atof(argv[2]);
  tolerance_bf16 = std::atof(argv[3]);
  for (DType dtype : kDTypes)
    for (int threads : kThreads) {
      test_dwconv(dtype, dtype, threads);
      test_mbconv(dtype, threads);
      for (const PlaneShape& shape : kPlanes) test_planes(shape, dtype, threads);
      test_excite(dtype, threads);
    }
  test_dwconv(DType::kBFloat16, DType::kFloat32, 2);
  if (bf16_products) test_many_pixels(2);
  for (int threads : kThreads) test_checksum(threads);
  test_special_values();
  if (isa == "avx512") {
    test_streams(2);
    test_depthwise_streams(2);
  }
  for (int threads : kNetworkThreads) {
    for (bool excites : {false, true}) {
      test_network(DType::kFloat32, false, false, excites, threads);
      test_network(DType::kBFloat16, isa == "avx512_bf16", amx, excites, threads);
    }
    for (int64_t l2 : {32 << 10, 2 << 20}) {
      test_dense_network(false, false, l2, threads);
      if (isa == "avx512_bf16") test_dense_network(true, amx, l2, threads);
    }
  }
  for (bool bf16 : {false, isa == "avx512_bf16"}) {  // as if a weight were infinite
    test_network(DType::kFloat32, bf16, bf16 && amx, true, 2, false);
    test_dense_network(bf16, bf16 && amx, 32 << 10, 2, false);
  }
  for (DType dtype : kDTypes)
    for (int threads : kThreads) test_stem(dtype, dtype, threads);
  test_stem(DType::kBFloat16, DType::kFloat32, 2);
  test_other_activations();
  std::printf("%s: %d of %d tensors are wrong\n", argv[1], failures, comparisons);
  return failures ? 1 : 0;
}
