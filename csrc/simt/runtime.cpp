// Runs a grid on the CPU: one block at a time, its threads as fibers that switch at barriers and
// shuffles, in an order shuffled from a seed. simt/twins.h says what is checked.
#include <cstdlib>
#include <map>
#include <numeric>

#include "simt/machine.h"

namespace effnet {
namespace simt {

Place here;

namespace {

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
    t.index = i;
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

void run_grid(Machine& m, const char* name, const cuda::LaunchShape& shape) {
  const int64_t total = shape.grid_x * shape.grid_y * shape.grid_z;
  const int64_t stride = stride_through(m.random, total);
  int64_t block = m.random.below(static_cast<uint32_t>(std::min<int64_t>(total, 1 << 30)));
  for (int64_t i = 0; i < total && !m.failure; i++) {
    block = (block + stride) % total;
    here.block_x = block % shape.grid_x;
    here.block_y = block / shape.grid_x % shape.grid_y;
    here.block_z = block / shape.grid_x / shape.grid_y;
    run_block(m, shape.shared_bytes);
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

}  // namespace

Machine& machine() {
  static Machine m;
  return m;
}

void wait(Machine& m) {
  if (m.head == m.tail) fail(deadlock(m));
  const int me = m.running;
  m.fibers.switch_to(me, next_ready(m));
}

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

void run(const char* name, const cuda::LaunchShape& shape, const std::function<void()>& thread) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  m.body = &thread;
  m.size = here.block_dim = shape.threads;
  m.dynamic_bytes = shape.shared_bytes;
  struct Dynamic {  // freed with the launch, so that a sanitizer sees later use
    void*& data;
    ~Dynamic() { std::free(std::exchange(data, nullptr)); }
  } dynamic = {m.dynamic};
  if (shape.shared_bytes) m.dynamic = aligned_block(static_cast<size_t>(shape.shared_bytes));
  run_grid(m, name, shape);
}

void set_seed(uint64_t seed) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  m.random = Random(seed);
}

}  // namespace simt
}  // namespace effnet
