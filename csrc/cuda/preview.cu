// latent_to_rgb: a linear map of the channels to RGB at every latent position, enlarged bilinearly to pixels.
// The specification is latentfast/reference/preview.py.
//
// Of HunyuanVideo's 720p latents, 15 MB, come 91 million bytes: at the memory's rate a multiprocessor has
// some dozen instructions for each of them, waiting included, so the kernel for bytes at factors of 2, 4, 8
// or 16 counts them. A block maps some rows of latents into shared memory. A thread then makes 16 pixels of a
// row, 48 bytes, and goes down the rows between two rows of latents: the vertical step is made once for a
// latent column, not for each pixel; the horizontal fractions are constants; a value takes one multiply-add,
// which also clamps (saturation to [0, 1], NaN to 0), and one more that multiplies by 255 and adds 2^23,
// which leaves the byte, rounded to nearest even, in the lowest bits: no conversion, which runs at a quarter
// of the rate. Three byte permutations pack four values. 48 bytes are three stores that would leave gaps
// between the lanes, so the warp turns them in shared memory and stores 512 bytes at a time.
//
// Everything else takes the second kernel, which works in tiles with places from tables, or the third where
// nothing is enlarged. All three do the same arithmetic in the same order, so which of them ran shows in no
// bit: the map in the order of the channels, then the vertical, then the horizontal step.
#include <algorithm>

#include "preview.cuh"

namespace latentfast::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// ---- bytes, enlarged by a factor of 2, 4, 8 or 16 ----

constexpr int kPixels = 16;                // a thread's, in one row
constexpr int kStaged = 32 * 3 * kPixels;  // bytes of a warp's row

template <typename T>
struct EnlargeParams {
  Source<T> source;
  uint8_t* out;
  uint32_t strips;         // blocks of a frame
  int intervals;           // between rows of latents, that a block fills
  uint32_t units;          // threads that a row of pixels takes
  uint32_t units_inverse;  // ⌈2^32 / units⌉: a quotient is one multiplication
  int pitch;               // of a row in shared memory
};

// Interval i lies between the latent rows i and i + 1; the first, −1, and the last one are half a factor wide
// and beyond the edge, where the row is repeated. kFactor·i + kFactor/2 is its first row of pixels.
template <typename T, int kFactor, int V>
__global__ void __launch_bounds__(kThreads, kFactor >= 8 ? 3 : 1)
    enlarge_kernel(const __grid_constant__ EnlargeParams<T> p) {
  // Latent columns that a thread's pixels lie between, its own and one to each side.
  constexpr int kOwn = kPixels / kFactor, kColumns = kOwn + 2;
  extern __shared__ uint4 shared[];
  uint4* const staged = shared + threadIdx.x / 32 * (kStaged / 16);
  float* const tile =
      reinterpret_cast<float*>(shared + kWarps * (kStaged / 16));  // (row, colour, column + 1)
  const Source<T>& s = p.source;
  const uint32_t frame = blockIdx.x / p.strips, strip = blockIdx.x - frame * p.strips;
  const int first = static_cast<int>(strip) * p.intervals - 1, last = min(first + p.intervals, s.height);
  const int low = max(first, 0), high = min(last, s.height - 1);  // rows of latents, both included

  const int vectors = s.width / V, count = (high - low + 1) * vectors;
  const T* const rows = s.frame(frame) + static_cast<int64_t>(low) * s.width;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    float rgb[3][V];
    map_to_rgb<T, V>(s, rows + i * V, rgb);
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

// ---- any other size ----

// Where an output lies between two inputs along one dimension: at low + share.
template <typename C>
struct Place {
  int low;
  C share;
};

// In whole numbers up to the one division: output i of `full` is at (i + ½)·size/full − ½, not below 0.
template <typename C>
__device__ __forceinline__ Place<C> place_of(int i, int full, int size) {
  const int64_t twice = max((2 * static_cast<int64_t>(i) + 1) * size - full, int64_t(0));
  const int64_t low = twice / (2 * static_cast<int64_t>(full));
  return {static_cast<int>(low),
          static_cast<C>(twice - low * 2 * full) / static_cast<C>(2 * static_cast<int64_t>(full))};
}

template <typename T, typename R>
struct SampleParams {
  Source<T> source;
  R* out;
  int rows, columns;            // of the output
  int tile_rows, tile_columns;  // of it, a block's
  uint32_t tiles_down, tiles_across;
};

template <typename T, typename R, int V>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ SampleParams<T, R> p) {
  using C = Wide<T>;
  extern __shared__ uint4 shared[];
  Place<C>* const down = reinterpret_cast<Place<C>*>(shared);
  Place<C>* const across = down + p.tile_rows;
  C* const tile = reinterpret_cast<C*>(across + p.tile_columns);  // (row, column, colour)
  const Source<T>& s = p.source;
  const uint32_t line = blockIdx.x / p.tiles_across, frame = line / p.tiles_down;
  const int first_row = static_cast<int>(line - frame * p.tiles_down) * p.tile_rows;
  const int first_column = static_cast<int>(blockIdx.x - line * p.tiles_across) * p.tile_columns;
  const int rows = min(p.tile_rows, p.rows - first_row);
  const int columns = min(p.tile_columns, p.columns - first_column);
  const int top = place_of<C>(first_row, p.rows, s.height).low;
  const int left = place_of<C>(first_column, p.columns, s.width).low;
  const int height = min(place_of<C>(first_row + rows - 1, p.rows, s.height).low + 2, s.height) - top;
  const int width = min(place_of<C>(first_column + columns - 1, p.columns, s.width).low + 2, s.width) - left;

  for (int i = threadIdx.x; i < rows; i += kThreads) {
    down[i] = place_of<C>(first_row + i, p.rows, s.height);
    down[i].low -= top;
  }
  for (int i = threadIdx.x; i < columns; i += kThreads) {
    across[i] = place_of<C>(first_column + i, p.columns, s.width);
    across[i].low -= left;
  }
  const T* const corner = s.frame(frame) + static_cast<int64_t>(top) * s.width + left;
  for (int i = threadIdx.x; i < height * width; i += kThreads) {
    const int row = i / width;
    C rgb[3][1];
    map_to_rgb<T, 1>(s, corner + static_cast<int64_t>(row) * s.width + (i - row * width), rgb);
#pragma unroll
    for (int k = 0; k < 3; ++k) tile[3 * i + k] = scaled<R>(rgb[k][0]);
  }
  __syncthreads();

  const int vectors = 3 * columns / V;
  R* const corner_out =
      p.out + ((static_cast<int64_t>(frame) * p.rows + first_row) * p.columns + first_column) * 3;
  for (int i = threadIdx.x; i < rows * vectors; i += kThreads) {
    const int row = i / vectors, begin = (i - row * vectors) * V;
    const Place<C> y = down[row];
    const C* const above = tile + 3 * y.low * width;
    const C* const below = tile + 3 * min(y.low + 1, height - 1) * width;
    C value[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int pixel = (begin + v) / 3, k = begin + v - 3 * pixel;
      const Place<C> x = across[pixel];
      const int near = 3 * x.low + k, far = 3 * min(x.low + 1, width - 1) + k;
      const C before = fma(y.share, below[near] - above[near], above[near]);
      const C after = fma(y.share, below[far] - above[far], above[far]);
      value[v] = fma(x.share, after - before, before);
    }
    store_values<R, V>(corner_out + static_cast<int64_t>(row) * p.columns * 3 + begin, value);
  }
}

// ---- not enlarged ----

template <typename T, typename R>
struct MapParams {
  Source<T> source;
  R* out;
  int64_t vectors;  // of all frames
};

template <typename T, typename R, int V>
__global__ void __launch_bounds__(kThreads) map_kernel(const __grid_constant__ MapParams<T, R> p) {
  using C = Wide<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.vectors) return;
  const Source<T>& s = p.source;
  const int64_t each = s.plane / V;
  const uint32_t frame = static_cast<uint32_t>(i <= UINT32_MAX && each <= UINT32_MAX
                                                   ? static_cast<uint32_t>(i) / static_cast<uint32_t>(each)
                                                   : i / each);
  C rgb[3][V], value[3 * V];
  map_to_rgb<T, V>(s, s.frame(frame) + (i - frame * each) * V, rgb);
#pragma unroll
  for (int q = 0; q < 3 * V; ++q) value[q] = scaled<R>(rgb[q % 3][q / 3]);
  if constexpr (V == 1) {
#pragma unroll
    for (int k = 0; k < 3; ++k)
      store_values<R, 1>(p.out + 3 * i + k, reinterpret_cast<const C(&)[1]>(value[k]));
  } else {
    store_values<R, 3 * V>(p.out + 3 * V * i, value);
  }
}

// ---- host ----

constexpr int kSharedBytes = 48 << 10;  // what a block may have without asking

bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int64_t blocks_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "latent_to_rgb: a clip of this size takes too many blocks: ", blocks);
  return blocks;
}

// The factor, if the kernel for factors takes it.
template <typename T>
int factor_of(const Source<T>& s, int64_t rows, int64_t columns, const void* out) {
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

template <typename T, int kFactor>
void enlarge(const Source<T>& s, uint8_t* out, int64_t frames, const Target& target) {
  EnlargeParams<T> p;
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
  // small clips: rather more blocks, so that every multiprocessor has some
  while (intervals > 1 &&
         frames * ceil_div<int64_t>(s.height + 1, intervals) < 2 * target.device.multiprocessors)
    --intervals;
  p.intervals = static_cast<int>(intervals);
  p.strips = static_cast<uint32_t>(ceil_div<int64_t>(s.height + 1, intervals));
  const int64_t threads = std::min<int64_t>(kThreads, ceil_div<int64_t>(intervals * p.units, 32) * 32);
  const int64_t bytes = kWarps * kStaged + (intervals + 1) * row_bytes;
  const bool vectors = s.width % 4 == 0 && aligned(s.z, 4 * sizeof(T)) && s.plane % 4 == 0;
  const auto kernel = vectors ? enlarge_kernel<T, kFactor, 4> : enlarge_kernel<T, kFactor, 1>;
  kernel<<<static_cast<uint32_t>(blocks_of(frames * p.strips)), static_cast<uint32_t>(threads), bytes,
           target.stream>>>(p);
  check_launch("latent_to_rgb");
}

// The most inputs that `count` neighbouring outputs lie between.
int64_t extent(int64_t count, int64_t full, int64_t size) {
  return std::min(size, (count - 1) * size / full + 3);
}

template <typename T, typename R>
void sample(const Source<T>& s, R* out, int64_t frames, int64_t rows, int64_t columns, const Target& target) {
  using C = Wide<T>;
  SampleParams<T, R> p;
  p.source = s;
  p.out = out;
  p.rows = static_cast<int>(rows);
  p.columns = static_cast<int>(columns);
  int64_t down = std::min<int64_t>(32, rows), across = std::min<int64_t>(64, columns);
  const auto bytes = [&] {
    const int64_t positions = extent(down, rows, s.height) * extent(across, columns, s.width);
    return (down + across) * static_cast<int64_t>(sizeof(Place<C>)) +
           3 * positions * static_cast<int64_t>(sizeof(C));
  };
  // at most 3 x 3 positions in the end
  while (bytes() > kSharedBytes) {
    const bool tall = extent(down, rows, s.height) > extent(across, columns, s.width);
    int64_t& longer = across == 1 || (tall && down > 1) ? down : across;
    longer = ceil_div<int64_t>(longer, 2);
  }
  p.tile_rows = static_cast<int>(down);
  p.tile_columns = static_cast<int>(across);
  p.tiles_down = static_cast<uint32_t>(ceil_div(rows, down));
  p.tiles_across = static_cast<uint32_t>(ceil_div(columns, across));
  const auto grid = static_cast<uint32_t>(blocks_of(frames * p.tiles_down * p.tiles_across));
  bool vectors = false;
  if constexpr (sizeof(R) <= 4) {
    vectors = columns % 4 == 0 && across % 4 == 0 && aligned(out, 4 * sizeof(R));
    if (vectors) sample_kernel<T, R, 4><<<grid, kThreads, bytes(), target.stream>>>(p);
  }
  if (!vectors) sample_kernel<T, R, 1><<<grid, kThreads, bytes(), target.stream>>>(p);
  check_launch("latent_to_rgb");
}

template <typename T, typename R>
void map(const Source<T>& s, R* out, int64_t frames, const Target& target) {
  MapParams<T, R> p;
  p.source = s;
  p.out = out;
  constexpr int V = kPack<T>;
  bool vectors = false;
  const auto grid = [&](int64_t count) {
    p.vectors = count;
    return static_cast<uint32_t>(blocks_of(ceil_div<int64_t>(count, kThreads)));
  };
  if constexpr (sizeof(T) <= 4) {
    vectors = s.plane % V == 0 && aligned16(s.z) && aligned(out, sizeof(R) == 1 ? 4 : 16);
    if (vectors) map_kernel<T, R, V><<<grid(frames * s.plane / V), kThreads, 0, target.stream>>>(p);
  }
  if (!vectors) map_kernel<T, R, 1><<<grid(frames * s.plane), kThreads, 0, target.stream>>>(p);
  check_launch("latent_to_rgb");
}

template <typename T, typename R>
void show(const Source<T>& s, const View& out, int64_t frames, const Target& target) {
  const int64_t rows = out.size(2), columns = out.size(3);
  R* const to = mutable_data<R>(out);
  if (rows == s.height && columns == s.width) return map<T, R>(s, to, frames, target);
  if constexpr (std::is_same_v<R, uint8_t> && sizeof(T) <= 4) {
    switch (factor_of(s, rows, columns, to)) {
      case 2:
        return enlarge<T, 2>(s, to, frames, target);
      case 4:
        return enlarge<T, 4>(s, to, frames, target);
      case 8:
        return enlarge<T, 8>(s, to, frames, target);
      case 16:
        return enlarge<T, 16>(s, to, frames, target);
    }
  }
  sample<T, R>(s, to, frames, rows, columns, target);
}

void latent_to_rgb(const View& z, const View& weight, const View& bias, const View& out) {
  check_contiguous(z, "z");
  check_contiguous(weight, "weight");
  check_contiguous(bias, "bias");
  check_contiguous(out, "out");
  STD_TORCH_CHECK(z.dim() == 5 && out.dim() == 5 && weight.numel() == 3 * z.size(1) && bias.numel() == 3,
                  "latent_to_rgb takes z (B, C, T, H, W), weight (C, 3), bias (3) and out (B, T, H', W', 3)");
  if (out.numel() == 0) return;
  constexpr int64_t kMost = INT32_MAX / 4;  // sides, so that a few of them add up in 32 bits
  STD_TORCH_CHECK(z.size(3) > 0 && z.size(4) > 0, "latent_to_rgb cannot enlarge frames without pixels");
  STD_TORCH_CHECK(std::max({z.size(1), z.size(3), z.size(4), out.size(2), out.size(3)}) <= kMost &&
                      z.size(0) * z.size(2) <= INT32_MAX,
                  "latent_to_rgb: a side, or the number of frames, is too large");
  const Target target(z);
  dispatch_floating(z.scalar_type(), "latent_to_rgb", [&]<typename T>() {
    using C = Wide<T>;
    const int64_t plane = z.size(3) * z.size(4);
    const Source<T> source{data<T>(z),
                           data<C>(weight),
                           data<C>(bias),
                           plane,
                           z.size(2) * plane,
                           static_cast<uint32_t>(z.size(2)),
                           static_cast<int>(z.size(1)),
                           static_cast<int>(z.size(3)),
                           static_cast<int>(z.size(4))};
    const int64_t frames = z.size(0) * z.size(2);
    if (out.scalar_type() == ScalarType::Byte) {
      show<T, uint8_t>(source, out, frames, target);
    } else {
      show<T, C>(source, out, frames, target);
    }
  });
}

}  // namespace
}  // namespace latentfast::cuda

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) {
  m.impl("latent_to_rgb", LATENTFAST_BOX(latentfast::cuda::latent_to_rgb));
}
