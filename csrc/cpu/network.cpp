// A whole network for inference: its memory, and which threads run which layer of which image.
//
// The first layers have large maps and few weights: there each thread takes an image of its own
// through all of them. Later ones have small maps and many weights: there all threads share every
// layer, so that the weights are read once. What is left over of the first is shared too. No sum
// depends on the choice.
#include <cstdlib>

#include "cpu/kernels.h"
#include "cpu/network_layers.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

constexpr int64_t kImagesAtOnce = 16;  // through the layers that the threads share

// Hands out parts of one allocation, each on a cache line.
class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}
  float* take(int64_t floats) {
    float* const part = base_ ? base_ + used_ : nullptr;
    used_ += ceil_div(floats, kUnit) * kUnit;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

template <typename T>
int64_t floats_of(int64_t elements) {
  return ceil_div(elements * static_cast<int64_t>(sizeof(T)), 4);
}

template <typename T>
class Network {
 public:
  Network(const NetworkArgs& args, BlockShape* shapes)
      : args_(args), stem_(*args.stem, args.h, args.w), shapes_(shapes) {
    int64_t h = stem_.vertical.out, w = stem_.horizontal.out;
    narrow_ = Activations<T>::size(h * w, args.stem->out_channels);
    for (int64_t i = 0; i < args.block_count; i++) {
      const BlockLayer& layer = args.blocks[i];
      shapes[i] = BlockShape(layer, h, w);
      const BlockShape& shape = shapes[i];
      h = shape.vertical.out, w = shape.horizontal.out;
      const int64_t units = units_of<T>(layer.channels), squeezed = layer.squeeze_channels;
      narrow_ = max_of(narrow_, Activations<T>::size(h * w, layer.out_channels));
      filtered_ = max_of(filtered_, Activations<T>::size(h * w, layer.channels));
      partial_ = max_of(partial_, shape.steps * units * kUnit);
      hidden_ = max_of(hidden_, squeezed);
      if (gates_weights<T>(layer, shape)) weights_ = max_of(weights_, weight_words(layer));
      // At the least three rows' worth of the narrowest group fit, whatever the caches.
      ring_ = max_of(ring_, kMaxUnits * shape.unit_ring());
      offsets_ = max_of(offsets_, shape.slots * shape.w);
      means_ = max_of(means_, 2 * units * kUnit + kMaxHidden);
      if (early_ == i && 2 * weight_words(layer) <= floats_of<T>(h * w * layer.channels)) early_++;
    }
    pixels_ = h * w;
    ring_ = max_of(ring_, args.caches.l2 * 5 / 8 / 4);
    images_ = min_of(args.n, kImagesAtOnce);
    slots_ = max_of(images_, args.threads);
    if (args.head)
      pooled_channels_ = args.head->out_channels;
    else if (args.block_count)
      pooled_channels_ = args.blocks[args.block_count - 1].out_channels;
    else
      pooled_channels_ = args.stem->out_channels;
  }

  bool run() {
    Arena measure(nullptr);
    place(measure);
    // A tile of the product unit reads whole tiles of pixels: up to 31 beyond an image.
    float* const memory = args_.workspace(measure.used() + 32 * kUnit + kUnit);
    if (!memory) return false;
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
    Arena arena(reinterpret_cast<float*>((address + 63) / 64 * 64));
    place(arena);
#pragma omp parallel num_threads(args_.threads)
    {
      const Team all = {omp_get_thread_num(), omp_get_num_threads()};
#if defined(__AVX512BF16__)
      if (args_.amx) amx_begin();
#endif
      run_all(all);
#if defined(__AVX512BF16__)
      if (args_.amx) amx_end();
#endif
    }
    return true;
  }

 private:
  static constexpr int64_t kMaxHidden = 16384;

  static int64_t weight_words(const BlockLayer& layer) {
    return units_of<T>(layer.out_channels) * kUnit * words_of<T>(layer.project.in_channels);
  }

  void place(Arena& arena) {
    for (Images<T>& x : x_)
      x = {reinterpret_cast<T*>(arena.take(floats_of<T>(narrow_ * args_.n))), narrow_, args_.n};
    filtered_at_ = arena.take(floats_of<T>(filtered_) * slots_);
    partial_at_ = arena.take(partial_ * slots_);
    hidden_at_ = arena.take(hidden_ * slots_);
    weights_at_ = arena.take(weights_ * slots_);
    pooled_ = {reinterpret_cast<T*>(
                   arena.take(floats_of<T>(Activations<T>::size(args_.n, pooled_channels_)))),
               args_.n, pooled_channels_};
    thread_floats_ = (ring_ + offsets_ + means_ + stem_.scratch(*args_.stem)) / kUnit * kUnit + 64;
    threads_at_ = arena.take(thread_floats_ * args_.threads);
  }

  // Memory of the block phases for images in slots from `slot` on, and of one thread.
  BlockMemory<T> memory(int64_t slot, int64_t thread) const {
    float* const own = threads_at_ + thread * thread_floats_;
    return {reinterpret_cast<T*>(filtered_at_ + slot * floats_of<T>(filtered_)),
            partial_at_ + slot * partial_,
            hidden_at_ + slot * hidden_,
            weights_at_ + slot * weights_,
            own,
            own + ring_ + offsets_,
            ring_,
            filtered_,
            weights_};
  }

  Images<T> images(int64_t which, int64_t first, int64_t count) const {
    return {x_[which % 2][first], narrow_, count};
  }

  void tap(int64_t index, int64_t channels, int64_t pixels, Images<T> x, int64_t first,
           Team team) const {
    if (index >= 0)
      run_tap(channels, pixels, x, args_.taps[index] + first * channels * pixels, team);
  }

  // Blocks [begin, end) of some images; the stem before block 0.
  void run_blocks(int64_t begin, int64_t end, int64_t first, int64_t count, int64_t slot, Team team,
                  int64_t thread) const {
    const BlockMemory<T> at = memory(slot, thread);
    if (begin == 0) {
      const Images<T> y = images(0, first, count);
      float* const scratch = at.ring + ring_ + offsets_ + means_;
      run_stem(args_, stem_, first, y, scratch, team);
      team.wait();
      tap(args_.stem_tap, args_.stem->out_channels, stem_.pixels(), y, first, team);
    }
    for (int64_t i = begin; i < end; i++) {
      const BlockLayer& layer = args_.blocks[i];
      const BlockShape& shape = shapes_[i];
      const Images<T> x = images(i, first, count), y = images(i + 1, first, count);
      run_filter(layer, shape, x, at, args_.caches, args_.amx, team);
      team.wait();
      run_excite(layer, shape, count, at, team);
      team.wait();
      run_project(layer, shape, x, y, at, args_.caches, args_.amx, team);
      team.wait();
      tap(layer.tap, layer.out_channels, shape.pixels(), y, first, team);
    }
  }

  void run_all(Team all) const {
    const int64_t n = args_.n, blocks = args_.block_count, apart = n / all.size * all.size;
    if (early_ > 0) {
      for (int64_t i = all.index; i < apart; i += all.size)
        run_blocks(0, early_, i, 1, all.index, {0, 1}, all.index);
      if (apart < n) {
        all.wait();
        run_blocks(0, early_, apart, n - apart, 0, all, all.index);
      }
      all.wait();
    }
    for (int64_t first = 0; first < n; first += images_) {
      const int64_t count = min_of(images_, n - first);
      if (early_ < blocks || early_ == 0)
        run_blocks(early_, blocks, first, count, 0, all, all.index);
      const Images<T> x = images(blocks, first, count);
      if (args_.head)
        run_head(*args_.head, pixels_, x, pooled_, first, args_.amx, all);
      else if (args_.y)
        run_pool(pooled_channels_, pixels_, x, pooled_, first, all);
    }
    if (!args_.y) return;
    all.wait();
    if (args_.classifier)
      run_classifier(*args_.classifier, pooled_, args_.y, args_.amx, all);
    else
      run_tap(pooled_channels_, n, Images<T>{pooled_.data, 0, 1}, args_.y, all);
  }

  const NetworkArgs& args_;
  StemShape stem_;
  BlockShape* shapes_;
  int64_t early_ = 0;  // blocks for which each thread has its own image
  int64_t pixels_, images_, slots_, pooled_channels_;
  int64_t narrow_, filtered_ = 0;  // elements of an image's tensors
  int64_t partial_ = 0, hidden_ = 0, weights_ = 0, ring_ = 0, offsets_ = 0, means_ = 0;
  int64_t thread_floats_ = 0;
  Images<T> x_[2];
  Activations<T> pooled_;
  float *filtered_at_, *partial_at_, *hidden_at_, *weights_at_, *threads_at_;
};

}  // namespace

bool network(const NetworkArgs& args) {
  void* const memory = std::malloc(sizeof(BlockShape) * max_of(1, args.block_count));
  if (!memory) return false;
  BlockShape* const shapes = static_cast<BlockShape*>(memory);
  bool ok;
#if defined(__AVX512BF16__)
  if (args.bf16)
    ok = Network<bf16>(args, shapes).run();
  else
#endif
    ok = Network<float>(args, shapes).run();
  std::free(memory);
  return ok;
}

int64_t network_tile_units() { return kTileUnits; }

}  // namespace EFFNET_ISA
}  // namespace effnet
