// Passes over channels-last tensors without a neighbourhood: who takes which pixels and channels.
//
// A block owns a chunk of an image's pixels and a block of channels in pieces of 16 bytes; a thread
// has always the same piece, so that what depends on the channel stays in its registers.
#pragma once

#include "cuda/args.h"
#include "cuda/common.cuh"
#include "cuda/primitives.cuh"

namespace effnet {
namespace cuda {

constexpr int kChannelThreads = 256;
constexpr int kMaxPieces = 32;  // 512 bytes of a pixel's channels

struct ChannelGrid {
  int64_t blocks, channel_blocks, chunks, hw;
  int pieces, rows;  // threads side by side on a pixel's channels, and on pixels
  bool aligned;      // 16-byte pieces
};

inline ChannelGrid channel_grid(int64_t n, int64_t c, int64_t hw, int64_t chunks, int vector,
                                bool addresses_aligned) {
  ChannelGrid grid;
  const int64_t pieces = ceil_div(c, vector);
  grid.channel_blocks = ceil_div(pieces, kMaxPieces);
  grid.pieces = static_cast<int>(ceil_div(pieces, grid.channel_blocks));
  const int64_t rows = kChannelThreads / grid.pieces, most = ceil_div(hw, chunks);
  grid.rows = static_cast<int>(rows < most ? rows : most);
  grid.chunks = chunks;
  grid.hw = hw;
  grid.blocks = n * chunks * grid.channel_blocks;
  grid.aligned = addresses_aligned && c % vector == 0;
  return grid;
}

// Chunks of an image's pixels in passes that write a tensor: about 16 pixels for each thread.
inline int64_t elementwise_chunks(int64_t c, int64_t hw, int vector) {
  const int64_t pieces = ceil_div(c, vector), width = pieces < kMaxPieces ? pieces : kMaxPieces;
  return ceil_div(hw * width, 16 * kChannelThreads);
}

// Where a thread stands: its image, the chunk's pixels, its row of them and its piece.
struct Pixels {
  int64_t n, chunk, begin, end, c0;
  int row, piece;
  __device__ Pixels(const ChannelGrid& grid, int vector) {
    const int64_t index = block_x() / grid.channel_blocks;
    n = index / grid.chunks;
    chunk = index % grid.chunks;
    begin = grid.hw * chunk / grid.chunks;
    end = grid.hw * (chunk + 1) / grid.chunks;
    c0 = block_x() % grid.channel_blocks * grid.pieces * vector;
    row = thread_x() / grid.pieces;
    piece = thread_x() % grid.pieces;
  }
};

// 16 bytes, of which the first `channels` elements exist.
template <typename T>
__device__ __forceinline__ uint4 load_piece(const T* p, int channels, bool aligned) {
  if (aligned) return load(reinterpret_cast<const uint4*>(p));
  float v[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; i++) v[i] = i < channels ? to_float(p[i]) : 0.0f;
  return pack<T, uint4>(v);
}

template <typename T>
__device__ __forceinline__ void store_piece(T* p, const float (&v)[kVector<T>], int channels,
                                            bool aligned) {
  if (aligned) {
    store(reinterpret_cast<uint4*>(p), pack<T, uint4>(v));
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector<T>; i++)
    if (i < channels) p[i] = from_float<T>(v[i]);
}

}  // namespace cuda
}  // namespace effnet
