// What each instruction set offers; kernel_table.cpp gathers it for the bindings.
// A kernel returns false where it could not get its scratch memory.
#pragma once

#include <omp.h>

#include "cpu/args.h"
#include "cpu/simd/vec.h"

namespace effnet {
namespace EFFNET_ISA {

EFFNET_INLINE int64_t thread_index() { return omp_get_thread_num(); }

bool dwconv_forward(const DwconvForwardArgs& args);
bool dwconv_backward(const DwconvBackwardArgs& args);
bool bn_backward_reduce(const BnReduceArgs& args);
bool affine_act(const AffineActArgs& args);
bool squeeze(const SqueezeArgs& args);
bool excite(const ExciteArgs& args);
bool excite_backward(const ExciteBackwardArgs& args);
bool gate(const GateArgs& args);
bool fold_sum(const FoldArgs& args);
bool merge_moments(const MergeMomentsArgs& args);
bool checksum(const ChecksumArgs& args);
bool network(const NetworkArgs& args);
bool stem_forward(const StemForwardArgs& args);
bool stem_backward(const StemBackwardArgs& args);
int64_t network_tile_units();

}  // namespace EFFNET_ISA
}  // namespace effnet
