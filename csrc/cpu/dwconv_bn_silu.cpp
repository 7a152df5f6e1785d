// Depthwise convolution with BatchNorm and SiLU, forward.
//
// Computes: eval      y = silu(conv(x, weight) * scale + shift), and the sums of y over each chunk
//           training  z = conv(x, weight), and (mean, M2) of z - pivot, as stored, over
//           each chunk, with the pivot
// Layout:   channels-last, any strides over N, H, W
// Tiling:   a task owns one image's chunk of about 16 output rows and a block of channels, and
// walks
//           it in strips of columns. The input rows of 4 output rows are staged pixel by pixel, as
//           they lie in memory, into the L2 cache; then each channel vector's plane, which fits the
//           L1 cache, yields its 4 rows in register tiles of up to 8 outputs
// Bytes:    x once (K - 1 rows more per chunk, from cache), y once
// FLOPs:    2 * K * K per output, and about 20 for the SiLU
// Source:   original; Chan, Golub, LeVeque 1983 for merging (count, mean, M2)
// Truth:    effnet_fast/reference/dwconv_bn_silu.py
#include "cpu/dwconv_tiles.h"
#include "cpu/kernels.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

constexpr int64_t kGroupRows = 4;  // output rows computed from one staging, plane by plane

// How a strip of output columns lies in scratch: `rows` input rows in a ring, `pitch` columns.
struct Ring {
  int64_t rows, strips, pitch;
  bool fetch_ahead;  // where x does not fit the L2 cache
  Ring(const DwconvShape& s, int64_t step, int64_t element_size)
      : rows(s.k + (min_of(kGroupRows, s.oh) - 1) * step),
        fetch_ahead(s.n * s.h * s.w * s.c * element_size > (2 << 20)) {
    // A plane of the ring, [rows][pitch][kLanes], is to stay in the L1 cache.
    const int64_t columns = kPlaneBytes / (rows * kLanes * 4);
    const int64_t fit = max_of(2, ((columns - s.k) / step + 1) / kMaxTile) * kMaxTile;
    strips = ceil_div(s.ow, max_of(fit, fit + kMaxTile / 2 >= s.ow ? s.ow : 0));
    pitch = ((ceil_div(s.ow, strips) - 1) * step + s.k) | 1;
  }
};

struct Task {
  const DwconvForwardArgs& args;
  const Ring& shape;
  ChannelBlock block;
  int64_t n;
  float *ring, *weight, *scale, *shift, *sums;  // sums: [v][3][kLanes], pool or (mean, M2, pivot)

  int64_t row_floats() const { return block.vecs * shape.pitch * kLanes; }
};

// One output row: which kernel rows meet the image, and what the rows after it will stage.
struct Row {
  int64_t oh;
  int64_t kh_begin, kh_end, slot;  // slot: place in the ring of kernel row kh_begin
  int64_t count;                   // outputs of the task before this row
  int64_t next, next_rows;         // input rows to fetch ahead, while this row computes
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

// `tiles` consecutive tiles of TILE outputs of one row and channel vector, from the strip's output
// `begin`; ow is the strip's first output.
template <typename T, int K, int STEP, bool TRAINING, int TILE>
EFFNET_INLINE void run_tiles(const Task& task, const Row& row, int64_t ow, int64_t v, int64_t begin,
                             int64_t tiles) {
  if (tiles == 0) return;
  const DwconvForwardArgs& args = task.args;
  const int64_t k = K ? K : args.shape.k, row_floats = task.row_floats();
  const int64_t x_step = args.x.w_stride, x_row = args.x.h_stride, y_step = args.y.w_stride;
  const int64_t c = task.block.c0 + v * kLanes, lanes = task.block.lanes(v);
  const float* weight = task.weight + v * k * k * kLanes;
  const float* in =
      task.ring + row.slot * row_floats + (v * task.shape.pitch + begin * STEP) * kLanes;
  const T* ahead = pixel<T>(args.x, task.n, row.next, (ow + begin) * STEP) + c;
  T* y = pixel<T>(args.y, task.n, row.oh, ow + begin) + c;
  float* sums = task.sums + v * 3 * kLanes;
  int64_t count = row.count + begin;
  for (int64_t tile = 0; tile < tiles; tile++) {
    for (int64_t r = 0; r < row.next_rows; r++)
#pragma GCC unroll 16
      for (int t = 0; t < TILE * STEP; t++)
        __builtin_prefetch(ahead + r * x_row + t * x_step, 0, 2);
    Vec acc[TILE] = {};
    const float* from = in;
    int64_t slot = row.slot;
    for (int64_t kh = row.kh_begin; kh < row.kh_end; kh++) {
      correlate<K, STEP, TILE>(acc, from, weight + kh * k * kLanes, k);
      from += row_floats;
      if (++slot == task.shape.rows) slot = 0, from -= task.shape.rows * row_floats;
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
    store_tile<TILE>(y, y_step, acc, lanes);
    y += TILE * y_step;
    ahead += TILE * STEP * x_step;
    in += TILE * STEP * kLanes;
    count += TILE;
  }
}

// Output columns [strip.begin, strip.end) of the task's rows.
template <typename T, int K, int STEP, bool TRAINING>
void run_strip(const Task& task, Range rows, Range strip, int64_t count) {
  const DwconvShape& s = task.args.shape;
  const RowTiles tiles(strip.size());
  const int64_t columns = (strip.size() - 1) * STEP + s.k, left = strip.begin * STEP - s.pad_l;
  const int64_t x_step = task.args.x.w_stride;
  int64_t staged = max_of(0, rows.begin * STEP - s.pad_t);
  Row group[kGroupRows];
  for (int64_t oh = rows.begin; oh < rows.end; oh += kGroupRows) {
    const int64_t size = min_of(kGroupRows, rows.end - oh);
    const int64_t top = oh * STEP - s.pad_t, last_top = top + (size - 1) * STEP;
    staged = max_of(staged, top);
    for (; staged < min_of(s.h, last_top + s.k); staged++) {
      const T* x = pixel<T>(task.args.x, task.n, staged, left) + task.block.c0;
      stage_row(task.ring + staged % task.shape.rows * task.row_floats(), task.shape.pitch, columns,
                {-left, s.w - left}, task.block, [=](int64_t j, int64_t v, int64_t lanes) {
                  return load_n(x + j * x_step + v * kLanes, lanes);
                });
    }
    for (int64_t i = 0; i < size; i++) {
      const int64_t above = top + i * STEP, next = staged + i * STEP;
      Row& row = group[i];
      row = {oh + i,
             max_of(0, -above),
             min_of(s.k, s.h - above),
             0,
             count + (oh + i - rows.begin) * strip.size(),
             next,
             0};
      row.slot = (above + row.kh_begin) % task.shape.rows;
      if (task.shape.fetch_ahead && oh + kGroupRows < rows.end)
        row.next_rows = max_of(0, min_of(STEP, s.h - next));
    }
    with_tile(tiles.size, [&]<int TILE>() {
      for (int64_t v = 0; v < task.block.vecs; v++)
        for (int64_t i = 0; i < size; i++) {
          run_tiles<T, K, STEP, TRAINING, TILE>(task, group[i], strip.begin, v, 0, tiles.wide);
          if constexpr (TILE > 1)
            run_tiles<T, K, STEP, TRAINING, TILE - 1>(task, group[i], strip.begin, v,
                                                      tiles.wide * TILE, tiles.count - tiles.wide);
        }
    });
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

template <typename T, int K, int STEP, bool TRAINING>
bool forward(const DwconvForwardArgs& args) {
  const DwconvShape& s = args.shape;
  const Ring shape(s, STEP, sizeof(T));
  const int64_t chunks = row_chunks(s.oh), kk = s.k * s.k;
  const int64_t plane = shape.rows * shape.pitch * kLanes;
  const Blocks blocks(s.c, s.n * chunks, args.threads, kRingBytes / (plane * 4));
  const int64_t floats = blocks.vecs * (plane + (kk + 5) * kLanes);
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
    float* ring = sums + 3 * block.vecs * kLanes;
    const Task task = {args, shape, block, n, ring, weight, scale, shift, sums};
    std::memset(weight, 0, sizeof(float) * static_cast<size_t>(ring - weight));
    pack_weight(weight, args.weight, args.weight_dtype, kk, block);
    if (!TRAINING) {
      pack_vector(scale, args.scale, block);
      pack_vector(shift, args.shift, block);
    }
    const Range rows = part_of(s.oh, chunks, chunk);
    for (int64_t i = 0; i < shape.strips; i++) {
      const Range strip = part_of(s.ow, shape.strips, i);
      run_strip<T, K, STEP, TRAINING>(task, rows, strip, rows.size() * strip.begin);
    }
    write_partials(task, chunk);
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
    return k == 3   ? by_mode<T, 3, 1>(args)
           : k == 5 ? by_mode<T, 5, 1>(args)
                    : by_mode<T, 0, 1>(args);
  return k == 3 ? by_mode<T, 3, 2>(args) : k == 5 ? by_mode<T, 5, 2>(args) : by_mode<T, 0, 2>(args);
}

}  // namespace

bool dwconv_forward(const DwconvForwardArgs& args) {
  return args.dtype == DType::kFloat32 ? by_shape<float>(args) : by_shape<bf16>(args);
}

}  // namespace EFFNET_ISA
}  // namespace effnet
