// The passes of MBConv in training; pass_table.cpp gathers them into a table.
#pragma once

#include <omp.h>

#include "cpu/simd/vec.h"
#include "cpu/training/args.h"

namespace effnet {
namespace EFFNET_ISA {

bool mbconv_pointwise_forward(const PointwiseForwardArgs& args);
bool mbconv_project_backward(const ProjectBackwardArgs& args);
bool mbconv_expand_backward(const ExpandBackwardArgs& args);
bool mbconv_fold_weight(const FoldWeightArgs& args);
bool mbconv_depthwise_forward(const DepthwiseForwardArgs& args);
bool mbconv_depthwise_backward(const DepthwiseBackwardArgs& args);
bool mbconv_squeeze(const MBConvSqueezeArgs& args);
bool mbconv_finish(const MBConvFinishArgs& args);
bool mbconv_finish_backward(const MBConvFinishArgs& args);
bool mbconv_moments(const MBConvMomentsArgs& args);
bool mbconv_norm_backward(const MBConvNormBackwardArgs& args);

}  // namespace EFFNET_ISA
}  // namespace effnet
