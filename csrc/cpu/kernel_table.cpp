// The table of this instruction set's kernels.
#include "cpu/kernels.h"

namespace effnet {
namespace EFFNET_ISA {

extern const MBConvKernels mbconv_kernels;
extern const Kernels kernels;
const Kernels kernels = {
    .dwconv_forward = dwconv_forward,
    .dwconv_backward = dwconv_backward,
    .bn_backward_reduce = bn_backward_reduce,
    .affine_act = affine_act,
    .squeeze = squeeze,
    .excite = excite,
    .excite_backward = excite_backward,
    .gate = gate,
    .fold_sum = fold_sum,
    .merge_moments = merge_moments,
    .checksum = checksum,
    .network = network,
    .stem_forward = stem_forward,
    .stem_backward = stem_backward,
    .network_tile_units = network_tile_units,
    .mbconv = &mbconv_kernels,
};

}  // namespace EFFNET_ISA
}  // namespace effnet
