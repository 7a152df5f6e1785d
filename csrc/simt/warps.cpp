// Shuffles of the host run: lanes wait until all of their mask have come.
#include "simt/machine.h"

namespace effnet {
namespace simt {
namespace {

// The lane that `lane` reads from; its own where that lies beyond the warp.
int source_of(const Thread& t, int lane) {
  const int from = lane ^ t.lane_mask;
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
    if (other.mask != me.mask || !same(other.where, me.where))
      fail("shuffles at " + text_of(me.where) + ", but " + thread_name(other) +
           " of the mask is in another shuffle at " + text_of(other.where) +
           ", or has another mask");
    if (!all) break;  // as those that came before; the last to come looks at all
  }
  return all;
}

}  // namespace

uint64_t shuffle_xor(uint64_t value, int lane_mask, unsigned mask, const Location& at) {
  Machine& m = machine();
  Thread& me = m.threads[m.running];
  const int warp = m.running / kWarp * kWarp, lane = m.running % kWarp;
  if (!(mask >> lane & 1))
    fail("shuffles at " + text_of(at) + " with a mask that it is not in itself");
  me.state = State::kShuffle;
  me.where = at;
  me.lane_mask = lane_mask, me.mask = mask, me.value = value;
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

}  // namespace simt
}  // namespace effnet
