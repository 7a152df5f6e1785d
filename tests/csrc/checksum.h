// Checksums: every changed byte is seen, none beyond the pieces is read, threads do not matter.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "harness.h"

namespace effnet {
namespace driver {

inline void test_checksum(int threads) {
  // Two chunks: one of two pieces, the second of which lies at an odd address, and one of a byte.
  const int64_t sizes[] = {1500, 77, 1};
  const int64_t chunks[] = {0, 2, 3};
  std::vector<char*> memory;
  std::vector<Piece> pieces;
  for (int64_t size : sizes) {
    memory.push_back(static_cast<char*>(std::malloc(size + 1)));
    std::memset(memory.back(), 0, size + 1);
    pieces.push_back({memory.back() + 1, size});
  }
  uint64_t before[2], after[2];
  ChecksumArgs args = {pieces.data(), chunks, 2, before, 1};
  launch("checksum", kernels->checksum, args);
  args.sums = after, args.threads = threads;
  int64_t missed = 0;
  for (int64_t piece = 0; piece < 3; piece++)
    for (int64_t i = 0; i < sizes[piece]; i += i % 16 == 0 ? 1 : 5) {
      char& byte = memory[piece][i + 1];
      byte ^= static_cast<char>(1 << i % 8);
      launch("checksum", kernels->checksum, args);
      missed += (after[0] != before[0]) != (piece < 2) || (after[1] != before[1]) != (piece == 2);
      byte = 0;
    }
  launch("checksum", kernels->checksum, args);
  missed += std::memcmp(before, after, sizeof(before)) != 0;
  Tensor found(1);
  found.set(0, static_cast<double>(missed));
  expect("missed changes", found, {0.0});
  for (char* block : memory) std::free(block);
}

}  // namespace driver
}  // namespace effnet
