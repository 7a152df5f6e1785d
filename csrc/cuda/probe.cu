// Whether the kernels can run on a device: asked without a launch, an allocation or a wait, so that
// it may be asked while a CUDA graph is being captured.
#include "cuda/args.h"
#include "cuda/primitives.cuh"

namespace effnet {
namespace cuda {
namespace {

__global__ void probe_kernel() {}

}  // namespace

std::string probe(int device) {
  return reason_against(reinterpret_cast<const void*>(&probe_kernel), device);
}

}  // namespace cuda
}  // namespace effnet
