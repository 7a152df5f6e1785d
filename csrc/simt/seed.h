// The host run's order of threads.
#pragma once

#include <cstdint>

namespace effnet {
namespace simt {

// The order of the threads in the launches that follow; every launch has another.
void set_seed(uint64_t seed);

}  // namespace simt
}  // namespace effnet
