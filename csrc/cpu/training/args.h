// Arguments of the passes of MBConv in training: plain data, as in args.h. Images are channels-last
// without gaps. Symbols as in effnet_fast/ops/mbconv_training.py.
#pragma once

#include "cpu/args.h"

namespace effnet {

// How BatchNorm is applied on load: u = z * scale + shift, zh = (z - mean) * rstd. All [C].
struct NormVectors {
  const float *scale, *shift, *mean, *rstd;
};

// dz = scale * du + (z - mean) * slope + offset: BatchNorm's backward with its two means. All [C];
// slope and offset are null where BatchNorm does not normalise by the batch: 0 times an infinite z
// would be NaN, where the slope of an activation may be finite.
struct GradVectors {
  const float *scale, *mean, *slope, *offset;
};

// z = conv(x, weight), or of a * gate, a = act(x * scale + shift); and (mean, M2, pivot) of each
// task as stored.
struct PointwiseForwardArgs {
  int64_t n, hw, c, out;  // channels of x and of z
  DType dtype, weight_dtype;
  const void* x;          // [N,HW,C]
  NormVectors norm;       // scale null: x is taken as it is
  const float* gate;      // [N,C] or null; null where norm.scale is
  const void* weight;     // [out,C]
  void* z;                // [N,HW,out]
  float* partial;         // [N,parts,3,out], parts = pointwise_parts(hw); null: not wanted
  Activation activation;  // of x, where norm.scale is
  Workspace workspace;
  int threads;
  bool amx;  // whether products of bf16 go to the tile unit
};

// e = dz3 W3 with its three sums, and the partial weight gradients.
struct ProjectBackwardArgs {
  int64_t n, hw, c, out;  // channels of z2 and of z3
  DType dtype, weight_dtype;
  const void *grad_y, *z3;  // [N,HW,out]
  const float* row_scale;   // [N] or null
  GradVectors grad;         // of z3
  const void* weight;       // [out,C]
  const void* z2;           // [N,HW,C]
  NormVectors norm;         // of z2
  const float* gate;        // [N,C]; null without squeeze-and-excite
  void* e;                  // [N,HW,C]; null: not wanted
  float* sums;              // [N,parts,3,C]
  float* grad_weight;       // [tasks,out,C padded]; null: not wanted
  Activation activation;    // of z2
  Workspace workspace;
  int threads;
  bool amx;  // whether products of bf16 go to the tile unit
};

// dx = dz1 W1 + residual, and the partial weight gradients, transposed.
struct ExpandBackwardArgs {
  int64_t n, hw, c, out;  // channels of x and of z1
  DType dtype, weight_dtype;
  const void *f, *z1;     // [N,HW,out]; f null where q is not
  const float* q;         // [N,out] or null: f = q * act'(u1)
  const float* shift;     // with q: of u1 = z1 * grad.scale + shift
  GradVectors grad;       // of z1
  const void* weight;     // [out,C]
  const void* x;          // [N,HW,C]
  const void* residual;   // [N,HW,C] or null
  void* grad_x;           // [N,HW,C]; null: not wanted
  float* grad_weight;     // [tasks,C,out padded]; null: not wanted
  Activation activation;  // with q: of z1
  Workspace workspace;
  int threads;
  bool amx;  // whether products of bf16 go to the tile unit
};

// out = sum of the parts in order; padded rows become dense, transposed ones [columns,rows].
struct FoldWeightArgs {
  const float* partial;  // [parts,rows,columns padded]
  int64_t parts, rows, columns;
  bool transposed;
  float* out;
  int threads;
};

// z = conv_dw(a, weight), a = x or act(x * scale + shift), and (mean, M2, pivot) of each task.
struct DepthwiseForwardArgs {
  DwconvShape shape;
  DType dtype, weight_dtype;
  const void* x;          // [N,H,W,C]
  NormVectors norm;       // scale null: x is taken as it is
  const void* weight;     // [C,1,K,K]
  void* z;                // [N,OH,OW,C]
  float* partial;         // [N,chunks,3,C], chunks = depthwise_chunks(n, oh); null: not wanted
  Activation activation;  // of x, where norm.scale is
  Workspace workspace;
  int threads;
};

// f = da * act'(u1) and its sums, or da + residual where x is taken as it is; partial weight
// gradients.
struct DepthwiseBackwardArgs {
  DwconvShape shape;
  DType dtype, weight_dtype;
  const void *e, *z2;     // [N,OH,OW,C]
  const float *gate, *q;  // [N,C]: du2 = (e * gate + q) * act'(u2); null without squeeze-and-excite
  const float* shift;     // of u2 = z2 * grad.scale + shift
  GradVectors grad;       // of z2
  const void* x;          // [N,H,W,C]
  NormVectors norm;       // of x
  const void* residual;   // [N,H,W,C] or null
  const void* weight;     // [C,1,K,K]
  void* f;                // [N,H,W,C]; null: not wanted
  float* sums;            // [N,chunks,2,C]; null where norm.scale is
  float* grad_weight;     // [N,chunks,C,K*K]; null: not wanted
  Activation activation;  // of x and of z2
  Workspace workspace;
  int threads;
};

// The sums of act(u), act'(u), act'(u) * zh over each task's pixels of an image.
struct MBConvSqueezeArgs {
  int64_t n, hw, c;
  DType dtype;
  const void* z;     // [N,HW,C]
  NormVectors norm;  // of z
  float* partial;    // [N,parts,3,C], parts = pointwise_parts(hw)
  Activation activation;
  int threads;
};

// y = u * row_scale + residual; or the sums of du = row_scale * grad_y and of du * zh.
struct MBConvFinishArgs {
  int64_t n, hw, c;
  DType dtype;
  const void* z;           // [N,HW,C]
  NormVectors norm;        // of z
  const float* row_scale;  // [N] or null
  const void* residual;    // forward: [N,HW,C] or null
  void* y;                 // forward: [N,HW,C]
  const void* grad_y;      // backward: [N,HW,C]
  float* partial;          // backward: [N,parts,2,C], parts = pointwise_parts(hw)
  int threads;
};

// (mean, M2, pivot) of each task.
struct MBConvMomentsArgs {
  int64_t n, hw, c;
  DType dtype;
  const void* z;   // [N,HW,C]
  float* partial;  // [N,parts,3,C], parts = pointwise_parts(hw)
  Workspace workspace;
  int threads;
};

// dz = scale * (grad_y * act'(z * scale + shift)) + (z - mean) * slope + offset.
struct MBConvNormBackwardArgs {
  int64_t pixels, c;
  DType dtype;
  const void *grad_y, *z;  // [pixels,C]
  const float* shift;
  GradVectors vectors;  // of z
  void* dz;             // [pixels,C]
  Activation activation;
  int threads;
};

// What one instruction set offers for MBConv in training.
struct MBConvKernels {
  bool (*pointwise_forward)(const PointwiseForwardArgs&);
  bool (*project_backward)(const ProjectBackwardArgs&);
  bool (*expand_backward)(const ExpandBackwardArgs&);
  bool (*fold_weight)(const FoldWeightArgs&);
  bool (*depthwise_forward)(const DepthwiseForwardArgs&);
  bool (*depthwise_backward)(const DepthwiseBackwardArgs&);
  bool (*squeeze)(const MBConvSqueezeArgs&);
  bool (*finish)(const MBConvFinishArgs&);
  bool (*finish_backward)(const MBConvFinishArgs&);
  bool (*moments)(const MBConvMomentsArgs&);
  bool (*norm_backward)(const MBConvNormBackwardArgs&);
  int64_t (*padded)(int64_t c);  // channels rounded up to whole vectors
};

}  // namespace effnet
