// Runs every CUDA kernel over a small table of shapes on the CPU, for the sanitizers; no Python.
//
//   simt_driver [fp32|bf16|fp16]    every dtype, or one alone
//
// Tensors are heap blocks of exactly their size. Each launch happens twice, its threads in another
// order: the results must be bitwise the same, and every element of them set and finite. Whether
// they are right is for the tests of parity to say.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/args.h"
#include "cuda/primitives.cuh"

namespace effnet {
namespace cuda {
namespace {

int failures = 0, launches = 0;
std::string context;  // the case that runs

int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "fp32" : dtype == DType::kFloat16 ? "fp16" : "bf16";
}

float uniform(float low, float high) {
  static uint64_t state = 0x9e3779b97f4a7c15u;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return low + (high - low) * static_cast<float>(state >> 40) / 16777216.0f;
}

class Tensor {
 public:
  // Not inlined: gcc would warn of negative sizes that nobody asks for.
  __attribute__((noinline)) explicit Tensor(int64_t size, DType dtype = DType::kFloat32)
      : size_(size), dtype_(dtype), data_(std::malloc(bytes())) {
    poison();
  }
  Tensor(int64_t size, DType dtype, float low, float high) : Tensor(size, dtype) {
    for (int64_t i = 0; i < size; i++) set(i, uniform(low, high));
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() { std::free(data_); }

  void poison() { std::memset(data_, 0xff, bytes()); }
  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }
  size_t bytes() const { return static_cast<size_t>(size_ * bytes_of(dtype_)); }
  int64_t size() const { return size_; }
  float operator[](int64_t i) const {
    if (dtype_ == DType::kFloat32) return floats()[i];
    if (dtype_ == DType::kFloat16) return to_float(static_cast<__half*>(data_)[i]);
    return to_float(static_cast<__nv_bfloat16*>(data_)[i]);
  }

 private:
  void set(int64_t i, float v) {
    if (dtype_ == DType::kFloat32)
      floats()[i] = v;
    else if (dtype_ == DType::kFloat16)
      static_cast<__half*>(data_)[i] = from_float<__half>(v);
    else
      static_cast<__nv_bfloat16*>(data_)[i] = from_float<__nv_bfloat16>(v);
  }
  int64_t size_;
  DType dtype_;
  void* data_;
};

void failed(const char* what, const std::string& text) {
  if (failures++ < 20) std::printf("%s: %s: %s\n", context.c_str(), what, text.c_str());
}

// `outputs` are all that the launcher writes; null ones are left out.
template <typename Args>
void check(const char* what, void (*launcher)(const Args&, const Queue&), const Args& args,
           std::initializer_list<Tensor*> outputs) {
  const Queue queue = {0, nullptr};
  std::vector<std::vector<char>> first(outputs.size());
  for (int turn = 0; turn < 2; turn++) {
    for (Tensor* t : outputs)
      if (t) t->poison();
    launches++;
    try {
      launcher(args, queue);
    } catch (const std::exception& error) {
      return failed(what, error.what());
    }
    size_t index = 0;
    for (const Tensor* t : outputs) {
      std::vector<char>& before = first[index++];
      if (!t) continue;
      for (int64_t i = 0; i < t->size(); i++)
        if (!std::isfinite((*t)[i]))
          return failed(what, "output " + std::to_string(index) + ", element " + std::to_string(i) +
                                  " of " + std::to_string(t->size()) + " is not finite");
      const char* data = static_cast<const char*>(t->data());
      if (turn == 0)
        before.assign(data, data + t->bytes());
      else if (std::memcmp(before.data(), data, t->bytes()) != 0)
        return failed(what, "output " + std::to_string(index) + " depends on the threads' order");
    }
  }
}

// Vectors of a BatchNorm over C channels: weight and bias in `dtype`, for even C the others too.
struct Norm {
  DType dtype, stats;
  Tensor weight, bias, mean, var;
  Norm(int64_t c, DType dtype)
      : dtype(dtype),
        stats(c % 2 ? DType::kFloat32 : dtype),
        weight(c, dtype, 0.5f, 1.5f),
        bias(c, dtype, -1.0f, 1.0f),
        mean(c, stats, -1.0f, 1.0f),
        var(c, stats, 0.5f, 1.5f) {}
  BatchNorm all() const {
    return {weight.data(), bias.data(), mean.data(), var.data(), dtype, stats, 1e-3f};
  }
};

struct DwconvCase {
  const char* name;
  DwconvShape shape;
  Tile forward, backward;
  int64_t gap;  // elements between the pixels of x
};

//  n, c, h, w, oh, ow, k, stride, left, top; rows, cols, lanes, nx, ny, bands, images
const DwconvCase kDwconv[] = {
    {"k3", {2, 8, 6, 5, 6, 5, 3, 1, 1, 1}, {4, 4, 4, 1, 1, 1, 1}, {2, 4, 4, 1, 1, 1, 1}, 0},
    {"k3_c_odd", {1, 5, 4, 9, 4, 9, 3, 1, 1, 1}, {2, 7, 4, 2, 1, 2, 1}, {2, 4, 4, 2, 1, 2, 1}, 0},
    {"k3_images", {3, 24, 7, 7, 7, 7, 3, 1, 1, 1}, {4, 4, 8, 2, 2, 1, 2}, {2, 4, 8, 2, 4, 1, 2}, 8},
    {"k3_gaps", {2, 9, 5, 5, 5, 5, 3, 1, 1, 1}, {4, 4, 8, 2, 1, 2, 2}, {2, 4, 8, 1, 2, 2, 2}, 3},
    {"k3_same", {2, 16, 8, 7, 4, 4, 3, 2, 1, 0}, {2, 4, 8, 1, 1, 2, 1}, {2, 4, 8, 1, 1, 4, 1}, 0},
    {"k3_bands", {1, 6, 21, 3, 21, 3, 3, 1, 1, 1}, {4, 4, 4, 1, 1, 3, 1}, {2, 4, 4, 1, 2, 3, 1}, 0},
    {"k5", {2, 40, 7, 7, 7, 7, 5, 1, 2, 2}, {2, 7, 16, 1, 2, 2, 2}, {2, 4, 16, 2, 2, 2, 2}, 0},
    {"k5_small", {2, 8, 2, 1, 2, 1, 5, 1, 2, 2}, {4, 4, 4, 1, 1, 1, 2}, {2, 4, 4, 1, 1, 1, 2}, 0},
    {"k5_s2", {2, 12, 9, 8, 5, 4, 5, 2, 2, 2}, {2, 4, 8, 1, 2, 2, 1}, {2, 4, 8, 2, 2, 2, 1}, 0},
    {"k5_same", {1, 10, 6, 11, 3, 6, 5, 2, 2, 1}, {2, 4, 8, 2, 1, 1, 1}, {2, 4, 8, 1, 3, 1, 1}, 0},
};

// SiLU and ReLU6.
const Activation kActivations[] = {{kSilu, 0.0f, 0.0f}, {kClamp, 0.0f, 6.0f}};

void forward(const DwconvCase& at, DType dtype, DType weight_dtype) {
  const DwconvShape& s = at.shape;
  const int64_t pixel = s.c + at.gap;
  const DwconvGrid grid = dwconv_forward_grid(s, at.forward);
  Tensor x((s.n * s.h * s.w - 1) * pixel + s.c, dtype, -2.0f, 2.0f);
  Tensor weight(s.c * s.k * s.k, weight_dtype, -1.0f, 1.0f);
  Tensor y(s.n * s.oh * s.ow * s.c, dtype);
  Tensor pooled(s.n * grid.chunks * s.c), moments(grid.parts * 4 * s.c);
  const Norm before(s.c, dtype), after(s.c, dtype);
  DwconvForwardArgs args = {};
  args.shape = s;
  args.dtype = dtype, args.weight_dtype = weight_dtype;
  args.tile = at.forward;
  args.x = {x.data(), s.h * s.w * pixel, s.w * pixel, pixel};
  args.weight = weight.data();
  args.y = y.data();
  args.factor = 0.25f;
  for (const Activation& activation : kActivations) {
    args.activation = activation;
    for (int prologue = 0; prologue < 2; prologue++) {
      args.before = prologue ? before.all() : BatchNorm{};
      args.after = {};
      args.partial = moments.floats();
      check("forward, raw", launch_dwconv_bn_silu_fwd, args, {&y, &moments});
      args.after = after.all();
      args.partial = pooled.floats();
      check("forward, activated", launch_dwconv_bn_silu_fwd, args, {&y, &pooled});
    }
    args.partial = nullptr;
    check("forward, without sums", launch_dwconv_bn_silu_fwd, args, {&y});
  }
  Tensor mean(s.c), var(s.c);
  MergeMomentsArgs fold = {};
  fold.partial = moments.floats();
  fold.parts = grid.parts, fold.c = s.c;
  fold.mean = mean.floats(), fold.var = var.floats();
  check("merge of moments", launch_merge_moments, fold, {&mean, &var});
}

void backward(const DwconvCase& at, DType dtype, DType weight_dtype) {
  const DwconvShape& s = at.shape;
  const int64_t pixel = s.c + at.gap, outputs = s.n * s.oh * s.ow;
  const DwconvGrid grid = dwconv_backward_grid(s, at.backward);
  Tensor x((s.n * s.h * s.w - 1) * pixel + s.c, dtype, -2.0f, 2.0f);
  Tensor weight(s.c * s.k * s.k, weight_dtype, -1.0f, 1.0f);
  Tensor grad_y(outputs * s.c, dtype, -1.0f, 1.0f), z(outputs * s.c, dtype, -2.0f, 2.0f);
  Tensor gate(s.n * s.c, DType::kFloat32, 0.0f, 1.0f);
  Tensor shift(s.n * s.c, DType::kFloat32, -1.0f, 1.0f);
  Tensor sums(2 * s.c, DType::kFloat32, -1.0f, 1.0f);
  Tensor grad_x(s.n * s.h * s.w * s.c, dtype), partial(grid.parts * (s.k * s.k + 2) * s.c);
  const Norm before(s.c, dtype), after(s.c, dtype);
  DwconvBackwardArgs args = {};
  args.shape = s;
  args.dtype = dtype, args.weight_dtype = weight_dtype;
  args.tile = at.backward;
  args.x = {x.data(), s.h * s.w * pixel, s.w * pixel, pixel};
  args.grad_y = grad_y.data(), args.z = z.data();
  args.after = after.all();
  args.count = static_cast<double>(outputs);
  args.weight = weight.data();
  args.grad_x = grad_x.data();
  args.partial = partial.floats();
  for (const Activation& activation : kActivations) {
    args.activation = activation;
    args.before = {};
    args.gate = args.shift = args.sums = nullptr;
    check("backward, eval", launch_dwconv_bn_silu_bwd, args, {&grad_x, &partial});
    args.before = before.all();
    args.gate = gate.floats(), args.shift = shift.floats();
    args.sums = sums.floats();
    check("backward, training", launch_dwconv_bn_silu_bwd, args, {&grad_x, &partial});
  }
  args.partial = nullptr;
  check("backward, data", launch_dwconv_bn_silu_bwd, args, {&grad_x});
  args.partial = partial.floats(), args.grad_x = nullptr;
  check("backward, weight", launch_dwconv_bn_silu_bwd, args, {&partial});
  const int64_t taps = s.k * s.k;
  Tensor grad_weight(s.c * taps), grad_bn(2 * s.c);
  FoldSumArgs fold = {};
  fold.partial = partial.floats();
  fold.outer = 1, fold.parts = grid.parts, fold.part_rows = taps + 2, fold.c = s.c;
  fold.rows = taps;
  fold.out_r = 1, fold.out_c = taps;
  fold.first_factor = 0.5f;
  fold.out = grad_weight.floats();
  check("fold of weight gradients", launch_fold_sum, fold, {&grad_weight});
  fold.first_row = taps, fold.rows = 2;
  fold.out_r = s.c, fold.out_c = 1;
  fold.out = grad_bn.floats();
  check("fold of sums", launch_fold_sum, fold, {&grad_bn});
}

struct PlaneCase {
  int64_t n, c, hw, chunks;
};

// C: whole vectors, a tail, less than one vector, more than a block's
const PlaneCase kPlanes[] = {{2, 16, 9, 1}, {3, 21, 50, 4}, {1, 3, 7, 7}, {2, 296, 33, 2}};

void reduce(const PlaneCase& at, DType dtype) {
  constexpr int kSums[] = {1, 1, 3, 2, 2};  // of each Reduction
  const int64_t size = at.n * at.hw * at.c;
  const Tensor x(size, dtype, -2.0f, 2.0f), grad_y(size, dtype, -1.0f, 1.0f);
  const Tensor keep(at.n, DType::kFloat32, 0.0f, 1.0f);
  const Norm norm(at.c, dtype);
  for (int what = 0; what < 5; what++) {
    Tensor partial(at.n * at.chunks * kSums[what] * at.c);
    ReduceArgs args = {};
    args.n = at.n, args.c = at.c, args.hw = at.hw, args.chunks = at.chunks;
    args.dtype = dtype;
    args.what = static_cast<Reduction>(what);
    args.x = x.data();
    if (what == 1 || what >= 3) args.grad_y = grad_y.data();
    if (what >= 2) args.bn = norm.all();
    if (what == 4) args.keep = keep.floats();
    args.factor = 0.5f;
    args.partial = partial.floats();
    for (const Activation& activation : kActivations) {
      args.activation = activation;
      check(("reduction " + std::to_string(what)).c_str(), launch_reduce, args, {&partial});
    }
  }
}

void elementwise(const PlaneCase& at, DType dtype) {
  const int64_t size = at.n * at.hw * at.c;
  const Tensor x(size, dtype, -2.0f, 2.0f), residual(size, dtype, -1.0f, 1.0f);
  const Tensor keep(at.n, DType::kFloat32, 0.0f, 1.0f);
  const Tensor gate(at.n * at.c, DType::kFloat32, 0.0f, 1.0f);
  const Tensor shift(at.n * at.c, DType::kFloat32, -1.0f, 1.0f);
  Tensor y(size, dtype);
  const Norm norm(at.c, dtype);
  for (int all = 0; all < 2; all++) {
    BnActArgs act = {};
    act.n = at.n, act.c = at.c, act.hw = at.hw;
    act.dtype = dtype;
    act.z = x.data(), act.y = y.data();
    act.bn = norm.all();
    if (all) act.residual = residual.data(), act.keep = keep.floats();
    const Activation identity = {kClamp, std::nanf(""), std::nanf("")};
    for (const Activation& activation : {kActivations[0], kActivations[1], identity}) {
      act.activation = activation;
      check(all ? "bn, keep, residual" : "bn", launch_bn_act, act, {&y});
    }
    GateArgs gated = {};
    gated.n = at.n, gated.c = at.c, gated.hw = at.hw;
    gated.dtype = dtype;
    gated.x = x.data(), gated.y = y.data();
    gated.gate = gate.floats();
    if (all) gated.shift = shift.floats();
    check(all ? "gate, shift" : "gate", launch_gate, gated, {&y});
  }
}

struct ExciteCase {
  int64_t n, c, r, splits;
};

const ExciteCase kExcite[] = {{1, 8, 1, 1}, {5, 33, 6, 3}, {2, 96, 40, 2}, {34, 40, 4, 1}};

void excite(const ExciteCase& at, DType dtype) {
  const int64_t n = at.n, c = at.c, r = at.r;
  const Tensor pooled(n * c, DType::kFloat32, -1.0f, 1.0f);
  const Tensor w1(r * c, dtype, -1.0f, 1.0f), b1(r, dtype, -1.0f, 1.0f);
  const Tensor w2(c * r, dtype, -1.0f, 1.0f), b2(c, dtype, -1.0f, 1.0f);
  Tensor splits(at.splits * n * r), hidden(n * r), gate(n * c);
  ExciteArgs forward = {};
  forward.n = n, forward.c = c, forward.r = r, forward.splits = at.splits;
  forward.weight_dtype = dtype;
  forward.pooled = pooled.floats();
  forward.se_reduce_weight = w1.data(), forward.se_reduce_bias = b1.data();
  forward.se_expand_weight = w2.data(), forward.se_expand_bias = b2.data();
  forward.partial = splits.floats(), forward.hidden = hidden.floats(), forward.gate = gate.floats();
  for (int kind : {kHardSigmoid, kSigmoid}) {
    forward.activation = kActivations[kind], forward.gate_kind = kind;
    check("excite", launch_excite_fwd, forward, {&splits, &hidden, &gate});
  }

  const Tensor grad_gate(n * c, DType::kFloat32, -1.0f, 1.0f);
  const Tensor grad_sums(2 * n * c, DType::kFloat32, -1.0f, 1.0f);
  const Tensor squeeze_sums(2 * n * c, DType::kFloat32, -1.0f, 1.0f);
  Tensor partial((c + 31) / 32 * n * r), grad_hidden(n * r), grad_pooled(n * c), grad_bn(2 * c);
  Tensor grad_w1(r * c), grad_b1(r), grad_w2(c * r), grad_b2(c);
  ExciteBackwardArgs back = {};
  back.n = n, back.c = c, back.r = r;
  back.weight_dtype = dtype;
  back.pooled = pooled.floats(), back.hidden = hidden.floats(), back.gate = gate.floats();
  back.grad_gate = grad_gate.floats();
  back.se_reduce_weight = w1.data(), back.se_expand_weight = w2.data();
  back.partial = partial.floats(), back.grad_hidden = grad_hidden.floats();
  back.grad_se_reduce_weight = grad_w1.floats(), back.grad_se_reduce_bias = grad_b1.floats();
  back.grad_se_expand_weight = grad_w2.floats(), back.grad_se_expand_bias = grad_b2.floats();
  back.grad_pooled = grad_pooled.floats();
  back.factor = 0.25f;
  for (Tensor* bn : {static_cast<Tensor*>(nullptr), &grad_bn}) {
    if (bn) {
      back.grad_sums = grad_sums.floats(), back.squeeze_sums = squeeze_sums.floats();
      back.grad_bn = bn->floats();
    }
    for (int kind : {kSigmoid, kHardSigmoid}) {
      back.activation = kActivations[kind], back.gate_kind = kind;
      check(bn ? "excite backward, bn" : "excite backward", launch_excite_bwd, back,
            {&partial, &grad_hidden, &grad_w1, &grad_b1, &grad_w2, &grad_b2, &grad_pooled, bn});
    }
  }
}

}  // namespace

void run_all(const char* only) {
  std::vector<DType> dtypes;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    if (!only || !std::strcmp(only, name_of(dtype))) dtypes.push_back(dtype);
  for (const DwconvCase& at : kDwconv)
    for (DType dtype : dtypes) {
      context = std::string("dwconv ") + at.name + " " + name_of(dtype);
      const DType weight_dtype = at.shape.c % 2 ? DType::kFloat32 : dtype;
      forward(at, dtype, weight_dtype);
      backward(at, dtype, weight_dtype);
    }
  for (const PlaneCase& at : kPlanes)
    for (DType dtype : dtypes) {
      context = "plane of C " + std::to_string(at.c) + " " + name_of(dtype);
      reduce(at, dtype);
      elementwise(at, dtype);
    }
  for (const ExciteCase& at : kExcite)
    for (DType dtype : dtypes) {
      context = "excite of C " + std::to_string(at.c) + " " + name_of(dtype);
      excite(at, dtype);
    }
}

int report() {
  std::printf("%d of %d launches failed\n", failures, launches);
  return failures != 0 || launches == 0;
}

}  // namespace cuda
}  // namespace effnet

int main(int count, char** words) {
  effnet::simt::set_seed(1);
  effnet::cuda::run_all(count > 1 ? words[1] : nullptr);
  return effnet::cuda::report();
}
