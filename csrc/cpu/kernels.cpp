// The table of this instruction set's kernels.
#include "cpu/kernels.h"

namespace effnet {
namespace EFFNET_ISA {

extern const MBConvKernels mbconv_kernels;
extern const Kernels kernels;
const Kernels kernels = {dwconv_forward,
                         dwconv_backward,
                         bn_backward_reduce,
                         affine_act,
                         squeeze,
                         excite,
                         excite_backward,
                         gate,
                         fold_sum,
                         fold_chan,
                         network,
                         stem_forward,
                         stem_backward,
                         network_tile_units,
                         &mbconv_kernels};

}  // namespace EFFNET_ISA
}  // namespace effnet
