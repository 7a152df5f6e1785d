// Projection of a block in inference, and what follows the last block: head, pool, classifier.
//
// Computes: y = x W + b, BatchNorm folded in, + residual; head: mean over pixels of act(x W + b)
// Layout:   blocks of one cache line and packed weights, see args.h
// Bytes:    x once per panel of output channels from cache, weights once per thread, y once
// FLOPs:    2 Cin per element of y
// Source:   original
// Truth:    effnet_fast/reference/pointwise_bn_act.py
#include "cpu/network/layers.h"
#include "cpu/network/silu.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

// Results of one panel to a tensor, as they are or with a residual.
template <typename T, bool RESIDUAL>
EFFNET_INLINE void store_panel(const Activations<T>& y, const Activations<T>& x, Panel panel,
                               int64_t first, int64_t count, const float* results) {
  for (int64_t u = 0; u < panel.units; u++) {
    const float* in = results + u * kUnit;
    T* to = y.unit(panel.unit + u) + first * kBlock<T>;
    const T* added = RESIDUAL ? x.unit(panel.unit + u) + first * kBlock<T> : nullptr;
    for (int64_t p = 0; p < count; p++, in += panel.units * kUnit, to += kBlock<T>)
#pragma GCC unroll 4
      for (int part = 0; part < kParts; part++) {
        Vec v = load(in + part * kLanes);
        if constexpr (RESIDUAL) v += load(added + p * kBlock<T> + part * kLanes);
        store(to + part * kLanes, v);
      }
  }
}

}  // namespace

template <typename T>
void project_pixels(const BlockLayer& layer, const Activations<T>& in, const Activations<T>& x,
                    const Activations<T>& y, int64_t first, bool amx) {
  const int64_t units = units_of<T>(layer.out_channels);
  for (int64_t i = 0; i < Panel::count(units); i++) {
    const Panel panel(i, units);
    multiply_chunks(in, {0, in.pixels}, layer.project, panel, amx, i == 0,
                    [&](int64_t pixel, int64_t count, const float* results) {
                      if (layer.residual)
                        store_panel<T, true>(y, x, panel, first + pixel, count, results);
                      else
                        store_panel<T, false>(y, x, panel, first + pixel, count, results);
                    });
  }
}

template <typename T>
void run_project(const BlockLayer& layer, const BlockShape& shape, Images<T> x, Images<T> y,
                 const BlockMemory<T>& memory, int64_t l2, bool amx, Team team) {
  const int64_t pixels = shape.pixels(), units = units_of<T>(layer.out_channels);
  const int64_t panels = Panel::count(units), words = words_of<T>(layer.channels);
  const bool own_weights = gates_weights<T>(layer, shape);
  // A part of the operand stays in the L2 cache while the panels of weights pass by, each once: K
  // is cut where a part of it would have few pixels.
  const int64_t k_parts = ceil_div(words, kCut), k_words = ceil_div(words, k_parts * kUnit) * kUnit;
  // The results of one panel fit the thread's memory.
  const int64_t fitting = memory.ring_floats / (kMaxUnits * kUnit);  // pixels times panels
  const int64_t most = min_of(fitting - kAmxSlack, l2 / 4 / (k_words * 4));
  int64_t chunks = ceil_div(pixels, max_of(kCut / 4, most));
  // A team divides the larger of operand and weights.
  int64_t groups = 1;
  if (pixels < units * kUnit)
    groups = min_of(panels, team.size);
  else if (x.count * chunks % team.size)
    chunks = min_of(ceil_div(chunks, team.size) * team.size, ceil_div(pixels, kTilePixels));
  const int64_t at_once = max_of(1, fitting / (ceil_div(pixels, chunks) + kAmxSlack));
  const Range part = team.part(x.count * chunks * groups);
  for (int64_t i = part.begin; i < part.end; i++) {
    const int64_t n = i / groups / chunks;
    const Range chunk = part_of(pixels, chunks, i / groups % chunks);
    const Range group = part_of(panels, groups, i % groups);
    const Activations<T> in = {memory.filtered + n * memory.filtered_size, pixels, layer.channels};
    const Activations<T> out = {y[n], pixels, layer.out_channels};
    const Activations<T> added = {x[n], pixels, layer.out_channels};
    const void* const weight =
        own_weights ? memory.weights + n * memory.weights_size : layer.project.weight;
    const int64_t results_size = (chunk.size() + kAmxSlack) * kMaxUnits * kUnit;
    for (int64_t first = group.begin; first < group.end; first += at_once) {
      const int64_t last = min_of(group.end, first + at_once);
      for (int64_t k = 0; k < words; k += k_words)
        for (int64_t j = first; j < last; j++) {
          const Panel panel(j, units);
          float* const results = memory.ring + (j - first) * results_size;
          const Range of_k = {k, min_of(words, k + k_words)};
          multiply(results, in, {of_k, chunk, panel, amx, true}, layer.project, weight);
          if (of_k.end < words) continue;
          if (layer.residual)
            store_panel<T, true>(out, added, panel, chunk.begin, chunk.size(), results);
          else
            store_panel<T, false>(out, added, panel, chunk.begin, chunk.size(), results);
        }
    }
  }
}

namespace {

template <typename T, typename A>
void pool_panels(const HeadLayer& head, int64_t pixels, Images<T> x, Activations<T> pooled,
                 int64_t first_image, bool amx, Team team) {
  const A act(head.activation);
  const int64_t units = units_of<T>(head.out_channels), panels = Panel::count(units);
  const float factor = 1.0f / static_cast<float>(pixels);
  const Range part = team.part(panels * x.count);
  for (int64_t i = part.begin; i < part.end; i++) {
    const int64_t n = i % x.count;
    const Panel panel(i / x.count, units);
    Vec sums[kMaxUnits * kParts] = {};
    multiply_chunks(Activations<T>{x[n], pixels, head.in_channels}, {0, pixels}, head, panel, amx,
                    i == part.begin, [&](int64_t, int64_t count, const float* results) {
                      const int64_t vectors = panel.units * kParts;
                      for (int64_t p = 0; p < count; p++)
                        for (int64_t v = 0; v < vectors; v++)
                          sums[v] +=
                              activate_as<T>(act, load(results + (p * vectors + v) * kLanes));
                    });
    for (int64_t u = 0; u < panel.units; u++)
      for (int part = 0; part < kParts; part++)
        store(pooled.unit(panel.unit + u) + (first_image + n) * kBlock<T> + part * kLanes,
              sums[u * kParts + part] * factor);
  }
}

}  // namespace

template <typename T>
void run_head(const HeadLayer& head, int64_t pixels, Images<T> x, Activations<T> pooled,
              int64_t first_image, bool amx, Team team) {
  with_activation(head.activation, [&]<typename A>() {
    pool_panels<T, A>(head, pixels, x, pooled, first_image, amx, team);
  });
}

template <typename T>
void run_classifier(const Product& classifier, Activations<T> pooled, float* y, bool amx,
                    Team team) {
  const int64_t classes = classifier.out_channels, units = units_of<T>(classes);
  const Range part = team.part(Panel::count(units));
  for (int64_t i = part.begin; i < part.end; i++) {
    const Panel panel(i, units);
    multiply_chunks(pooled, {0, pooled.pixels}, classifier, panel, amx, false,
                    [&](int64_t first, int64_t count, const float* results) {
                      const int64_t wanted =
                          min_of(classes - panel.unit * kUnit, panel.units * kUnit);
                      for (int64_t p = 0; p < count && wanted > 0; p++)
                        std::memcpy(y + (first + p) * classes + panel.unit * kUnit,
                                    results + p * panel.units * kUnit, sizeof(float) * wanted);
                    });
  }
}

template <typename T>
void run_tap(int64_t channels, int64_t pixels, Images<T> x, float* y, Team team) {
  const Range part = team.part(x.count * pixels);
  for (int64_t i = part.begin; i < part.end; i++) {
    const Activations<T> in = {x[i / pixels], pixels, channels};
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t unit = c / kUnit, lane = c % kUnit;
      store_n(y + i * channels + c, load(in.unit(unit) + i % pixels * kBlock<T> + lane),
              min_of(kLanes, channels - c));
    }
  }
}

#define EFFNET_LAYERS(T)                                                                        \
  template void project_pixels(const BlockLayer&, const Activations<T>&, const Activations<T>&, \
                               const Activations<T>&, int64_t, bool);                           \
  template void run_project(const BlockLayer&, const BlockShape&, Images<T>, Images<T>,         \
                            const BlockMemory<T>&, int64_t, bool, Team);                        \
  template void run_head(const HeadLayer&, int64_t, Images<T>, Activations<T>, int64_t, bool,   \
                         Team);                                                                 \
  template void run_classifier(const Product&, Activations<T>, float*, bool, Team);             \
  template void run_tap(int64_t, int64_t, Images<T>, float*, Team);
EFFNET_LAYERS(float)
#if defined(__AVX512BF16__)
EFFNET_LAYERS(bf16)
#endif

}  // namespace EFFNET_ISA
}  // namespace effnet
