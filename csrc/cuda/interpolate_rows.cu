// slerp and nlerp of vectors whose elements lie in runs of neighbours: the short ones, and every case that
// the streamed kernel does not take (older cards, rows that do not start at 16 bytes).
//
// Short vectors, one launch. Up to one piece (1024 halves): a warp takes several vectors, sums each, then its
// lanes make the weights of different vectors side by side (in float64 they cost more than the elements of a
// short vector), then it makes the results; the elements come from L1 the second time. Up to eight pieces: a
// block takes a vector and holds it in registers.
//
// Any length, three launches: sums of the chunks; weights, one block a vector; results. Elements are read
// from memory twice.
#include <algorithm>

#include "interpolate.cuh"

namespace latentfast::cuda {
namespace {

constexpr int kBlockWarps = 8;
constexpr int kThreads = 32 * kBlockWarps;

template <typename T, bool Aligned, int J = kLanePacks>
__device__ __forceinline__ LanePacks<J> load_piece(const Arguments& arguments, int64_t offset, int elements) {
  LanePacks<J> packs;
#pragma unroll
  for (int j = 0; j < J; ++j) {
    const int e = (threadIdx.x % 32 + 32 * j) * kPack<T>;
    packs.a[j] = load_pack<T, Aligned>(static_cast<const T*>(arguments.a) + offset + e, elements - e);
    packs.b[j] = load_pack<T, Aligned>(static_cast<const T*>(arguments.b) + offset + e, elements - e);
  }
  return packs;
}

// The last element of a vector's A.
template <typename T>
struct Last {
  const Arguments& arguments;
  int64_t base;

  __device__ double operator()() const {
    const int64_t offset = base + arguments.vectors.offset(arguments.vectors.length - 1);
    return widen<T>(static_cast<const T*>(arguments.a)[offset]);
  }
};

// Vectors of one piece and no more than 32·J packs: a warp takes `batch` of them. `batch` times the number of
// values is at most kMaxValues.
template <typename T, bool Aligned, int J>
__global__ void __launch_bounds__(kThreads)
    warp_kernel(const __grid_constant__ Arguments arguments, int batch) {
  __shared__ Mix<Wide<T>> mixes[kBlockWarps][kMaxValues];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Vectors& vectors = arguments.vectors;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kBlockWarps + warp) * batch;
  if (begin >= vectors.count) return;
  const int mine = static_cast<int>(min(static_cast<int64_t>(batch), vectors.count - begin));
  const int values = arguments.values.count;
  const Piece piece = piece_of<T>(vectors, 0);

  Sums sums{0.0, 0.0, 0.0};  // lane i: those of the vector that its weights are for
  for (int v = 0; v < mine; ++v) {
    const LanePacks<J> packs = load_piece<T, Aligned, J>(arguments, vectors.base(begin + v), piece.elements);
    const double folded = sum_packs<T, false>(packs);
    const Sums all{__shfl_sync(0xffffffffu, folded, 0), __shfl_sync(0xffffffffu, folded, 8),
                   __shfl_sync(0xffffffffu, folded, 16)};
    if (lane / values == v) sums = all;
  }
  if (lane < mine * values) {
    const int64_t vector = begin + lane / values;
    mixes[warp][lane] = make_mix<Wide<T>>(arguments.mode, sums, arguments.values.at(lane % values, vector),
                                          vectors.length, Last<T>{arguments, vectors.base(vector)});
  }
  __syncwarp();
  for (int v = 0; v < mine; ++v) {
    const int64_t base = vectors.base(begin + v);
    const LanePacks<J> packs = load_piece<T, Aligned, J>(arguments, base, piece.elements);
    write_packs<T, Aligned>(arguments, mixes[warp] + v * values, packs, base, piece);
  }
}

// Vectors of up to kBlockWarps pieces: a block takes one, a warp each piece.
template <typename T, bool Aligned>
__global__ void __launch_bounds__(kThreads, Aligned ? 3 : 1)
    block_kernel(const __grid_constant__ Arguments arguments) {
  constexpr int P = kChunkPieces<T>;
  __shared__ double piece_sums[kBlockWarps][3];
  __shared__ Mix<Wide<T>> mixes[kMaxValues];
  const int warp = threadIdx.x / 32;
  const Vectors& vectors = arguments.vectors;
  const int64_t vector = blockIdx.x;
  const int64_t base = vectors.base(vector);
  const bool has_piece = warp < vectors.pieces;
  Piece piece{};
  LanePacks<> packs;
  if (has_piece) {
    piece = piece_of<T>(vectors, warp);
    packs = load_piece<T, Aligned>(arguments, base + piece.offset, piece.elements);
    const double folded = sum_packs<T, false>(packs);
    const int component = folded_component();
    if (component >= 0) piece_sums[warp][component] = folded;
  }
  __syncthreads();
  if (threadIdx.x < arguments.values.count) {
    double total[3] = {0.0, 0.0, 0.0};
    for (int first = 0; first < vectors.pieces;
         first += P) {  // the same order as in the kernels for longer vectors
      for (int i = 0; i < 3; ++i) {
        double sum = piece_sums[first][i];
        for (int j = first + 1; j < min(first + P, vectors.pieces); ++j) sum += piece_sums[j][i];
        total[i] += sum;
      }
    }
    mixes[threadIdx.x] =
        make_mix<Wide<T>>(arguments.mode, {total[0], total[1], total[2]},
                          arguments.values.at(threadIdx.x, vector), vectors.length, Last<T>{arguments, base});
  }
  __syncthreads();
  if (has_piece) write_packs<T, Aligned>(arguments, mixes, packs, base, piece);
}

// The three launches. A block takes a chunk, a warp a piece of it.
template <typename T, bool Aligned>
__global__ void __launch_bounds__(32 * kChunkPieces<T>)
    chunk_sums_kernel(const __grid_constant__ Arguments arguments, double* sums) {
  constexpr int P = kChunkPieces<T>;
  __shared__ double piece_sums[P][3];
  const Vectors& vectors = arguments.vectors;
  const int warp = threadIdx.x / 32;
  for (int64_t i = blockIdx.x; i < vectors.count * vectors.chunks; i += gridDim.x) {
    const int64_t vector = i / vectors.chunks;
    const int chunk = static_cast<int>(i % vectors.chunks);
    const int pieces = min(P, vectors.pieces - chunk * P);
    if (warp < pieces) {
      const Piece piece = piece_of<T>(vectors, chunk * P + warp);
      const double folded = sum_packs<T, true>(
          load_piece<T, Aligned>(arguments, vectors.base(vector) + piece.offset, piece.elements));
      const int component = folded_component();
      if (component >= 0) piece_sums[warp][component] = folded;
    }
    __syncthreads();
    if (threadIdx.x < 3) {
      double sum = piece_sums[0][threadIdx.x];
      for (int j = 1; j < pieces; ++j) sum += piece_sums[j][threadIdx.x];
      sums[(vector * 3 + threadIdx.x) * vectors.chunks + chunk] = sum;
    }
    __syncthreads();
  }
}

// A block makes the weights of a vector: a lane the sums of a share, the first warp those of the vector.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    weights_kernel(const __grid_constant__ Arguments arguments, const double* sums, Mix<Wide<T>>* mixes) {
  __shared__ double share_sums[3][kThreads];
  const Vectors& vectors = arguments.vectors;
  for (int64_t vector = blockIdx.x; vector < vectors.count; vector += gridDim.x) {
    const double* const mine = sums + vector * 3 * vectors.chunks;
    double lanes[3] = {};  // of the first warp
    for (int first = 0; first < vectors.shares; first += kThreads) {
      const int share = first + threadIdx.x;
      if (share < vectors.shares) {
        const int begin = vectors.share_begin(share), end = vectors.share_begin(share + 1);
        for (int i = 0; i < 3; ++i) {
          const double* const chunk = mine + static_cast<int64_t>(i) * vectors.chunks;
          double sum = 0.0;
          for (int c = begin; c < end; ++c) sum += chunk[c];
          share_sums[i][threadIdx.x] = sum;
        }
      }
      __syncthreads();
      if (threadIdx.x < 32) {
        for (int s = threadIdx.x; s < min(kThreads, vectors.shares - first); s += 32) {
          for (int i = 0; i < 3; ++i) lanes[i] += share_sums[i][s];
        }
      }
      __syncthreads();
    }
    if (threadIdx.x < 32) {
      const Sums total{fold_lanes(lanes[0]), fold_lanes(lanes[1]), fold_lanes(lanes[2])};
      if (threadIdx.x < arguments.values.count) {
        mixes[vector * arguments.values.count + threadIdx.x] =
            make_mix<Wide<T>>(arguments.mode, total, arguments.values.at(threadIdx.x, vector), vectors.length,
                              Last<T>{arguments, vectors.base(vector)});
      }
    }
  }
}

template <typename T, bool Aligned>
__global__ void __launch_bounds__(32 * kChunkPieces<T>)
    results_kernel(const __grid_constant__ Arguments arguments, const Mix<Wide<T>>* mixes) {
  constexpr int P = kChunkPieces<T>;
  const Vectors& vectors = arguments.vectors;
  const int warp = threadIdx.x / 32;
  for (int64_t i = blockIdx.x; i < vectors.count * vectors.chunks; i += gridDim.x) {
    const int64_t vector = i / vectors.chunks;
    const int chunk = static_cast<int>(i % vectors.chunks);
    if (chunk * P + warp >= vectors.pieces) continue;
    const Piece piece = piece_of<T>(vectors, chunk * P + warp);
    const int64_t base = vectors.base(vector);
    const LanePacks<> packs = load_piece<T, Aligned>(arguments, base + piece.offset, piece.elements);
    write_packs<T, Aligned>(arguments, mixes + vector * arguments.values.count, packs, base, piece);
  }
}

template <typename T, bool Aligned>
void launch(const Target& target, const Arguments& arguments) {
  const Vectors& vectors = arguments.vectors;
  constexpr int64_t kMaxGrid = 0x7fffffff;
  if (vectors.pieces == 1) {
    // Of vectors longer than half a piece one a warp: their elements take as long as the weights.
    const int fitting = std::max(1, kMaxValues / arguments.values.count);
    const int batch =
        vectors.m * static_cast<int64_t>(sizeof(T)) * 2 > kPieceBytes ? 1 : std::min(8, fitting);
    const int64_t blocks = ceil_div<int64_t>(vectors.count, static_cast<int64_t>(kBlockWarps) * batch);
    STD_TORCH_CHECK(blocks <= kMaxGrid, "interpolate: too many vectors: ", vectors.count);
    const int64_t packs = ceil_div<int64_t>(vectors.m, kPack<T>);
    const auto kernel = !Aligned || packs > 64 ? warp_kernel<T, Aligned, kLanePacks>
                        : packs > 32           ? warp_kernel<T, true, 2>
                                               : warp_kernel<T, true, 1>;
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, target.stream>>>(arguments, batch);
    check_launch("interpolate");
    return;
  }
  if (vectors.pieces <= kBlockWarps) {
    STD_TORCH_CHECK(vectors.count <= kMaxGrid, "interpolate: too many vectors: ", vectors.count);
    block_kernel<T, Aligned><<<static_cast<unsigned>(vectors.count), kThreads, 0, target.stream>>>(arguments);
    check_launch("interpolate");
    return;
  }
  const int64_t chunks = vectors.count * vectors.chunks;
  const int64_t sums_bytes = ceil_div<int64_t>(chunks * 3 * sizeof(double), 16) * 16;
  const Workspace workspace(target, sums_bytes + vectors.count * arguments.values.count *
                                                     static_cast<int64_t>(sizeof(Mix<Wide<T>>)));
  double* const sums = static_cast<double*>(workspace.data());
  auto* const mixes =
      reinterpret_cast<Mix<Wide<T>>*>(static_cast<unsigned char*>(workspace.data()) + sums_bytes);
  const unsigned grid = static_cast<unsigned>(std::min(chunks, kMaxGrid));
  chunk_sums_kernel<T, Aligned><<<grid, 32 * kChunkPieces<T>, 0, target.stream>>>(arguments, sums);
  check_launch("interpolate, sums");
  weights_kernel<T><<<static_cast<unsigned>(std::min(vectors.count, kMaxGrid)), kThreads, 0, target.stream>>>(
      arguments, sums, mixes);
  check_launch("interpolate, weights");
  results_kernel<T, Aligned><<<grid, 32 * kChunkPieces<T>, 0, target.stream>>>(arguments, mixes);
  check_launch("interpolate, results");
}

}  // namespace

template <typename T>
void interpolate_rows(const Target& target, const Arguments& arguments) {
  if (rows_aligned<T>(arguments)) {
    launch<T, true>(target, arguments);
  } else {
    launch<T, false>(target, arguments);
  }
}

template void interpolate_rows<float>(const Target&, const Arguments&);
template void interpolate_rows<double>(const Target&, const Arguments&);
template void interpolate_rows<Half>(const Target&, const Arguments&);
template void interpolate_rows<BFloat16>(const Target&, const Arguments&);

}  // namespace latentfast::cuda
