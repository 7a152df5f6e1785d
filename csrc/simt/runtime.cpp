// Runs a grid on the CPU: one block at a time, its threads as fibers that switch at barriers and
// shuffles, in an order shuffled from a seed. simt/twins.h says what is checked.
#include <algorithm>
#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#define EFFNET_SIMT 1
#include "cuda/primitives.cuh"
#include "simt/fibers.h"

namespace effnet {
namespace simt {

Place here;

namespace {

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
  Index index;
  State state;
  Location where;
  // of a shuffle
  Shuffle kind;
  int argument;
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

Machine& machine() {
  static Machine m;
  return m;
}

std::string text_of(const Index& i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

std::string text_of(const Location& at) {
  return std::string(at.file_name()) + ":" + std::to_string(at.line());
}

std::string thread_name(const Thread& thread) { return "thread " + text_of(thread.index); }

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

bool same(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string deadlock(const Machine& m) {
  std::map<std::string, int> waiting;
  for (int i = 0; i < m.size; i++) {
    const Thread& t = m.threads[i];
    if (t.state == State::kReturned) waiting["have returned"]++;
    if (t.state == State::kBarrier) waiting["wait in sync_threads at " + text_of(t.where)]++;
    if (t.state == State::kShuffle) waiting["wait in a shuffle at " + text_of(t.where)]++;
  }
  std::string text = "stops last in a deadlock:";
  for (const auto& [what, count] : waiting) text += " " + std::to_string(count) + " " + what + ";";
  text.pop_back();
  return text;
}

int next_ready(Machine& m) {
  const int next = m.ready[m.head++ % kMaxThreads];
  m.running = next;
  here.thread = m.threads[next].index;
  return next;
}

// Lets the others run until somebody makes this thread ready again.
void wait(Machine& m) {
  if (m.head == m.tail) fail(deadlock(m));
  const int me = m.running;
  m.fibers.switch_to(me, next_ready(m));
}

void check_return(Machine& m) {
  const Thread& me = m.threads[m.running];
  if (!me.copies.empty())
    fail("returns without having waited for its copy of cp_async to shared memory");
  if (!m.at_barrier.empty()) {
    const Thread& other = m.threads[m.at_barrier[0]];
    fail("returns while " + thread_name(other) + " waits in sync_threads at " +
         text_of(other.where));
  }
  const int warp = m.running / kWarp * kWarp;
  for (int i = warp; i < std::min(warp + kWarp, m.size); i++) {
    const Thread& other = m.threads[i];
    if (other.state == State::kShuffle && other.mask >> (m.running - warp) & 1)
      fail("returns while " + thread_name(other) + " waits for it in a shuffle at " +
           text_of(other.where));
  }
}

// The body of a fiber: one thread of the block. Returns whose turn it is then.
int run_thread(int fiber) {
  Machine& m = machine();
  try {
    (*m.body)();
    check_return(m);
    m.threads[fiber].state = State::kReturned;
    if (++m.returned == m.size) return kMain;
    if (m.head == m.tail) fail(deadlock(m));
    return next_ready(m);
  } catch (...) {
    m.failure = std::current_exception();
    return kMain;
  }
}

void run_block(Machine& m, int64_t shared_bytes) {
  m.block++;
  m.head = m.tail = m.returned = 0;
  m.static_bytes = 0;
  m.at_barrier.clear();
  std::fill_n(m.in_shuffle, kMaxThreads / kWarp, 0u);
  if (shared_bytes) std::memset(m.dynamic, kPoison, static_cast<size_t>(shared_bytes));
  std::vector<int> order(m.size);
  std::iota(order.begin(), order.end(), 0);
  m.shuffle_order(order);
  for (int i = 0; i < m.size; i++) {
    Thread& t = m.threads[i];
    t.copies.clear();
    t.groups = 0;
    const Index& dim = here.block_dim;
    t.index = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
    m.fibers.reset(i);
  }
  for (int i : order) m.make_ready(i);
  m.fibers.switch_to(kMain, next_ready(m));
}

// A number without a common factor with `total`, to visit all blocks in another order.
int64_t stride_through(Random& random, int64_t total) {
  const uint32_t bound = static_cast<uint32_t>(std::min<int64_t>(total, 1 << 30));
  for (;;) {
    const int64_t stride = 1 + random.below(bound);
    if (std::gcd(stride, total) == 1) return stride;
  }
}

void run_grid(Machine& m, const char* name, const Index& grid, int64_t shared_bytes) {
  const int64_t total = int64_t{grid.x} * grid.y * grid.z;
  const int64_t stride = stride_through(m.random, total);
  int64_t block = m.random.below(static_cast<uint32_t>(std::min<int64_t>(total, 1 << 30)));
  for (int64_t i = 0; i < total && !m.failure; i++) {
    block = (block + stride) % total;
    here.block_x = block % grid.x;
    here.block_y = block / grid.x % grid.y;
    here.block_z = block / grid.x / grid.y;
    run_block(m, shared_bytes);
  }
  if (!m.failure) return;
  m.fibers.forget_frames();
  try {
    std::rethrow_exception(std::exchange(m.failure, nullptr));
  } catch (const std::exception& error) {
    fail(std::string(name) + ": " + thread_name(m.threads[m.running]) + " of block (" +
         std::to_string(here.block_x) + "," + std::to_string(here.block_y) + "," +
         std::to_string(here.block_z) + ") " + error.what());
  }
}

void* aligned_block(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, 16, bytes)) throw std::bad_alloc();
  return data;
}

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

// The lane that `lane` reads from; its own where that lies beyond the warp.
int source_of(const Thread& t, int lane) {
  int from = lane;
  if (t.kind == Shuffle::kXor) from = lane ^ t.argument;
  if (t.kind == Shuffle::kDown) from = lane + t.argument;
  if (t.kind == Shuffle::kIndex) from = t.argument % kWarp;
  return from < 0 || from >= kWarp ? lane : from;
}

// Whether all lanes of this thread's mask wait, and then in the same shuffle.
bool lanes_are_here(const Machine& m, int warp, const Thread& me) {
  const unsigned in_shuffle = m.in_shuffle[warp / kWarp];
  const bool all = (in_shuffle & me.mask) == me.mask;
  for (int lane = 0; lane < kWarp; lane++) {
    if (!(me.mask >> lane & 1)) continue;
    if (warp + lane >= m.size)
      fail("shuffles with lane " + std::to_string(lane) + ", which its warp has not, at " +
           text_of(me.where));
    const Thread& other = m.threads[warp + lane];
    if (other.state == State::kReturned)
      fail("shuffles at " + text_of(me.where) + " with " + thread_name(other) +
           ", which has returned");
    if (other.state != State::kShuffle) continue;
    if (other.mask != me.mask || other.kind != me.kind || !same(other.where, me.where))
      fail("shuffles at " + text_of(me.where) + ", but " + thread_name(other) +
           " of the mask is in another shuffle at " + text_of(other.where) +
           ", or has another mask");
    if (!all) break;  // as those that came before; the last to come looks at all
  }
  return all;
}

}  // namespace

void sync_threads(const Location& at) {
  Machine& m = machine();
  Thread& me = m.threads[m.running];
  if (m.returned) fail("reaches sync_threads at " + text_of(at) + " after a thread has returned");
  if (!m.at_barrier.empty()) {
    const Thread& other = m.threads[m.at_barrier[0]];
    if (!same(other.where, at))
      fail("reaches sync_threads at " + text_of(at) + ", but " + thread_name(other) +
           " waits in another at " + text_of(other.where));
  }
  me.state = State::kBarrier;
  me.where = at;
  m.at_barrier.push_back(m.running);
  if (static_cast<int>(m.at_barrier.size()) == m.size) {
    m.shuffle_order(m.at_barrier);
    for (int thread : m.at_barrier) m.make_ready(thread);
    m.at_barrier.clear();
  }
  wait(m);
}

uint64_t shuffle(Shuffle kind, uint64_t value, int argument, unsigned mask, const Location& at) {
  Machine& m = machine();
  Thread& me = m.threads[m.running];
  const int warp = m.running / kWarp * kWarp, lane = m.running % kWarp;
  if (!(mask >> lane & 1))
    fail("shuffles at " + text_of(at) + " with a mask that it is not in itself");
  me.state = State::kShuffle;
  me.where = at;
  me.kind = kind, me.argument = argument, me.mask = mask, me.value = value;
  m.in_shuffle[warp / kWarp] |= 1u << lane;
  if (lanes_are_here(m, warp, me)) {
    const int first = static_cast<int>(m.random.below(kWarp));
    for (int i = 0; i < kWarp; i++) {
      const int of = (first + i) % kWarp;
      if (!(mask >> of & 1)) continue;
      Thread& t = m.threads[warp + of];
      const int from = source_of(t, of);
      t.result = mask >> from & 1 ? m.threads[warp + from].value : ~uint64_t{0};
      m.make_ready(warp + of);
    }
    m.in_shuffle[warp / kWarp] &= ~mask;
  }
  wait(m);
  return me.result;
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
  while (done < me.copies.size() && (groups < 0 || me.copies[done].group < me.groups - groups))
    arrive(me.copies[done++]);
  me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<ptrdiff_t>(done));
}

void run(const char* name, const Index& grid, const Index& block, int64_t shared_bytes,
         const std::function<void()>& thread) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  m.body = &thread;
  m.size = block.x * block.y * block.z;
  here.block_dim = block;
  here.grid_x = grid.x, here.grid_y = grid.y, here.grid_z = grid.z;
  m.dynamic_bytes = shared_bytes;
  struct Dynamic {  // freed with the launch, so that a sanitizer sees later use
    void*& data;
    ~Dynamic() { std::free(std::exchange(data, nullptr)); }
  } dynamic = {m.dynamic};
  if (shared_bytes) m.dynamic = aligned_block(static_cast<size_t>(shared_bytes));
  run_grid(m, name, grid, shared_bytes);
}

void set_seed(uint64_t seed) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  m.random = Random(seed);
}

}  // namespace simt
}  // namespace effnet
