// The table of this instruction set's passes of MBConv.
#include "cpu/mbconv_kernels.h"

#include "cpu/panel_product.h"

namespace effnet {
namespace EFFNET_ISA {

namespace {
int64_t padded_channels(int64_t c) { return padded(c); }
}  // namespace

extern const MBConvKernels mbconv_kernels;
const MBConvKernels mbconv_kernels = {mbconv_pointwise_forward, mbconv_project_backward,
                                      mbconv_expand_backward,   mbconv_fold_weight,
                                      mbconv_depthwise_forward, mbconv_depthwise_backward,
                                      mbconv_squeeze,           mbconv_finish,
                                      mbconv_finish_backward,   padded_channels};

}  // namespace EFFNET_ISA
}  // namespace effnet
