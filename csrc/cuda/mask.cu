// heatmap_to_mask on CUDA. The specification is latentfast/reference/mask.py.
//
// All maps in one cooperative launch: a few megabytes, which stay in L2. Time goes into waiting, so the
// phases are few, and the grid meets between them.
//   range     the least and largest of each block's piece of a map; what is counted later is set to 0
//   smooth    normalised, and smoothed and enlarged over time: one sum of a few given frames for each frame
//             wanted. Over time first, where the planes are still small.
//   enlarge   in h and w, and the largest within reach; where that is far, along rows, then along columns
//   count     for a quantile: radix selection (radix_select.cuh), its first digits while the map is made
//   compare   with the limit
// Blocks are dealt out to maps evenly. No result depends on how: neither the largest of some numbers nor a
// count depends on an order, and every sum is made by one thread.
#include <cooperative_groups.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "cooperative.cuh"
#include "radix_select.cuh"
#include "vector_sums.cuh"

namespace latentfast::cuda {
namespace {

constexpr int kMaskThreads = kSelectThreads, kWarps = kMaskThreads / 32;
// Dilation by more is made along rows, then along columns, with a meeting of the grid in between.
constexpr int kReachAtOnce = 1;

enum class Compare : int { nothing, threshold, quantile };

struct Grid {
  int t, h, w;
  __host__ __device__ int64_t plane() const { return static_cast<int64_t>(h) * w; }
  __host__ __device__ int64_t size() const { return t * plane(); }
};

// Where an element of an enlarged dimension lies between two of the given one (align_corners=False).
template <typename C>
struct alignas(16) Between {
  int first, second;
  C rest, share;  // of the first and of the second

  __device__ __forceinline__ Between(int i, double ratio, int from) {
    const double at = fmax(0.0, (i + 0.5) * ratio - 0.5);
    first = min(static_cast<int>(at), from - 1);
    second = min(first + 1, from - 1);
    share = static_cast<C>(at - first);
    rest = static_cast<C>(1 - (at - first));
  }
};

template <typename C>
struct MaskParams {
  const C* heat;
  C* out;
  C* ranges;                 // (maps, pieces, 2): the least and the largest
  C* shares;                 // (T, taps): a given frame's share in one that is wanted
  Between<C>* lines;         // (H)
  Between<C>* columns;       // (W)
  C* planes;                 // (maps, T, h, w): after `smooth`
  C* across;                 // (maps, T, H, W): dilated along rows; null: `enlarge` does all
  Selection<C>* selections;  // of each map; null: no quantile
  int64_t maps;
  int pieces;  // blocks that share a map
  Grid given, wanted;
  double per_t, per_h, per_w;  // given elements to one wanted
  double sigma, inverse;       // of the Gaussian: inverse·exp(−½(i/σ)²) for |i| ≤ radius
  int64_t radius;
  int taps, dilate;
  Compare compare;
  Count rank;  // of the element below the quantile
  C share;     // of the one above
  C threshold, softness;
  bool quads;  // out, and each row of it, can be read and written 16 bytes at a time
};

template <typename C>
struct Shared {
  SelectShared select;
  C range[2][kWarps];
};

template <typename C>
struct alignas(16) Quad {
  C x[4];
};

// The first given frame that has a share in a frame wanted.
__device__ __forceinline__ int64_t first_tap(int64_t before, int64_t radius) {
  return max(before - radius, int64_t(0));
}

// One block's part in one map.
template <typename C>
struct Piece {
  using Bits = typename Keys<C>::Bits;
  const MaskParams<C>& p;
  Shared<C>& shared;
  int64_t map;
  int piece;

  __device__ __forceinline__ C* out() const { return p.out + map * p.wanted.size(); }

  // f(i) for this thread's share of [0, count).
  template <typename F>
  __device__ __forceinline__ void each(int64_t count, F&& f) const {
    const int64_t step = static_cast<int64_t>(p.pieces) * kMaskThreads;
    for (int64_t i = static_cast<int64_t>(piece) * kMaskThreads + threadIdx.x; i < count; i += step) f(i);
  }

  static __device__ __forceinline__ void fold(C& low, C& high) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) {
      low = fmin(low, __shfl_xor_sync(0xffffffffu, low, i));
      high = fmax(high, __shfl_xor_sync(0xffffffffu, high, i));
    }
  }

  // The piece's range; an infinite largest where something is not finite.
  __device__ void find_range() const {
    constexpr C kInfinity = std::numeric_limits<C>::infinity();
    const C* const heat = p.heat + map * p.given.size();
    C low = kInfinity, high = -kInfinity;
    bool odd = false;
    each(p.given.size(), [&](int64_t i) {
      const C x = heat[i];
      odd |= !(x - x == 0);
      low = fmin(low, x);
      high = fmax(high, x);
    });
    if (odd) high = kInfinity;
    fold(low, high);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) {
      shared.range[0][warp] = low;
      shared.range[1][warp] = high;
    }
    __syncthreads();
    if (warp == 0) {
      low = shared.range[0][lane % kWarps];
      high = shared.range[1][lane % kWarps];
      fold(low, high);
      if (lane == 0) {
        C* const range = p.ranges + (map * p.pieces + piece) * 2;
        range[0] = low;
        range[1] = high;
      }
    }
    if (p.compare == Compare::quantile) {
      Selection<C>& selection = p.selections[map];
      each(Keys<C>::kLevels * kBins, [&](int64_t i) { selection.counts[0][i] = 0; });
      if (piece == 0 && threadIdx.x == 0) selection.beyond = ~Bits(0);
    }
    __syncthreads();
  }

  // The map's least value and its span, not finite where an element is not; by each warp.
  __device__ __forceinline__ void range(C& low, C& span) const {
    C high = -std::numeric_limits<C>::infinity();
    low = -high;
    const C* const ranges = p.ranges + map * p.pieces * 2;
    for (int i = threadIdx.x % 32; i < p.pieces; i += 32) {
      low = fmin(low, ranges[2 * i]);
      high = fmax(high, ranges[2 * i + 1]);
    }
    fold(low, high);
    span = high - low;
  }
  __device__ __forceinline__ bool spoilt() const {
    C low, span;
    range(low, span);
    return !isfinite(span);
  }

  __device__ void smooth() const {
    C low, span;
    range(low, span);
    const bool flat = !(span > 0 && isfinite(span));
    const int64_t plane = p.given.plane();
    const C* const heat = p.heat + map * p.given.size();
    C* const planes = p.planes + map * p.wanted.t * plane;
    each(p.wanted.t * plane, [&](int64_t i) {
      const int64_t t = quotient(i, plane);
      const Between<C> at(static_cast<int>(t), p.per_t, p.given.t);
      const int begin = static_cast<int>(first_tap(at.first, p.radius));
      const int count = static_cast<int>(min(at.second + p.radius + 1, int64_t(p.given.t))) - begin;
      const C* const shares = p.shares + t * p.taps;
      const C* const from = heat + begin * plane + (i - t * plane);
      C total = 0;
#pragma unroll 2
      for (int k = 0; k < count; ++k) total += shares[k] * (flat ? C(0) : (from[k * plane] - low) / span);
      planes[i] = total;
    });
  }

  // In h and w; each thread makes four neighbours of a row.
  __device__ void enlarge() const {
    const auto [frames, height, width] = p.wanted;
    const int quads = ceil_div(width, 4), reach = p.dilate, up = p.across == nullptr ? reach : 0;
    const bool none = spoilt();
    const C* const planes = p.planes + map * frames * p.given.plane();
    Counter counter{shared.select.counts};
    each(static_cast<int64_t>(frames) * height * quads, [&](int64_t i) {
      const int64_t row = quotient(i, quads);
      const int x = static_cast<int>(i - row * quads) * 4;
      const int t = static_cast<int>(quotient(row, height));
      const int y = static_cast<int>(row - static_cast<int64_t>(t) * height);
      const C* const plane = planes + t * p.given.plane();
      const int left = max(x - reach, 0), right = min(x + 3 + reach, width - 1);
      Quad<C> most{};  // nothing is less than 0
      for (int line = max(y - up, 0); line <= min(y + up, height - 1); ++line) {
        const Between<C> v = p.lines[line];
        const C* const a = plane + static_cast<int64_t>(v.first) * p.given.w;
        const C* const b = plane + static_cast<int64_t>(v.second) * p.given.w;
#pragma unroll 1
        for (int column = left; column <= right; ++column) {
          const Between<C> h = p.columns[column];
          const C value = v.rest * (h.rest * a[h.first] + h.share * a[h.second]) +
                          v.share * (h.rest * b[h.first] + h.share * b[h.second]);
          const int from = column - x;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (from - j <= reach && j - from <= reach) most.x[j] = fmax(most.x[j], value);
          }
        }
      }
      const int count = min(width - x, 4);
      if (p.across != nullptr) {
        store(p.across + map * p.wanted.size() + row * width + x, most, count);
      } else {
        finish(row * width + x, most, count, none, counter);
      }
    });
    if (p.across == nullptr && p.compare == Compare::quantile) selector().hand_in(counter, 0);
  }

  // The largest of each column's neighbours in `across`.
  __device__ void dilate_columns() const {
    const auto [frames, height, width] = p.wanted;
    const int quads = ceil_div(width, 4);
    const bool none = spoilt();
    const C* const across = p.across + map * p.wanted.size();
    Counter counter{shared.select.counts};
    each(static_cast<int64_t>(frames) * height * quads, [&](int64_t i) {
      const int64_t row = quotient(i, quads);
      const int x = static_cast<int>(i - row * quads) * 4;
      const int y = static_cast<int>(row - quotient(row, height) * height);
      const int count = min(width - x, 4);
      Quad<C> most{};
      const int64_t last = row + min(p.dilate, height - 1 - y);
      for (int64_t line = row - min(p.dilate, y); line <= last; ++line) {
        const Quad<C> other = load(across + line * width + x, count);
#pragma unroll
        for (int j = 0; j < 4; ++j) most.x[j] = fmax(most.x[j], other.x[j]);
      }
      finish(row * width + x, most, count, none, counter);
    });
    if (p.compare == Compare::quantile) selector().hand_in(counter, 0);
  }

  __device__ __forceinline__ Selector<C> selector() const {
    return {p.selections[map], shared.select, p.rank};
  }

  // Counts the digits of a level from 1 on.
  __device__ void count(int level) const {
    const Bits prefix = selector().begin(level, piece == 0);
    Bits beyond = ~Bits(0);
    Counter counter{shared.select.counts};
    each(ceil_div<int64_t>(p.wanted.size(), 4), [&](int64_t i) {
      const int n = static_cast<int>(min(p.wanted.size() - i * 4, int64_t(4)));
      const Quad<C> quad = load(out() + i * 4, n);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j < n) selector().add(quad.x[j], level, prefix, counter, beyond);
      }
    });
    selector().end(level, counter, beyond);
  }

  __device__ void compare_with_quantile() const {
    const C limit = selector().between(p.share);
    const bool none = spoilt();
    each(ceil_div<int64_t>(p.wanted.size(), 4), [&](int64_t i) {
      const int n = static_cast<int>(min(p.wanted.size() - i * 4, int64_t(4)));
      Quad<C> quad = load(out() + i * 4, n);
      compare(quad, limit, none);
      store(out() + i * 4, quad, n);
    });
  }

  // --- elements ---

  __device__ __forceinline__ Quad<C> load(const C* from, int count) const {
    if (p.quads) return *reinterpret_cast<const Quad<C>*>(from);
    Quad<C> quad{};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < count) quad.x[j] = from[j];
    }
    return quad;
  }

  __device__ __forceinline__ void store(C* to, const Quad<C>& quad, int count) const {
    if (p.quads) {
      *reinterpret_cast<Quad<C>*>(to) = quad;
      return;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < count) to[j] = quad.x[j];
    }
  }

  __device__ __forceinline__ void compare(Quad<C>& quad, C limit, bool none) const {
#pragma unroll
    for (C& x : quad.x) {
      if (p.softness > 0) {
        const C u = fmin(fmax((x - limit) / p.softness + C(0.5), C(0)), C(1));
        x = u * u * (3 - 2 * u);
      } else {
        x = x > limit ? C(1) : C(0);
      }
      if (none) x = std::numeric_limits<C>::quiet_NaN();
    }
  }

  // Neighbours of the map as it is compared; for a quantile they are counted first.
  __device__ __forceinline__ void finish(int64_t at, Quad<C>& quad, int count, bool none,
                                         Counter& counter) const {
    if (p.compare == Compare::quantile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j < count) counter.add(static_cast<unsigned>(Keys<C>::of(quad.x[j]) >> Keys<C>::shift(0)));
      }
    } else if (p.compare == Compare::threshold) {
      compare(quad, p.threshold, none);
    } else if (none) {
#pragma unroll
      for (C& x : quad.x) x = std::numeric_limits<C>::quiet_NaN();
    }
    store(out() + at, quad, count);
  }
};

// What is the same for all maps: between which lines and columns those wanted lie, and the shares of the
// given frames in those wanted; beyond its ends a clip stands still.
template <typename C>
__device__ void prepare(const MaskParams<C>& p) {
  // What falls to `frame` of the Gaussian around `centre`.
  const auto weight = [&](int64_t frame, int64_t centre) {
    const int64_t begin = frame == 0 ? -p.radius : max(frame - centre, -p.radius);
    const int64_t end = frame == p.given.t - 1 ? p.radius : min(frame - centre, p.radius);
    double total = 0;
    for (int64_t i = begin; i <= end; ++i) total += exp(-0.5 * (i / p.sigma) * (i / p.sigma));
    return p.inverse * total;
  };
  const int64_t step = static_cast<int64_t>(gridDim.x) * kMaskThreads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x;
  for (int64_t i = thread; i < p.wanted.h; i += step)
    p.lines[i] = Between<C>(static_cast<int>(i), p.per_h, p.given.h);
  for (int64_t i = thread; i < p.wanted.w; i += step)
    p.columns[i] = Between<C>(static_cast<int>(i), p.per_w, p.given.w);
  for (int64_t i = thread; i < static_cast<int64_t>(p.wanted.t) * p.taps; i += step) {
    const int64_t t = i / p.taps;
    const Between<double> at(static_cast<int>(t), p.per_t, p.given.t);
    const int64_t frame = first_tap(at.first, p.radius) + i - t * p.taps;
    if (frame >= p.given.t) continue;
    double share = at.rest * weight(frame, at.first);
    if (at.share > 0) share += at.share * weight(frame, at.second);
    p.shares[i] = static_cast<C>(share);
  }
}

template <typename C>
__global__ void __launch_bounds__(kMaskThreads, sizeof(C) == 4 ? 2 : 1)
    heatmap_to_mask_kernel(const __grid_constant__ MaskParams<C> p) {
  __shared__ Shared<C> shared;
  const auto for_maps = [&](auto&& f) {
    const int64_t groups = gridDim.x / p.pieces;
    const int piece = static_cast<int>(blockIdx.x % p.pieces);
    for (int64_t map = blockIdx.x / p.pieces; map < p.maps; map += groups) f(Piece<C>{p, shared, map, piece});
  };
  for (int bin = threadIdx.x; bin < kBins; bin += kMaskThreads) shared.select.counts[bin] = 0;
  prepare(p);
  for_maps([](const Piece<C>& piece) { piece.find_range(); });
  cooperative_groups::this_grid().sync();
  for_maps([](const Piece<C>& piece) { piece.smooth(); });
  cooperative_groups::this_grid().sync();
  for_maps([](const Piece<C>& piece) { piece.enlarge(); });
  if (p.across != nullptr) {
    cooperative_groups::this_grid().sync();
    for_maps([](const Piece<C>& piece) { piece.dilate_columns(); });
  }
  if (p.compare != Compare::quantile) return;
  for (int level = 1; level < Keys<C>::kLevels; ++level) {
    cooperative_groups::this_grid().sync();
    for_maps([=](const Piece<C>& piece) { piece.count(level); });
  }
  cooperative_groups::this_grid().sync();
  for_maps([](const Piece<C>& piece) { piece.compare_with_quantile(); });
}

// Rooms of a workspace, one after another, each at a multiple of 16 bytes.
class Rooms {
 public:
  template <typename X>
  int64_t add(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += ceil_div<int64_t>(count * static_cast<int64_t>(sizeof(X)), 16) * 16;
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

template <typename C>
void make_masks(const Target& target, MaskParams<C>& p) {
  const int64_t resident = resident_blocks<heatmap_to_mask_kernel<C>, kMaskThreads>(target);
  // no more blocks than have something to do
  const int64_t most = ceil_div<int64_t>(ceil_div<int64_t>(p.wanted.size(), 4), kMaskThreads);
  p.pieces = static_cast<int>(std::clamp<int64_t>(resident / p.maps, 1, most));
  const int64_t blocks = std::min(p.maps, resident / p.pieces) * p.pieces;
  Rooms rooms;
  const int64_t ranges = rooms.add<C>(p.maps * p.pieces * 2);
  const int64_t shares = rooms.add<C>(static_cast<int64_t>(p.wanted.t) * p.taps);
  const int64_t lines = rooms.add<Between<C>>(p.wanted.h), columns = rooms.add<Between<C>>(p.wanted.w);
  const int64_t planes = rooms.add<C>(p.maps * p.wanted.t * p.given.plane());
  const bool twice = p.dilate > kReachAtOnce;
  const int64_t across = rooms.add<C>(twice ? p.maps * p.wanted.size() : 0);
  const int64_t selections = rooms.add<Selection<C>>(p.compare == Compare::quantile ? p.maps : 0);
  const Workspace scratch(target, rooms.bytes());
  char* const base = static_cast<char*>(scratch.data());
  p.ranges = reinterpret_cast<C*>(base + ranges);
  p.shares = reinterpret_cast<C*>(base + shares);
  p.lines = reinterpret_cast<Between<C>*>(base + lines);
  p.columns = reinterpret_cast<Between<C>*>(base + columns);
  p.planes = reinterpret_cast<C*>(base + planes);
  p.across = twice ? reinterpret_cast<C*>(base + across) : nullptr;
  p.selections = reinterpret_cast<Selection<C>*>(base + selections);
  launch_together<heatmap_to_mask_kernel<C>, kMaskThreads>(p, blocks, target, "heatmap_to_mask");
}

void heatmap_to_mask(const View& heat, std::span<const int64_t> grid, double threshold, double quantile,
                     double softness, int64_t dilate, double smooth_time, const View& out) {
  check_contiguous(heat, "heat");
  check_contiguous(out, "out");
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(grid.size() == 3 && heat.dim() == 3 && grid[0] * grid[1] * grid[2] == heat.size(2),
                  "heatmap_to_mask: grid must be that of heat");
  STD_TORCH_CHECK(out.dtype == heat.dtype && out.dim() == 5, "heatmap_to_mask: out must have heat's dtype");
  const Target target(heat);
  dispatch_wide(heat.scalar_type(), "heatmap_to_mask", [&]<typename C>() {
    MaskParams<C> p{};
    p.heat = data<C>(heat);
    p.out = mutable_data<C>(out);
    p.maps = out.size(0) * out.size(1);
    const auto narrowed = [](int64_t t, int64_t h, int64_t w) {
      STD_TORCH_CHECK(std::max({t, h, w}) < INT32_MAX / 2, "heatmap_to_mask: a dimension is too long");
      return Grid{static_cast<int>(t), static_cast<int>(h), static_cast<int>(w)};
    };
    p.given = narrowed(grid[0], grid[1], grid[2]);
    p.wanted = narrowed(out.size(2), out.size(3), out.size(4));
    const auto ratio = [](int from, int to) { return static_cast<double>(from) / to; };
    p.per_t = ratio(p.given.t, p.wanted.t);
    p.per_h = ratio(p.given.h, p.wanted.h);
    p.per_w = ratio(p.given.w, p.wanted.w);
    p.radius = static_cast<int64_t>(std::ceil(3 * smooth_time));
    p.sigma = smooth_time > 0 ? smooth_time : 1.0;
    double total = 1;
    for (int64_t i = 1; i <= p.radius; ++i) total += 2 * std::exp(-0.5 * (i / p.sigma) * (i / p.sigma));
    p.inverse = 1 / total;
    p.taps = static_cast<int>(std::min<int64_t>(p.given.t, 2 * p.radius + 2));
    p.dilate = static_cast<int>(std::min<int64_t>(dilate, std::max(p.wanted.h, p.wanted.w)));
    p.softness = static_cast<C>(softness);
    if (!std::isnan(quantile)) {
      const double rank = quantile * static_cast<double>(p.wanted.size() - 1);
      p.compare = Compare::quantile;
      p.rank = static_cast<Count>(rank);
      p.share = static_cast<C>(rank - std::floor(rank));
    } else if (!std::isnan(threshold)) {
      p.compare = Compare::threshold;
      p.threshold = static_cast<C>(threshold);
    }
    p.quads = p.wanted.w % 4 == 0 && aligned16(p.out);
    make_masks(target, p);
  });
}

}  // namespace
}  // namespace latentfast::cuda

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) {
  m.impl("heatmap_to_mask", LATENTFAST_BOX(latentfast::cuda::heatmap_to_mask));
}
