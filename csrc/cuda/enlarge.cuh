// The kernel that maps latents to RGB bytes and enlarges them by a factor of 2, 4, 8 or 16; preview.cu says
// why it is made so.
//
// A Source S of latents:
//   int height, width                                   of a frame
//   rows(frame, low)                                    where row `low` of a frame begins
//   map<V>(rows, at, rgb)                               RGB of V neighbouring positions, `at` after that
//   bool fours()                                        whether V may be 4; V is 1 otherwise
#pragma once

#include <algorithm>

#include "preview.cuh"

namespace latentfast::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;

constexpr int kPixels = 16;                // a thread's, in one row
constexpr int kStaged = 32 * 3 * kPixels;  // bytes of a warp's row

template <typename S>
struct EnlargeParams {
  S source;
  uint8_t* out;
  uint32_t strips;         // blocks of a frame
  int intervals;           // between rows of latents, that a block fills
  uint32_t units;          // threads that a row of pixels takes
  uint32_t units_inverse;  // ⌈2^32 / units⌉: a quotient is one multiplication
  int pitch;               // of a row in shared memory
};

// Interval i lies between the latent rows i and i + 1; the first, −1, and the last one are half a factor wide
// and beyond the edge, where the row is repeated. kFactor·i + kFactor/2 is its first row of pixels.
template <typename S, int kFactor, int V>
__global__ void __launch_bounds__(kThreads, kFactor >= 8 ? 3 : 1)
    enlarge_kernel(const __grid_constant__ EnlargeParams<S> p) {
  // Latent columns that a thread's pixels lie between, its own and one to each side.
  constexpr int kOwn = kPixels / kFactor, kColumns = kOwn + 2;
  extern __shared__ uint4 shared[];
  uint4* const staged = shared + threadIdx.x / 32 * (kStaged / 16);
  float* const tile =
      reinterpret_cast<float*>(shared + kWarps * (kStaged / 16));  // (row, colour, column + 1)
  const S& s = p.source;
  const uint32_t frame = blockIdx.x / p.strips, strip = blockIdx.x - frame * p.strips;
  const int first = static_cast<int>(strip) * p.intervals - 1, last = min(first + p.intervals, s.height);
  const int low = max(first, 0), high = min(last, s.height - 1);  // rows of latents, both included

  const int vectors = s.width / V, count = (high - low + 1) * vectors;
  const auto rows = s.rows(frame, low);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    float rgb[3][V];
    s.template map<V>(rows, i * V, rgb);
    const int row = i / vectors, column = (i - row * vectors) * V;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      float* const to = tile + (row * 3 + k) * p.pitch + column + 1;
#pragma unroll
      for (int v = 0; v < V; ++v) to[v] = scaled<uint8_t>(rgb[k][v]);
      if (column == 0) to[-1] = to[0];
      if (column + V == s.width) to[V] = to[V - 1];
    }
  }
  __syncthreads();

  const uint32_t items = static_cast<uint32_t>(last - first) * p.units;
  const int lane = threadIdx.x % 32;
  const uint32_t width = static_cast<uint32_t>(kFactor * s.width) * 3;  // bytes
  // the block's first row of pixels, half an interval below its first row of latents
  uint8_t* const picture =
      p.out + (static_cast<int64_t>(frame) * kFactor * s.height + kFactor * first + kFactor / 2) *
                  static_cast<int64_t>(width);
  for (uint32_t begin = threadIdx.x - lane; begin < items; begin += blockDim.x) {
    // What this lane stores: of the warp's 96 pieces of 16 bytes a row, those at lane, lane + 32, lane + 64;
    // not the upper half of the interval above the picture, nor the lower half of the one below.
    uint32_t to[3];
    bool inside[2][3];
#pragma unroll
    for (int m = 0; m < 3; ++m) {
      const uint32_t piece = lane + 32 * m, item = begin + piece / 3;
      const uint32_t interval = __umulhi(item, p.units_inverse), unit = item - interval * p.units;
      to[m] = kFactor * interval * width + unit * (3 * kPixels) + piece % 3 * 16;
      inside[0][m] = item < items && first + static_cast<int>(interval) >= 0;
      inside[1][m] = item < items && first + static_cast<int>(interval) + 1 < s.height;
    }
    // What it makes. Lanes beyond the last item make what another one does, and nothing of it is stored.
    const uint32_t item = min(begin + lane, items - 1);
    const uint32_t interval = __umulhi(item, p.units_inverse), unit = item - interval * p.units;
    const int above = max(first + static_cast<int>(interval), 0) - low;
    const int below = min(first + static_cast<int>(interval) + 1, s.height - 1) - low;
    float top[kColumns][3], step[kColumns][3];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const float* const a = tile + (above * 3 + k) * p.pitch + unit * kOwn;
      const float* const b = tile + (below * 3 + k) * p.pitch + unit * kOwn;
      if constexpr (kColumns % 2 == 0) {
#pragma unroll
        for (int n = 0; n < kColumns; n += 2) {
          const float2 x = *reinterpret_cast<const float2*>(a + n),
                       y = *reinterpret_cast<const float2*>(b + n);
          top[n][k] = x.x;
          top[n + 1][k] = x.y;
          step[n][k] = y.x - x.x;
          step[n + 1][k] = y.y - x.y;
        }
      } else {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          top[n][k] = a[n];
          step[n][k] = b[n] - a[n];
        }
      }
    }
    float down = 0.5f / kFactor;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll 1
      for (int j = 0; j < kFactor / 2; ++j, down += 1.0f / kFactor) {
        float x[kColumns][3];
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int k = 0; k < 3; ++k) x[n][k] = fmaf(down, step[n][k], top[n][k]);
        }
        uint32_t word[3 * kPixels / 4];
#pragma unroll
        for (int q = 0; q < 3 * kPixels; q += 4) {
          uint32_t value[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // in halves of a pixel from the centre of the column before this thread's own
            constexpr int kStep = 2 * kFactor;
            const int pixel = (q + i) / 3, k = (q + i) % 3, place = 2 * pixel + 1 + kFactor;
            const int n = place / kStep;
            const float right = static_cast<float>(place % kStep) / kStep;
            value[i] = byte_of(saturated(fmaf(right, x[n + 1][k] - x[n][k], x[n][k])));
          }
          word[q / 4] = pack_bytes(value[0], value[1], value[2], value[3]);
        }
#pragma unroll
        for (int m = 0; m < 3; ++m) {
          staged[3 * lane + m] = uint4{word[4 * m], word[4 * m + 1], word[4 * m + 2], word[4 * m + 3]};
        }
        __syncwarp();
#pragma unroll
        for (int m = 0; m < 3; ++m) {
          const uint4 piece = staged[lane + 32 * m];
          if (inside[half][m]) store_once(picture + to[m], piece);
          to[m] += width;
        }
        __syncwarp();
      }
    }
  }
}

// ---- host ----

inline bool aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

inline int64_t blocks_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "latent_to_rgb: a clip of this size takes too many blocks: ", blocks);
  return blocks;
}

// The factor, if the kernel for factors takes it.
template <typename S>
int factor_of(const S& s, int64_t rows, int64_t columns, const void* out) {
  for (const int factor : {2, 4, 8, 16}) {
    if (rows == factor * static_cast<int64_t>(s.height) &&
        columns == factor * static_cast<int64_t>(s.width)) {
      const bool whole = columns % kPixels == 0 && columns > kPixels;
      const int64_t least = kWarps * kStaged + 2 * 3 * (s.width + 2) * static_cast<int64_t>(sizeof(float));
      return whole && aligned16(out) && least <= kSharedBytes && rows <= INT32_MAX / 2 ? factor : 0;
    }
  }
  return 0;
}

template <typename S, int kFactor>
void enlarge(const S& s, uint8_t* out, int64_t frames, const Target& target) {
  EnlargeParams<S> p;
  p.source = s;
  p.out = out;
  p.units = static_cast<uint32_t>(kFactor * s.width / kPixels);
  p.units_inverse = static_cast<uint32_t>(((uint64_t(1) << 32) + p.units - 1) / p.units);
  p.pitch = s.width + 2;
  const int64_t row_bytes = 3 * p.pitch * static_cast<int64_t>(sizeof(float));
  const int64_t room = (kSharedBytes - kWarps * kStaged) / row_bytes - 1;  // a row more than intervals
  // few enough rows of pixels, too, for offsets of 32 bits: units · intervals ≤ kThreads wherever that is
  // more than one
  int64_t intervals = std::clamp<int64_t>(kThreads / p.units, 1, std::min<int64_t>(room, s.height + 1));
  // small clips: rather as many blocks as the multiprocessors can have at a time, than that some of these
  // have fewer
  while (intervals > 1 &&
         frames * ceil_div<int64_t>(s.height + 1, intervals) < 3 * target.device.multiprocessors)
    --intervals;
  p.intervals = static_cast<int>(intervals);
  p.strips = static_cast<uint32_t>(ceil_div<int64_t>(s.height + 1, intervals));
  const int64_t threads = std::min<int64_t>(kThreads, ceil_div<int64_t>(intervals * p.units, 32) * 32);
  const int64_t bytes = kWarps * kStaged + (intervals + 1) * row_bytes;
  const auto kernel = s.fours() ? enlarge_kernel<S, kFactor, 4> : enlarge_kernel<S, kFactor, 1>;
  kernel<<<static_cast<uint32_t>(blocks_of(frames * p.strips)), static_cast<uint32_t>(threads), bytes,
           target.stream>>>(p);
  check_launch("latent_to_rgb");
}

}  // namespace latentfast::cuda
