// Arguments of the CPU kernels: plain data, the same for every instruction set. No functions here:
// code that this header emitted would be shared between objects compiled for different machines.
//
// Tensors are channels-last: the stride over C is 1, the strides over N, H and W (in elements)
// are free for inputs. Vectors over channels are fp32 and contiguous.
#pragma once

#include <cstdint>

#include "common/activation.h"

namespace effnet {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };

// Memory aligned to a cache line that stays with the calling thread between calls: a fresh block of
// this size would cost a page fault per 4 KiB. Null where there is none to be had.
using Workspace = float* (*)(int64_t floats);

struct Image {  // x [N,C,H,W], its first element and its strides in elements
  void* data;
  int64_t n_stride, h_stride, w_stride;
};

struct DwconvShape {
  int64_t n, c, h, w;    // input
  int64_t oh, ow;        // output
  int64_t k, stride;     // square kernel, odd k
  int64_t pad_l, pad_t;  // what lies right and below follows from oh and ow
};

// Rows of the output are dealt out in chunks whose height depends on the shape alone, so that every
// sum has the same order whatever the number of threads. The caller allocates the partials.
struct DwconvForwardArgs {
  DwconvShape shape;
  DType dtype, weight_dtype;
  Image x, y;          // y: activation(z * scale + shift) in eval, z in training
  const void* weight;  // [C,1,K,K] contiguous
  const float* scale;  // [C], eval only
  const float* shift;  // [C], eval only
  float* partial;      // eval: sums of y [N,chunks,C]; training: (mean, M2, pivot)
                       // [N,chunks,3,C], the former two of z - pivot
  bool training;
  Activation activation;  // eval only
  Workspace workspace;
  int threads;
};

struct DwconvBackwardArgs {
  DwconvShape shape;
  DType dtype, weight_dtype;
  Image x, z, grad_y, grad_x;  // grad_x.data may be null: not wanted
  const void* weight;
  const float* scale;      // [C] gamma * rstd
  const float* shift;      // [C] beta - mean * scale
  const float* mean;       // [C]
  const float* rstd;       // [C]
  const float* du_mean;    // [C] dbeta / M, null in eval
  const float* duzh_mean;  // [C] dgamma / M, null in eval
  float* grad_weight;      // partials [N*chunks,C,K*K], null: not wanted
  Activation activation;
  Workspace workspace;
  int threads;
};

struct PlaneShape {
  int64_t n, c, hw;  // hw pixels at a common stride
};

// Per-channel reductions over the pixels of every image, one partial for each chunk of pixels.
struct BnReduceArgs {
  PlaneShape shape;  // n = 1, hw = N * H * W
  DType dtype;
  const void *z, *grad_y;  // contiguous channels-last
  const float *scale, *shift, *mean, *rstd;
  float* partial;  // [chunks,2,C]: sum du, sum du * zh
  Activation activation;
  int threads;
};

struct AffineActArgs {  // y = activation(z * scale + shift) + residual, in place where y == z
  PlaneShape shape;
  DType dtype;
  const void* z;
  const void* residual;  // or null
  const float *scale, *shift;
  void* y;
  Activation activation;
  int threads;
};

struct SqueezeArgs {
  PlaneShape shape;
  DType dtype;
  const void* x;       // contiguous channels-last
  const void* grad_y;  // null: sums of x; else sums of x * grad_y
  float* partial;      // [N,chunks,C]
  int threads;
};

struct ExciteArgs {
  int64_t n, c, r;
  DType weight_dtype;
  const float* pooled;  // [N,C] means
  const void *se_reduce_weight, *se_reduce_bias, *se_expand_weight,
      *se_expand_bias;    // [R,C] [R] [C,R] [C]
  float* hidden;          // [N,R] before the activation
  float* gate;            // [N,C]
  Activation activation;  // of the reduction
  int gate_kind;
  Workspace workspace;
  int threads;
};

struct ExciteBackwardArgs {
  int64_t n, c, r;
  DType weight_dtype;
  const float *pooled, *hidden, *gate, *grad_gate;
  const void *se_reduce_weight, *se_expand_weight;
  float *grad_se_reduce_weight, *grad_se_reduce_bias, *grad_se_expand_weight, *grad_se_expand_bias;
  float* grad_pooled;  // [N,C]
  float* grad_hidden;  // [N,R] workspace
  Activation activation;
  int gate_kind;
  Workspace workspace;
  int threads;
};

struct GateArgs {  // y = x * gate + offset per (n, c)
  PlaneShape shape;
  DType dtype;
  const void* x;
  const float* gate;
  const float* offset;  // or null
  void* y;
  int threads;
};

struct FoldArgs {  // out[o,c] = factor * sum over p of partial[o,p,c], p in order
  const float* partial;
  int64_t outer, parts, c;
  float factor;
  float* out;
  int threads;
};

struct MergeMomentsArgs {  // (mean, M2) of the parts, merged in order into mean and biased variance
  const float* partial;    // [N,chunks,3,C]: mean and M2 of z - pivot, and the pivot
  int64_t n, chunks, c;
  int64_t oh, ow;     // a chunk covers its part of the oh rows
  float *mean, *var;  // [C]
  int threads;
};

struct Piece {  // of memory, at any address
  const void* data;
  int64_t bytes;
};

struct ChecksumArgs {  // sums[i]: of the bytes of pieces [chunks[i], chunks[i + 1]), in order
  const Piece* pieces;
  const int64_t* chunks;
  int64_t count;
  uint64_t* sums;
  int threads;
};

struct NetworkArgs;      // in network/args.h
struct MBConvKernels;    // in training/args.h
struct StemForwardArgs;  // in stem_args.h
struct StemBackwardArgs;

// A kernel returns false where it could not get its scratch memory.
struct Kernels {
  bool (*dwconv_forward)(const DwconvForwardArgs&);
  bool (*dwconv_backward)(const DwconvBackwardArgs&);
  bool (*bn_backward_reduce)(const BnReduceArgs&);
  bool (*affine_act)(const AffineActArgs&);
  bool (*squeeze)(const SqueezeArgs&);
  bool (*excite)(const ExciteArgs&);
  bool (*excite_backward)(const ExciteBackwardArgs&);
  bool (*gate)(const GateArgs&);
  bool (*fold_sum)(const FoldArgs&);
  bool (*merge_moments)(const MergeMomentsArgs&);
  bool (*checksum)(const ChecksumArgs&);
  bool (*network)(const NetworkArgs&);
  bool (*stem_forward)(const StemForwardArgs&);
  bool (*stem_backward)(const StemBackwardArgs&);
  int64_t (*network_tile_units)();  // panels of packed weights have this many units
  const MBConvKernels* mbconv;
};

}  // namespace effnet
