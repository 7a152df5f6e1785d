// Kernels with one planted fault each, beside the same kernel without it, for the host run alone.
//
//   simt_faults <name> right|wrong <seed>
// prints "right", "wrong values" or the error, and ends with 0, 1 or 2; "list" prints the names.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cuda/primitives.cuh"

namespace effnet {
namespace cuda {
namespace {

constexpr int kThreads = 96;

// y[i] = x[kThreads - 1 - i] within the block, through shared memory.
template <bool kWrong>
__global__ void missing_barrier_kernel(const float* x, float* y) {
  EFFNET_SHARED(float, tile, [kThreads]);
  tile[thread_x()] = x[thread_x()];
  if (!kWrong) sync_threads();
  y[thread_x()] = tile[kThreads - 1 - thread_x()];
}

// The same twice through the same tile: the second write must not overtake the first read.
template <bool kWrong>
__global__ void missing_second_barrier_kernel(const float* x, float* y) {
  EFFNET_SHARED(float, tile, [kThreads]);
  float v = x[thread_x()];
  for (int i = 0; i < 3; i++) {
    tile[thread_x()] = v;
    sync_threads();
    v = tile[kThreads - 1 - thread_x()];
    if (!kWrong) sync_threads();
  }
  y[thread_x()] = v;
}

template <bool kWrong>
__global__ void missing_copy_wait_kernel(const float* x, float* y) {
  float4* const tile = dynamic_shared<float4>();
  if (thread_x() < kThreads / 4) cp_async<16>(tile + thread_x(), x + 4 * thread_x());
  cp_async_commit();
  if (!kWrong) cp_async_wait<0>();
  sync_threads();
  y[thread_x()] = reinterpret_cast<const float*>(tile)[kThreads - 1 - thread_x()];
  cp_async_wait<0>();
}

// Two groups; the wrong one waits for the older of them alone.
template <bool kWrong>
__global__ void copy_wait_too_short_kernel(const float* x, float* y) {
  float* const tile = dynamic_shared<float>();
  const int half = kThreads / 2, i = thread_x() % half;
  if (thread_x() < half) cp_async<4>(tile + i, x + i);
  cp_async_commit();
  if (thread_x() < half) cp_async<4>(tile + half + i, x + half + i);
  cp_async_commit();
  cp_async_wait<kWrong ? 1 : 0>();
  sync_threads();
  y[thread_x()] = tile[kThreads - 1 - thread_x()];
  cp_async_wait<0>();
}

template <bool kWrong>
__global__ void missing_barrier_after_copy_kernel(const float* x, float* y) {
  float* const tile = dynamic_shared<float>();
  cp_async<4>(tile + thread_x(), x + thread_x());
  cp_async_commit();
  cp_async_wait<0>();
  if (!kWrong) sync_threads();
  y[thread_x()] = tile[kThreads - 1 - thread_x()];
}

template <bool kWrong>
__global__ void copy_never_waited_for_kernel(const float* x, float* y) {
  float* const tile = dynamic_shared<float>();
  cp_async<4>(tile + thread_x(), x + thread_x());
  cp_async_commit();
  if (!kWrong) cp_async_wait<0>();
  y[thread_x()] = x[kThreads - 1 - thread_x()];
}

template <bool kWrong>
__global__ void copy_to_outside_kernel(const float* x, float* y) {
  float* const tile = dynamic_shared<float>();
  cp_async<4>(tile + thread_x() + (kWrong ? 1 : 0), x + thread_x(), thread_x() % 2 == 0);
  cp_async_commit();
  cp_async_wait<0>();
  y[thread_x()] = x[kThreads - 1 - thread_x()];
}

template <bool kWrong>
__global__ void unset_shared_kernel(const float* x, float* y) {
  EFFNET_SHARED(float, tile, [2][kThreads]);
  if (!kWrong) tile[1][thread_x()] = 0.0f;
  sync_threads();
  y[thread_x()] = x[kThreads - 1 - thread_x()] + tile[1][thread_x()];
}

template <bool kWrong>
__global__ void global_out_of_bounds_kernel(const float* x, float* y) {
  y[thread_x()] = x[kThreads - (kWrong ? 0 : 1) - thread_x()];
}

// A vector that begins inside and ends behind the last element.
template <bool kWrong>
__global__ void copy_from_outside_kernel(const float* x, float* y) {
  float4* const tile = dynamic_shared<float4>();
  if (thread_x() < kThreads / 4)
    cp_async<16>(tile + thread_x(), x + 4 * thread_x() + (kWrong ? 4 : 0));
  cp_async_commit();
  cp_async_wait<0>();
  y[thread_x()] = x[kThreads - 1 - thread_x()];
}

template <bool kWrong>
__global__ void shared_out_of_bounds_kernel(const float* x, float* y) {
  EFFNET_SHARED(float, tile, [kThreads]);
  float* const flat = tile;
  flat[thread_x() + (kWrong ? 1 : 0)] = 1.0f;
  y[thread_x()] = x[kThreads - 1 - thread_x()];
}

template <bool kWrong>
__global__ void dynamic_out_of_bounds_kernel(const float* x, float* y) {
  float* const tile = dynamic_shared<float>();
  tile[thread_x() + (kWrong ? 1 : 0)] = 1.0f;
  y[thread_x()] = x[kThreads - 1 - thread_x()];
}

// Registers: an array of a thread's own.
template <bool kWrong>
__global__ void local_out_of_bounds_kernel(const float* x, float* y) {
  float values[4] = {};
  const int last = kWrong ? thread_x() / 16 : thread_x() / 24;
  values[last] = x[kThreads - 1 - thread_x()];
  y[thread_x()] = values[last];
}

template <bool kWrong>
__global__ void integer_overflow_kernel(const float* x, float* y) {
  const int large = 1 << 30;
  const int64_t offset = kWrong ? large * (thread_x() / 32 + 2) : int64_t{large} * 4;
  y[thread_x()] = offset ? x[kThreads - 1 - thread_x()] : 0.0f;
}

template <bool kWrong>
__global__ void misaligned_kernel(const float* x, float* y) {
  const float2 pair = load(reinterpret_cast<const float2*>(x + (kThreads - 1 - thread_x()) / 2 * 2 -
                                                           (kWrong && thread_x() == 0 ? 1 : 0)));
  y[thread_x()] = thread_x() % 2 ? pair.x : pair.y;
}

template <bool kWrong>
__global__ void divergent_barrier_kernel(const float* x, float* y) {
  EFFNET_SHARED(float, tile, [kThreads]);
  tile[thread_x()] = x[thread_x()];
  if (kWrong && thread_x() < kWarp) {
    sync_threads();
  } else {
    sync_threads();
  }
  y[thread_x()] = tile[kThreads - 1 - thread_x()];
}

template <bool kWrong>
__global__ void return_before_barrier_kernel(const float* x, float* y) {
  EFFNET_SHARED(float, tile, [kThreads]);
  tile[thread_x()] = x[thread_x()];
  if (kWrong && thread_x() == 5) return;
  sync_threads();
  y[thread_x()] = tile[kThreads - 1 - thread_x()];
}

// One warp waits in a shuffle for a lane that waits in a barrier for the warp.
template <bool kWrong>
__global__ void deadlock_kernel(const float* x, float* y) {
  float v = x[kThreads - 1 - thread_x()];
  if (!kWrong || thread_x() != 7) v = shuffle_xor(shuffle_xor(v, 1), 1);
  sync_threads();
  y[thread_x()] = v;
}

template <bool kWrong>
__global__ void different_masks_kernel(const float* x, float* y) {
  const unsigned mask = kWrong && thread_x() % kWarp < 16 ? 0xffffu : kFullMask;
  const float v = shuffle_xor(x[kThreads - 1 - thread_x()], 1, mask);
  y[thread_x()] = shuffle_xor(v, 1);
}

template <bool kWrong>
__global__ void mask_without_itself_kernel(const float* x, float* y) {
  const float v = shuffle_xor(x[kThreads - 1 - thread_x()], 1, kWrong ? 0xffffu : kFullMask);
  y[thread_x()] = shuffle_xor(v, 1);
}

// Lane 16 is not in the mask: its value is undefined.
template <bool kWrong>
__global__ void source_outside_the_mask_kernel(const float* x, float* y) {
  float v = x[kThreads - 1 - thread_x()];
  if (thread_x() % kWarp < 16) v = shuffle_xor(v, kWrong ? 16 : 0, 0xffffu);
  y[thread_x()] = v;
}

template <bool kWrong>
__global__ void too_much_shared_kernel(const float* x, float* y) {
  EFFNET_SHARED(float, tile, [kWrong ? 13000 : 12000]);
  tile[thread_x()] = x[thread_x()];
  sync_threads();
  y[thread_x()] = tile[kThreads - 1 - thread_x()];
}

using Kernel = void (*)(const float*, float*);

struct Fault {
  const char* name;
  Kernel right, wrong;
};

#define FAULT(name) {#name, name##_kernel<false>, name##_kernel<true>}
constexpr Fault kFaults[] = {
    FAULT(missing_barrier),
    FAULT(missing_second_barrier),
    FAULT(missing_copy_wait),
    FAULT(copy_wait_too_short),
    FAULT(missing_barrier_after_copy),
    FAULT(copy_never_waited_for),
    FAULT(copy_to_outside),
    FAULT(unset_shared),
    FAULT(global_out_of_bounds),
    FAULT(copy_from_outside),
    FAULT(shared_out_of_bounds),
    FAULT(dynamic_out_of_bounds),
    FAULT(local_out_of_bounds),
    FAULT(integer_overflow),
    FAULT(misaligned),
    FAULT(divergent_barrier),
    FAULT(return_before_barrier),
    FAULT(deadlock),
    FAULT(different_masks),
    FAULT(mask_without_itself),
    FAULT(source_outside_the_mask),
    FAULT(too_much_shared),
};

// A heap block of exactly its size.
struct Block {
  float* data = static_cast<float*>(std::malloc(kThreads * sizeof(float)));
  ~Block() { std::free(data); }
};

bool run(const Fault& fault, bool wrong) {
  Block x, y;
  for (int i = 0; i < kThreads; i++) x.data[i] = static_cast<float>(i);
  launch(fault.name, wrong ? fault.wrong : fault.right,
         grid_of(2, 1, 1, kThreads, kThreads * sizeof(float), nullptr), x.data, y.data);
  for (int i = 0; i < kThreads; i++)
    if (!(y.data[i] == static_cast<float>(kThreads - 1 - i))) return false;
  return true;
}

}  // namespace
}  // namespace cuda
}  // namespace effnet

int main(int count, char** words) {
  using namespace effnet::cuda;
  if (count == 2 && !std::strcmp(words[1], "list")) {
    for (const Fault& fault : kFaults) std::puts(fault.name);
    return 0;
  }
  for (const Fault& fault : kFaults) {
    if (count != 4 || std::strcmp(words[1], fault.name)) continue;
    effnet::simt::set_seed(std::strtoull(words[3], nullptr, 10));
    try {
      const bool right = run(fault, !std::strcmp(words[2], "wrong"));
      std::puts(right ? "right" : "wrong values");
      return right ? 0 : 1;
    } catch (const std::runtime_error& error) {
      std::puts(error.what());
      return 2;
    }
  }
  std::puts("usage: simt_faults list | <name> right|wrong <seed>");
  return 3;
}
