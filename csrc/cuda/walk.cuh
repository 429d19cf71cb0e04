// How the threads of an elementwise kernel walk a tensor beside operands that broadcast to it.
//
// The target's joined dimensions (common/broadcast.h) are split in three: the innermost one, a contiguous
// row, which the lanes of a warp share in vectors of V elements; one dimension of repeats, which each thread
// walks in a loop, chosen by the kernel so that some operand does not change along it and is read once; and
// the outer rest. A block covers a tile of blockDim.x vectors of an outer row, 4 KiB that lie together (of
// blockDim.y rows where rows are short). Blocks that differ only in their chunk of repeats are neighbours in
// the grid: what they share is read from memory once and then from L2. So are, where rows share an operand,
// the blocks of different rows at the same positions.
#pragma once

#include <algorithm>

#include "launch.cuh"

namespace latentfast::cuda {

template <int N>
struct Walk {
  int64_t inner;            // elements in a row
  int64_t inner_stride[N];  // 1, or 0 for an operand that is constant along the row
  int64_t repeats;
  int64_t repeat_stride[N];
  int64_t
      repeat_step;  // how far a repeat moves along the row: 0 unless the repeats are pieces of the row itself
  int64_t rows;     // outer rows, in groups of `group`
  Joined<N> outer;
  int64_t group_stride[N];  // from one row of a group to the next
  uint32_t chunk;           // repeats a thread
  uint32_t chunks;          // blocks that share a tile of rows
  uint32_t tiles;           // tiles along the row
  uint32_t
      row_tiles;  // blocks that share a tile but for their rows, if they are neighbours in the grid, or 0
};

template <int N>
struct Spot {
  int64_t position;     // in the row, of the thread's first element
  int64_t first, last;  // its repeats
  int64_t offset[N];    // of its first element in each operand, the repeats left out
};

// Where this thread works; false if nowhere.
template <int V, int N>
__device__ __forceinline__ bool locate(const Walk<N>& walk, Spot<N>& spot) {
  const uint32_t tile_and_row = blockIdx.x / walk.chunks, chunk = blockIdx.x - tile_and_row * walk.chunks;
  const uint32_t fastest = walk.row_tiles != 0 ? walk.row_tiles : walk.tiles;
  const uint32_t slow = tile_and_row / fastest, fast = tile_and_row - slow * fastest;
  const uint32_t row_tile = walk.row_tiles != 0 ? fast : slow, tile = walk.row_tiles != 0 ? slow : fast;
  int64_t row = static_cast<int64_t>(row_tile) * blockDim.y + threadIdx.y;
  spot.position = (static_cast<int64_t>(tile) * blockDim.x + threadIdx.x) * V;
  spot.first = static_cast<int64_t>(chunk) * walk.chunk;
  spot.last = min(spot.first + walk.chunk, walk.repeats);
  if (row >= walk.rows || spot.position >= walk.inner) return false;
#pragma unroll
  for (int k = 0; k < N; ++k) spot.offset[k] = spot.position * walk.inner_stride[k];
  for (int d = walk.outer.dims - 1; d >= 0; --d) {
    int64_t i = row;
    if (d > 0) {  // the outermost index is what is left: with one outer dimension there is no division at all
      row = row <= UINT32_MAX && walk.outer.size[d] <= UINT32_MAX
                ? static_cast<uint32_t>(row) / static_cast<uint32_t>(walk.outer.size[d])
                : row / walk.outer.size[d];
      i -= row * walk.outer.size[d];
    }
#pragma unroll
    for (int k = 0; k < N; ++k) spot.offset[k] += i * walk.outer.stride[k][d];
  }
  return true;
}

constexpr int kWalkThreads = 256;

// Split `joined` for vectors of `vec` elements. `repeat_dim`: the dimension to repeat over, -1 for pieces of
// the row; `shared_rows`: outer rows read the same at the same positions; `chunk`: the most
// repeats a thread should make; `group`: how many neighbours along the last outer dimension a thread takes,
// 1 or a divisor of its size.
template <int N>
Walk<N> make_walk(const Joined<N>& joined, int repeat_dim, int vec, bool shared_rows, uint32_t chunk,
                  const Device& device, dim3& grid, dim3& block, int group = 1) {
  Walk<N> walk{};
  const int last = joined.dims - 1;
  walk.inner = joined.size[last];
  walk.rows = 1;
  for (int d = 0; d < last; ++d) {
    if (d == repeat_dim) continue;
    const int slot = walk.outer.dims++;
    walk.outer.size[slot] = joined.size[d];
    for (int k = 0; k < N; ++k) walk.outer.stride[k][slot] = joined.stride[k][d];
    walk.rows *= joined.size[d];
  }
  if (group > 1) {
    const int neighbours = walk.outer.dims - 1;
    walk.rows /= group;
    walk.outer.size[neighbours] /= group;
    for (int k = 0; k < N; ++k) {
      walk.group_stride[k] = walk.outer.stride[k][neighbours];
      walk.outer.stride[k][neighbours] *= group;
    }
  }
  const int64_t vectors = ceil_div<int64_t>(walk.inner, vec);
  uint32_t lanes = kWalkThreads;
  while (lanes > 1 && lanes / 2 >= vectors) lanes /= 2;
  const uint32_t rows = kWalkThreads / lanes;  // short rows: the threads left over take more of them
  block = dim3(lanes, rows);
  if (repeat_dim >= 0) {
    walk.repeats = joined.size[repeat_dim];
    walk.repeat_step = 0;
    for (int k = 0; k < N; ++k) walk.repeat_stride[k] = joined.stride[k][repeat_dim];
    walk.tiles = static_cast<uint32_t>(ceil_div<int64_t>(vectors, lanes));
  } else {
    walk.repeats = ceil_div<int64_t>(vectors, lanes);
    walk.repeat_step = static_cast<int64_t>(lanes) * vec;
    for (int k = 0; k < N; ++k) walk.repeat_stride[k] = walk.repeat_step * joined.stride[k][last];
    walk.tiles = 1;
  }
  for (int k = 0; k < N; ++k) walk.inner_stride[k] = joined.stride[k][last];
  const int64_t row_tiles = ceil_div<int64_t>(walk.rows, rows);
  walk.row_tiles = shared_rows && row_tiles <= UINT32_MAX ? static_cast<uint32_t>(row_tiles) : 0;
  const auto blocks = [&](uint32_t c) { return row_tiles * walk.tiles * ceil_div<int64_t>(walk.repeats, c); };
  // small tensors: rather more blocks, so that every multiprocessor has some
  while (chunk > 1 && blocks(chunk) < 3 * device.multiprocessors) chunk /= 2;
  walk.chunk = chunk;
  walk.chunks = static_cast<uint32_t>(ceil_div<int64_t>(walk.repeats, chunk));
  STD_TORCH_CHECK(blocks(chunk) <= INT32_MAX, "a tensor of ", joined.numel(),
                  " elements broadcast this way is too large");
  grid = dim3(static_cast<uint32_t>(blocks(chunk)));
  return walk;
}

}  // namespace latentfast::cuda
