// How the weight gradient of the stem deals out its rows: by the shape alone, so that every sum has
// the same order whatever the number of threads. Included as geometry.h is.
#pragma once

#include "common/geometry.h"

namespace effnet {
namespace EFFNET_NAMESPACE {

// Tasks of the output rows of all images, each with a partial weight gradient of this many floats.
inline int64_t stem_weight_tasks(int64_t rows, int64_t weight_floats) {
  constexpr int64_t kMaxTasks = 32, kRows = 4, kMaxFloats = 2 << 20;
  const int64_t most = max_of(2, min_of(kMaxTasks, kMaxFloats / weight_floats));
  int64_t tasks = 1;
  while (2 * tasks <= most && 2 * tasks * kRows <= rows) tasks *= 2;
  return tasks;
}

}  // namespace EFFNET_NAMESPACE
}  // namespace effnet
