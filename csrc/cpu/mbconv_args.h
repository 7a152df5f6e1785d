// Arguments of the passes of MBConv in training: plain data, as in args.h. Images are channels-last
// without gaps. Symbols as in effnet_fast/reference/mbconv_passes.py.
#pragma once

#include "cpu/args.h"

namespace effnet {

// How BatchNorm is applied on load: u = z * scale + shift, zh = (z - mean) * rstd. All [C].
struct NormVectors {
  const float *scale, *shift, *mean, *rstd;
};

// dz = scale * du + (z - mean) * slope + offset: BatchNorm's backward with its two means. All [C];
// slope and offset are 0 where BatchNorm does not normalise by the batch.
struct GradVectors {
  const float *scale, *mean, *slope, *offset;
};

// z = conv(x * gate or a * gate, weight), and (mean, M2, pivot) of each task as stored.
struct PointwiseForwardArgs {
  int64_t n, hw, c, out;  // channels of x and of z
  DType dtype, weight_dtype;
  const void* x;       // [N,HW,C]
  NormVectors norm;    // scale null: x is taken as it is
  const float* gate;   // [N,C] or null
  const void* weight;  // [out,C]
  void* z;             // [N,HW,out]
  float* partial;      // [N,parts,3,out], parts = pointwise_parts(hw); null: not wanted
  Workspace workspace;
  int threads;
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
  const float* gate;        // [N,C]
  void* e;                  // [N,HW,C]; null: not wanted
  float* sums;              // [N,parts,3,C]
  float* grad_weight;       // [tasks,out,C padded]; null: not wanted
  Workspace workspace;
  int threads;
};

// dx = dz1 W1 + residual, and the partial weight gradients, transposed.
struct ExpandBackwardArgs {
  int64_t n, hw, c, out;  // channels of x and of z1
  DType dtype, weight_dtype;
  const void *f, *z1;    // [N,HW,out]
  GradVectors grad;      // of z1
  const void* weight;    // [out,C]
  const void* x;         // [N,HW,C]
  const void* residual;  // [N,HW,C] or null
  void* grad_x;          // [N,HW,C]; null: not wanted
  float* grad_weight;    // [tasks,C,out padded]; null: not wanted
  Workspace workspace;
  int threads;
};

// out = sum of the parts in order; padded rows become dense, transposed ones [columns,rows].
struct FoldWeightArgs {
  const float* partial;  // [parts,rows,columns padded]
  int64_t parts, rows, columns;
  bool transposed;
  float* out;
  int threads;
};

// What one instruction set offers for MBConv in training.
struct MBConvKernels {
  bool (*pointwise_forward)(const PointwiseForwardArgs&);
  bool (*project_backward)(const ProjectBackwardArgs&);
  bool (*expand_backward)(const ExpandBackwardArgs&);
  bool (*fold_weight)(const FoldWeightArgs&);
  int64_t (*padded)(int64_t c);  // channels rounded up to whole vectors
};

}  // namespace effnet
