// The state of the host run (simt/twins.h says what it is). Test only.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#ifndef EFFNET_SIMT
#error "csrc/simt is compiled with EFFNET_SIMT"
#endif
#include "cuda/primitives.cuh"
#include "simt/fibers.h"

namespace effnet {
namespace simt {

constexpr int kPoison = 0xff;  // a NaN in every floating type, -1 in integers
constexpr int kWarp = cuda::kWarp;

enum class State { kReady, kBarrier, kShuffle, kReturned };

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
  int64_t group;
};

struct Thread {
  int index;
  State state;
  Location where;
  // of a shuffle
  int lane_mask;
  unsigned mask;
  uint64_t value, result;
  // copies on their way, oldest first
  std::vector<Copy> copies;
  int64_t groups;  // committed
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint32_t below(uint32_t bound) {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return static_cast<uint32_t>(((state_ >> 32) * bound) >> 32);
  }

 private:
  uint64_t state_;
};

struct Range {
  char* begin;
  size_t bytes;
};

// The body of a fiber: one thread of the block. Returns whose turn it is then.
int run_thread(int fiber);

// One grid at a time, whichever threads of the process call.
struct Machine {
  std::mutex mutex;
  Fibers fibers{run_thread};
  Random random{0};
  std::vector<Thread> threads{kMaxThreads};
  const std::function<void()>* body;
  std::exception_ptr failure;
  int size;                            // threads of a block
  int running;                         // the thread that runs
  int ready[kMaxThreads], head, tail;  // a ring of those that can
  std::vector<int> at_barrier;
  unsigned in_shuffle[kMaxThreads / kWarp];  // lanes of each warp that wait in one
  int returned;
  uint64_t block = 0;  // counts all blocks that ever ran
  void* dynamic = nullptr;
  int64_t dynamic_bytes, static_bytes;
  std::vector<Range> slots;  // every static shared block

  void make_ready(int thread) {
    threads[thread].state = State::kReady;
    ready[tail++ % kMaxThreads] = thread;
  }
  void shuffle_order(std::vector<int>& order) {
    for (size_t i = order.size(); i > 1; i--)
      std::swap(order[i - 1], order[random.below(static_cast<uint32_t>(i))]);
  }
};

Machine& machine();

// Lets the others run until somebody makes this thread ready again.
void wait(Machine& m);

inline std::string text_of(const Location& at) {
  return std::string(at.file_name()) + ":" + std::to_string(at.line());
}

inline std::string thread_name(const Thread& thread) {
  return "thread " + std::to_string(thread.index);
}

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

inline bool same(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

void* aligned_block(size_t bytes);

}  // namespace simt
}  // namespace effnet
