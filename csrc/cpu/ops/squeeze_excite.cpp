// Squeeze-and-excite: pooled mean, two small layers, gate; forward and backward.
//
// Computes: pooled = mean_hw(x), hidden = W1 pooled + b1, gate = g(W2 act(hidden) + b2) with g
//           sigmoid or hard sigmoid, y = x * gate; backward the sums of x * grad_y, then
//           grad_x = grad_y * gate + grad_pooled / (H * W)
// Layout:   contiguous channels-last; weights [R,C] and [C,R]; vectors over (n, c) in fp32
// Bytes:    forward x twice (once where the producer pooled) and y; backward x, grad_y twice and
//           grad_x
// FLOPs:    2 per element, 4 * N * R * C for the layers
// Source:   Hu, Shen, Sun 2018, "Squeeze-and-Excitation Networks"
// Truth:    effnet_fast/reference/squeeze_excite.py
#include "cpu/kernels.h"
#include "cpu/simd/activations.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

constexpr int64_t kParallelFrom = 16384;  // products below which one thread is quicker
constexpr int64_t kSumBlock = 64;         // channels summed apart: long chains lose digits

template <typename T, bool PRODUCT>
bool run_squeeze(const SqueezeArgs& args) {
  const int64_t c = args.shape.c, hw = args.shape.hw, chunks = pixel_chunks(hw);
  constexpr int64_t kBlock = 8;  // pixels per visit of a channel vector: as many open streams
#pragma omp parallel for num_threads(args.threads) schedule(static)
  for (int64_t index = 0; index < args.shape.n * chunks; index++) {
    const int64_t base = index / chunks * hw;
    const Range part = part_of(hw, chunks, index % chunks);
    const Range pixels = {base + part.begin, base + part.end};
    float* sums = args.partial + index * c;
    std::memset(sums, 0, sizeof(float) * c);
    for (int64_t begin = pixels.begin; begin < pixels.end; begin += kBlock) {
      const int64_t stop = min_of(pixels.end, begin + kBlock);
      for (int64_t i = 0; i < c; i += kLanes) {
        const int64_t lanes = min_of(kLanes, c - i);
        fetch<kBlock>(static_cast<const T*>(args.x) + stop * c + i * kBlock);
        if constexpr (PRODUCT)
          fetch<kBlock>(static_cast<const T*>(args.grad_y) + stop * c + i * kBlock);
        Vec sum = {};
        for (int64_t p = begin; p < stop; p++) {
          Vec v = load_n(static_cast<const T*>(args.x) + p * c + i, lanes);
          if constexpr (PRODUCT) v *= load_n(static_cast<const T*>(args.grad_y) + p * c + i, lanes);
          sum += v;
        }
        store_n(sums + i, load_n(sums + i, lanes) + sum, lanes);
      }
    }
  }
  return true;
}

template <typename T>
bool by_product(const SqueezeArgs& args) {
  return args.grad_y ? run_squeeze<T, true>(args) : run_squeeze<T, false>(args);
}

template <typename T>
bool run_gate(const GateArgs& args) {
  const int64_t c = args.shape.c, pixels = args.shape.n * args.shape.hw;
  const bool large = pixels * c > kParallelFrom;
#pragma omp parallel for num_threads(args.threads) schedule(static) if (large)
  for (int64_t p = 0; p < pixels; p++) {
    const T* x = static_cast<const T*>(args.x) + p * c;
    T* y = static_cast<T*>(args.y) + p * c;
    const float* gate = args.gate + p / args.shape.hw * c;
    const float* offset = args.offset ? args.offset + p / args.shape.hw * c : nullptr;
    for (int64_t i = 0; i < c; i += kLanes) {
      const int64_t lanes = min_of(kLanes, c - i);
      Vec v = load_n(x + i, lanes) * load_n(gate + i, lanes);
      if (offset) v += load_n(offset + i, lanes);
      store_n(y + i, v, lanes);
    }
  }
  return true;
}

template <typename W>
float dot(const W* weight, const float* x, int64_t n) {
  Vec even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    even += load(weight + i) * load(x + i);
    odd += load(weight + i + kLanes) * load(x + i + kLanes);
  }
  for (; i < n; i += kLanes) {
    const int64_t lanes = min_of(kLanes, n - i);
    even += load_n(weight + i, lanes) * load_n(x + i, lanes);
  }
  return sum_lanes(even + odd);
}

// out[i] += factor * row[i]
template <typename W>
EFFNET_INLINE void add_scaled(float* out, const W* row, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t lanes = min_of(kLanes, n - i);
    store_n(out + i, load_n(out + i, lanes) + load_n(row + i, lanes) * factor, lanes);
  }
}

template <typename W>
bool run_excite(const ExciteArgs& args) {
  const int64_t c = args.c, r = args.r;
  const W* se_reduce_weight = static_cast<const W*>(args.se_reduce_weight);
  const W* se_expand_weight = static_cast<const W*>(args.se_expand_weight);
  const bool is_bf16 = sizeof(W) == 2, large = args.n * c * r > kParallelFrom;
  float* const values = args.workspace(args.n * r);
  if (!values) return false;
#pragma omp parallel for num_threads(args.threads) schedule(static) if (large)
  for (int64_t index = 0; index < args.n * r; index++) {
    const int64_t n = index / r, j = index % r;
    const float bias = args.se_reduce_bias ? load_scalar(args.se_reduce_bias, is_bf16, j) : 0.0f;
    const float h = dot(se_reduce_weight + j * c, args.pooled + n * c, c) + bias;
    args.hidden[index] = h;
    values[index] = activated(args.activation, h);
  }
#pragma omp parallel for num_threads(args.threads) schedule(static) if (large)
  for (int64_t index = 0; index < args.n * ceil_div(c, kLanes); index++) {
    const int64_t n = index / ceil_div(c, kLanes), i = index % ceil_div(c, kLanes) * kLanes;
    const int64_t lanes = min_of(kLanes, c - i);
    float logits[kLanes] = {};
    for (int64_t l = 0; l < lanes; l++) {
      const float bias =
          args.se_expand_bias ? load_scalar(args.se_expand_bias, is_bf16, i + l) : 0.0f;
      logits[l] = dot(se_expand_weight + (i + l) * r, values + n * r, r) + bias;
    }
    store_n(args.gate + n * c + i, gate_value(args.gate_kind, load(logits)), lanes);
  }
  return true;
}

// Gradients of both layers: each output is summed by one thread, over n or c in order.
template <typename W>
bool run_excite_backward(const ExciteBackwardArgs& args) {
  const int64_t n = args.n, c = args.c, r = args.r;
  const W* se_reduce_weight = static_cast<const W*>(args.se_reduce_weight);
  const W* se_expand_weight = static_cast<const W*>(args.se_expand_weight);
  float* const grad_logit = args.workspace(n * (c + 2 * r));
  if (!grad_logit) return false;
  float *const values = grad_logit + n * c, *const block_sums = values + n * r;
  for (int64_t i = 0; i < n * c; i++)
    grad_logit[i] = gate_grad(args.gate_kind, args.grad_gate[i], args.gate[i]);
  for (int64_t i = 0; i < n * r; i++) values[i] = activated(args.activation, args.hidden[i]);
  std::memset(args.grad_hidden, 0, sizeof(float) * n * r);
  std::memset(args.grad_pooled, 0, sizeof(float) * n * c);
#pragma omp parallel num_threads(args.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < c; i++) {
      float* row = args.grad_se_expand_weight + i * r;
      float bias = 0.0f;
      std::memset(row, 0, sizeof(float) * r);
      for (int64_t b = 0; b < n; b++) {
        add_scaled(row, values + b * r, grad_logit[b * c + i], r);
        bias += grad_logit[b * c + i];
      }
      args.grad_se_expand_bias[i] = bias;
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < n; b++) {
      float* row = args.grad_hidden + b * r;
      for (int64_t begin = 0; begin < c; begin += kSumBlock) {
        float* sums = block_sums + b * r;
        std::memset(sums, 0, sizeof(float) * r);
        for (int64_t i = begin; i < min_of(c, begin + kSumBlock); i++)
          add_scaled(sums, se_expand_weight + i * r, grad_logit[b * c + i], r);
        add_scaled(row, sums, 1.0f, r);
      }
      for (int64_t j = 0; j < r; j++) row[j] *= slope_of(args.activation, args.hidden[b * r + j]);
      for (int64_t j = 0; j < r; j++)
        add_scaled(args.grad_pooled + b * c, se_reduce_weight + j * c, row[j], c);
    }
#pragma omp for schedule(static)
    for (int64_t j = 0; j < r; j++) {
      float* row = args.grad_se_reduce_weight + j * c;
      float bias = 0.0f;
      std::memset(row, 0, sizeof(float) * c);
      for (int64_t b = 0; b < n; b++) {
        add_scaled(row, args.pooled + b * c, args.grad_hidden[b * r + j], c);
        bias += args.grad_hidden[b * r + j];
      }
      args.grad_se_reduce_bias[j] = bias;
    }
  }
  return true;
}

}  // namespace

bool squeeze(const SqueezeArgs& args) {
  return args.dtype == DType::kFloat32 ? by_product<float>(args) : by_product<bf16>(args);
}

bool gate(const GateArgs& args) {
  return args.dtype == DType::kFloat32 ? run_gate<float>(args) : run_gate<bf16>(args);
}

bool excite(const ExciteArgs& args) {
  return args.weight_dtype == DType::kFloat32 ? run_excite<float>(args) : run_excite<bf16>(args);
}

bool excite_backward(const ExciteBackwardArgs& args) {
  return args.weight_dtype == DType::kFloat32 ? run_excite_backward<float>(args)
                                              : run_excite_backward<bf16>(args);
}

}  // namespace EFFNET_ISA
}  // namespace effnet
