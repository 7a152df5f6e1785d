// Depthwise convolution of MBConv, backward: data and weight gradients in one pass.
//
// Computes: du2 = (e * gate + q) * act'(u2), dz2 = scale * du2 + (z2 - mean) * slope + offset,
//           f = conv_transpose(dz2, weight) * act'(u1) with sum f and sum f * zh1 per channel, or
//           conv_transpose(dz2, weight) + residual where x is taken as it is,
//           grad_weight = correlate(a, dz2)
// Layout:   channels-last without gaps
// Tiling:   a task owns a chunk of one image's rows and a block of channels, and goes through
//           groups of rows of dz2. dz2, a and act'(u1) are formed once per element, in the order
//           of addresses, into planes in the L2 cache; each channel vector's planes then yield its
//           part of the weight gradient and its rows of f
// Bytes:    e, z2, x once, f once; x a second time from the cache, for zh1
// FLOPs:    4 * K * K per output, about 50 per element
// Source:   original; Ioffe and Szegedy 2015, section 3, for the gradient through BatchNorm
// Truth:    tests/support/reference_passes.py (depthwise_backward)
#include "cpu/simd/activations.h"
#include "cpu/training/kernels.h"
#include "cpu/training/rings.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

constexpr int kGradTile =
    kRegisters == 32 ? 8 : 4;  // dz vectors held at once, within the registers
constexpr int64_t kGroup = 4;  // rows of dz formed at a time

// Packed per channel vector: of dz2, then of x.
enum {
  kScale,
  kShift,
  kMean,
  kSlope,
  kOffset,
  kGate,
  kQ,
  kScale1,
  kShift1,
  kMean1,
  kRstd1,
  kVectors
};

struct Geometry {
  int64_t chunks, dz_left, dz_pitch, dz_rows, a_pitch, a_rows, data_rows, floats_per_vec;
  explicit Geometry(const DwconvShape& s)
      : chunks(depthwise_chunks(s.n, s.oh)),
        dz_left(s.k - 1),
        dz_pitch((dz_left + max_of(s.ow, (s.w - 1 + s.pad_l) / s.stride + 1)) | 1),
        dz_rows((s.k - 1) / s.stride + kGroup),
        a_pitch(max_of(s.pad_l + s.w, (s.ow - 1) * s.stride + s.k) | 1),
        a_rows((kGroup - 1) * s.stride + max_of(s.k, s.stride)),
        data_rows(kGroup * s.stride),
        floats_per_vec((dz_rows * dz_pitch + 2 * a_rows * a_pitch + 3 * s.k * s.k + kVectors + 2) *
                       kLanes) {}
};

struct Task;
struct Stages {  // of one activation: each forms a row
  void (*dz)(const Task&, int64_t oh);
  void (*a)(const Task&, int64_t h);
};

struct Task {
  const DepthwiseBackwardArgs& args;
  const Stages& stages;
  const Geometry& geometry;
  ChannelBlock block;
  Ring dz, a, slope;
  int64_t n, part;
  bool stream;  // f goes past the caches
  float *weight = nullptr, *flipped = nullptr, *grad_weight = nullptr;
  float *vectors = nullptr, *sums = nullptr;  // sums: [v][2][kLanes]
};

void pack_vectors(const Task& task) {
  const DepthwiseBackwardArgs& args = task.args;
  const int64_t row = task.n * args.shape.c;
  const float* const gate = args.gate ? args.gate + row : nullptr;
  const float* const q = args.q ? args.q + row : nullptr;
  const float* from[kVectors] = {
      args.grad.scale, args.shift,      args.grad.mean, args.grad.slope, args.grad.offset, gate, q,
      args.norm.scale, args.norm.shift, args.norm.mean, args.norm.rstd};
  for (int64_t v = 0; v < task.block.vecs; v++)
    for (int64_t i = 0; i < kVectors; i++)
      store(task.vectors + (v * kVectors + i) * kLanes,
            from[i] ? load_n(from[i] + task.block.c0 + v * kLanes, task.block.lanes(v))
                    : splat(i == kGate ? 1.0f : 0.0f));
}

template <typename T>
const T* row_of(const void* image, const Task& task, int64_t h, int64_t rows, int64_t columns) {
  const int64_t c = task.args.shape.c;
  return static_cast<const T*>(image) + (task.n * rows + h) * columns * c + task.block.c0;
}

// Forms row oh of dz2, and fetches that of the next group.
template <typename T, typename A, bool BY_BATCH>
void stage_dz(const Task& task, int64_t oh) {
  const DwconvShape& s = task.args.shape;
  const T* z = row_of<T>(task.args.z2, task, oh, s.oh, s.ow);
  const T* e = row_of<T>(task.args.e, task, oh, s.oh, s.ow);
  float* const plane = task.dz.plane(task.dz.slot(oh), 0) + task.geometry.dz_left * kLanes;
  const int64_t pitch = task.dz.pitch * kLanes;
  const int64_t ahead = kGroup * s.ow * s.c;
  const A act(task.args.activation);
  for_row(task.block, s.ow, [&](int64_t v, int64_t lanes, int64_t j) {
    const float* vectors = task.vectors + v * kVectors * kLanes;
    const auto vector = [&](int i) { return load(vectors + i * kLanes); };
    fetch<1>(z + ahead + j * s.c + v * kLanes);
    fetch<1>(e + ahead + j * s.c + v * kLanes);
    const Vec zv = load_n(z + j * s.c + v * kLanes, lanes);
    const Vec grad = load_n(e + j * s.c + v * kLanes, lanes) * vector(kGate) + vector(kQ);
    const Vec du = act.gradient(grad, zv * vector(kScale) + vector(kShift));
    Vec dz = vector(kScale) * du;
    if constexpr (BY_BATCH) dz += (zv - vector(kMean)) * vector(kSlope) + vector(kOffset);
    store(plane + v * pitch + j * kLanes, dz);
  });
}

// Forms row h of a, and of act'(u1) where x is activated; fetches as stage_dz does.
template <typename T, typename A>
void stage_a(const Task& task, int64_t h) {
  const DwconvShape& s = task.args.shape;
  const T* x = row_of<T>(task.args.x, task, h, s.h, s.w);
  const int64_t slot = task.a.slot(h), pitch = task.a.pitch * kLanes;
  float* const a = task.a.plane(slot, 0) + s.pad_l * kLanes;
  float* const slope = task.slope.plane(slot, 0) + s.pad_l * kLanes;
  if (!task.args.norm.scale) {
    for_row(task.block, s.w, [&](int64_t v, int64_t lanes, int64_t j) {
      store(a + v * pitch + j * kLanes, load_n(x + j * s.c + v * kLanes, lanes));
    });
    return;
  }
  const int64_t ahead = kGroup * s.stride * s.w * s.c;
  const A act(task.args.activation);
  for_row(task.block, s.w, [&](int64_t v, int64_t lanes, int64_t j) {
    fetch<1>(x + ahead + j * s.c + v * kLanes);
    const float* vectors = task.vectors + v * kVectors * kLanes;
    const Vec u = load_n(x + j * s.c + v * kLanes, lanes) * load(vectors + kScale1 * kLanes) +
                  load(vectors + kShift1 * kLanes);
    const ValueAndSlope activated = act.both(u);
    store(a + v * pitch + j * kLanes, activated.value);
    store(slope + v * pitch + j * kLanes, activated.slope);
  });
}

// grad[kh][j] += sum over the rows' TILE outputs from `ow` of dz[t] * a[t * STEP + j].
template <int K, int STEP, int TILE>
EFFNET_NOINLINE void weight_tile(const Task& task, Range rows, int64_t ow) {
  const DwconvShape& s = task.args.shape;
  const int64_t k = K ? K : s.k, column = (task.geometry.dz_left + ow) * kLanes;
  const int64_t first_slot = task.dz.slot(rows.begin);
  const int64_t first_row = max_of(0, rows.begin * STEP - s.pad_t);
  const int64_t first_a = task.a.slot(first_row);
  for (int64_t v = 0; v < task.block.vecs; v++)
    for (int64_t kh = 0; kh < k; kh++) {
      float* grad = task.grad_weight + (v * k + kh) * k * kLanes;
      // Kernel row kh meets the image at these rows of dz.
      const int64_t begin = max_of(rows.begin, ceil_div(max_of(0, s.pad_t - kh), STEP));
      const int64_t last = s.h - 1 + s.pad_t - kh, end = last < 0 ? 0 : last / STEP + 1;
      const Range own = {begin, min_of(rows.end, end)};
      constexpr int PARTS = TILE < 2 ? 1 : K == 3 && kRegisters == 32 ? 3 : 2;  // chains per tap
      Vec acc[max_of(1, K) * PARTS] = {};
      for (int64_t oh = own.begin; oh < own.end; oh++) {
        const float* dz = task.dz.plane(task.dz.after(first_slot, oh - rows.begin), v) + column;
        const int64_t ahead = oh * STEP - s.pad_t + kh - first_row;
        const float* a = task.a.plane(task.a.after(first_a, ahead), v) + ow * STEP * kLanes;
        if constexpr (K > 0) {
          Vec d[TILE];
#pragma GCC unroll 8
          for (int t = 0; t < TILE; t++) d[t] = load(dz + t * kLanes);
#pragma GCC unroll 32
          for (int i = 0; i < (TILE - 1) * STEP + K; i++) {
            const Vec x = in_register(load(a + i * kLanes));
#pragma GCC unroll 8
            for (int j = 0; j < K; j++) {
              const int t = (i - j) / STEP;
              if (i >= j && (i - j) % STEP == 0 && t < TILE) acc[t % PARTS * K + j] += d[t] * x;
            }
          }
        } else {
          for (int64_t j = 0; j < k; j++) {
            Vec sum = {};
#pragma GCC unroll 8
            for (int t = 0; t < TILE; t++)
              sum += load(dz + t * kLanes) * load(a + (t * STEP + j) * kLanes);
            store(grad + j * kLanes, load(grad + j * kLanes) + sum);
          }
        }
      }
      if constexpr (K > 0) {
#pragma GCC unroll 8
        for (int j = 0; j < K; j++) {
          Vec sum = acc[j];
          for (int part = 1; part < PARTS; part++) sum += acc[part * K + j];
          store(grad + j * kLanes, load(grad + j * kLanes) + sum);
        }
      }
    }
}

template <int K, int STEP>
void add_grad_weight(const Task& task, Range rows) {
  const int64_t width = task.args.shape.ow;
  for (int64_t ow = 0; ow < width; ow += kGradTile)
    with_tile(min_of(kGradTile, width - ow), [&]<int TILE>() {
      if constexpr (TILE <= kGradTile) weight_tile<K, STEP, TILE>(task, rows, ow);
    });
}

// TILE columns of rows of f, from the parity's column `begin`.
template <typename T, int TAPS, int TILE>
EFFNET_NOINLINE void data_tile(const Task& task, const Parity& parity, Range rows, int64_t begin) {
  const DwconvShape& s = task.args.shape;
  const int64_t column = parity.column + begin * s.stride, step = s.stride * s.c;
  const bool activated = task.args.norm.scale;
  for (int64_t v = 0; v < task.block.vecs; v++) {
    const float* flipped = task.flipped + (v * s.k * s.k + parity.first_tap) * kLanes;
    const float* vectors = task.vectors + v * kVectors * kLanes;
    const Vec mean = load(vectors + kMean1 * kLanes), rstd = load(vectors + kRstd1 * kLanes);
    const int64_t lanes = task.block.lanes(v);
    Vec sum = {}, sum_zh = {};
    for (int64_t ih = rows.begin; ih < rows.end; ih++) {
      // kh = ih + pad_t - oh * stride with 0 <= oh < OH.
      const int64_t lowest = ih + s.pad_t - (s.oh - 1) * s.stride;
      const int64_t kh_begin = max_of((ih + s.pad_t) % s.stride, lowest);
      const int64_t kh_end = min_of(s.k, ih + s.pad_t + 1);
      Vec acc[TILE] = {};
      int64_t slot = task.dz.slot(max_of(0, ih + s.pad_t - kh_begin) / s.stride);
      for (int64_t kh = kh_begin; kh < kh_end; kh += s.stride) {
        correlate<TAPS, 1, TILE>(acc, task.dz.plane(slot, v) + (begin + parity.shift) * kLanes,
                                 kLanes, flipped + kh * s.k * kLanes, parity.taps);
        slot = (slot ? slot : task.dz.rows) - 1;
      }
      const int64_t at = ((task.n * s.h + ih) * s.w + column) * s.c + task.block.c0 + v * kLanes;
      if (activated) {
        const float* slope = task.slope.plane(task.slope.slot(ih), v) + (s.pad_l + column) * kLanes;
        const T* x = static_cast<const T*>(task.args.x) + at;
#pragma GCC unroll 8
        for (int t = 0; t < TILE; t++) {
          acc[t] = as_stored<T>(acc[t] * load(slope + t * s.stride * kLanes));
          sum += acc[t];
          sum_zh += acc[t] * ((load_n(x + t * step, lanes) - mean) * rstd);
        }
      } else if (task.args.residual) {
        const T* residual = static_cast<const T*>(task.args.residual) + at;
#pragma GCC unroll 8
        for (int t = 0; t < TILE; t++) acc[t] += load_n(residual + t * step, lanes);
      }
      store_tile<TILE>(static_cast<T*>(task.args.f) + at, step, acc, lanes, task.stream);
    }
    float* sums = task.sums + v * 2 * kLanes;
    store(sums, load(sums) + sum);
    store(sums + kLanes, load(sums + kLanes) + sum_zh);
  }
}

template <typename T, int TAPS>
void data_columns(const Task& task, const Parity& parity, Range rows) {
  const RowTiles tiles(parity.width);
  int64_t begin = 0;
  for (int64_t tile = 0; tile < tiles.count; tile++) {
    const int64_t size = tile < tiles.wide ? tiles.size : tiles.size - 1;
    with_tile(size, [&]<int TILE>() { data_tile<T, TAPS, TILE>(task, parity, rows, begin); });
    begin += size;
  }
}

template <typename T>
void write_data(const Task& task, Range rows) {
  const DwconvShape& s = task.args.shape;
  for (int64_t q = 0; q < s.stride; q++) {
    const Parity parity(s, q, task.geometry.dz_left);
    if (parity.width == 0) continue;
    switch (parity.taps) {
      case 1:
        data_columns<T, 1>(task, parity, rows);
        break;
      case 2:
        data_columns<T, 2>(task, parity, rows);
        break;
      case 3:
        data_columns<T, 3>(task, parity, rows);
        break;
      case 5:
        data_columns<T, 5>(task, parity, rows);
        break;
      default:
        data_columns<T, 0>(task, parity, rows);
    }
  }
}

template <typename T, int K, int STEP>
void run_chunk(const Task& task, int64_t chunk) {
  const DwconvShape& s = task.args.shape;
  const bool data = task.args.f, weight = task.args.grad_weight, activated = task.args.norm.scale;
  const Range own = part_of(s.oh, task.geometry.chunks, chunk);
  // Rows of f of this chunk, and the rows of dz that they need.
  int64_t ih = chunk == 0 ? 0 : min_of(s.h, own.begin * STEP);
  const int64_t ih_end = own.end == s.oh ? s.h : min_of(s.h, own.end * STEP);
  Range rows = own;
  if (data && ih < ih_end) {
    rows.begin = min_of(rows.begin, max_of(0, ceil_div(max_of(0, ih + s.pad_t - s.k + 1), STEP)));
    rows.end = max_of(rows.end, min_of(s.oh, (ih_end - 1 + s.pad_t) / STEP + 1));
  }
  int64_t staged = 0;  // rows of a before this one are there, or of no use
  const auto stage_until = [&](int64_t first, int64_t end) {
    for (staged = max_of(staged, first); staged < end; staged++) task.stages.a(task, staged);
  };
  for (int64_t oh = rows.begin; oh < rows.end; oh += kGroup) {
    const Range group = {oh, min_of(rows.end, oh + kGroup)};
    for (int64_t i = group.begin; i < group.end; i++) task.stages.dz(task, i);
    const Range with_weight = {max_of(group.begin, own.begin), min_of(group.end, own.end)};
    if (weight && with_weight.size() > 0) {
      stage_until(max_of(0, with_weight.begin * STEP - s.pad_t),
                  min_of(s.h, (with_weight.end - 1) * STEP - s.pad_t + s.k));
      add_grad_weight<K, STEP>(task, with_weight);
    }
    // The rows of f whose dz is complete.
    const int64_t ready =
        group.end == rows.end ? ih_end : min_of(ih_end, group.end * STEP - s.pad_t);
    for (; data && ih < ready; ih = min_of(ready, ih + task.geometry.data_rows)) {
      const Range part = {ih, min_of(ready, ih + task.geometry.data_rows)};
      if (activated) stage_until(part.begin, part.end);
      write_data<T>(task, part);
    }
  }
}

void write_partials(const Task& task) {
  const int64_t c = task.args.shape.c, kk = task.args.shape.k * task.args.shape.k;
  for (int64_t row = 0; task.args.sums && row < 2; row++)
    for (int64_t v = 0; v < task.block.vecs; v++)
      store_n(task.args.sums + (task.part * 2 + row) * c + task.block.c0 + v * kLanes,
              load(task.sums + (v * 2 + row) * kLanes), task.block.lanes(v));
  if (task.args.grad_weight)
    unpack_weight(task.args.grad_weight + task.part * c * kk, task.grad_weight, kk, task.block);
}

template <typename T, int K, int STEP>
bool run(const DepthwiseBackwardArgs& args) {
  const DwconvShape& s = args.shape;
  const Geometry g(s);
  const int64_t kk = s.k * s.k, parts = s.n * g.chunks;
  const Blocks blocks(s.c, parts, args.threads, kRingBytes / (g.floats_per_vec * 4));
  const int64_t floats = blocks.vecs * g.floats_per_vec;
  float* const scratch = args.workspace(floats * args.threads);
  if (!scratch) return false;
  const bool stream = streams<T>(args.f, s.n * s.h * s.w * s.c, s.c);
  const Stages stages = with_activation(args.activation, [&]<typename A>() {
    return Stages{args.grad.slope ? stage_dz<T, A, true> : stage_dz<T, A, false>, stage_a<T, A>};
  });
#pragma omp parallel for num_threads(args.threads) schedule(static)
  for (int64_t index = 0; index < parts * blocks.count; index++) {
    const int64_t part = index / blocks.count;
    const ChannelBlock block = blocks[index % blocks.count];
    const int64_t vecs = block.vecs;
    float* at = scratch + omp_get_thread_num() * floats;
    const Ring dz = {at, g.dz_rows, vecs, g.dz_pitch}, a = {nullptr, g.a_rows, vecs, g.a_pitch};
    Task task = {args, stages, g, block, dz, a, a, part / g.chunks, part, stream};
    task.a.data = at + task.dz.floats();
    task.slope.data = task.a.data + task.a.floats();
    task.weight = task.slope.data + task.slope.floats();
    task.flipped = task.weight + kk * vecs * kLanes;
    task.grad_weight = task.flipped + kk * vecs * kLanes;
    task.vectors = task.grad_weight + kk * vecs * kLanes;
    task.sums = task.vectors + kVectors * vecs * kLanes;
    task.dz.clear_borders(g.dz_left, g.dz_left + s.ow);
    task.a.clear_borders(s.pad_l, s.pad_l + s.w);
    std::memset(task.grad_weight, 0, sizeof(float) * static_cast<size_t>(kk * vecs * kLanes));
    std::memset(task.sums, 0, sizeof(float) * static_cast<size_t>(2 * vecs * kLanes));
    pack_weight(task.weight, args.weight, args.weight_dtype, kk, block);
    flip_weight(task.flipped, task.weight, s.k, STEP, vecs);
    pack_vectors(task);
    run_chunk<T, K, STEP>(task, part % g.chunks);
    write_partials(task);
    end_streams();
  }
  return true;
}

template <typename T>
bool by_shape(const DepthwiseBackwardArgs& args) {
  const int64_t k = args.shape.k;
  if (args.shape.stride == 1)
    return k == 3 ? run<T, 3, 1>(args) : k == 5 ? run<T, 5, 1>(args) : run<T, 0, 1>(args);
  return k == 3 ? run<T, 3, 2>(args) : k == 5 ? run<T, 5, 2>(args) : run<T, 0, 2>(args);
}

}  // namespace

bool mbconv_depthwise_backward(const DepthwiseBackwardArgs& args) {
  return args.dtype == DType::kFloat32 ? by_shape<float>(args) : by_shape<bf16>(args);
}

}  // namespace EFFNET_ISA
}  // namespace effnet
