// Depthwise convolution of MBConv in training, forward.
//
// Computes: z = conv(a, weight), a = x or act(x * scale + shift), zero beyond the image;
//           (mean, M2) of z - pivot, as stored, over each task, with the pivot, where wanted
// Layout:   channels-last without gaps
// Tiling:   a task owns a chunk of one image's output rows and a block of channels. It goes through
//           groups of rows; a is formed once per element, in the order of addresses, into planes in
//           the L2 cache, from which tiles of up to 8 columns are correlated in registers
// Bytes:    x once (K - 1 rows more per chunk), z once
// FLOPs:    2 * K * K per output, about 20 per element of an activated x, 4 with clamp
// Source:   original
// Truth:    tests/support/reference_passes.py (depthwise)
#include "cpu/simd/activations.h"
#include "cpu/simd/moments.h"
#include "cpu/training/kernels.h"
#include "cpu/training/rings.h"

#include <type_traits>

namespace effnet {
namespace EFFNET_ISA {
namespace {

constexpr int64_t kGroup = 4;  // output rows computed from one state of the ring

// Where x is taken as it is, in an activation's place.
struct AsItIs {
  explicit AsItIs(const Activation&) {}
};

struct Task {
  const DepthwiseForwardArgs& args;
  void (*stage_row)(const Task&, int64_t h);  // of this call's activation
  ChannelBlock block;
  Ring ring;
  int64_t n, width;         // width: columns of x that are met
  Moments* moments;         // [v]; null: not wanted
  bool stream;              // z goes past the caches
  float *weight, *vectors;  // vectors: [v][2][kLanes]
};

// Forms row h of a, and fetches that of the next group.
template <typename T, typename A>
void stage_row(const Task& task, int64_t h) {
  const DwconvShape& s = task.args.shape;
  const T* x = static_cast<const T*>(task.args.x) + (task.n * s.h + h) * s.w * s.c + task.block.c0;
  float* const plane = task.ring.plane(task.ring.slot(h), 0) + s.pad_l * kLanes;
  const int64_t pitch = task.ring.pitch * kLanes;
  const int64_t ahead = kGroup * s.stride * s.w * s.c;
  const A act(task.args.activation);
  for_row(task.block, task.width, [&](int64_t v, int64_t lanes, int64_t j) {
    fetch<1>(x + ahead + j * s.c + v * kLanes);
    Vec a = load_n(x + j * s.c + v * kLanes, lanes);
    if constexpr (!std::is_same_v<A, AsItIs>) {
      const float* vectors = task.vectors + v * 2 * kLanes;
      a = act.value(a * load(vectors) + load(vectors + kLanes));
    }
    store(plane + v * pitch + j * kLanes, a);
  });
}

// Output columns [ow, ow + TILE) of a group's rows; `fresh`: no output of the task came before.
template <typename T, int K, int STEP, int TILE>
EFFNET_NOINLINE void run_tile(const Task& task, Range rows, int64_t first_row, int64_t first_slot,
                              int64_t ow, bool fresh) {
  const DwconvShape& s = task.args.shape;
  const int64_t k = K ? K : s.k;
  T* z = static_cast<T*>(task.args.z) + ((task.n * s.oh + rows.begin) * s.ow + ow) * s.c +
         task.block.c0;
  const float* weight = task.weight;
  for (int64_t v = 0; v < task.block.vecs; v++, weight += k * k * kLanes) {
    const int64_t lanes = task.block.lanes(v);
    for (int64_t i = 0; i < rows.size(); i++) {
      const int64_t top = (rows.begin + i) * STEP - s.pad_t;
      const int64_t begin = max_of(0, -top), end = min_of(k, s.h - top);
      Vec acc[TILE] = {};
      int64_t slot = begin < end ? task.ring.after(first_slot, top + begin - first_row) : 0;
      for (int64_t kh = begin; kh < end; kh++, slot = task.ring.after(slot, 1))
        correlate<K, STEP, TILE>(acc, task.ring.plane(slot, v) + ow * STEP * kLanes, kLanes,
                                 weight + kh * k * kLanes, k);
#pragma GCC unroll 8
      for (int t = 0; t < TILE; t++) acc[t] = as_stored<T>(acc[t]);
      if (task.moments) take_tile<TILE>(task.moments[v], acc, fresh && i == 0);
      store_tile<TILE>(z + i * s.ow * s.c + v * kLanes, s.c, acc, lanes, task.stream);
    }
  }
}

template <typename T, int K, int STEP>
void run_rows(const Task& task, Range rows) {
  const DwconvShape& s = task.args.shape;
  const RowTiles tiles(s.ow);
  int64_t staged = max_of(0, rows.begin * STEP - s.pad_t);
  for (int64_t begin = rows.begin; begin < rows.end; begin += kGroup) {
    const Range group = {begin, min_of(rows.end, begin + kGroup)};
    const int64_t first = max_of(0, group.begin * STEP - s.pad_t);
    const int64_t below = min_of(s.h, (group.end - 1) * STEP - s.pad_t + s.k);
    for (staged = max_of(staged, first); staged < below; staged++) task.stage_row(task, staged);
    int64_t ow = 0;
    for (int64_t tile = 0; tile < tiles.count; tile++) {
      const int64_t size = tile < tiles.wide ? tiles.size : tiles.size - 1;
      with_tile(size, [&]<int TILE>() {
        run_tile<T, K, STEP, TILE>(task, group, first, task.ring.slot(first), ow,
                                   begin == rows.begin && tile == 0);
      });
      ow += size;
    }
  }
}

void write_partials(const Task& task, int64_t part, int64_t count) {
  const int64_t c = task.args.shape.c;
  for (int64_t v = 0; v < task.block.vecs; v++)
    task.moments[v].write(task.args.partial + part * 3 * c + task.block.c0 + v * kLanes, c,
                          task.block.lanes(v), count);
}

template <typename T, int K, int STEP>
bool run(const DepthwiseForwardArgs& args) {
  const DwconvShape& s = args.shape;
  const int64_t chunks = depthwise_chunks(s.n, s.oh), kk = s.k * s.k;
  const int64_t needed = (s.ow - 1) * STEP + s.k, ring_rows = (kGroup - 1) * STEP + s.k;
  const int64_t width = max_of(0, min_of(s.w, needed - s.pad_l)), pitch = needed | 1;
  const Blocks blocks(s.c, s.n * chunks, args.threads,
                      kRingBytes / (ring_rows * pitch * kLanes * 4));
  const int64_t floats =
      whole_lines(blocks.vecs * (kMomentFloats + kLanes * (ring_rows * pitch + kk + 2)));
  float* const scratch = args.workspace(floats * args.threads);
  if (!scratch) return false;
  const bool stream = streams<T>(args.z, s.n * s.oh * s.ow * s.c, s.c);
  auto* stage = &stage_row<T, AsItIs>;
  if (args.norm.scale)
    stage = with_activation(args.activation, []<typename A>() { return &stage_row<T, A>; });
#pragma omp parallel for num_threads(args.threads) schedule(static)
  for (int64_t index = 0; index < s.n * chunks * blocks.count; index++) {
    const ChannelBlock block = blocks[index % blocks.count];
    const int64_t part = index / blocks.count;
    float* const own = scratch + omp_get_thread_num() * floats;
    float* const at = own + block.vecs * kMomentFloats;
    Moments* const moments = args.partial ? reinterpret_cast<Moments*>(own) : nullptr;
    Task task = {args,          stage,  block,   {at, ring_rows, block.vecs, pitch},
                 part / chunks, width,  moments, stream,
                 nullptr,       nullptr};
    task.weight = at + task.ring.floats();
    task.vectors = task.weight + kk * block.vecs * kLanes;
    task.ring.clear_borders(min_of(s.pad_l, pitch), min_of(s.pad_l + width, pitch));
    pack_weight(task.weight, args.weight, args.weight_dtype, kk, block);
    for (int64_t v = 0; args.norm.scale && v < block.vecs; v++) {
      const int64_t c = block.c0 + v * kLanes;
      store(task.vectors + 2 * v * kLanes, load_n(args.norm.scale + c, block.lanes(v)));
      store(task.vectors + (2 * v + 1) * kLanes, load_n(args.norm.shift + c, block.lanes(v)));
    }
    const Range rows = part_of(s.oh, chunks, part % chunks);
    run_rows<T, K, STEP>(task, rows);
    if (moments) write_partials(task, part, rows.size() * s.ow);
    end_streams();
  }
  return true;
}

template <typename T>
bool by_shape(const DepthwiseForwardArgs& args) {
  const int64_t k = args.shape.k;
  if (args.shape.stride == 1)
    return k == 3 ? run<T, 3, 1>(args) : k == 5 ? run<T, 5, 1>(args) : run<T, 0, 1>(args);
  return k == 3 ? run<T, 3, 2>(args) : k == 5 ? run<T, 5, 2>(args) : run<T, 0, 2>(args);
}

}  // namespace

bool mbconv_depthwise_forward(const DepthwiseForwardArgs& args) {
  return args.dtype == DType::kFloat32 ? by_shape<float>(args) : by_shape<bf16>(args);
}

}  // namespace EFFNET_ISA
}  // namespace effnet
