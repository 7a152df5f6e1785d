// Depthwise convolution with BatchNorm and SiLU, backward: data and weight gradients in one pass.
//
// Computes: dz = scale * (du - mean(du) - zh * mean(du * zh)), du = grad_y * silu'(z * scale +
// shift)
//           grad_x = conv_transpose(dz, weight), grad_weight = correlate(x, dz)
//           (eval: the two means are absent)
// Layout:   channels-last, any strides over N, H, W
// Tiling:   a task owns a group of images' chunks of 16 rows and a block of channels. Rows of dz
// and
//           of x ring through scratch; dz is formed once per element, as it is staged
// Bytes:    z, grad_y and x once, grad_x once
// FLOPs:    4 * K * K per output, and about 30 for dz
// Source:   original; Ioffe and Szegedy 2015, section 3, for the gradient through BatchNorm
// Truth:    effnet_fast/reference/dwconv_bn_silu.py
#include "cpu/dwconv_tiles.h"
#include "cpu/kernels.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

constexpr int kGradTile = kLanes == 16 ? 8 : 4;  // dz vectors held at once, within the registers
constexpr int64_t kScratchBytes = 384 << 10;     // rows of dz and x: a part of the L2 cache
constexpr int kVectors = 6;  // scale, shift, mean, rstd, mean(du), mean(du * zh)

struct Layout {
  int64_t chunks, groups, left, z_pitch, x_pitch, z_rows, x_rows, floats_per_vec;
  explicit Layout(const DwconvShape& s)
      : chunks(row_chunks(s.oh)),
        groups(weight_groups(s.n, s.oh, s.ow)),
        left(s.k - 1),
        z_pitch((left + max_of(s.ow, (s.w - 1 + s.pad_l) / s.stride + 1)) | 1),
        x_pitch(((s.ow - 1) * s.stride + s.k) | 1),
        z_rows((s.k - 1) / s.stride + 1),
        x_rows(s.k),
        floats_per_vec((z_rows * z_pitch + x_rows * x_pitch + 3 * s.k * s.k + kVectors) * kLanes) {}
};

struct Task {
  const DwconvBackwardArgs& args;
  const Layout& layout;
  ChannelBlock block;
  int64_t n, chunk;
  float *z_ring, *x_ring, *weight, *flipped, *grad_weight, *vectors;

  float* z_row(int64_t oh, int64_t v) const {
    return z_ring + ((oh % layout.z_rows) * block.vecs + v) * layout.z_pitch * kLanes;
  }
  float* x_row(int64_t ih, int64_t v) const {
    return x_ring + ((ih % layout.x_rows) * block.vecs + v) * layout.x_pitch * kLanes;
  }
  Vec vector(int which, int64_t v) const {
    return load(vectors + (which * block.vecs + v) * kLanes);
  }
};

// Taps kw = q, q + stride, ... of each kernel row in descending order, row after row of K places:
// the data gradient at one column parity is then a plain correlation of dz with stride 1.
void flip_weight(const Task& task) {
  const int64_t k = task.args.shape.k, stride = task.args.shape.stride;
  for (int64_t row = 0; row < task.block.vecs * k; row++) {
    float* out = task.flipped + row * k * kLanes;
    const float* in = task.weight + row * k * kLanes;
    for (int64_t q = 0; q < stride; q++)
      for (int64_t kw = q + (k - 1 - q) / stride * stride; q < k && kw >= q; kw -= stride)
        store(out, load(in + kw * kLanes)), out += kLanes;
  }
}

template <typename T>
void stage_dz(const Task& task, int64_t oh) {
  const DwconvBackwardArgs& args = task.args;
  const T* z = pixel<T>(args.z, task.n, oh, -task.layout.left) + task.block.c0;
  const T* grad_y = pixel<T>(args.grad_y, task.n, oh, -task.layout.left) + task.block.c0;
  const Range columns = {task.layout.left, task.layout.left + args.shape.ow};
  stage_row(task.z_row(oh, 0), task.layout.z_pitch, columns.end, columns, task.block,
            [&](int64_t j, int64_t v, int64_t lanes) {
              Vec zv = load_n(z + j * args.z.w_stride + v * kLanes, lanes);
              Vec dy = load_n(grad_y + j * args.grad_y.w_stride + v * kLanes, lanes);
              Vec scale = task.vector(0, v);
              Vec du = dy * silu_grad(zv * scale + task.vector(1, v));
              Vec zh = (zv - task.vector(2, v)) * task.vector(3, v);
              return scale * (du - task.vector(4, v) - zh * task.vector(5, v));
            });
}

template <typename T>
void stage_x(const Task& task, int64_t ih) {
  const DwconvShape& s = task.args.shape;
  const T* x = pixel<T>(task.args.x, task.n, ih, -s.pad_l) + task.block.c0;
  const int64_t columns = (s.ow - 1) * s.stride + s.k;
  stage_row(task.x_row(ih, 0), task.layout.x_pitch, columns, {s.pad_l, s.w + s.pad_l}, task.block,
            [&](int64_t j, int64_t v, int64_t lanes) {
              return load_n(x + j * task.args.x.w_stride + v * kLanes, lanes);
            });
}

// grad[j] += sum_t dz[t] * x[t * STEP + j] over TILE outputs, in K x PARTS chains.
template <int K, int STEP, int TILE>
EFFNET_INLINE void grad_weight_tile(const float* dz, const float* x, float* grad, int64_t k) {
  Vec d[TILE];
#pragma GCC unroll 8
  for (int t = 0; t < TILE; t++) d[t] = load(dz + t * kLanes);
  if constexpr (K > 0) {
    constexpr int PARTS = TILE < 2 ? 1 : K == 3 && kLanes == 16 ? 3 : 2;
    Vec acc[K * PARTS] = {};
#pragma GCC unroll 32
    for (int i = 0; i < (TILE - 1) * STEP + K; i++) {
      Vec xv = load(x + i * kLanes);
#pragma GCC unroll 8
      for (int j = 0; j < K; j++) {
        int t = (i - j) / STEP;
        if (i >= j && (i - j) % STEP == 0 && t < TILE) acc[t % PARTS * K + j] += d[t] * xv;
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < K; j++) {
      Vec sum = acc[j];
      for (int part = 1; part < PARTS; part++) sum += acc[part * K + j];
      store(grad + j * kLanes, load(grad + j * kLanes) + sum);
    }
  } else {
    for (int64_t j = 0; j < k; j++) {
      Vec sum = load(grad + j * kLanes);
#pragma GCC unroll 8
      for (int t = 0; t < TILE; t++) sum += d[t] * load(x + (t * STEP + j) * kLanes);
      store(grad + j * kLanes, sum);
    }
  }
}

template <int K, int STEP>
void add_grad_weight(const Task& task, int64_t oh) {
  const DwconvShape& s = task.args.shape;
  const int64_t k = K ? K : s.k;
  const int64_t top = oh * s.stride - s.pad_t;
  for (int64_t v = 0; v < task.block.vecs; v++)
    for (int64_t kh = max_of(0, -top); kh < min_of(k, s.h - top); kh++) {
      const float* dz = task.z_row(oh, v) + task.layout.left * kLanes;
      const float* x = task.x_row(top + kh, v);
      float* grad = task.grad_weight + (v * k + kh) * k * kLanes;
      int64_t ow = 0;
      for (; ow + kGradTile <= s.ow; ow += kGradTile)
        grad_weight_tile<K, STEP, kGradTile>(dz + ow * kLanes, x + ow * STEP * kLanes, grad, k);
      if (ow < s.ow)
        with_tile(s.ow - ow, [&]<int TILE>() {
          if constexpr (TILE < kGradTile)
            grad_weight_tile<K, STEP, TILE>(dz + ow * kLanes, x + ow * STEP * kLanes, grad, k);
        });
    }
}

// Columns of one row and parity of grad_x: out[t] = sum over kh of correlate(dz row, taps).
struct DataRow {
  int64_t kh_begin, kh_step, kh_end;   // kernel rows whose output row exists
  int64_t first_tap, taps;             // where the parity's taps start in a flipped kernel row
  int64_t shift;                       // dz column of output 0's first tap
  int64_t column, column_step, width;  // grad_x columns
};

template <typename T, int TAPS, int TILE>
void data_tiles(const Task& task, const DataRow& row, int64_t ih, int64_t v, int64_t begin,
                int64_t tiles) {
  const DwconvShape& s = task.args.shape;
  const int64_t step = row.column_step * task.args.grad_x.w_stride;
  T* out = pixel<T>(task.args.grad_x, task.n, ih, row.column + begin * row.column_step) +
           task.block.c0 + v * kLanes;
  for (int64_t tile = 0; tile < tiles; tile++, begin += TILE) {
    Vec acc[TILE] = {};
    for (int64_t kh = row.kh_begin; kh < row.kh_end; kh += row.kh_step) {
      const float* dz = task.z_row((ih + s.pad_t - kh) / s.stride, v);
      const float* w = task.flipped + ((v * s.k + kh) * s.k + row.first_tap) * kLanes;
      correlate<TAPS, 1, TILE>(acc, dz + (begin + row.shift) * kLanes, kLanes, w, row.taps);
    }
    store_tile<TILE>(out, step, acc, task.block.lanes(v));
    out += TILE * step;
  }
}

template <typename T, int TAPS>
void data_columns(const Task& task, const DataRow& row, int64_t ih, int64_t v) {
  const RowTiles tiles(row.width);
  with_tile(tiles.size, [&]<int TILE>() {
    data_tiles<T, TAPS, TILE>(task, row, ih, v, 0, tiles.wide);
    if constexpr (TILE > 1)
      data_tiles<T, TAPS, TILE - 1>(task, row, ih, v, tiles.wide * TILE, tiles.count - tiles.wide);
  });
}

template <typename T>
void write_grad_x(const Task& task, int64_t ih) {
  const DwconvShape& s = task.args.shape;
  DataRow row;
  // Kernel rows kh = ih + pad_t - oh * stride with 0 <= oh < OH.
  row.kh_begin = (ih + s.pad_t) % s.stride;
  row.kh_step = s.stride;
  const int64_t lowest = ih + s.pad_t - (s.oh - 1) * s.stride;
  row.kh_begin = max_of(row.kh_begin, lowest);
  row.kh_end = min_of(s.k, ih + s.pad_t + 1);
  row.first_tap = 0;
  row.column_step = s.stride;
  for (int64_t q = 0; q < s.stride; q++) {
    row.taps = q < s.k ? (s.k - 1 - q) / s.stride + 1 : 0;
    row.column = floor_mod(q - s.pad_l, s.stride);
    row.width = s.w > row.column ? ceil_div(s.w - row.column, s.stride) : 0;
    row.shift = task.layout.left + (row.column + s.pad_l - q) / s.stride - (row.taps - 1);
    for (int64_t v = 0; v < task.block.vecs && row.width > 0; v++) switch (row.taps) {
        case 1:
          data_columns<T, 1>(task, row, ih, v);
          break;
        case 2:
          data_columns<T, 2>(task, row, ih, v);
          break;
        case 3:
          data_columns<T, 3>(task, row, ih, v);
          break;
        case 5:
          data_columns<T, 5>(task, row, ih, v);
          break;
        default:
          data_columns<T, 0>(task, row, ih, v);
      }
    row.first_tap += row.taps;
  }
}

template <typename T, int K, int STEP>
void run_chunk(const Task& task) {
  const DwconvShape& s = task.args.shape;
  const bool data = task.args.grad_x.data, weight = task.args.grad_weight;
  const Range own = part_of(s.oh, task.layout.chunks, task.chunk);
  // grad_x rows of this chunk, and the rows of dz that they need
  int64_t ih = task.chunk == 0 ? 0 : min_of(s.h, own.begin * s.stride);
  const int64_t ih_end = own.end == s.oh ? s.h : min_of(s.h, own.end * s.stride);
  Range rows = own;
  if (data && ih < ih_end) {
    rows.begin =
        min_of(rows.begin, max_of(0, ceil_div(max_of(0, ih + s.pad_t - s.k + 1), s.stride)));
    rows.end = max_of(rows.end, min_of(s.oh, (ih_end - 1 + s.pad_t) / s.stride + 1));
  }
  int64_t staged = max_of(0, own.begin * s.stride - s.pad_t);
  for (int64_t oh = rows.begin; oh < rows.end; oh++) {
    stage_dz<T>(task, oh);
    if (weight && oh >= own.begin && oh < own.end) {
      const int64_t top = oh * s.stride - s.pad_t;
      staged = max_of(staged, top);
      for (; staged < min_of(s.h, top + s.k); staged++) stage_x<T>(task, staged);
      add_grad_weight<K, STEP>(task, oh);
    }
    for (; data && ih < ih_end && (ih + s.pad_t) / s.stride <= oh; ih++) write_grad_x<T>(task, ih);
  }
  for (; data && ih < ih_end; ih++) write_grad_x<T>(task, ih);
}

void write_grad_weight(const Task& task, int64_t part) {
  const int64_t kk = task.args.shape.k * task.args.shape.k;
  for (int64_t v = 0; v < task.block.vecs; v++)
    for (int64_t l = 0; l < task.block.lanes(v); l++) {
      float* out =
          task.args.grad_weight + (part * task.args.shape.c + task.block.c0 + v * kLanes + l) * kk;
      for (int64_t i = 0; i < kk; i++) out[i] = task.grad_weight[(v * kk + i) * kLanes + l];
    }
}

template <typename T, int K, int STEP>
bool backward(const DwconvBackwardArgs& args) {
  const DwconvShape& s = args.shape;
  const Layout layout(s);
  const int64_t tasks = layout.groups * layout.chunks, kk = s.k * s.k;
  const Blocks blocks(s.c, tasks, args.threads, kScratchBytes / (layout.floats_per_vec * 4));
  const int64_t floats = blocks.vecs * layout.floats_per_vec;
  float* const scratch = args.workspace(floats * args.threads);
  if (!scratch) return false;
#pragma omp parallel for num_threads(args.threads) schedule(static)
  for (int64_t index = 0; index < tasks * blocks.count; index++) {
    const int64_t part = index / blocks.count;
    const ChannelBlock block = blocks[index % blocks.count];
    float* at = scratch + thread_index() * floats;
    std::memset(at, 0, sizeof(float) * floats);
    Task task = {args,    layout,  block,   0,      part % layout.chunks, at, nullptr,
                 nullptr, nullptr, nullptr, nullptr};
    task.x_ring = task.z_ring + layout.z_rows * block.vecs * layout.z_pitch * kLanes;
    task.weight = task.x_ring + layout.x_rows * block.vecs * layout.x_pitch * kLanes;
    task.flipped = task.weight + kk * block.vecs * kLanes;
    task.grad_weight = task.flipped + kk * block.vecs * kLanes;
    task.vectors = task.grad_weight + kk * block.vecs * kLanes;
    pack_weight(task.weight, args.weight, args.weight_dtype, kk, block);
    flip_weight(task);
    const float* sources[kVectors] = {args.scale, args.shift,   args.mean,
                                      args.rstd,  args.du_mean, args.duzh_mean};
    for (int i = 0; i < kVectors; i++)
      if (sources[i]) pack_vector(task.vectors + i * block.vecs * kLanes, sources[i], block);
    const Range images = part_of(s.n, layout.groups, part / layout.chunks);
    for (task.n = images.begin; task.n < images.end; task.n++) run_chunk<T, K, STEP>(task);
    if (args.grad_weight) write_grad_weight(task, part);
  }
  return true;
}

template <typename T>
bool by_shape(const DwconvBackwardArgs& args) {
  const int64_t k = args.shape.k;
  if (args.shape.stride == 1)
    return k == 3   ? backward<T, 3, 1>(args)
           : k == 5 ? backward<T, 5, 1>(args)
                    : backward<T, 0, 1>(args);
  return k == 3   ? backward<T, 3, 2>(args)
         : k == 5 ? backward<T, 5, 2>(args)
                  : backward<T, 0, 2>(args);
}

}  // namespace

bool dwconv_backward(const DwconvBackwardArgs& args) {
  return args.dtype == DType::kFloat32 ? by_shape<float>(args) : by_shape<bf16>(args);
}

}  // namespace EFFNET_ISA
}  // namespace effnet
