// Runs every CUDA kernel over a small table of shapes on the CPU, for the sanitizers; no Python.
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
  explicit Tensor(int64_t size, DType dtype = DType::kFloat32)
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
  std::vector<std::vector<char>> first;
  for (int turn = 0; turn < 2; turn++) {
    for (Tensor* t : outputs)
      if (t) t->poison();
    launches++;
    try {
      launcher(args, queue);
    } catch (const std::exception& error) {
      return failed(what, error.what());
    }
    int index = 0;
    for (Tensor* t : outputs) {
      index++;
      if (!t) continue;
      for (int64_t i = 0; i < t->size(); i++)
        if (!std::isfinite((*t)[i]))
          return failed(what, "output " + std::to_string(index) + ", element " + std::to_string(i) +
                                  " of " + std::to_string(t->size()) + " is not finite");
      const char* data = static_cast<const char*>(t->data());
      std::vector<char> now(data, data + t->bytes());
      if (turn == 0)
        first.push_back(std::move(now));
      else if (now != first[index - 1])
        return failed(what, "output " + std::to_string(index) + " depends on the threads' order");
      if (turn == 1) continue;
    }
    for (size_t i = first.size(); turn == 0 && i < outputs.size(); i++) first.emplace_back();
  }
}

// Vectors of a BatchNorm over C channels.
struct Norm {
  Tensor weight, bias, mean, var;
  explicit Norm(int64_t c)
      : weight(c, DType::kFloat32, 0.5f, 1.5f),
        bias(c, DType::kFloat32, -1.0f, 1.0f),
        mean(c, DType::kFloat32, -1.0f, 1.0f),
        var(c, DType::kFloat32, 0.5f, 1.5f) {}
  BatchNorm all() const {
    return {weight.floats(), bias.floats(), mean.floats(), var.floats(), 1e-3f};
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

void forward(const DwconvCase& at, DType dtype, DType weight_dtype) {
  const DwconvShape& s = at.shape;
  const int64_t pixel = s.c + at.gap;
  const DwconvGrid grid = dwconv_forward_grid(s, at.forward);
  Tensor x((s.n * s.h * s.w - 1) * pixel + s.c, dtype, -2.0f, 2.0f);
  Tensor weight(s.c * s.k * s.k, weight_dtype, -1.0f, 1.0f);
  Tensor y(s.n * s.oh * s.ow * s.c, dtype);
  Tensor pooled(s.n * grid.chunks * s.c), moments(grid.parts * 4 * s.c);
  const Norm before(s.c), after(s.c);
  DwconvForwardArgs args = {};
  args.shape = s;
  args.dtype = dtype, args.weight_dtype = weight_dtype;
  args.tile = at.forward;
  args.x = {x.data(), s.h * s.w * pixel, s.w * pixel, pixel};
  args.weight = weight.data();
  args.y = y.data();
  args.factor = 0.25f;
  for (int prologue = 0; prologue < 2; prologue++) {
    args.before = prologue ? before.all() : BatchNorm{};
    args.after = {};
    args.partial = moments.floats();
    check("forward, raw", launch_dwconv_bn_silu_fwd, args, {&y, &moments});
    args.after = after.all();
    args.partial = pooled.floats();
    check("forward, activated", launch_dwconv_bn_silu_fwd, args, {&y, &pooled});
  }
  Tensor mean(s.c), var(s.c);
  FoldMomentsArgs fold = {};
  fold.partial = moments.floats();
  fold.parts = grid.parts, fold.c = s.c;
  fold.mean = mean.floats(), fold.var = var.floats();
  if (0)
    check("fold of moments", (void (*)(const FoldMomentsArgs&, const Queue&)) nullptr, fold,
          {&mean, &var});
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
  const Norm before(s.c), after(s.c);
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
  check("backward, eval", launch_dwconv_bn_silu_bwd, args, {&grad_x, &partial});
  args.before = before.all();
  args.gate = gate.floats(), args.shift = shift.floats();
  args.sums = sums.floats();
  check("backward, training", launch_dwconv_bn_silu_bwd, args, {&grad_x, &partial});
  args.partial = nullptr;
  check("backward, data", launch_dwconv_bn_silu_bwd, args, {&grad_x});
  args.partial = partial.floats(), args.grad_x = nullptr;
  check("backward, weight", launch_dwconv_bn_silu_bwd, args, {&partial});
  Tensor grad_weight(s.c * s.k * s.k);
  FoldSumArgs fold = {};
  fold.partial = partial.floats();
  fold.outer = 1, fold.parts = grid.parts, fold.rows = s.k * s.k, fold.c = s.c;
  fold.out_r = 1, fold.out_c = s.k * s.k;
  fold.factor = 1.0f;
  fold.out = grad_weight.floats();
  (void)fold;
}

}  // namespace

void run_all() {
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  for (const DwconvCase& at : kDwconv)
    for (DType dtype : dtypes) {
      context = std::string("dwconv ") + at.name + " " + name_of(dtype);
      const DType weight_dtype = at.shape.c % 2 ? DType::kFloat32 : dtype;
      forward(at, dtype, weight_dtype);
      backward(at, dtype, weight_dtype);
    }
}

int report() {
  std::printf("%d of %d launches failed\n", failures, launches);
  return failures != 0;
}

}  // namespace cuda
}  // namespace effnet

int main() {
  effnet::simt::set_seed(1);
  effnet::cuda::run_all();
  return effnet::cuda::report();
}
