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

#include "enlarge.cuh"

namespace latentfast::cuda {
namespace {

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

template <typename S, typename R>
struct SampleParams {
  S source;
  R* out;
  int rows, columns;            // of the output
  int tile_rows, tile_columns;  // of it, a block's
  uint32_t tiles_down, tiles_across;
};

template <typename S, typename R, int V>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ SampleParams<S, R> p) {
  using C = typename S::C;
  extern __shared__ uint4 shared[];
  Place<C>* const down = reinterpret_cast<Place<C>*>(shared);
  Place<C>* const across = down + p.tile_rows;
  C* const tile = reinterpret_cast<C*>(across + p.tile_columns);  // (row, column, colour)
  const S& s = p.source;
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
  const auto* const corner = s.frame(frame) + static_cast<int64_t>(top) * s.width + left;
  for (int i = threadIdx.x; i < height * width; i += kThreads) {
    const int row = i / width;
    C rgb[3][1];
    s.map(corner, static_cast<int64_t>(row) * s.width + (i - row * width), rgb);
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

template <typename S, typename R>
struct MapParams {
  S source;
  R* out;
  int64_t vectors;  // of all frames
};

template <typename S, typename R, int V>
__global__ void __launch_bounds__(kThreads) map_kernel(const __grid_constant__ MapParams<S, R> p) {
  using C = typename S::C;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.vectors) return;
  const S& s = p.source;
  const int64_t each = s.plane / V;
  const uint32_t frame = static_cast<uint32_t>(i <= UINT32_MAX && each <= UINT32_MAX
                                                   ? static_cast<uint32_t>(i) / static_cast<uint32_t>(each)
                                                   : i / each);
  C rgb[3][V], value[3 * V];
  s.map(s.frame(frame), (i - frame * each) * V, rgb);
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

// The most inputs that `count` neighbouring outputs lie between.
int64_t extent(int64_t count, int64_t full, int64_t size) {
  return std::min(size, (count - 1) * size / full + 3);
}

template <typename S, typename R>
void sample(const S& s, R* out, int64_t frames, int64_t rows, int64_t columns, const Target& target) {
  using C = typename S::C;
  SampleParams<S, R> p;
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
    if (vectors) sample_kernel<S, R, 4><<<grid, kThreads, bytes(), target.stream>>>(p);
  }
  if (!vectors) sample_kernel<S, R, 1><<<grid, kThreads, bytes(), target.stream>>>(p);
  check_launch("latent_to_rgb");
}

template <typename S, typename R>
void map(const S& s, R* out, int64_t frames, const Target& target) {
  using T = typename S::Element;
  MapParams<S, R> p;
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
    if (vectors) map_kernel<S, R, V><<<grid(frames * s.plane / V), kThreads, 0, target.stream>>>(p);
  }
  if (!vectors) map_kernel<S, R, 1><<<grid(frames * s.plane), kThreads, 0, target.stream>>>(p);
  check_launch("latent_to_rgb");
}

template <typename R, typename S>
void show(const S& s, const View& out, int64_t frames, const Target& target) {
  const int64_t rows = out.size(2), columns = out.size(3);
  R* const to = mutable_data<R>(out);
  if (rows == s.height && columns == s.width) return map(s, to, frames, target);
  if constexpr (std::is_same_v<R, uint8_t> && sizeof(typename S::Element) <= 4) {
    switch (factor_of(s, rows, columns, to)) {
      case 2:
        return enlarge<S, 2>(s, to, frames, target);
      case 4:
        return enlarge<S, 4>(s, to, frames, target);
      case 8:
        return enlarge<S, 8>(s, to, frames, target);
      case 16:
        return enlarge<S, 16>(s, to, frames, target);
    }
  }
  sample(s, to, frames, rows, columns, target);
}

}  // namespace

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
      show<uint8_t>(source, out, frames, target);
    } else {
      show<C>(source, out, frames, target);
    }
  });
}

void enlarge_planes(const float* planes, int64_t batch, int64_t frames, int64_t height, int64_t width,
                    const View& out) {
  const int64_t plane = height * width;
  const Source<float, true> source{planes,
                                   nullptr,
                                   nullptr,
                                   plane,
                                   frames * plane,
                                   static_cast<uint32_t>(frames),
                                   3,
                                   static_cast<int>(height),
                                   static_cast<int>(width)};
  show<uint8_t>(source, out, batch * frames, Target(out));
}

}  // namespace latentfast::cuda

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) {
  m.impl("latent_to_rgb", LATENTFAST_BOX(latentfast::cuda::latent_to_rgb));
}
