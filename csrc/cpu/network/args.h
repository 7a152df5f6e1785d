// A network for inference as the CPU kernels read it: BatchNorm folded into packed weights, one
// call for all layers. Plain data, the same for every instruction set; no functions (see args.h).
//
// Activations lie in blocks of one cache line: [image][C / block][pixel][block], a block being 16
// fp32 or 32 bf16 channels, those beyond C zero. A unit is 16 channels, so one fp32 block and half
// a bf16 one. Weights of a product are packed by panels of `tile units`: [panel][K][units * 16] in
// words of 32 bits, a word being one fp32 weight or the bf16 weights of two consecutive input
// channels; the last panel has the units that are left over as well. A panel begins at its first
// unit * K * 16 words.
#pragma once

#include <cstdint>

#include "cpu/args.h"

namespace effnet {

constexpr int64_t kMaxKernel = 31;  // of a depthwise convolution in a network

struct Product {
  int64_t in_channels, out_channels;
  const void* weight;
  const float* shift;  // [out_channels rounded up to a unit]
};

struct Padding {
  bool same;  // TensorFlow's rule instead of the sides below
  int64_t left, right, top, bottom;
};

struct HeadLayer : Product {
  Activation activation;
};

struct StemLayer {
  int64_t in_channels, out_channels, kernel_h, kernel_w, stride;
  Padding padding;
  const float* weight;  // [units][Cin * Kh * Kw][16]
  const float* shift;
  bool finite;  // whether all weights are
  Activation activation;
};

struct BlockLayer {
  int64_t in_channels, channels, out_channels;  // channels: of the depthwise one
  int64_t se_channels;                          // 0: no squeeze-and-excite
  int64_t kernel, stride;
  Padding padding;
  bool expands, residual;
  Activation activation, se_activation;  // of expansion and depthwise convolution; of the reduction
  int gate_kind;
  Product expand;
  const float* filter;  // [units][K * K][16]
  const float* filter_shift;
  // Null without squeeze-and-excite: [R][channels rounded up to a unit], [R]; [units][R][16],
  // likewise.
  const float *se_reduce_weight, *se_reduce_bias, *se_expand_weight, *se_expand_bias;
  Product project;
  // bf16 with a gate: these words' weights in fp32, [..][units * 16][2]
  const float* project_master;
  // FusedMBConv: a dense convolution of this kernel and stride to `channels`, and then the
  // projection or nothing; all of the above between them is absent.
  bool is_dense, projects;
  bool finite;    // whether all weights are of `dense` or `filter`, which reads padding
  Product dense;  // in_channels: of all taps, [K * K][input channels, in bf16 up to a block]
  int64_t tap;    // index of the output that shows this block's result, or -1
};

struct NetworkArgs {
  const StemLayer* stem;
  const BlockLayer* blocks;
  int64_t block_count;
  const HeadLayer* head;      // null: nothing but taps is wanted
  const Product* classifier;  // null: the output is the pooled head
  bool bf16;                  // of the activations and packed weights
  bool amx;
  int64_t l2;  // bytes of a core's L2 cache

  int64_t n, h, w;
  const void* x;  // [N,Cin,H,W]
  DType x_dtype;
  int64_t x_strides[4];  // over n, c, h, w in elements
  float* y;              // [N,classes] or [N,head channels]; null: not wanted, always without head
  float* const* taps;    // per tap: [N,C,Ho,Wo] in NHWC order
  int64_t stem_tap;      // as BlockLayer's tap
  Workspace workspace;
  int threads;
};

}  // namespace effnet
