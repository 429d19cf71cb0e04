// stitch: the seams of tiled decoding, one launch. The specification is latentfast/reference/tiles.py.
//
// Memory bounds it: most of the result lies in one tile and is a copy; in the seams two, four or (with
// temporal tiles) eight tiles meet. What all frames and channels have in common is where the tiles lie: so a
// thread keeps its place in a frame, a pack of 16 bytes, finds its tiles and their weights once, and walks
// over the frames, run by run of those that lie in the same temporal tiles. A warp is 8 packs wide and 4 rows
// high: seams mostly end between warps (64 columns of a half type), and each row of it is one 128-byte line.
// Rows that are no multiple of a pack, unaligned pointers, and double go by the element.
//
// In sequential order each product and each sum is rounded to the tiles' dtype, as diffusers' are, so nothing
// may be contracted. The tile above was blended to its own left before this one is blended into it, hence the
// corner. Tiles' pointers and sizes go to the kernel by value; if there are too many, through device memory.
#include <vector>

#include "../common/tiles.h"
#include "columns.cuh"
#include "upload.cuh"

namespace latentfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kByValue = 400;    // numbers: with the rest below the 4 KB that a kernel's parameters may have
constexpr int kMostFrames = 16;  // that a thread walks over

// Of the table, for each tile along a dimension; the tiles' pointers follow.
enum Entry : int { kSize, kExtent, kStart, kEntries };

template <typename T>
struct StitchParams {
  T* out;
  const int64_t* far;                     // the table in device memory, or null: `near`
  int64_t planes, frames, height, width;  // of the result; planes: samples × channels
  int frames_each, blocks_across;
  int count[3];  // tiles along each dimension
  bool clamps;
  Wide<T> low, high;
  int64_t near[kByValue];

  __device__ __forceinline__ int64_t entry(int i) const { return far == nullptr ? near[i] : __ldg(far + i); }
};

// Where a position of the result lies along a dimension: in tile k at `at`, and, if `blended`, in the one
// before at `before` as well.
template <typename C>
struct Place {
  int k;
  int64_t at, size, before, size_before;
  bool blended;
};

template <typename C, typename T>
__device__ __forceinline__ Place<C> locate(const StitchParams<T>& p, int d, int64_t position) {
  int first = 0;
  for (int i = 0; i < d; ++i) first += p.count[i];
  const auto entry = [&](int k, Entry what) { return p.entry(kEntries * (first + k) + what); };
  Place<C> place;
  place.k = 0;
  while (place.k + 1 < p.count[d] && entry(place.k + 1, kStart) <= position) ++place.k;
  place.at = position - entry(place.k, kStart);
  place.size = entry(place.k, kSize);
  place.blended = place.at < entry(place.k, kExtent);
  place.before = place.blended ? position - entry(place.k - 1, kStart) : 0;
  place.size_before = place.blended ? entry(place.k - 1, kSize) : 0;
  return place;
}

// A tile's weight `at` of `extent`, in float64 as Python's; the rest is that of the tile before.
template <bool kRound>
__device__ __forceinline__ double weight_at(int64_t at, int64_t extent) {
  return (static_cast<double>(at) + (kRound ? 0.0 : 0.5)) / static_cast<double>(extent);
}

template <typename C>
struct Weight {
  C own, rest;
};

template <bool kRound, typename C, typename T>
__device__ __forceinline__ Weight<C> weight_of(const StitchParams<T>& p, int d, const Place<C>& place,
                                               int v = 0) {
  int first = place.k;
  for (int i = 0; i < d; ++i) first += p.count[i];
  const double w = weight_at<kRound>(place.at + v, p.entry(kEntries * first + kExtent));
  return {static_cast<C>(w), static_cast<C>(1.0 - w)};
}

__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float sum(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double sum(double a, double b) { return __dadd_rn(a, b); }

template <typename T, bool kRound>
__device__ __forceinline__ Wide<T> rounded(Wide<T> x) {
  return kRound ? widen(narrow<T>(x)) : x;
}

template <typename T, bool kRound>
__device__ __forceinline__ Wide<T> mixed(Wide<T> before, Wide<T> own, const Weight<Wide<T>>& w) {
  return rounded<T, kRound>(
      sum(rounded<T, kRound>(product(before, w.rest)), rounded<T, kRound>(product(own, w.own))));
}

// The tiles that meet at a thread's place, each with the distance from a frame to the next.
template <typename T>
struct Corner {
  const T *own, *left, *above, *both;
  int64_t own_step, left_step, above_step, both_step;

  template <typename C>
  __device__ __forceinline__ Corner(const StitchParams<T>& p, int k, const Place<C>& y, const Place<C>& x) {
    const int first = kEntries * (p.count[0] + p.count[1] + p.count[2]);
    const auto tile = [&](int i, int j) {
      return reinterpret_cast<const T*>(p.entry(first + (k * p.count[1] + i) * p.count[2] + j));
    };
    own = tile(y.k, x.k) + y.at * x.size + x.at;
    own_step = y.size * x.size;
    if (x.blended) {
      left = tile(y.k, x.k - 1) + y.at * x.size_before + x.before;
      left_step = y.size * x.size_before;
    }
    if (y.blended) {
      above = tile(y.k - 1, x.k) + y.before * x.size + x.at;
      above_step = y.size_before * x.size;
    }
    if (x.blended && y.blended) {
      both = tile(y.k - 1, x.k - 1) + y.before * x.size_before + x.before;
      both_step = y.size_before * x.size_before;
    }
  }
};

template <typename T, int V, bool kY, bool kX>
struct Loaded {
  Raw<T, V> own, left, above, both;

  __device__ __forceinline__ void load(const Corner<T>& from, int64_t frame) {
    load_raw(own, from.own + frame * from.own_step);
    if constexpr (kX) load_raw(left, from.left + frame * from.left_step);
    if constexpr (kY) load_raw(above, from.above + frame * from.above_step);
    if constexpr (kY && kX) load_raw(both, from.both + frame * from.both_step);
  }

  template <bool kRound>
  __device__ __forceinline__ void mix(const Weight<Wide<T>>& wy, const Weight<Wide<T>> (&wx)[V],
                                      Wide<T> (&value)[V]) const {
    widen_raw(own, value);
    [[maybe_unused]] Wide<T> corner[V];
    if constexpr (kY && kX) widen_raw(both, corner);
    if constexpr (kY) {
      Wide<T> x[V];
      widen_raw(above, x);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (kX && kRound) x[v] = mixed<T, kRound>(corner[v], x[v], wx[v]);
        value[v] = mixed<T, kRound>(x[v], value[v], wy);
      }
    }
    if constexpr (kX) {
      Wide<T> x[V];
      widen_raw(left, x);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if constexpr (kY) x[v] = mixed<T, kRound>(corner[v], x[v], wy);
        value[v] = mixed<T, kRound>(x[v], value[v], wx[v]);
      }
    }
  }
};

template <typename T, int V>
__device__ __forceinline__ void store_clamped(const StitchParams<T>& p, T* to, Wide<T> (&value)[V]) {
  if (p.clamps) {
#pragma unroll
    for (int v = 0; v < V; ++v) {  // as torch does: what is clamped has been rounded; NaN stays
      const Wide<T> x = widen(narrow<T>(value[v]));
      value[v] = x < p.low ? p.low : x > p.high ? p.high : x;
    }
  }
  store_narrow(to, value);
}

// A copy has its tile's bits.
template <typename T, int V>
__device__ __forceinline__ void store_raw(T* to, const Raw<T, V>& raw) {
  if constexpr (V == 1) {
    *to = raw.units[0];
  } else {
    store_once(to, raw.units[0]);
  }
}

// The frames of the result that a thread walks over: `left` from frame t of a plane on.
struct Frames {
  int64_t left, plane, t;
};

// How many of them lie in the same temporal tiles in the same way, one after the other in each.
template <typename C, typename T>
__device__ __forceinline__ int64_t run_of(const StitchParams<T>& p, const Frames& frames,
                                          const Place<C>& place) {
  if (p.count[0] == 1) return frames.left;  // the tile's planes follow one another as the result's do
  const auto entry = [&](int k, Entry what) { return p.entry(kEntries * k + what); };
  int64_t end = p.frames;
  if (place.blended) {
    end = entry(place.k, kStart) + entry(place.k, kExtent);
  } else if (place.k + 1 < p.count[0]) {
    end = entry(place.k + 1, kStart);
  }
  return min(frames.left, end - frames.t);
}

// U frames are in flight together.
template <typename T, int V, bool kRound, bool kY, bool kX, int U>
__device__ __forceinline__ void walk(const StitchParams<T>& p, Frames frames, const Place<Wide<T>>& y,
                                     const Place<Wide<T>>& x, T* out) {
  using C = Wide<T>;
  Weight<C> wy{}, wx[V] = {};
  if constexpr (kY) wy = weight_of<kRound>(p, 1, y);
  if constexpr (kX) {
#pragma unroll
    for (int v = 0; v < V; ++v) wx[v] = weight_of<kRound>(p, 2, x, v);
  }
  const int64_t out_step = p.height * p.width;
  while (frames.left > 0) {
    const Place<C> t = locate<C>(p, 0, frames.t);
    const int64_t run = run_of(p, frames, t);
    const Corner<T> own(p, t.k, y, x);
    int64_t at = frames.plane * t.size + t.at, left = run;
    if (!t.blended) {
      const auto batch = [&]<int N>() {
        Loaded<T, V, kY, kX> loaded[N];
#pragma unroll
        for (int u = 0; u < N; ++u) loaded[u].load(own, at++);
#pragma unroll
        for (int u = 0; u < N; ++u) {
          if (!kY && !kX && !p.clamps) {
            store_raw(out, loaded[u].own);
          } else {
            C value[V];
            loaded[u].template mix<kRound>(wy, wx, value);
            store_clamped(p, out, value);
          }
          out += out_step;
        }
      };
      for (; left >= U; left -= U) batch.template operator()<U>();
      for (; left > 0; --left) batch.template operator()<1>();
    } else {
      const Corner<T> earlier(p, t.k - 1, y, x);
      int64_t before = frames.plane * t.size_before + t.before;
      for (int frame = 0; left > 0; --left) {
        Loaded<T, V, kY, kX> loaded, loaded_before;
        loaded.load(own, at++);
        loaded_before.load(earlier, before++);
        C value[V], value_before[V];
        loaded.template mix<kRound>(wy, wx, value);
        loaded_before.template mix<kRound>(wy, wx, value_before);
        const Weight<C> wt = weight_of<kRound>(p, 0, t, frame++);
#pragma unroll
        for (int v = 0; v < V; ++v) value[v] = mixed<T, kRound>(value_before[v], value[v], wt);
        store_clamped(p, out, value);
        out += out_step;
      }
    }
    frames.left -= run;
    frames.t += run;
    if (frames.t >= p.frames) {  // beyond only with one temporal tile, when all is done
      frames.t = 0;
      ++frames.plane;
    }
  }
}

// Packs or elements that a warp is wide.
template <int V>
constexpr int kAcross = V == 1 ? 32 : 8;

template <typename T, int V, bool kRound>
__global__ void __launch_bounds__(kThreads, 2) stitch_kernel(const __grid_constant__ StitchParams<T> p) {
  using C = Wide<T>;
  constexpr int kDown = kThreads / kAcross<V>;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column =
      (static_cast<int64_t>(blockIdx.x % p.blocks_across) * kAcross<V> + thread % kAcross<V>)*V;
  const int64_t row = static_cast<int64_t>(blockIdx.x / p.blocks_across) * kDown + thread / kAcross<V>;
  if (column >= p.width || row >= p.height) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * p.frames_each, all = p.planes * p.frames;
  const Frames frames{begin + p.frames_each < all ? p.frames_each : all - begin, begin / p.frames,
                      begin % p.frames};
  const Place<C> y = locate<C>(p, 1, row), x = locate<C>(p, 2, column);
  T* const out = p.out + (begin * p.height + row) * p.width + column;
  const auto go = [&]<bool kY, bool kX, int U>() { walk<T, V, kRound, kY, kX, U>(p, frames, y, x, out); };
  if (y.blended) {
    x.blended ? go.template operator()<true, true, 1>() : go.template operator()<true, false, 2>();
  } else {
    x.blended ? go.template operator()<false, true, 2>() : go.template operator()<false, false, 4>();
  }
}

// Whether every row of every tile and of the result, and every seam, begins at a pack of V elements.
bool in_packs(std::span<const View> tiles, const TileGrid& layout, const View& out, int64_t V) {
  const TileAxis& columns = layout.axis[2];
  const auto whole = [V](int64_t n) { return n % V == 0; };
  return whole(out.size(4)) && aligned16(out.const_data_ptr()) &&
         std::all_of(columns.size.begin(), columns.size.end(), whole) &&
         std::all_of(columns.extent.begin(), columns.extent.end(), whole) &&
         std::all_of(tiles.begin(), tiles.end(), [](const View& x) { return aligned16(x.const_data_ptr()); });
}

std::vector<int64_t> table_of(std::span<const View> tiles, const TileGrid& layout) {
  std::vector<int64_t> table;
  for (const TileAxis& axis : layout.axis) {
    for (int64_t k = 0; k < axis.count(); ++k) {
      table.insert(table.end(), {axis.size[k], axis.extent[k], axis.start[k]});
    }
  }
  for (const View& tile : tiles) table.push_back(reinterpret_cast<int64_t>(tile.const_data_ptr()));
  return table;
}

template <typename T, int V>
void launch(StitchParams<T>& p, Seam seam, const Target& target) {
  constexpr int kDown = kThreads / kAcross<V>;
  const int64_t across = ceil_div<int64_t>(p.width, kAcross<V> * V),
                down = ceil_div<int64_t>(p.height, kDown);
  const int64_t all = p.planes * p.frames;
  // enough blocks for every multiprocessor, and no more of them than a grid may have
  const int64_t wanted = ceil_div<int64_t>(16 * target.device.multiprocessors, across * down);
  const int64_t each =
      std::max(std::clamp<int64_t>(all / wanted, 1, kMostFrames), ceil_div<int64_t>(all, 65535));
  p.frames_each = static_cast<int>(each);
  p.blocks_across = static_cast<int>(across);
  const dim3 grid(static_cast<unsigned>(across * down), static_cast<unsigned>(ceil_div(all, each)));
  const auto run = [&](auto kernel) {
    kernel<<<grid, kThreads, 0, target.stream>>>(p);
    check_launch("stitch");
  };
  seam == Seam::sequential ? run(stitch_kernel<T, V, true>) : run(stitch_kernel<T, V, false>);
}

}  // namespace

static void stitch(std::span<const View> tiles, std::span<const int64_t> grid,
                   std::span<const int64_t> overlap, int64_t kind, std::span<const double> clamp,
                   const View& out) {
  check_contiguous(out, "out");
  const TileGrid layout(tiles, grid, overlap, out);
  if (out.numel() == 0) return;
  const Target target(out);
  const std::vector<int64_t> table = table_of(tiles, layout);
  const bool far = table.size() > kByValue;
  const Workspace uploaded(target, far ? static_cast<int64_t>(table.size() * sizeof(int64_t)) : 0);
  if (far) upload(std::span<const int64_t>(table), static_cast<int64_t*>(uploaded.data()), target.stream);
  dispatch_floating(out.scalar_type(), "stitch", [&]<typename T>() {
    StitchParams<T> p;
    p.out = mutable_data<T>(out);
    p.far = far ? static_cast<const int64_t*>(uploaded.data()) : nullptr;
    if (!far) std::copy(table.begin(), table.end(), p.near);
    p.planes = layout.planes;
    p.frames = out.size(2);
    p.height = out.size(3);
    p.width = out.size(4);
    for (int d = 0; d < 3; ++d) p.count[d] = static_cast<int>(layout.axis[d].count());
    p.clamps = !clamp.empty();
    p.low = p.clamps ? static_cast<Wide<T>>(clamp[0]) : 0;
    p.high = p.clamps ? static_cast<Wide<T>>(clamp[1]) : 0;
    if constexpr (sizeof(T) < 8) {
      if (in_packs(tiles, layout, out, kPack<T>)) {
        return launch<T, kPack<T>>(p, static_cast<Seam>(kind), target);
      }
    }
    launch<T, 1>(p, static_cast<Seam>(kind), target);
  });
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) { m.impl("stitch", LATENTFAST_BOX(stitch)); }

}  // namespace latentfast::cuda
