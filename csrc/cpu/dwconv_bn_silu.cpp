// Depthwise convolution with BatchNorm and SiLU, forward.
//
// Computes: eval      y = silu(conv(x, weight) * scale + shift), and the sums of y over each chunk
//           training  z = conv(x, weight), and (mean, M2) of z, as stored, over each chunk
// Layout:   channels-last, any strides over N, H, W
// Tiling:   a task owns one image's chunk of 16 output rows and a block of channels; K input rows
//           ring through scratch; a register tile is up to 8 outputs of one channel vector
// Bytes:    x once (K - 1 rows more per chunk, from cache), y once
// FLOPs:    2 * K * K per output, and about 20 for the SiLU
// Source:   original; Chan, Golub, LeVeque 1983 for merging (count, mean, M2)
// Truth:    effnet_fast/reference/dwconv_bn_silu.py
#include "cpu/dwconv_tiles.h"
#include "cpu/kernels.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

struct Task {
  const DwconvForwardArgs& args;
  ChannelBlock block;
  int64_t n, chunk, pitch;
  float *ring, *weight, *scale, *shift, *sums;  // sums: [v][2][kLanes], (pool, -) or (mean, M2)

  float* row(int64_t ih) const {
    return ring + (ih % args.shape.k) * block.vecs * pitch * kLanes;
  }
};

// Merges the tile's outputs into (mean, M2) of the `count` outputs before it.
template <int TILE>
EFFNET_INLINE void merge_statistics(const Vec* z, int64_t count, float* sums) {
  Vec total = z[0];
#pragma GCC unroll 8
  for (int t = 1; t < TILE; t++) total += z[t];
  Vec mean = total * (1.0f / TILE), m2 = {};
#pragma GCC unroll 8
  for (int t = 0; t < TILE; t++) {
    Vec d = z[t] - mean;
    m2 += d * d;
  }
  Vec old_mean = load(sums), delta = mean - old_mean;
  float share = static_cast<float>(TILE) / static_cast<float>(count + TILE);
  store(sums, old_mean + delta * share);
  store(sums + kLanes,
        load(sums + kLanes) + m2 + delta * delta * (share * static_cast<float>(count)));
}

// `tiles` consecutive tiles of TILE outputs from column `ow` of row `oh`, channel vector v.
template <typename T, int K, int STEP, bool TRAINING, int TILE>
void run_tiles(const Task& task, int64_t oh, int64_t ow, int64_t v, int64_t tiles, int64_t count) {
  const DwconvShape& s = task.args.shape;
  const int64_t k = K ? K : s.k;
  const int64_t top = oh * s.stride - s.pad_t;
  const int64_t kh_begin = max_of(0, -top), kh_end = min_of(k, s.h - top);
  const int64_t lanes = task.block.lanes(v);
  const float* weight = task.weight + v * k * k * kLanes;
  T* y = pixel<T>(task.args.y, task.n, oh, ow) + task.block.c0 + v * kLanes;
  float* sums = task.sums + v * 2 * kLanes;
  for (int64_t tile = 0; tile < tiles; tile++, ow += TILE, count += TILE) {
    Vec acc[TILE] = {};
    for (int64_t kh = kh_begin; kh < kh_end; kh++) {
      const float* in = task.row(top + kh) + (v * task.pitch + ow * STEP) * kLanes;
      correlate<K, STEP, TILE>(acc, in, weight + kh * k * kLanes, k);
    }
    if constexpr (TRAINING) {
#pragma GCC unroll 8
      for (int t = 0; t < TILE; t++) acc[t] = as_stored<T>(acc[t]);
      merge_statistics<TILE>(acc, count, sums);
    } else {
      Vec scale = load(task.scale + v * kLanes), shift = load(task.shift + v * kLanes);
      Vec pool = load(sums);
#pragma GCC unroll 8
      for (int t = 0; t < TILE; t++) {
        acc[t] = as_stored<T>(silu(acc[t] * scale + shift));
        pool += acc[t];
      }
      store(sums, pool);
    }
#pragma GCC unroll 8
    for (int t = 0; t < TILE; t++, y += task.args.y.w_stride) store_n(y, acc[t], lanes);
  }
}

template <typename T, int K, int STEP, bool TRAINING>
void run_chunk(Task& task) {
  const DwconvShape& s = task.args.shape;
  const int64_t oh_begin = task.chunk * kChunkRows, oh_end = min_of(s.oh, oh_begin + kChunkRows);
  const RowTiles tiles(s.ow);
  const int64_t columns = (s.ow - 1) * s.stride + s.k;
  const Range inside = {s.pad_l, min_of(columns, s.w + s.pad_l)};
  const ChannelBlock block = task.block;
  int64_t staged = max_of(0, oh_begin * s.stride - s.pad_t);
  int64_t count = 0;
  for (int64_t oh = oh_begin; oh < oh_end; oh++, count += s.ow) {
    const int64_t top = oh * s.stride - s.pad_t;
    staged = max_of(staged, top);
    for (; staged < min_of(s.h, top + s.k); staged++) {
      const T* x = pixel<T>(task.args.x, task.n, staged, -s.pad_l) + block.c0;
      stage_row(task.row(staged), task.pitch, inside, block.vecs, [&](int64_t j, int64_t v) {
        return load_n(x + j * task.args.x.w_stride + v * kLanes, block.lanes(v));
      });
    }
    for (int64_t v = 0; v < block.vecs; v++) {
      with_tile(tiles.size, [&]<int TILE>() {
        run_tiles<T, K, STEP, TRAINING, TILE>(task, oh, 0, v, tiles.wide, count);
        if constexpr (TILE > 1)
          run_tiles<T, K, STEP, TRAINING, TILE - 1>(task, oh, tiles.wide * TILE, v,
                                                    tiles.count - tiles.wide,
                                                    count + tiles.wide * TILE);
      });
    }
  }
}

void write_partials(const Task& task) {
  const DwconvForwardArgs& args = task.args;
  const int64_t planes = args.training ? 2 : 1;
  float* out = args.partial +
               (task.n * row_chunks(args.shape.oh) + task.chunk) * planes * args.shape.c;
  for (int64_t plane = 0; plane < planes; plane++)
    for (int64_t v = 0; v < task.block.vecs; v++)
      store_n(out + plane * args.shape.c + task.block.c0 + v * kLanes,
              load(task.sums + (v * 2 + plane) * kLanes), task.block.lanes(v));
}

template <typename T, int K, int STEP, bool TRAINING>
bool forward(const DwconvForwardArgs& args) {
  const DwconvShape& s = args.shape;
  const int64_t pitch = ((s.ow - 1) * s.stride + s.k) | 1;
  const int64_t chunks = row_chunks(s.oh);
  const int64_t floats_per_vec = (s.k * pitch + s.k * s.k + 4) * kLanes;
  const int64_t vecs = block_vecs(s.c, floats_per_vec * 4, s.n * chunks, args.threads);
  const int64_t blocks = ceil_div(ceil_div(s.c, kLanes), vecs);
  const int64_t floats = vecs * floats_per_vec;
  const Scratch scratch(floats * args.threads);
  if (!scratch.ok()) return false;
#pragma omp parallel for num_threads(args.threads) schedule(dynamic, 1)
  for (int64_t index = 0; index < s.n * chunks * blocks; index++) {
    const int64_t b = index % blocks, chunk = index / blocks % chunks, n = index / blocks / chunks;
    const int64_t c0 = b * vecs * kLanes;
    ChannelBlock block = {c0, min_of(vecs, ceil_div(s.c - c0, kLanes)), s.c};
    float* at = scratch.get() + thread_index() * floats;
    Task task = {args, block, n, chunk, pitch, at, nullptr, nullptr, nullptr, nullptr};
    task.weight = at + s.k * vecs * pitch * kLanes;
    task.scale = task.weight + s.k * s.k * vecs * kLanes;
    task.shift = task.scale + vecs * kLanes;
    task.sums = task.shift + vecs * kLanes;
    std::memset(at, 0, sizeof(float) * floats);
    pack_weight(task.weight, args.weight, args.weight_dtype == DType::kBFloat16, s.k * s.k, block);
    if (!TRAINING) {
      pack_vector(task.scale, args.scale, block);
      pack_vector(task.shift, args.shift, block);
    }
    run_chunk<T, K, STEP, TRAINING>(task);
    write_partials(task);
  }
  return true;
}

template <typename T, int K, int STEP>
bool by_mode(const DwconvForwardArgs& args) {
  return args.training ? forward<T, K, STEP, true>(args) : forward<T, K, STEP, false>(args);
}

template <typename T>
bool by_shape(const DwconvForwardArgs& args) {
  const int64_t k = args.shape.k;
  if (args.shape.stride == 1)
    return k == 3 ? by_mode<T, 3, 1>(args) : k == 5 ? by_mode<T, 5, 1>(args)
                                                    : by_mode<T, 0, 1>(args);
  return k == 3 ? by_mode<T, 3, 2>(args) : k == 5 ? by_mode<T, 5, 2>(args)
                                                  : by_mode<T, 0, 2>(args);
}

}  // namespace

bool dwconv_forward(const DwconvForwardArgs& args) {
  return args.dtype == DType::kFloat32 ? by_shape<float>(args) : by_shape<bf16>(args);
}

}  // namespace EFFNET_ISA
}  // namespace effnet
