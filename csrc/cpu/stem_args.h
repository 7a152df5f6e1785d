// Arguments of the stem's kernels: plain data, as in args.h. Symbols as in
// effnet_fast/ops/mbconv_training.py.
#pragma once

#include "cpu/training/args.h"

namespace effnet {

struct StemConvShape {
  int64_t n, c, h, w;          // input
  int64_t out, oh, ow;         // output
  int64_t kh, kw;              // kernel
  int64_t stride_h, stride_w;  // of the kernel's steps
  int64_t pad_l, pad_t;        // what lies right and below follows from oh and ow
};

struct StemImage {  // x [N,C,H,W] with any strides, in elements
  const void* data;
  int64_t n_stride, c_stride, h_stride, w_stride;
};

// z = conv(x, weight) with the moments of each task as stored; or y = activation(z * scale +
// shift).
struct StemForwardArgs {
  StemConvShape shape;
  DType dtype, weight_dtype;
  StemImage x;
  const void* weight;  // [out,C,Kh,Kw]
  const float* scale;  // [out]; null: z is written as it is
  const float* shift;  // [out]
  void* y;             // [N,OH,OW,out]
  float* partial;      // [N,chunks,3,out], chunks = row_chunks(oh); null: not wanted
  Activation activation;
  Workspace workspace;
  int threads;
};

// Partial weight gradients, dz formed of grad_y and z on load.
struct StemBackwardArgs {
  StemConvShape shape;
  DType dtype;
  StemImage x;
  const void *grad_y, *z;  // [N,OH,OW,out]
  const float* shift;      // of u = z * grad.scale + shift
  GradVectors grad;
  float* grad_weight;  // [tasks,Kh,Kw,C,out padded], tasks = stem_weight_tasks(n * oh, ...)
  Activation activation;
  Workspace workspace;
  int threads;
};

}  // namespace effnet
