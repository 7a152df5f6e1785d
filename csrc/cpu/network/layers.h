// The layers of a network for inference, one function per phase: within a phase the members of a
// team work on disjoint parts, between phases they wait for each other.
#pragma once

#include "cpu/network/parts.h"

namespace effnet {
namespace EFFNET_ISA {

// Products of squeeze-and-excite, over all images, beyond which the threads share it: there waiting
// for each other pays.
constexpr int64_t kShareFrom = 16384;
constexpr int64_t kOwnHidden = kShareFrom / kUnit;  // most numbers between the layers if not shared

struct StemShape {
  int64_t h, w;
  Sides vertical, horizontal;
  StemShape(const StemLayer& layer, int64_t h, int64_t w);
  int64_t pixels() const { return vertical.out * horizontal.out; }
  // Floats of one thread's copy of the input rows that an output row reads.
  int64_t scratch(const StemLayer& layer) const;
};

// A block at one size of its input.
struct BlockShape {
  int64_t h, w;
  Sides vertical, horizontal;
  int64_t rows, steps;     // output rows of a step; the pool is summed by steps
  int64_t slots, columns;  // of the ring of expanded rows
  BlockShape(const BlockLayer& layer, int64_t h, int64_t w);
  int64_t in_pixels() const { return h * w; }
  int64_t pixels() const { return vertical.out * horizontal.out; }
  int64_t unit_ring() const { return slots * columns * kUnit; }  // floats
};

// Memory of one block's phases. Those of images hold `images` of them.
template <typename T>
struct BlockMemory {
  T* filtered;     // [images] activations of layer.channels
  float* partial;  // [images][steps][units * 16]
  float* hidden;   // [images][R]
  float* weights;  // [images] gated projection weights
  float* ring;     // of this thread: expanded rows, then the offset of each pixel in them
  float* pooled;  // of this thread: [units * 16], as many for the gate, kOwnHidden where not shared
  T* rows;        // of this thread: a step's rows of filtered, where they are projected at once
  int64_t ring_floats;
  int64_t filtered_size, weights_size;  // from one image to the next, in elements and words
};

// Images of a narrow tensor, `stride` elements apart.
template <typename T>
struct Images {
  T* data;
  int64_t stride, count;
  T* operator[](int64_t n) const { return data + n * stride; }
};

template <typename T>
void run_stem(const NetworkArgs& args, const StemShape& shape, int64_t first, Images<T> y,
              float* scratch, Team team);
template <typename T>
class StemRows;
// stem: where not null, image n of x is what it makes of image first + n. Returns whether it has
// projected as well: y is then complete, and filtered is not there.
template <typename T>
bool run_filter(const BlockLayer& layer, const BlockShape& shape, Images<T> x, Images<T> y,
                const BlockMemory<T>& memory, int64_t l2, bool amx, Team team, StemRows<T>* stem,
                int64_t first);
// Pixels of y from `first` on, of which `in` has the depthwise results.
template <typename T>
void project_pixels(const BlockLayer& layer, const Activations<T>& in, const Activations<T>& x,
                    const Activations<T>& y, int64_t first, bool amx);
template <typename T>
void run_excite(const BlockLayer& layer, const BlockShape& shape, int64_t images,
                const BlockMemory<T>& memory, Team team);
template <typename T>
void run_project(const BlockLayer& layer, const BlockShape& shape, Images<T> x, Images<T> y,
                 const BlockMemory<T>& memory, int64_t l2, bool amx, Team team);
// Convolution, activation and mean over the pixels: pooled [C / block][images][block].
template <typename T>
void run_head(const HeadLayer& head, int64_t pixels, Images<T> x, Activations<T> pooled,
              int64_t first, bool amx, Team team);
// y [images][out_channels] of pooled features.
template <typename T>
void run_classifier(const Product& classifier, Activations<T> pooled, float* y, bool amx,
                    Team team);
// Activations as a tensor in NHWC order, in fp32.
template <typename T>
void run_tap(int64_t channels, int64_t pixels, Images<T> x, float* y, Team team);

// Whether the gate rides on the projection's weights rather than on its operand.
template <typename T>
inline bool gates_weights(const BlockLayer& layer, const BlockShape& shape) {
  return layer.se_channels > 0 && units_of<T>(layer.out_channels) * kUnit <= shape.pixels();
}

constexpr int64_t kCut = 512;  // words of K that a projection takes at once, of more near as many

// Whether rows may be projected as soon as they are filtered: no gate has to wait for all of them,
// and the products are added up in the same order.
template <typename T>
inline bool projects_rows(const BlockLayer& layer) {
  return layer.se_channels == 0 && words_of<T>(layer.channels) <= kCut;
}

}  // namespace EFFNET_ISA
}  // namespace effnet
