#include "simt/fibers.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

// Saves the callee's registers and the stack pointer at *save, and goes on at `sp`.
extern "C" __attribute__((visibility("hidden"))) void effnet_simt_switch(void** save, void* sp);
asm(R"(
.text
.p2align 4
.globl effnet_simt_switch
.hidden effnet_simt_switch
.type effnet_simt_switch, @function
effnet_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size effnet_simt_switch, .-effnet_simt_switch
)");

#define EFFNET_NO_ASAN __attribute__((no_sanitize_address, noinline))

namespace effnet {
namespace simt {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 64 * kPage;
// A guard page below each stack. An odd number of pages apart, or the same frames of all fibers
// would share a few sets of the caches.
constexpr size_t kStride = kStackBytes + kPage;

Fibers* running = nullptr;

}  // namespace

Fibers::~Fibers() {
  if (stacks_) munmap(stacks_, kMaxThreads * kStride);
}

void Fibers::map_stacks() {
  void* mapped = mmap(nullptr, kMaxThreads * kStride, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  stacks_ = static_cast<char*>(mapped);
  for (int i = 0; i < kMaxThreads; i++) mprotect(stacks_ + i * kStride, kPage, PROT_NONE);
}

char* Fibers::stack_of(int fiber) const { return stacks_ + fiber * kStride + kPage; }

void Fibers::reset(int fiber) {
  if (!stacks_) map_stacks();
  // Colours the cache lines within a page, as kStride does the pages.
  const size_t offset = static_cast<size_t>(fiber) * 7 % 61 * 64;
  void** top = reinterpret_cast<void**>(stack_of(fiber) + kStackBytes - offset);
  *--top = nullptr;  // the end for whoever walks the stack
  *--top = reinterpret_cast<void*>(&Fibers::entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  contexts_[fiber] = {top, nullptr};
}

void Fibers::forget_frames() {
#ifdef __SANITIZE_ADDRESS__
  for (int i = 0; i < kMaxThreads; i++) ASAN_UNPOISON_MEMORY_REGION(stack_of(i), kStackBytes);
#endif
}

EFFNET_NO_ASAN void Fibers::leave_for(int current, int to, bool for_good) {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom = to == kMain ? main_bottom_ : stack_of(to);
  __sanitizer_start_switch_fiber(for_good ? nullptr : &contexts_[current].fake_stack, bottom,
                                 to == kMain ? main_size_ : kStackBytes);
#else
  (void)for_good;
#endif
  from_main_ = current == kMain;
  current_ = to;
  running = this;
  effnet_simt_switch(&contexts_[current].sp, contexts_[to].sp);
}

EFFNET_NO_ASAN void Fibers::arrived(int at) {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(contexts_[at].fake_stack, &bottom, &size);
  if (from_main_) main_bottom_ = bottom, main_size_ = size;
#else
  (void)at;
#endif
}

EFFNET_NO_ASAN void Fibers::switch_to(int current, int to) {
  if (current == to) return;
  leave_for(current, to, false);
  arrived(current);
}

// Not instrumented: this frame is never left in order.
EFFNET_NO_ASAN void Fibers::entry() {
  Fibers* const self = running;
  const int fiber = self->current_;
  self->arrived(fiber);
  const int next = self->body_(fiber);
  self->leave_for(fiber, next, true);
  __builtin_unreachable();
}

}  // namespace simt
}  // namespace effnet
