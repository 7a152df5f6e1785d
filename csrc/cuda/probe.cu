// A kernel that proves the path from source to device: compiled, linked, launched, read back.
//
// Computes: out[0] = 2 * in + 1
#include <cuda_runtime.h>

#include <string>

#include "common/cuda_probe.h"

namespace effnet {
namespace {

__global__ void probe_kernel(int in, int* out) { *out = 2 * in + 1; }

std::string describe(const char* what, cudaError_t error) {
  std::string text = std::string(what) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    text += driver == 0 ? " (no CUDA driver is installed here; "
                        : " (the driver supports CUDA " + std::to_string(driver / 1000) + "." +
                              std::to_string(driver % 1000 / 10) + "; ";
    text += "this build uses CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
            std::to_string(CUDART_VERSION % 1000 / 10) +
            ", whose runtime wants driver 580 or newer)";
  }
  return text;
}

}  // namespace

std::string cuda_probe(int device) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return describe("cannot count the CUDA devices", error);
  if (device < 0 || device >= count)
    return "there is no CUDA device " + std::to_string(device) + ": " + std::to_string(count) +
           " found";
  int before = 0;
  cudaGetDevice(&before);
  int* out = nullptr;
  int answer = 0;
  const int in = 20;
  const char* step = "cannot select the device";
  if ((error = cudaSetDevice(device)) == cudaSuccess) {
    step = "cannot allocate device memory";
    error = cudaMalloc(&out, sizeof(int));
  }
  if (error == cudaSuccess) {
    probe_kernel<<<1, 1>>>(in, out);
    step = "cannot launch a kernel";
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) {
    step = "cannot read the kernel's answer";
    error = cudaMemcpy(&answer, out, sizeof(int), cudaMemcpyDeviceToHost);
  }
  if (out) cudaFree(out);
  cudaSetDevice(before);
  if (error != cudaSuccess) return describe(step, error);
  return answer == 2 * in + 1 ? "" : "the probe kernel gave a wrong answer";
}

}  // namespace effnet
