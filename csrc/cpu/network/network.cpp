// A whole network for inference: its memory, and which threads run which layer of which image.
//
// The first layers have large maps and few weights: there each thread takes an image of its own
// through all of them. Later ones have small maps and many weights: there all threads share every
// layer, so that the weights are read once. What is left over of the first is shared too. No sum
// depends on the choice.
#include <cstdlib>

#include "cpu/kernels.h"
#include "cpu/network/stem.h"

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

// What one image needs of the blocks that run at one time, and how many images they run on.
template <typename T>
struct Phase {
  int64_t images;
  int64_t narrow = 0, filtered = 0;              // elements: a block's input, its depthwise result
  int64_t partial = 0, hidden = 0, weights = 0;  // floats

  void take(const BlockLayer& layer, const BlockShape& shape) {
    filtered = max_of(filtered, Activations<T>::size(shape.pixels(), layer.channels));
    partial = max_of(partial, shape.steps * units_of<T>(layer.channels) * kUnit);
    hidden = max_of(hidden, layer.se_channels);
    if (gates_weights<T>(layer, shape)) weights = max_of(weights, weight_words(layer));
  }
  static int64_t weight_words(const BlockLayer& layer) {
    return units_of<T>(layer.out_channels) * kUnit * words_of<T>(layer.project.in_channels);
  }
};

template <typename T>
class Network {
 public:
  Network(const NetworkArgs& args, BlockShape* shapes)
      : args_(args),
        stem_(*args.stem, args.h, args.w),
        shapes_(shapes),
        early_{min_of(args.n, args.threads)},
        late_{min_of(args.n, kImagesAtOnce)} {
    int64_t h = stem_.vertical.out, w = stem_.horizontal.out;
    for (int64_t i = 0; i < args.block_count; i++) {
      const BlockLayer& layer = args.blocks[i];
      shapes[i] = BlockShape(layer, h, w);
      h = shapes[i].vertical.out, w = shapes[i].horizontal.out;
      const int64_t words = Phase<T>::weight_words(layer);
      if (early_blocks_ == i && 2 * words <= floats_of<T>(h * w * layer.channels)) early_blocks_++;
    }
    pixels_ = h * w;
    if (!joins_stem()) take_narrow(0, stem_.pixels(), args.stem->out_channels);
    for (int64_t i = 0; i < args.block_count; i++) {
      const BlockLayer& layer = args.blocks[i];
      const BlockShape& shape = shapes[i];
      (i < early_blocks_ ? early_ : late_).take(layer, shape);
      take_narrow(i + 1, shape.pixels(), layer.out_channels);
      // At the least the rings of the widest panel fit, whatever the caches.
      ring_ = max_of(ring_, kMaxUnits * shape.unit_ring());
      offsets_ = max_of(offsets_, shape.slots * shape.w);
      if (projects_rows<T>(layer)) {
        const int64_t pixels = shape.rows * shape.horizontal.out;
        rows_ = max_of(rows_, floats_of<T>(Activations<T>::size(pixels, layer.channels)));
      }
      means_ = max_of(means_, 2 * units_of<T>(layer.channels) * kUnit + kOwnHidden);
    }
    ring_ = max_of(ring_, args.l2 * 5 / 8 / 4);
    if (args.y) pooled_channels_ = args.head->out_channels;
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
  // Whether tensor i, the input of block i, is what the early blocks leave for the late ones.
  bool is_boundary(int64_t i) const { return i == early_blocks_ && early_blocks_ > 0; }

  // Whether the first block forms the stem's rows as it reads them, and nothing else sees them.
  bool joins_stem() const {
    if (args_.block_count == 0 || args_.stem_tap >= 0) return false;
    return !args_.blocks[0].expands && !args_.blocks[0].residual;
  }

  void take_narrow(int64_t i, int64_t pixels, int64_t channels) {
    int64_t& most = is_boundary(i) ? boundary_.stride : (i < early_blocks_ ? early_ : late_).narrow;
    most = max_of(most, Activations<T>::size(pixels, channels));
  }

  // Early and late blocks use the same memory: nothing but the boundary outlives the early ones.
  void place(Arena& arena) {
    const auto take = [&](int64_t early, int64_t late) {
      return arena.take(max_of(early * early_.images, late * late_.images));
    };
    const auto take_images = [&](int64_t early, int64_t late) {
      return reinterpret_cast<T*>(take(floats_of<T>(early), floats_of<T>(late)));
    };
    for (T*& x : narrow_at_) x = take_images(early_.narrow, late_.narrow);
    filtered_at_ = take_images(early_.filtered, late_.filtered);
    partial_at_ = take(early_.partial, late_.partial);
    hidden_at_ = take(early_.hidden, late_.hidden);
    weights_at_ = take(early_.weights, late_.weights);
    const int64_t n = args_.n, pooled = Activations<T>::size(n, pooled_channels_);
    boundary_.data = reinterpret_cast<T*>(arena.take(floats_of<T>(boundary_.stride * n)));
    pooled_ = {reinterpret_cast<T*>(arena.take(floats_of<T>(pooled))), n, pooled_channels_};
    const int64_t scratch = stem_.scratch(*args_.stem);
    thread_floats_ = (rows_ + ring_ + offsets_ + means_ + scratch) / kUnit * kUnit + 64;
    threads_at_ = arena.take(thread_floats_ * args_.threads);
  }

  // Memory of a phase's blocks for images in slots from `slot` on, and of one thread.
  BlockMemory<T> memory(const Phase<T>& phase, int64_t slot, int64_t thread) const {
    float* const own = threads_at_ + thread * thread_floats_;
    return {filtered_at_ + slot * phase.filtered,
            partial_at_ + slot * phase.partial,
            hidden_at_ + slot * phase.hidden,
            weights_at_ + slot * phase.weights,
            own + rows_,
            own + rows_ + ring_ + offsets_,
            reinterpret_cast<T*>(own),
            ring_,
            phase.filtered,
            phase.weights};
  }

  // Images of tensor i, the input of block i: `count` of the network's from `first` on, which lie
  // in the slots from `slot` on.
  Images<T> narrow(int64_t i, int64_t first, int64_t count, int64_t slot) const {
    if (is_boundary(i)) return {boundary_[first], boundary_.stride, count};
    const int64_t stride = (i < early_blocks_ ? early_ : late_).narrow;
    return {narrow_at_[i % 2] + slot * stride, stride, count};
  }

  void tap(int64_t index, int64_t channels, int64_t pixels, Images<T> x, int64_t first,
           Team team) const {
    if (index >= 0)
      run_tap(channels, pixels, x, args_.taps[index] + first * channels * pixels, team);
  }

  // Blocks [begin, end) of some images; the stem before block 0.
  void run_blocks(int64_t begin, int64_t end, int64_t first, int64_t count, int64_t slot, Team team,
                  int64_t thread) const {
    const BlockMemory<T> at = memory(begin < early_blocks_ ? early_ : late_, slot, thread);
    float* const scratch = at.ring + ring_ + offsets_ + means_;
    StemRows<T> stem(args_, stem_, scratch);
    if (begin == 0 && !joins_stem()) {
      const Images<T> y = narrow(0, first, count, slot);
      run_stem(args_, stem_, first, y, scratch, team);
      team.wait();
      tap(args_.stem_tap, args_.stem->out_channels, stem_.pixels(), y, first, team);
    }
    for (int64_t i = begin; i < end; i++) {
      const BlockLayer& layer = args_.blocks[i];
      const BlockShape& shape = shapes_[i];
      const Images<T> x = narrow(i, first, count, slot), y = narrow(i + 1, first, count, slot);
      const bool projected = run_filter(layer, shape, x, y, at, args_.l2, args_.amx, team,
                                        i == 0 && joins_stem() ? &stem : nullptr, first);
      team.wait();
      if (layer.se_channels > 0) {
        run_excite(layer, shape, count, at, team);
        team.wait();
      }
      if (!projected) {
        run_project(layer, shape, x, y, at, args_.l2, args_.amx, team);
        team.wait();
      }
      tap(layer.tap, layer.out_channels, shape.pixels(), y, first, team);
    }
  }

  void run_all(Team all) const {
    const int64_t n = args_.n, blocks = args_.block_count, apart = n / all.size * all.size;
    if (early_blocks_ > 0) {
      for (int64_t i = all.index; i < apart; i += all.size)
        run_blocks(0, early_blocks_, i, 1, all.index, {0, 1}, all.index);
      if (apart < n) {
        all.wait();
        run_blocks(0, early_blocks_, apart, n - apart, 0, all, all.index);
      }
      all.wait();
    }
    for (int64_t first = 0; first < n; first += late_.images) {
      const int64_t count = min_of(late_.images, n - first);
      if (first > 0) all.wait();  // until the images before these are read
      if (early_blocks_ < blocks || early_blocks_ == 0)
        run_blocks(early_blocks_, blocks, first, count, 0, all, all.index);
      if (!args_.y) continue;
      const Images<T> x = narrow(blocks, first, count, 0);
      run_head(*args_.head, pixels_, x, pooled_, first, args_.amx, all);
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
  int64_t early_blocks_ = 0;  // early blocks, for which each thread has an image of its own
  Phase<T> early_, late_;
  int64_t pixels_, pooled_channels_ = 0;
  int64_t rows_ = 0, ring_ = 0, offsets_ = 0, means_ = 0, thread_floats_ = 0;  // of a thread
  Images<T> boundary_ = {nullptr, 0, 0};  // of all images; without early blocks none
  T *narrow_at_[2], *filtered_at_;
  float *partial_at_, *hidden_at_, *weights_at_, *threads_at_;
  Activations<T> pooled_;
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
