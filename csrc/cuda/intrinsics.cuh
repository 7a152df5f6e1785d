// The device's side of cuda/primitives.cuh, which says what each of these promises; the host's side
// is simt/twins.h.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

#define EFFNET_SHARED(type, name, extents) __shared__ __align__(16) type name extents

namespace effnet {
namespace cuda {

__device__ __forceinline__ int thread_x() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int64_t block_x() { return blockIdx.x; }
__device__ __forceinline__ int64_t block_y() { return blockIdx.y; }
__device__ __forceinline__ int64_t block_z() { return blockIdx.z; }
__device__ __forceinline__ int block_dim_x() { return static_cast<int>(blockDim.x); }

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ uint4 effnet_dynamic_shared[];
  return reinterpret_cast<T*>(effnet_dynamic_shared);
}

__device__ __forceinline__ void sync_threads() { __syncthreads(); }

template <typename T>
__device__ __forceinline__ T shuffle_xor(T v, int lane_mask, unsigned mask = kFullMask) {
  return __shfl_xor_sync(mask, v, lane_mask);
}

template <typename V>
__device__ __forceinline__ V load(const V* p) {
  return __ldg(p);
}
template <typename V>
__device__ __forceinline__ void store(V* p, V v) {
  *p = v;
}
template <typename V>
__device__ __forceinline__ V load_shared(const V* p) {
  return *p;
}
template <typename V>
__device__ __forceinline__ void store_shared(V* p, V v) {
  *p = v;
}

template <int kBytes>
__device__ __forceinline__ void cp_async(void* to, const void* from, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
                 "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kGroups of this thread's committed groups are still under way.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {  // within 2 ulp, subnormals are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp_approx(float x) {  // within 1 ulp, subnormals are 0
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

inline void check(const char* name, cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

// Makes `device` the current one until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check("cannot ask for the current device", cudaGetDevice(&before_));
    if (device != before_) check("cannot select the device", cudaSetDevice(device));
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// The empty text where this build has code of the kernel for `device`, else what is in the way.
inline std::string reason_against(const void* kernel, int device) {
  int count = 0, before = 0, driver = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  const char* step = "cannot count the CUDA devices: ";
  if (error == cudaSuccess && (device < 0 || device >= count))
    return "there is no CUDA device " + std::to_string(device) + ": " + std::to_string(count) +
           " found";
  if (error == cudaSuccess) {
    step = "cannot select the device: ";
    cudaGetDevice(&before);
    if (device != before) error = cudaSetDevice(device);
  }
  if (error == cudaSuccess) {
    step = "this build's kernels do not fit the device: ";
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, kernel);
    if (device != before) cudaSetDevice(before);
  }
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // it must not show up as that of a later launch
  std::string text = std::string(step) + cudaGetErrorString(error);
  if (error != cudaErrorInsufficientDriver) return text;
  const auto version = [](int v) {
    return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
  };
  cudaDriverGetVersion(&driver);
  text += driver == 0 ? " (no CUDA driver is installed here; "
                      : " (the driver supports CUDA " + version(driver) + "; ";
  return text + "this build uses CUDA " + version(CUDART_VERSION) +
         ", whose runtime wants driver 580 or newer)";
}

// Allows the kernel the most dynamic shared memory that a launch may ask for, on the current device
// and once there: an attribute set to each launch's own size could be lowered by another thread
// before the launch.
inline void allow_shared(const char* name, const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> done;
  int device = 0;
  check(name, cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count({kernel, device})) return;
  check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(kMaxSharedBytes)));
  done.insert({kernel, device});
}

// Starts a kernel on the current device; asynchronous. Throws std::runtime_error with CUDA's text.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape,
            Arguments&&... arguments) {
  check_shape(name, shape);
  if (is_empty(shape)) return;
  if (shape.shared_bytes > kDefaultSharedBytes)
    allow_shared(name, reinterpret_cast<const void*>(kernel));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.grid_x), static_cast<unsigned>(shape.grid_y),
                        static_cast<unsigned>(shape.grid_z));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(shape.stream);
  check(name, cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace cuda
}  // namespace effnet
