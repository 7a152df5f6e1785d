// Fibers: stacks of their own between which a thread switches by itself. Test only, x86-64 alone.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the host run of the CUDA kernels (EFFNET_FAST_SIMT=1) switches stacks in x86-64 Linux only"
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace effnet {
namespace simt {

constexpr int kMaxThreads = 1024;
constexpr int kMain = kMaxThreads;  // the caller's own stack, beside those of the fibers

class Fibers {
 public:
  // `body(fiber)` is what a fiber runs; it returns the one to go on with (kMain or another fiber)
  // when it has ended.
  explicit Fibers(int (*body)(int fiber)) : body_(body) {}
  ~Fibers();
  Fibers(const Fibers&) = delete;
  Fibers& operator=(const Fibers&) = delete;

  // Makes the fiber begin anew when it is next switched to.
  void reset(int fiber);
  // Leaves the current stack for that of `to`; comes back when something switches to `current`.
  void switch_to(int current, int to);
  // What a fiber abandoned before its end has left in AddressSanitizer's map.
  void forget_frames();

 private:
  struct Context {
    void* sp = nullptr;
    void* fake_stack = nullptr;  // AddressSanitizer's
  };
  static void entry();
  void leave_for(int current, int to, bool for_good);
  void arrived(int at);
  char* stack_of(int fiber) const;
  void map_stacks();

  int (*body_)(int);
  char* stacks_ = nullptr;
  Context contexts_[kMaxThreads + 1];
  int current_ = kMain;
  const void* main_bottom_ = nullptr;
  size_t main_size_ = 0;
  bool from_main_ = false;
};

}  // namespace simt
}  // namespace effnet
