// The table of this instruction set's passes of MBConv.
#include "cpu/training/kernels.h"

#include "cpu/training/panel_product.h"

namespace effnet {
namespace EFFNET_ISA {

namespace {
int64_t padded_channels(int64_t c) { return padded(c); }
}  // namespace

extern const MBConvKernels mbconv_kernels;
const MBConvKernels mbconv_kernels = {
    .pointwise_forward = mbconv_pointwise_forward,
    .project_backward = mbconv_project_backward,
    .expand_backward = mbconv_expand_backward,
    .fold_weight = mbconv_fold_weight,
    .depthwise_forward = mbconv_depthwise_forward,
    .depthwise_backward = mbconv_depthwise_backward,
    .squeeze = mbconv_squeeze,
    .finish = mbconv_finish,
    .finish_backward = mbconv_finish_backward,
    .moments = mbconv_moments,
    .norm_backward = mbconv_norm_backward,
    .padded = padded_channels,
};

}  // namespace EFFNET_ISA
}  // namespace effnet
