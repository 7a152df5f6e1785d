// Squeeze-and-excite of a block in inference, from the sums that the depthwise pass left.
//
// Computes: gate = g(W2 act(W1 mean + b1) + b2), g sigmoid or hard sigmoid, and multiplies by it
//           the smaller of the projection's operand and, per image, its weights
// Layout:   W1 [R][channels], W2 [units][R][16]; operand and weights as in args.h
// Bytes:    W1, W2 and twice the smaller of operand and weights
// FLOPs:    4 R C per image, and 1 per element of what is scaled
// Source:   Hu, Shen, Sun 2018, "Squeeze-and-Excitation Networks"
// Truth:    effnet_fast/reference/squeeze_excite.py
#include "cpu/network/layers.h"
#include "cpu/simd/activations.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

// [units * 16] means from the steps' sums, in order.
void fold_means(float* means, const float* partial, const BlockShape& shape, int64_t channels) {
  const float factor = 1.0f / static_cast<float>(shape.pixels());
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vec sum = load(partial + c);
    for (int64_t step = 1; step < shape.steps; step++) sum += load(partial + step * channels + c);
    store(means + c, sum * factor);
  }
}

float dot(const float* a, const float* b, int64_t n) {
  Vec sums[4] = {};
  for (int64_t i = 0; i < n; i += kLanes) sums[i / kLanes % 4] += load(a + i) * load(b + i);
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The gate of one unit's part.
Vec gate_of(const BlockLayer& layer, const float* hidden, int64_t unit, int part) {
  const int64_t r = layer.se_channels;
  const float* weight = layer.se_expand_weight + unit * r * kUnit + part * kLanes;
  Vec sum = load(layer.se_expand_bias + unit * kUnit + part * kLanes);
  for (int64_t i = 0; i < r;) {
    Vec even = {}, odd = {};
    const int64_t end = min_of(r, i + kChain);
    for (; i + 2 <= end; i += 2) {
      even += load(weight + i * kUnit) * splat(hidden[i]);
      odd += load(weight + (i + 1) * kUnit) * splat(hidden[i + 1]);
    }
    if (i < end) even += load(weight + i * kUnit) * splat(hidden[i]), i++;
    sum += even + odd;
  }
  return gate_value(layer.gate_kind, sum);
}

// Rows of the projection's weights that belong to one unit of its operand.
void scale_weights(float* out, const BlockLayer& layer, const float* gate, int64_t unit,
                   const float*) {
  const int64_t words = layer.project.in_channels, first = unit * kUnit;
  const int64_t last = min_of(words, first + kUnit);
  const int64_t out_units = ceil_div(layer.project.out_channels, kUnit);
  for (int64_t i = 0; i < Panel::count(out_units); i++) {
    const Panel panel(i, out_units);
    const int64_t width = panel.units * kUnit, base = panel.unit * words * kUnit;
    const float* const in = static_cast<const float*>(layer.project.weight) + base;
    for (int64_t row = first; row < last; row++)
      for (int64_t c = 0; c < width; c += kLanes)
        store(out + base + row * width + c, load(in + row * width + c) * splat(gate[row]));
  }
}

#if defined(__AVX512BF16__)
void scale_weights(float* out, const BlockLayer& layer, const float* gate, int64_t unit,
                   const bf16*) {
  const int64_t words = words_of<bf16>(layer.project.in_channels), first = unit * kUnit / 2;
  const int64_t out_units = units_of<bf16>(layer.project.out_channels);
  for (int64_t i = 0; i < Panel::count(out_units); i++) {
    const Panel panel(i, out_units);
    const int64_t width = panel.units * kUnit, base = panel.unit * words * kUnit;
    for (int64_t row = first; row < first + kUnit / 2; row++) {
      double pair;  // the gates of two channels side by side
      std::memcpy(&pair, gate + 2 * row, sizeof(pair));
      const Vec gates = (Vec)_mm512_set1_pd(pair);
      const float* const in = layer.project_master + (base + row * width) * 2;
      bf16* const to = reinterpret_cast<bf16*>(out + base + row * width);
      for (int64_t c = 0; c < 2 * width; c += kLanes) store(to + c, load(in + c) * gates);
    }
  }
}
#endif

}  // namespace

template <typename T>
void run_excite(const BlockLayer& layer, const BlockShape& shape, int64_t images,
                const BlockMemory<T>& memory, Team team) {
  const int64_t r = layer.se_channels, units = units_of<T>(layer.channels);
  const int64_t channels = units * kUnit;
  float *const means = memory.pooled, *const gate = means + channels;
  const bool shared = images * r * channels > kShareFrom;
  // What a team shares lies in its memory; else each member computes it in its own.
  float* const hidden = shared ? memory.hidden : gate + channels;
  for (int64_t n = 0; n < images; n++) {
    fold_means(means, memory.partial + n * shape.steps * channels, shape, channels);
    const Range rows = shared ? team.part(r) : Range{0, r};
    for (int64_t i = rows.begin; i < rows.end; i++) {
      const float h = dot(layer.se_reduce_weight + i * channels, means, channels);
      hidden[n * r + i] = activated(layer.se_activation, h + layer.se_reduce_bias[i]);
    }
  }
  if (shared) team.wait();
  const Range mine = team.part(units);
  for (int64_t n = 0; n < images; n++) {
    const Activations<T> y = {memory.filtered + n * memory.filtered_size, shape.pixels(),
                              layer.channels};
    for (int64_t unit = mine.begin; unit < mine.end; unit++) {
      Vec gates[kParts];
#pragma GCC unroll 4
      for (int part = 0; part < kParts; part++) {
        gates[part] = gate_of(layer, hidden + n * r, unit, part);
        store(gate + unit * kUnit + part * kLanes, gates[part]);
      }
      if (gates_weights<T>(layer, shape))
        scale_weights(memory.weights + n * memory.weights_size, layer, gate, unit,
                      static_cast<const T*>(nullptr));
      else
        for_unit(y.unit(unit), y.pixels,
                 [&](T* at, int part) { store(at, load(at) * gates[part]); });
    }
  }
}

template void run_excite(const BlockLayer&, const BlockShape&, int64_t, const BlockMemory<float>&,
                         Team);
#if defined(__AVX512BF16__)
template void run_excite(const BlockLayer&, const BlockShape&, int64_t, const BlockMemory<bf16>&,
                         Team);
#endif

}  // namespace EFFNET_ISA
}  // namespace effnet
