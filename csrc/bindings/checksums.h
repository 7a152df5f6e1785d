// Checksums of memory, see cpu/ops/checksum.cpp: how memory is divided among threads.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bindings/parts.h"
#include "cpu/isa_dispatch.h"

namespace effnet {

class Checksums {
 public:
  using Span = std::pair<Address, int64_t>;  // address, bytes

  explicit Checksums(const std::vector<Span>& spans) {
    int64_t room = 0;
    for (auto [address, bytes] : spans) {
      require(bytes >= 0, "checksum: bytes must not be negative");
      for (int64_t taken; bytes > 0; address += static_cast<Address>(taken), bytes -= taken) {
        if (room == 0) {
          chunks_.push_back(static_cast<int64_t>(pieces_.size()));
          room = kChunk;
        }
        taken = std::min(bytes, room);
        pieces_.push_back({at<const void>(address), taken});
        room -= taken;
      }
    }
    chunks_.push_back(static_cast<int64_t>(pieces_.size()));
  }

  // One for each chunk; memory that was freed must not be among the spans. The GIL is released.
  std::vector<uint64_t> of_memory(const Isa& isa, int threads) const {
    std::vector<uint64_t> sums(chunks_.size() - 1);
    if (sums.empty()) return sums;
    launch(isa.kernels->checksum,
           ChecksumArgs{pieces_.data(), chunks_.data(), static_cast<int64_t>(sums.size()),
                        sums.data(), thread_count(threads)});
    return sums;
  }

 private:
  static constexpr int64_t kChunk = 128 << 10;  // bytes: a share of 21 MB for each of 160 threads
  std::vector<Piece> pieces_;
  std::vector<int64_t> chunks_;
};

}  // namespace effnet
