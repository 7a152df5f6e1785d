// Arguments of the CUDA kernels: plain data, no CUDA headers. Addresses are the device's.
//
// Tensors are channels-last: the stride over C is 1; those of inputs over N, H and W (in elements)
// are free where an Image says so, all else has no gaps. Vectors over channels are fp32, those of a
// BatchNorm of its dtypes.
// Every launcher is asynchronous on `stream` of `device`, allocates nothing, never synchronises,
// and throws std::invalid_argument or std::runtime_error.
#pragma once

#include <cstdint>
#include <string>

#include "common/activation.h"

namespace effnet {
namespace cuda {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Queue {
  int device;
  void* stream;  // a cudaStream_t
};

struct Image {  // x [N,C,H,W], its first element and its strides in elements
  void* data;
  int64_t n_stride, h_stride, w_stride;
};

// z -> (z - mean) * rstd * weight + bias; without `mean` there is none.
struct BatchNorm {
  const void *weight, *bias;  // [C], null for 1 and 0
  const void *mean, *var;     // [C], var biased
  DType dtype, stats_dtype;   // of weight and bias; of mean and var
  float eps;
};

struct DwconvShape {
  int64_t n, c, h, w;    // input
  int64_t oh, ow;        // output
  int64_t k, stride;     // square kernel of 3 or 5
  int64_t pad_l, pad_t;  // what lies right and below follows from oh and ow
};

// How a depthwise kernel is cut up: a row of effnet_fast/ops/cuda/tiles.py.
struct Tile {
  int64_t rows, cols;  // pixels of a thread: of the output, in backward of the input
  int64_t lanes;       // threads side by side on a pixel, two channels each
  int64_t nx, ny;      // threads side by side on columns and on rows
  int64_t bands;       // steps of ny * rows rows that a block takes downwards
  int64_t images;      // images that a block goes through
};

// A block owns a block of channels of a chunk (bands x a tile of columns) of a group of images.
struct DwconvGrid {
  int64_t channel_blocks, column_tiles, bands, row_chunks, groups;
  int64_t chunks, parts;  // of an image, of all
};

struct DwconvForwardArgs {
  DwconvShape shape;
  DType dtype, weight_dtype;
  Tile tile;
  Image x;
  const void* weight;  // [C,1,K,K]
  BatchNorm before;    // of x, followed by the activation; optional
  BatchNorm after;     // followed by the activation; without it z is written as it is
  void* y;             // [N,C,OH,OW]
  float* partial;      // after: factor * sums of y [N,chunks,C], null: unwanted
                       // else: (count, pivot, mean, M2) of z - pivot [parts,4,C]
  float factor;
  Activation activation;
};

struct DwconvBackwardArgs {
  DwconvShape shape;
  DType dtype, weight_dtype;
  Tile tile;
  Image x;
  BatchNorm before;           // of x, followed by the activation; optional
  const void *grad_y, *z;     // [N,C,OH,OW]; y = act(after(z))
  const float *gate, *shift;  // [N,C]: du = (grad_y * gate + shift) * act'(u); null for 1 and 0
  BatchNorm after;
  const float* sums;   // [2,C]: sum du, sum du * zh, where BN is in training; else null
  double count;        // values per channel that the sums are of
  const void* weight;  // [C,1,K,K]
  void* grad_x;        // [N,C,H,W], of x before `before` and act, less BN's part; null: unwanted
  float* partial;      // [parts,K*K+2,C]: weight gradient, sum f, sum f * zh of grad_x = f; or null
  Activation activation;
};

// Per-channel sums over the pixels of each image, a partial for each chunk of them.
enum class Reduction : int {
  kSum = 0,      // sum x
  kProduct = 1,  // sum x * grad_y
  kSqueeze = 2,  // u = bn(x): sum act(u), sum act'(u), sum act'(u) * zh
  kBnAct = 3,    // du = grad_y * act'(u): sum du, sum du * zh
  kBn = 4,       // dy = grad_y * keep[n]: sum dy, sum dy * zh
};

struct ReduceArgs {
  int64_t n, c, hw, chunks;
  DType dtype;
  Reduction what;
  const void *x, *grad_y;  // [N,C,H,W]
  BatchNorm bn;
  const float* keep;  // [N] or null
  float factor;
  float* partial;         // [N,chunks,sums,C], times factor
  Activation activation;  // of kSqueeze and kBnAct
};

// y = act(bn(z)) * keep[n] + residual
struct BnActArgs {
  int64_t n, c, hw;
  DType dtype;
  const void *z, *residual;  // residual may be null
  BatchNorm bn;
  const float* keep;  // [N] or null
  Activation activation;
  void* y;
};

// y = x * gate + shift, both [N,C]
struct GateArgs {
  int64_t n, c, hw;
  DType dtype;
  const void* x;
  const float *gate, *shift;  // shift may be null
  void* y;
};

struct ExciteArgs {
  int64_t n, c, r, splits;
  DType weight_dtype;
  const float* pooled;  // [N,C] means
  const void *se_reduce_weight, *se_reduce_bias, *se_expand_weight,
      *se_expand_bias;  // [R,C] [R] [C,R] [C]
  float* partial;       // [splits,N,R]
  float* hidden;        // [N,R] before the activation
  float* gate;          // [N,C]
  Activation activation;
  int gate_kind;
};

struct ExciteBackwardArgs {
  int64_t n, c, r;
  DType weight_dtype;
  const float *pooled, *hidden, *gate, *grad_gate;  // [N,C] [N,R] [N,C] [N,C]
  const void *se_reduce_weight, *se_expand_weight;
  float* partial;      // [ceil(C / 32),N,R]
  float* grad_hidden;  // [N,R]
  float *grad_se_reduce_weight, *grad_se_reduce_bias, *grad_se_expand_weight, *grad_se_expand_bias;
  float* grad_pooled;  // [N,C], times factor
  float factor;
  // Optional: grad_sums [2,N,C], S1 = sum e * act'(u) and S2 = sum e * act'(u) * zh;
  // squeeze_sums [2,N,C], S3 = sum act'(u) and S4 = sum act'(u) * zh; of them grad_bn [2,C],
  // sum_n gate * S1 + grad_pooled * S3 and sum_n gate * S2 + grad_pooled * S4.
  const float *grad_sums, *squeeze_sums;
  float* grad_bn;
  Activation activation;  // of hidden
  int gate_kind;
};

// out[o * out_o + r * out_r + c * out_c] = sum over p of partial[o,p,first_row + r,c], p in a fixed
// order; for r = 0 times first_factor.
struct FoldSumArgs {
  const float* partial;  // [outer,parts,part_rows,C]
  int64_t outer, parts, part_rows, c;
  int64_t first_row, rows;
  int64_t out_o, out_r, out_c;
  float first_factor;
  float* out;
};

struct MergeMomentsArgs {
  const float* partial;  // [parts,4,C]
  int64_t parts, c;
  float *mean, *var;  // [C], var biased
};

DwconvGrid dwconv_forward_grid(const DwconvShape& shape, const Tile& tile);
DwconvGrid dwconv_backward_grid(const DwconvShape& shape, const Tile& tile);
// Bytes of a block's shared memory.
int64_t dwconv_forward_shared_bytes(const DwconvShape& shape, DType dtype, const Tile& tile);
int64_t dwconv_backward_shared_bytes(const DwconvShape& shape, DType dtype, const Tile& tile);

// The empty text where the kernels can run on `device`, else the reason.
std::string probe(int device);

void launch_dwconv_bn_silu_fwd(const DwconvForwardArgs& args, const Queue& queue);
void launch_dwconv_bn_silu_bwd(const DwconvBackwardArgs& args, const Queue& queue);
void launch_reduce(const ReduceArgs& args, const Queue& queue);
void launch_fold_sum(const FoldSumArgs& args, const Queue& queue);
void launch_merge_moments(const MergeMomentsArgs& args, const Queue& queue);
void launch_bn_act(const BnActArgs& args, const Queue& queue);
void launch_gate(const GateArgs& args, const Queue& queue);
void launch_excite_fwd(const ExciteArgs& args, const Queue& queue);
void launch_excite_bwd(const ExciteBackwardArgs& args, const Queue& queue);

}  // namespace cuda
}  // namespace effnet
