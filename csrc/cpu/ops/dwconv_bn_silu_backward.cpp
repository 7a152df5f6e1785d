// Depthwise convolution with BatchNorm and activation, backward: data and weight in one pass.
//
// Computes: du = grad_y * act'(z * scale + shift)
//           dz = scale * (du - mean(du) - zh * mean(du * zh))
//           grad_x = conv_transpose(dz, weight), grad_weight = correlate(x, dz)
//           (eval: the two means are absent)
// Layout:   channels-last, any strides over N, H, W
// Tiling:   a task owns a group of images' chunks of up to 16 rows and a block of channels, and
//           goes through groups of 4 rows of dz. dz is formed once per element, in the order of
//           addresses, into planes of fp32 in the L2 cache, one per row and channel vector; then
//           each channel vector's planes yield its rows of grad_x and, with x read as in the
//           forward pass, its part of the weight gradient
// Bytes:    z, grad_y and x once, grad_x once
// FLOPs:    4 * K * K per output, and about 30 for dz
// Source:   original; Ioffe and Szegedy 2015, section 3, for the gradient through BatchNorm
// Truth:    effnet_fast/reference/dwconv_bn_silu.py
#include "cpu/kernels.h"
#include "cpu/ops/dwconv_tiles.h"
#include "cpu/simd/activations.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

constexpr int kGradTile = kRegisters == 32 ? 8 : 4;  // dz vectors held in registers at once
constexpr int64_t kGroupRows = 4;                    // rows of dz formed at a time
constexpr int64_t kDataRows = 2 * kGroupRows;        // rows of grad_x written at a time
constexpr int64_t kPlaneBytes = 512 << 10;           // planes of dz of a task

// Per channel: u = z * scale + shift, dz = scale * du + (z - mean) * slope + offset, the latter two
// by the batch alone.
enum { kScale, kShift, kMean, kSlope, kOffset, kVectors };

struct Layout {
  int64_t chunks, groups, left, pitch, rows, patch, floats_per_vec;
  explicit Layout(const DwconvShape& s)
      : chunks(row_chunks(s.oh)),
        groups(weight_groups(s.n, s.oh, s.ow)),
        left(s.k - 1),
        pitch((left + max_of(s.ow, (s.w - 1 + s.pad_l) / s.stride + 1)) | 1),
        rows((s.k - 1) / s.stride + kGroupRows),
        patch(((kGroupRows - 1) * s.stride + s.k) * ((kGradTile - 1) * s.stride + s.k) * kLanes),
        floats_per_vec((rows * pitch + 3 * s.k * s.k + kVectors) * kLanes) {}
};

struct Task {
  const DwconvBackwardArgs& args;
  const Layout& layout;
  void (*stage_dz)(const Task&, int64_t oh);  // of this call's activation
  ChannelBlock block;
  int64_t n, chunk;
  bool fetch_ahead;  // x comes from further than the L2 cache
  float *patch, *planes = nullptr, *weight = nullptr, *flipped = nullptr;
  float *grad_weight = nullptr, *vectors = nullptr;

  // Rows of dz go round `layout.rows` slots.
  int64_t slot(int64_t oh) const { return oh % layout.rows; }
  EFFNET_INLINE const float* plane(int64_t slot, int64_t v) const {
    return planes + (slot * block.vecs + v) * layout.pitch * kLanes;
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

void pack_vectors(const Task& task) {
  const DwconvBackwardArgs& args = task.args;
  for (int64_t v = 0; v < task.block.vecs; v++) {
    const int64_t c = task.block.c0 + v * kLanes, lanes = task.block.lanes(v);
    float* out = task.vectors + v * kVectors * kLanes;
    const Vec scale = load_n(args.scale + c, lanes);
    store(out + kScale * kLanes, scale);
    store(out + kShift * kLanes, load_n(args.shift + c, lanes));
    store(out + kMean * kLanes, load_n(args.mean + c, lanes));
    if (!args.du_mean) continue;
    store(out + kSlope * kLanes,
          -scale * load_n(args.rstd + c, lanes) * load_n(args.duzh_mean + c, lanes));
    store(out + kOffset * kLanes, -scale * load_n(args.du_mean + c, lanes));
  }
}

// Forms row oh of dz between zero columns, in the order of addresses. Meanwhile the rows of x that
// its weight gradient is the first to meet are fetched, where they lie beyond the L2 cache.
template <typename T, typename A, bool BY_BATCH>
void stage_dz(const Task& task, int64_t oh) {
  const DwconvBackwardArgs& args = task.args;
  const int64_t vecs = task.block.vecs, pitch = task.layout.pitch * kLanes;
  const T* z = pixel<T>(args.z, task.n, oh, 0) + task.block.c0;
  const T* grad_y = pixel<T>(args.grad_y, task.n, oh, 0) + task.block.c0;
  float* const planes = task.planes + task.slot(oh) * vecs * pitch;
  const int64_t begin = task.layout.left, end = begin + args.shape.ow;
  for (int64_t v = 0; v < vecs; v++) {
    for (int64_t j = 0; j < begin; j++) store(planes + v * pitch + j * kLanes, Vec{});
    for (int64_t j = end; j < task.layout.pitch; j++) store(planes + v * pitch + j * kLanes, Vec{});
  }
  const A act(args.activation);
  const auto form = [&](const float* vectors, Vec zv, Vec dy) {
    const Vec scale = load(vectors + kScale * kLanes);
    const Vec du = act.gradient(dy, zv * scale + load(vectors + kShift * kLanes));
    if constexpr (!BY_BATCH) return scale * du;  // 0 times an infinite z would be NaN
    return scale * du + ((zv - load(vectors + kMean * kLanes)) * load(vectors + kSlope * kLanes) +
                         load(vectors + kOffset * kLanes));
  };
  const int64_t step = args.shape.stride,
                below = oh * step - args.shape.pad_t + args.shape.k - step;
  const bool fetch = task.fetch_ahead && below >= 0 && below + step <= args.shape.h;
  const T* x = pixel<T>(args.x, task.n, below, 0) + task.block.c0;
  const int64_t tail = task.block.lanes(vecs - 1), full = tail < kLanes ? vecs - 1 : vecs;
  for (int64_t j = begin; j < end; j++) {
    float* out = planes + j * kLanes;
    const float* vectors = task.vectors;
    for (int64_t i = 0; fetch && i < step; i++)
      for (int64_t q = 0; q < step; q++)
        for (int64_t v = 0; v < vecs; v++)
          __builtin_prefetch(x + i * args.x.h_stride + q * args.x.w_stride + v * kLanes, 0, 2);
    x += step * args.x.w_stride;
    for (int64_t v = 0; v < full; v++, out += pitch, vectors += kVectors * kLanes)
      store(out, form(vectors, load(z + v * kLanes), load(grad_y + v * kLanes)));
    if (full < vecs)
      store(out,
            form(vectors, load_n(z + full * kLanes, tail), load_n(grad_y + full * kLanes, tail)));
    z += args.z.w_stride;
    grad_y += args.grad_y.w_stride;
  }
}

// grad[kh][j] += sum over the rows' TILE outputs from `ow` of dz[t] * x[t * STEP + j], in[] being
// the tile of x whose first row is in_row.
template <int K, int STEP, int TILE>
EFFNET_INLINE void grad_weight_vector(const Task& task, Range rows, int64_t first_slot, int64_t v,
                                      int64_t ow, const Source& in, int64_t in_row) {
  const DwconvShape& s = task.args.shape;
  const int64_t k = K ? K : s.k, column = (task.layout.left + ow) * kLanes;
  for (int64_t kh = 0; kh < k; kh++) {
    float* grad = task.grad_weight + (v * k + kh) * k * kLanes;
    // Kernel row kh meets the image at these rows of dz.
    const int64_t begin = max_of(rows.begin, ceil_div(max_of(0, s.pad_t - kh), STEP));
    const int64_t last = s.h - 1 + s.pad_t - kh, end = last < 0 ? 0 : last / STEP + 1;
    const Range own = {begin, min_of(rows.end, end)};
    int64_t slot = first_slot + own.begin - rows.begin;
    if (slot >= task.layout.rows) slot -= task.layout.rows;
    const auto next_dz = [&] {
      const float* dz = task.plane(slot, v) + column;
      if (++slot == task.layout.rows) slot = 0;
      return dz;
    };
    const float* from = in.data + (own.begin * STEP - s.pad_t + kh - in_row) * in.row;
    if constexpr (K > 0) {
      constexpr int PARTS = TILE < 2 ? 1 : K == 3 && kRegisters == 32 ? 3 : 2;  // chains per tap
      Vec acc[K * PARTS] = {};
      for (int64_t oh = own.begin; oh < own.end; oh++, from += STEP * in.row) {
        const float* dz = next_dz();
        Vec d[TILE];
#pragma GCC unroll 8
        for (int t = 0; t < TILE; t++) d[t] = load(dz + t * kLanes);
#pragma GCC unroll 32
        for (int i = 0; i < (TILE - 1) * STEP + K; i++) {
          const Vec xv = in_register(load(from + i * in.pixel));
#pragma GCC unroll 8
          for (int j = 0; j < K; j++) {
            int t = (i - j) / STEP;
            if (i >= j && (i - j) % STEP == 0 && t < TILE) acc[t % PARTS * K + j] += d[t] * xv;
          }
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < K; j++) {
        Vec sum = acc[j];
        for (int part = 1; part < PARTS; part++) sum += acc[part * K + j];
        store(grad + j * kLanes, load(grad + j * kLanes) + sum);
      }
    } else {
      for (int64_t oh = own.begin; oh < own.end; oh++, from += STEP * in.row) {
        const float* dz = next_dz();
        for (int64_t j = 0; j < k; j++) {
          Vec sum = {};
#pragma GCC unroll 8
          for (int t = 0; t < TILE; t++)
            sum += load(dz + t * kLanes) * load(from + (t * STEP + j) * in.pixel);
          store(grad + j * kLanes, load(grad + j * kLanes) + sum);
        }
      }
    }
  }
}

// One column tile of all channel vectors: each pixel's channels are read in a row.
template <typename T, int K, int STEP, int TILE>
EFFNET_NOINLINE void grad_weight_tile(const Task& task, Range rows, int64_t ow) {
  const DwconvShape& s = task.args.shape;
  const int64_t k = K ? K : s.k, top = rows.begin * STEP - s.pad_t, left = ow * STEP - s.pad_l;
  const int64_t columns = (TILE - 1) * STEP + k, begin = max_of(0, top);
  const int64_t in_rows = min_of(s.h, (rows.end - 1) * STEP - s.pad_t + k) - begin;
  const Range inside = columns_inside(left, columns, s.w);
  const int64_t slot = task.slot(rows.begin);
  const T* x = pixel<T>(task.args.x, task.n, begin, left) + task.block.c0;
  for (int64_t v = 0; v < task.block.vecs; v++, x += kLanes)
    grad_weight_vector<K, STEP, TILE>(
        task, rows, slot, v, ow,
        source(task.patch, x, task.args.x, in_rows, columns, inside, task.block.lanes(v)), begin);
}

template <typename T, int K, int STEP>
void add_grad_weight(const Task& task, Range rows) {
  const int64_t width = task.args.shape.ow;
  for (int64_t ow = 0; ow < width; ow += kGradTile)
    with_tile(min_of(kGradTile, width - ow), [&]<int TILE>() {
      if constexpr (TILE <= kGradTile) grad_weight_tile<T, K, STEP, TILE>(task, rows, ow);
    });
}

// A row of grad_x, the kernel rows whose output row exists, and the first one's slot.
struct DataRow {
  int64_t ih, kh_begin, kh_end, slot;
  DataRow() = default;
  DataRow(const Task& task, int64_t ih) : ih(ih) {
    const DwconvShape& s = task.args.shape;
    // kh = ih + pad_t - oh * stride with 0 <= oh < OH.
    const int64_t lowest = ih + s.pad_t - (s.oh - 1) * s.stride;
    kh_begin = max_of((ih + s.pad_t) % s.stride, lowest);
    kh_end = min_of(s.k, ih + s.pad_t + 1);
    slot = task.slot(max_of(0, ih + s.pad_t - kh_begin) / s.stride);
  }
};

// The columns of grad_x that meet the taps kw = q, q + stride, ...
struct Parity {
  int64_t first_tap = 0, taps;  // their place in a flipped kernel row
  int64_t column, width;        // the first column, and how many there are, `stride` apart
  int64_t shift;                // dz column of the first one's first tap
  Parity(const Layout& layout, const DwconvShape& s, int64_t q) {
    const auto taps_of = [&](int64_t i) { return i < s.k ? (s.k - 1 - i) / s.stride + 1 : 0; };
    for (int64_t i = 0; i < q; i++) first_tap += taps_of(i);
    taps = taps_of(q);
    column = floor_mod(q - s.pad_l, s.stride);
    width = s.w > column ? ceil_div(s.w - column, s.stride) : 0;
    shift = layout.left + (column + s.pad_l - q) / s.stride - (taps - 1);
  }
};

// out[t] = sum over kh of correlate(dz row, taps), TILE columns from `begin` of some rows.
template <typename T, int TAPS, int TILE>
EFFNET_NOINLINE void data_tile(const Task& task, const Parity& parity, const DataRow* rows,
                               int64_t count, int64_t begin) {
  const DwconvShape& s = task.args.shape;
  const int64_t column = parity.column + begin * s.stride;
  const float* flipped = task.flipped + parity.first_tap * kLanes;
  for (int64_t v = 0; v < task.block.vecs; v++, flipped += s.k * s.k * kLanes)
    for (int64_t i = 0; i < count; i++) {
      const DataRow& row = rows[i];
      Vec acc[TILE] = {};
      int64_t slot = row.slot;
      for (int64_t kh = row.kh_begin; kh < row.kh_end; kh += s.stride) {
        correlate<TAPS, 1, TILE>(acc, task.plane(slot, v) + (begin + parity.shift) * kLanes, kLanes,
                                 flipped + kh * s.k * kLanes, parity.taps);
        slot = (slot ? slot : task.layout.rows) - 1;
      }
      T* out = pixel<T>(task.args.grad_x, task.n, row.ih, column) + task.block.c0 + v * kLanes;
      store_tile<TILE>(out, s.stride * task.args.grad_x.w_stride, acc, task.block.lanes(v));
    }
}

template <typename T, int TAPS>
void data_columns(const Task& task, const Parity& parity, const DataRow* rows, int64_t count) {
  const RowTiles tiles(parity.width);
  int64_t begin = 0;
  for (int64_t tile = 0; tile < tiles.count; tile++) {
    const int64_t size = tile < tiles.wide ? tiles.size : tiles.size - 1;
    with_tile(size,
              [&]<int TILE>() { data_tile<T, TAPS, TILE>(task, parity, rows, count, begin); });
    begin += size;
  }
}

template <typename T>
void write_grad_x(const Task& task, Range rows) {
  const DwconvShape& s = task.args.shape;
  while (rows.begin < rows.end) {
    DataRow part[kDataRows];
    int64_t count = 0;
    for (; rows.begin < rows.end && count < kDataRows; rows.begin++)
      part[count++] = DataRow(task, rows.begin);
    for (int64_t q = 0; q < s.stride; q++) {
      const Parity parity(task.layout, s, q);
      if (parity.width == 0) continue;
      switch (parity.taps) {
        case 1:
          data_columns<T, 1>(task, parity, part, count);
          break;
        case 2:
          data_columns<T, 2>(task, parity, part, count);
          break;
        case 3:
          data_columns<T, 3>(task, parity, part, count);
          break;
        case 5:
          data_columns<T, 5>(task, parity, part, count);
          break;
        default:
          data_columns<T, 0>(task, parity, part, count);
      }
    }
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
  for (int64_t oh = rows.begin; oh < rows.end; oh += kGroupRows) {
    const Range group = {oh, min_of(rows.end, oh + kGroupRows)};
    for (int64_t i = group.begin; i < group.end; i++) task.stage_dz(task, i);
    const Range with_weight = {max_of(group.begin, own.begin), min_of(group.end, own.end)};
    if (weight && with_weight.size() > 0) add_grad_weight<T, K, STEP>(task, with_weight);
    // The rows of grad_x whose dz is complete.
    const int64_t ready =
        group.end == rows.end ? ih_end : min_of(ih_end, group.end * s.stride - s.pad_t);
    if (data && ih < ready) {
      write_grad_x<T>(task, {ih, ready});
      ih = ready;
    }
  }
}

template <typename T, int K, int STEP>
bool backward(const DwconvBackwardArgs& args) {
  const DwconvShape& s = args.shape;
  const Layout layout(s);
  const int64_t tasks = layout.groups * layout.chunks, kk = s.k * s.k;
  const Blocks blocks(s.c, tasks, args.threads, kPlaneBytes / (layout.floats_per_vec * 4));
  const int64_t floats = layout.patch + blocks.vecs * layout.floats_per_vec;
  const bool fetch_ahead = args.grad_weight && beyond_l2(s, s.n, sizeof(T));
  const auto stage = with_activation(args.activation, [&]<typename A>() {
    return args.du_mean ? &stage_dz<T, A, true> : &stage_dz<T, A, false>;
  });
  float* const scratch = args.workspace(floats * args.threads);
  if (!scratch) return false;
#pragma omp parallel for num_threads(args.threads) schedule(static)
  for (int64_t index = 0; index < tasks * blocks.count; index++) {
    const int64_t part = index / blocks.count;
    const ChannelBlock block = blocks[index % blocks.count];
    float* at = scratch + thread_index() * floats;
    Task task = {args, layout, stage, block, 0, part % layout.chunks, fetch_ahead, at};
    task.planes = task.patch + layout.patch;
    task.weight = task.planes + layout.rows * block.vecs * layout.pitch * kLanes;
    task.flipped = task.weight + kk * block.vecs * kLanes;
    task.grad_weight = task.flipped + kk * block.vecs * kLanes;
    task.vectors = task.grad_weight + kk * block.vecs * kLanes;
    std::memset(task.grad_weight, 0, sizeof(float) * static_cast<size_t>(kk * block.vecs * kLanes));
    pack_weight(task.weight, args.weight, args.weight_dtype, kk, block);
    flip_weight(task);
    pack_vectors(task);
    const Range images = part_of(s.n, layout.groups, part / layout.chunks);
    for (task.n = images.begin; task.n < images.end; task.n++) run_chunk<T, K, STEP>(task);
    if (args.grad_weight)
      unpack_weight(args.grad_weight + part * s.c * kk, task.grad_weight, kk, block);
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
