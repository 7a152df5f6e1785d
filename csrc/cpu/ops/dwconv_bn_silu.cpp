// Depthwise convolution with BatchNorm and activation, forward.
//
// Computes: eval      y = act(conv(x, weight) * scale + shift), and the sums of y over each chunk
//           training  z = conv(x, weight), and (mean, M2) of z - pivot, as stored, over
//           each chunk, with the pivot
// Layout:   channels-last, any strides over N, H, W
// Tiling:   a task owns one image's chunk of about 16 output rows and a block of channels. It goes
//           through groups of rows and, within them, tiles of up to 8 columns; within a tile, from
//           channel vector to channel vector, so that each pixel's channels are read in a row. Full
//           vectors of fp32 inside the image are read where they lie. All else (borders, bf16,
//           channels that do not fill a vector) is copied first into a patch that stays in L1
// Bytes:    x once (K - 1 rows more per group, from the L2 cache), y once
// FLOPs:    2 * K * K per output, and about 20 for SiLU, 4 for clamp
// Source:   original; Chan, Golub, LeVeque 1983 for merging (count, mean, M2)
// Truth:    effnet_fast/reference/dwconv_bn_silu.py
#include "cpu/kernels.h"
#include "cpu/ops/dwconv_tiles.h"
#include "cpu/simd/activations.h"

#include <type_traits>

namespace effnet {
namespace EFFNET_ISA {
namespace {

constexpr int64_t kMaxRows = 8;          // output rows of a tile
constexpr int64_t kMaxRowsBeyondL2 = 2;  // the same where an image does not fit L2
constexpr int64_t kTileBytes = 1 << 20;  // x of a tile, all channels of a block

// In training, in an activation's place.
struct Statistics {};

struct Task {
  const DwconvForwardArgs& args;
  ChannelBlock block;
  int64_t n;
  bool fetch_ahead;                              // x comes from further than the L2 cache
  float *weight, *scale, *shift, *sums, *patch;  // sums: [v][3][kLanes], pool or (mean, M2, pivot)
};

// Output rows [oh, oh + size) and the rows of x that they meet.
struct Group {
  int64_t oh, size;
  Range in;
  struct Row {
    int64_t kh_begin, kh_end;  // kernel rows that meet the image
    int64_t in;                // row of x, from in.begin, that kh_begin meets
  } rows[kMaxRows];
  Group(const DwconvShape& s, Range out)
      : oh(out.begin), size(out.size()), in{max_of(0, oh * s.stride - s.pad_t), 0} {
    for (int64_t i = 0; i < size; i++) {
      const int64_t top = (oh + i) * s.stride - s.pad_t, begin = max_of(0, -top);
      rows[i] = {begin, min_of(s.k, s.h - top), top + begin - in.begin};
      in.end = max_of(in.begin, min_of(s.h, top + s.k));
    }
  }
};

// Merges the tile's outputs into (mean, M2) of the `count` outputs before it. Both are taken of
// z - pivot, the pivot being the first output: a mean far from zero then costs no digits.
template <int TILE>
EFFNET_INLINE void merge_statistics(const Vec* z, int64_t count, float* sums) {
  if (count == 0) store(sums + 2 * kLanes, z[0] - z[0] == 0.0f ? z[0] : Vec{});
  const Vec pivot = load(sums + 2 * kLanes);
  Vec d[TILE], total = {}, m2 = {};
#pragma GCC unroll 8
  for (int t = 0; t < TILE; t++) {
    d[t] = z[t] - pivot;
    total += d[t];
  }
  const Vec mean = total * (1.0f / TILE);
#pragma GCC unroll 8
  for (int t = 0; t < TILE; t++) m2 += (d[t] - mean) * (d[t] - mean);
  const Vec old_mean = load(sums), delta = mean - old_mean;
  const float share = static_cast<float>(TILE) / static_cast<float>(count + TILE);
  store(sums, old_mean + delta * share);
  store(sums + kLanes,
        load(sums + kLanes) + m2 + delta * delta * (share * static_cast<float>(count)));
}

// Output columns [ow, ow + TILE) of a group's rows. `ahead`: x where the next tile begins to read
// what this one has not read.
template <typename T, int K, int STEP, typename A, int TILE>
EFFNET_NOINLINE void run_tile(const Task& task, const Group& group, int64_t ow, const T* ahead,
                              int64_t count) {
  const DwconvForwardArgs& args = task.args;
  const DwconvShape& s = args.shape;
  const int64_t k = K ? K : s.k, columns = (TILE - 1) * STEP + k, left = ow * STEP - s.pad_l;
  const Range inside = columns_inside(left, columns, s.w);
  const T* x = pixel<T>(args.x, task.n, group.in.begin, left) + task.block.c0;
  T* y = pixel<T>(args.y, task.n, group.oh, ow) + task.block.c0;
  const float* weight = task.weight;
  float* sums = task.sums;
  Fetch<T, TILE * STEP> fetch = {task.block.vecs, args.x.w_stride};
  for (int64_t v = 0; v < task.block.vecs; v++) {
    const int64_t lanes = task.block.lanes(v);
    const Source in = source(task.patch, x, args.x, group.in.size(), columns, inside, lanes);
    for (int64_t i = 0; i < group.size; i++) {
      for (int r = 0; ahead && r < STEP; r++) fetch.run(ahead + (i * STEP + r) * args.x.h_stride);
      const Group::Row& row = group.rows[i];
      const float* from = in.data + row.in * in.row;
      Vec acc[TILE] = {};
      for (int64_t kh = row.kh_begin; kh < row.kh_end; kh++, from += in.row)
        correlate<K, STEP, TILE>(acc, from, in.pixel, weight + kh * k * kLanes, k);
      if constexpr (std::is_same_v<A, Statistics>) {
#pragma GCC unroll 8
        for (int t = 0; t < TILE; t++) acc[t] = as_stored<T>(acc[t]);
        merge_statistics<TILE>(acc, count + i * TILE, sums);
      } else {
        const Vec scale = load(task.scale + v * kLanes), shift = load(task.shift + v * kLanes);
        const A act(args.activation);
        Vec pool = load(sums);
#pragma GCC unroll 8
        for (int t = 0; t < TILE; t++) {
          acc[t] = as_stored<T>(act.value(acc[t] * scale + shift));
          pool += acc[t];
        }
        store(sums, pool);
      }
      store_tile<TILE>(y + i * args.y.h_stride, args.y.w_stride, acc, lanes);
    }
    x += kLanes;
    y += kLanes;
    fetch.advance();
    weight += k * k * kLanes;
    sums += 3 * kLanes;
  }
}

template <typename T, int K, int STEP, typename A>
void run_rows(const Task& task, Range rows) {
  const DwconvShape& s = task.args.shape;
  const RowTiles tiles(s.ow);
  // By the image, not the batch: the order of the sums must not depend on the batch.
  const bool far = beyond_l2(s, 1, sizeof(T));
  const int64_t groups = ceil_div(rows.size(), far ? kMaxRowsBeyondL2 : kMaxRows);
  int64_t count = 0;
  for (int64_t i = 0; i < groups; i++) {
    const Range part = part_of(rows.size(), groups, i);
    const Group group(s, {rows.begin + part.begin, rows.begin + part.end});
    const int64_t below = group.in.end, fresh = below - group.size * STEP;
    int64_t ow = 0;
    for (int64_t tile = 0; tile < tiles.count; tile++) {
      const bool wide = tile < tiles.wide;
      const int64_t size = wide ? tiles.size : tiles.size - 1;
      const T* ahead = nullptr;
      if (task.fetch_ahead && tile + 1 < tiles.count)
        ahead =
            pixel<T>(task.args.x, task.n, max_of(0, fresh), (ow + size - 1) * STEP - s.pad_l + s.k);
      else if (task.fetch_ahead && i + 1 < groups)
        ahead = pixel<T>(task.args.x, task.n, min_of(below, s.h - group.size * STEP), 0);
      if (ahead) ahead += task.block.c0;
      with_tile(size,
                [&]<int TILE>() { run_tile<T, K, STEP, A, TILE>(task, group, ow, ahead, count); });
      ow += size;
      count += size * group.size;
    }
  }
}

void write_partials(const Task& task, int64_t chunk) {
  const DwconvForwardArgs& args = task.args;
  const int64_t planes = args.training ? 3 : 1;
  float* out = args.partial + (task.n * row_chunks(args.shape.oh) + chunk) * planes * args.shape.c;
  for (int64_t plane = 0; plane < planes; plane++)
    for (int64_t v = 0; v < task.block.vecs; v++)
      store_n(out + plane * args.shape.c + task.block.c0 + v * kLanes,
              load(task.sums + (v * 3 + plane) * kLanes), task.block.lanes(v));
}

template <typename T, int K, int STEP, typename A>
bool forward(const DwconvForwardArgs& args) {
  const DwconvShape& s = args.shape;
  const int64_t chunks = row_chunks(s.oh), kk = s.k * s.k;
  const int64_t patch = ((kMaxRows - 1) * STEP + s.k) * ((kMaxTile - 1) * STEP + s.k) * kLanes;
  const Blocks blocks(s.c, s.n * chunks, args.threads, kTileBytes / (patch * 4));
  const int64_t floats = patch + blocks.vecs * (kk + 5) * kLanes;
  const bool fetch_ahead = beyond_l2(s, s.n, sizeof(T));
  float* const scratch = args.workspace(floats * args.threads);
  if (!scratch) return false;
#pragma omp parallel for num_threads(args.threads) schedule(static)
  for (int64_t index = 0; index < s.n * chunks * blocks.count; index++) {
    const ChannelBlock block = blocks[index % blocks.count];
    const int64_t chunk = index / blocks.count % chunks, n = index / blocks.count / chunks;
    float* weight = scratch + thread_index() * floats;
    float* scale = weight + kk * block.vecs * kLanes;
    float* shift = scale + block.vecs * kLanes;
    float* sums = shift + block.vecs * kLanes;
    float* at = sums + 3 * block.vecs * kLanes;
    const Task task = {args, block, n, fetch_ahead, weight, scale, shift, sums, at};
    std::memset(sums, 0, sizeof(float) * static_cast<size_t>(at - sums));
    pack_weight(weight, args.weight, args.weight_dtype, kk, block);
    if (!args.training) {
      pack_vector(scale, args.scale, block);
      pack_vector(shift, args.shift, block);
    }
    run_rows<T, K, STEP, A>(task, part_of(s.oh, chunks, chunk));
    write_partials(task, chunk);
  }
  return true;
}

template <typename T, typename A>
bool by_shape(const DwconvForwardArgs& args) {
  const bool dense = args.shape.stride == 1;
  // Hard-swish takes the kernel size at run time: the tiles of its own would be a third more code.
  if constexpr (!std::is_same_v<A, HardSwish>) {
    if (args.shape.k == 3) return dense ? forward<T, 3, 1, A>(args) : forward<T, 3, 2, A>(args);
    if (args.shape.k == 5) return dense ? forward<T, 5, 1, A>(args) : forward<T, 5, 2, A>(args);
  }
  return dense ? forward<T, 0, 1, A>(args) : forward<T, 0, 2, A>(args);
}

template <typename T>
bool by_mode(const DwconvForwardArgs& args) {
  if (args.training) return by_shape<T, Statistics>(args);
  return with_activation(args.activation, [&]<typename A>() { return by_shape<T, A>(args); });
}

}  // namespace

bool dwconv_forward(const DwconvForwardArgs& args) {
  return args.dtype == DType::kFloat32 ? by_mode<float>(args) : by_mode<bf16>(args);
}

}  // namespace EFFNET_ISA
}  // namespace effnet
