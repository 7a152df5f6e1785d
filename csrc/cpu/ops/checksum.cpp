// Checksums of memory, by which writes to it are noticed.
//
// Computes: over the words of 32 bits in each lane of each chain a = mix((a ^ word) * odd), then
//           over chains and lanes likewise, 64 bits per chunk. Every step is a bijection of the
//           word and of what came before: a change of one word changes the sum for certain, any
//           other change but for about one chance in 2^32 per lane it touches, sign flips included.
// Layout:   pieces at any address and of any length; the last words are padded with zeros
// Tiling:   a thread owns whole chunks, whose sums do not depend on the number of threads
// Bytes:    those of the pieces, read once
// Source:   original
#include "cpu/kernels.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

typedef uint32_t Words __attribute__((vector_size(kLanes * 4), aligned(1), may_alias));

constexpr int kChains = 8;  // a product takes 10 cycles, and another can begin every other cycle
constexpr int64_t kVector = sizeof(UVec), kBlock = kChains * kVector;  // bytes
constexpr int64_t kLine = 64, kAhead = 3072;

EFFNET_INLINE UVec step(UVec a, UVec words) {
  a = (a ^ words) * 0x9e3779b1u;
  return a ^ (a >> 15);
}

EFFNET_INLINE void take(UVec* chains, const char* block) {
#pragma GCC unroll 8
  for (int i = 0; i < kChains; i++)
    chains[i] = step(chains[i], *reinterpret_cast<const Words*>(block + i * kVector));
}

EFFNET_INLINE void fetch_head(const Piece& piece) {
  const char* const data = static_cast<const char*>(piece.data);
  for (int64_t i = 0; i < min_of(kAhead, piece.bytes); i += kLine)
    __builtin_prefetch(data + i, 0, 2);
}

// What pieces [piece, end) add up to; `last` is the end of all pieces.
uint64_t sum_of(const Piece* piece, const Piece* end, const Piece* last) {
  UVec chains[kChains];
  for (UVec& chain : chains) chain = UVec{} + 0x85ebca6bu;
  for (; piece < end; piece++) {
    if (piece + 1 < last) fetch_head(piece[1]);
    const char* data = static_cast<const char*>(piece->data);
    int64_t left = piece->bytes;
    for (; left >= kBlock; left -= kBlock, data += kBlock) {
      for (int64_t i = 0; i < kBlock; i += kLine) __builtin_prefetch(data + kAhead + i, 0, 3);
      take(chains, data);
    }
    if (left > 0) {
      char block[kBlock] = {};
      std::memcpy(block, data, static_cast<size_t>(left));
      take(chains, block);
    }
  }
  UVec folded = chains[0];
  for (int i = 1; i < kChains; i++) folded = step(folded, chains[i]);
  uint64_t lanes[kVector / 8], sum = 0;
  std::memcpy(lanes, &folded, sizeof(lanes));
  for (uint64_t lane : lanes) {
    sum = (sum ^ lane) * 0x9e3779b97f4a7c15u;
    sum ^= sum >> 32;
  }
  return sum;
}

}  // namespace

bool checksum(const ChecksumArgs& args) {
#pragma omp parallel for num_threads(args.threads) schedule(static)
  for (int64_t i = 0; i < args.count; i++)
    args.sums[i] = sum_of(args.pieces + args.chunks[i], args.pieces + args.chunks[i + 1],
                          args.pieces + args.chunks[args.count]);
  return true;
}

}  // namespace EFFNET_ISA
}  // namespace effnet
