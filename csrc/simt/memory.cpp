// Shared memory and asynchronous copies of the host run.
#include <cstdlib>
#include <new>

#include "simt/machine.h"

namespace effnet {
namespace simt {
namespace {

void check_in_shared(const Machine& m, const void* p, int bytes) {
  const char* const begin = static_cast<const char*>(p);
  const auto holds = [&](const void* data, size_t size) {
    const char* const low = static_cast<const char*>(data);
    return begin >= low && begin + bytes <= low + size;
  };
  if (m.dynamic && holds(m.dynamic, static_cast<size_t>(m.dynamic_bytes))) return;
  for (const Range& slot : m.slots)
    if (holds(slot.begin, slot.bytes)) return;
  fail("copies with cp_async to outside of shared memory");
}

void arrive(const Copy& copy) {
  if (copy.valid)
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  else
    std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
}

}  // namespace

void* aligned_block(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, 16, bytes)) throw std::bad_alloc();
  return data;
}

void* dynamic_shared() {
  Machine& m = machine();
  if (!m.dynamic) fail("asks for dynamic shared memory, of which the launch gave none");
  return m.dynamic;
}

void* SharedSlot::get(size_t bytes) {
  Machine& m = machine();
  if (!data_) {
    data_ = aligned_block(bytes);
    m.slots.push_back({static_cast<char*>(data_), bytes});
  }
  if (block_ != m.block) {
    block_ = m.block;
    std::memset(data_, kPoison, bytes);
    m.static_bytes += static_cast<int64_t>(bytes);
    if (m.static_bytes + m.dynamic_bytes > cuda::kMaxSharedBytes ||
        m.static_bytes > cuda::kDefaultSharedBytes)
      fail("needs more shared memory than a block may have: " + std::to_string(m.static_bytes) +
           " bytes static, " + std::to_string(m.dynamic_bytes) + " dynamic");
  }
  return data_;
}

void check_aligned(const void* p, size_t bytes, const Location& at) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail("moves " + std::to_string(bytes) +
         " bytes at an address that is no multiple of that, at " + text_of(at));
}

void copy_async(void* to, const void* from, int bytes, bool valid, const Location& at) {
  Machine& m = machine();
  check_aligned(to, static_cast<size_t>(bytes), at);
  check_in_shared(m, to, bytes);
  if (valid) {
    check_aligned(from, static_cast<size_t>(bytes), at);
    // Read now, so that a sanitizer names this place.
    const volatile char* source = static_cast<const char*>(from);
    (void)source[0], (void)source[bytes - 1];
  }
  std::memset(to, kPoison, static_cast<size_t>(bytes));
  Thread& me = m.threads[m.running];
  me.copies.push_back({to, from, bytes, valid, me.groups});
}

void copy_commit() {
  Machine& m = machine();
  m.threads[m.running].groups++;
}

void copy_wait(int groups) {
  Machine& m = machine();
  Thread& me = m.threads[m.running];
  size_t done = 0;
  while (done < me.copies.size() && me.copies[done].group < me.groups - groups)
    arrive(me.copies[done++]);
  me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<ptrdiff_t>(done));
}

}  // namespace simt
}  // namespace effnet
