// The host's side of cuda/primitives.cuh, which says what each of these promises; the device's side
// is cuda/intrinsics.cuh. Test only.
//
// One block runs at a time, its threads as fibers of the calling thread (simt/runtime.cpp). What a
// GPU would leave undefined, and often get right by luck, is an error here or a NaN:
//   - shared memory is NaN at the start of a block, and lies in heap blocks of exactly its size;
//   - a copy of cp_async arrives at its wait, until then its destination is NaN;
//   - the order of the threads is shuffled from a seed;
//   - misaligned vectors, barriers that not all threads reach, or not at the same line, shuffles
//     that not all lanes of their mask reach, copies never waited for, deadlocks:
//     std::runtime_error.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>
#include <utility>

#include "simt/seed.h"

#define __launch_bounds__(...)

#define EFFNET_SHARED(type, name, extents)       \
  static ::effnet::simt::SharedSlot name##_slot; \
  using name##_type = type extents;              \
  name##_type& name = *static_cast<name##_type*>(name##_slot.get(sizeof(name##_type)))

namespace effnet {
namespace simt {

struct Place {  // what the running thread sees
  int thread, block_dim;
  int64_t block_x, block_y, block_z;
};

extern Place here;

using Location = std::source_location;

void sync_threads(const Location& at);
// The value of lane ^ lane_mask; all ones, a NaN, where that lane is not in the mask.
uint64_t shuffle_xor(uint64_t value, int lane_mask, unsigned mask, const Location& at);
void* dynamic_shared();
void copy_async(void* to, const void* from, int bytes, bool valid, const Location& at);
void copy_commit();
void copy_wait(int groups);  // groups that may still be under way
void check_aligned(const void* p, size_t bytes, const Location& at);

// Runs `thread` for every thread of every block. Throws std::runtime_error.
void run(const char* name, const cuda::LaunchShape& shape, const std::function<void()>& thread);

// One declaration of static shared memory: a heap block of exactly its size, as AddressSanitizer
// does not guard statics of templates. NaN when a block of threads first comes here.
class SharedSlot {
 public:
  void* get(size_t bytes);

 private:
  void* data_ = nullptr;
  uint64_t block_ = 0;
};

}  // namespace simt

namespace cuda {

using simt::Location;

inline int thread_x() { return simt::here.thread; }
inline int64_t block_x() { return simt::here.block_x; }
inline int64_t block_y() { return simt::here.block_y; }
inline int64_t block_z() { return simt::here.block_z; }
inline int block_dim_x() { return simt::here.block_dim; }

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(simt::dynamic_shared());
}

inline void sync_threads(const Location& at = Location::current()) { simt::sync_threads(at); }

template <typename T>
T shuffle_xor(T v, int lane_mask, unsigned mask = kFullMask,
              const Location& at = Location::current()) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  bits = simt::shuffle_xor(bits, lane_mask, mask, at);
  std::memcpy(&v, &bits, sizeof(T));
  return v;
}

template <typename V>
V load(const V* p, const Location& at = Location::current()) {
  simt::check_aligned(p, sizeof(V), at);
  return *p;
}
template <typename V>
V load_shared(const V* p, const Location& at = Location::current()) {
  return load(p, at);
}
template <typename V>
void store(V* p, V v, const Location& at = Location::current()) {
  simt::check_aligned(p, sizeof(V), at);
  *p = v;
}
template <typename V>
void store_shared(V* p, V v, const Location& at = Location::current()) {
  store(p, v, at);
}

template <int kBytes>
void cp_async(void* to, const void* from, bool valid = true,
              const Location& at = Location::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  simt::copy_async(to, from, kBytes, valid, at);
}
inline void cp_async_commit() { simt::copy_commit(); }
template <int kGroups>
void cp_async_wait() {
  static_assert(kGroups >= 0);
  simt::copy_wait(kGroups);
}

// As exact as the host is.
inline float exp2_approx(float x) { return std::exp2(x); }
inline float rcp_approx(float x) { return 1.0f / x; }

inline std::string reason_against(const void*, int) { return ""; }

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  ~DeviceGuard() {}  // as on the device, where an unused guard is no warning
};

// Runs the kernel to its end.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& s,
            Arguments&&... arguments) {
  check_shape(name, s);
  if (is_empty(s)) return;
  const auto thread = [&] { kernel(static_cast<Parameters>(arguments)...); };
  simt::run(name, s, thread);
}

}  // namespace cuda
}  // namespace effnet
