// Everything that a kernel may take from CUDA, each with a twin for the host run.
//
// The same .cu files are compiled by nvcc for a GPU and, with EFFNET_SIMT defined, by g++ as C++
// (csrc/simt), where a block's threads run as fibers. This header alone tells the two apart. So:
//   - a kernel is a __global__ function (template or not) in an anonymous namespace; __device__,
//     __forceinline__, __launch_bounds__ and __restrict__ may be used, __shared__, <<< >>>,
//     __CUDA_ARCH__, intrinsics, asm and the runtime's functions may not;
//   - thread_x(), block_dim_x(), block_x(), block_y(), block_z() stand for threadIdx.x, blockDim.x
//     and blockIdx, the latter in 64 bits; blocks have one dimension;
//   - EFFNET_SHARED(float, sums, [8][33]) declares static shared memory, 16-byte aligned;
//     dynamic_shared<T>() is the dynamic block, of exactly the bytes that the launch gave;
//   - no thread returns before the last sync_threads(); every thread of the block reaches each one
//     at the same line, every lane of a mask the same shuffle with the same mask;
//   - cp_async<16|8|4> copies from global to shared memory, zeros where not valid (the source is
//     then not read); the destination counts as undefined until cp_async_wait returns, and for
//     other threads until sync_threads() after that; what is issued must be waited for;
//   - load and store move 2, 4, 8 or 16 bytes to and from global memory, aligned to their size
//     (load goes through the read-only path: never what the same kernel writes); load_shared and
//     store_shared do so in shared memory; plain indexing of typed pointers is as good;
//   - maths: exp2_approx, rcp_approx, sigmoid, silu, silu_grad, and from <cmath> fmaf, fmaxf,
//   fminf,
//     sqrtf, expf (one float overload each; std::min and max are not for the device: min_of of
//     cuda/common.cuh is);
//   - to_float, from_float<T>, unpack2<T>, pack2<T>, unpack<T>, pack<T> convert float, __half and
//     __nv_bfloat16;
//   - a launcher writes DeviceGuard guard(device); launch("name", kernel, shape, arguments...).
// What is missing is added here and in simt/twins.h, never in a kernel file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#define EFFNET_HD __host__ __device__

namespace effnet {
namespace cuda {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;
// Static and dynamic shared memory of a block, in bytes: what sm_120 has, the least of sm_80 on
// except sm_86 and sm_89, which have the same.
constexpr int64_t kMaxSharedBytes = 99 * 1024;
// More dynamic shared memory than this has to be asked for.
constexpr int64_t kDefaultSharedBytes = 48 * 1024;

template <typename To, typename From>
EFFNET_HD inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof(To));
  return to;
}

struct LaunchShape {
  int64_t grid_x, grid_y, grid_z;  // blocks; nothing is launched where one is 0
  int threads;                     // of a block
  int64_t shared_bytes;            // dynamic
  void* stream;                    // a cudaStream_t
};

// A grid of up to 2^31 - 1 x 65535 x 65535 blocks of up to 1024 threads.
inline LaunchShape grid_of(int64_t grid_x, int64_t grid_y, int64_t grid_z, int threads,
                           int64_t shared_bytes, void* stream) {
  return {grid_x, grid_y, grid_z, threads, shared_bytes, stream};
}

// Throws std::invalid_argument where no device takes this shape.
inline void check_shape(const char* name, const LaunchShape& s) {
  const bool grid = s.grid_x >= 0 && s.grid_x < (int64_t{1} << 31) && s.grid_y >= 0 &&
                    s.grid_y < 65536 && s.grid_z >= 0 && s.grid_z < 65536;
  const bool block = s.threads > 0 && s.threads <= 1024;
  const bool shared = s.shared_bytes >= 0 && s.shared_bytes <= kMaxSharedBytes;
  if (grid && block && shared) return;
  std::string text = std::string(name) + ": cannot launch a grid of ";
  text += std::to_string(s.grid_x) + "x" + std::to_string(s.grid_y) + "x";
  text += std::to_string(s.grid_z) + " blocks of " + std::to_string(s.threads) + " threads with ";
  throw std::invalid_argument(text + std::to_string(s.shared_bytes) + " bytes of shared memory");
}

inline bool is_empty(const LaunchShape& s) {
  return s.grid_x == 0 || s.grid_y == 0 || s.grid_z == 0;
}

}  // namespace cuda
}  // namespace effnet

#ifdef EFFNET_SIMT
#include "simt/twins.h"
#else
#include "cuda/intrinsics.cuh"
#endif

#include "cuda/silu.cuh"

namespace effnet {
namespace cuda {

template <typename T>
struct Packed;  // two elements of T side by side in a 32-bit word

template <>
struct Packed<__half> {
  EFFNET_HD static float2 unpack(uint32_t word) { return __half22float2(bits_as<__half2>(word)); }
  EFFNET_HD static uint32_t pack(float2 v) { return bits_as<uint32_t>(__float22half2_rn(v)); }
};

template <>
struct Packed<__nv_bfloat16> {
  EFFNET_HD static float2 unpack(uint32_t word) {
    return make_float2(bits_as<float>(word << 16), bits_as<float>(word & 0xffff0000u));
  }
  EFFNET_HD static uint32_t pack(float2 v) { return bits_as<uint32_t>(__float22bfloat162_rn(v)); }
};

// The element at the lower address is .x.
template <typename T>
EFFNET_HD inline float2 unpack2(uint32_t word) {
  return Packed<T>::unpack(word);
}
// Rounds to nearest even.
template <typename T>
EFFNET_HD inline uint32_t pack2(float2 v) {
  return Packed<T>::pack(v);
}

EFFNET_HD inline float to_float(float v) { return v; }
EFFNET_HD inline float to_float(__half v) { return __half2float(v); }
EFFNET_HD inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// Rounds to nearest even.
template <typename T>
EFFNET_HD inline T from_float(float v) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(v);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(v);
  if constexpr (std::is_same_v<T, float>) return v;
}

// Elements of T in a vector of type V (uint4, uint2, uint32_t).
template <typename T, typename V>
constexpr int kElements = static_cast<int>(sizeof(V) / sizeof(T));

// V as its elements, lowest address first.
template <typename T, typename V>
EFFNET_HD inline void unpack(const V& vector, float (&out)[kElements<T, V>]) {
  struct Words {
    uint32_t word[sizeof(V) / 4];
  };
  const Words words = bits_as<Words>(vector);
  for (int i = 0; i < static_cast<int>(sizeof(V) / 4); i++) {
    if constexpr (std::is_same_v<T, float>) {
      out[i] = bits_as<float>(words.word[i]);
    } else {
      const float2 pair = unpack2<T>(words.word[i]);
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    }
  }
}

template <typename T, typename V>
EFFNET_HD inline V pack(const float (&in)[kElements<T, V>]) {
  struct Words {
    uint32_t word[sizeof(V) / 4];
  } words;
  for (int i = 0; i < static_cast<int>(sizeof(V) / 4); i++) {
    if constexpr (std::is_same_v<T, float>)
      words.word[i] = bits_as<uint32_t>(in[i]);
    else
      words.word[i] = pack2<T>(make_float2(in[2 * i], in[2 * i + 1]));
  }
  return bits_as<V>(words);
}

}  // namespace cuda
}  // namespace effnet
