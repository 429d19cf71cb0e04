// heatmap_to_mask: each heat map by itself, from its range to its mask, while it is in a cache.
//
// The enlargement is made dimension by dimension, so a row or a plane is mixed of two by one loop. The
// quantile needs no order but of the elements near it: a histogram over [0, 1] says in which of its bins the
// wanted rank lies, and only that bin's elements are partitioned.
#include <cmath>
#include <limits>

#include "common/stable.h"
#include "cpu/rows.h"

namespace latentfast {
namespace {

// Where an element of an enlarged dimension lies between two of the given one (align_corners=False).
struct Between {
  int64_t first, second;
  double share;  // of the second

  Between(int64_t i, int64_t from, int64_t to) {
    const double at = std::max(0.0, (i + 0.5) * from / to - 0.5);
    first = std::min(static_cast<int64_t>(at), from - 1);
    second = std::min(first + 1, from - 1);
    share = at - first;
  }
};

struct Grid {
  int64_t t, h, w;
  int64_t plane() const { return h * w; }
  int64_t size() const { return t * h * w; }
};

struct Wish {
  Grid grid, size;
  double threshold, quantile, softness;
  int64_t dilate;
  std::vector<double> weights;  // of the Gaussian over time
};

std::vector<double> gaussian(double sigma) {
  if (sigma == 0) return {1.0};
  const int64_t radius = static_cast<int64_t>(std::ceil(3 * sigma));
  std::vector<double> weights;
  double total = 0;
  for (int64_t i = -radius; i <= radius; ++i) {
    weights.push_back(std::exp(-0.5 * (i / sigma) * (i / sigma)));
    total += weights.back();
  }
  for (double& weight : weights) weight /= total;
  return weights;
}

template <typename C>
struct Maker {
  const Wish& wish;

  // Loops take at most kTile elements, rows of them any number.
  template <typename F>
  static void in_tiles(int64_t n, F&& f) {
    for (int64_t at = 0; at < n; at += kTile) f(at, static_cast<int>(std::min<int64_t>(kTile, n - at)));
  }

  static void mix(const C* a, const C* b, int64_t n, double share, C* out) {
    const C wb = static_cast<C>(share), wa = static_cast<C>(1 - share);
    in_tiles(n, [&](int64_t at, int count) { loops_of<C>().mix(a + at, b + at, count, wa, wb, out + at); });
  }

  // The map in [0, 1]; false if it holds a NaN or an infinity.
  bool normalise(const C* heat, std::vector<C>& x) const {
    C low = heat[0], high = heat[0];
    C none = 0;  // NaN once something is not finite
    for (const C value : std::span(heat, wish.grid.size())) {
      low = value < low ? value : low;
      high = value > high ? value : high;
      none += value * 0;
    }
    const C span = high - low;
    if (!(none == 0) || !std::isfinite(span)) return false;
    x.resize(wish.grid.size());
    for (size_t i = 0; i < x.size(); ++i) x[i] = span > 0 ? (heat[i] - low) / span : C(0);
    return true;
  }

  std::vector<C> smoothed(std::vector<C> x) const {
    if (wish.weights.size() == 1) return x;
    const int64_t plane = wish.grid.plane(), radius = static_cast<int64_t>(wish.weights.size() / 2);
    std::vector<C> out(x.size(), C(0));
    for (int64_t t = 0; t < wish.grid.t; ++t) {
      for (int64_t i = -radius; i <= radius; ++i) {
        const C* from = x.data() + std::clamp<int64_t>(t + i, 0, wish.grid.t - 1) * plane;
        const C weight = static_cast<C>(wish.weights[i + radius]);
        in_tiles(plane, [&](int64_t at, int count) {
          loops_of<C>().add_scaled(from + at, count, weight, out.data() + t * plane + at);
        });
      }
    }
    return out;
  }

  void enlarge(const std::vector<C>& x, C* out) const {
    const Grid &from = wish.grid, &to = wish.size;
    std::vector<C> wide(from.h * to.w), planes(from.t * to.plane());
    std::vector<Between> columns;
    for (int64_t i = 0; i < to.w; ++i) columns.emplace_back(i, from.w, to.w);
    for (int64_t t = 0; t < from.t; ++t) {
      for (int64_t row = 0; row < from.h; ++row) {
        const C* line = x.data() + (t * from.h + row) * from.w;
        for (int64_t i = 0; i < to.w; ++i) {
          const Between& at = columns[i];
          wide[row * to.w + i] =
              static_cast<C>(1 - at.share) * line[at.first] + static_cast<C>(at.share) * line[at.second];
        }
      }
      for (int64_t row = 0; row < to.h; ++row) {
        const Between at(row, from.h, to.h);
        mix(wide.data() + at.first * to.w, wide.data() + at.second * to.w, to.w, at.share,
            planes.data() + (t * to.h + row) * to.w);
      }
    }
    for (int64_t t = 0; t < to.t; ++t) {
      const Between at(t, from.t, to.t);
      mix(planes.data() + at.first * to.plane(), planes.data() + at.second * to.plane(), to.plane(), at.share,
          out + t * to.plane());
    }
  }

  // The largest of each row's neighbours, then of each column's.
  void dilate(C* map) const {
    const auto [frames, height, width] = wish.size;
    std::vector<C> across(height * width);
    for (int64_t t = 0; t < frames; ++t) {
      C* plane = map + t * height * width;
      for (int64_t row = 0; row < height; ++row) {
        const C* line = plane + row * width;
        for (int64_t i = 0; i < width; ++i) {
          const int64_t begin = std::max<int64_t>(0, i - wish.dilate),
                        end = std::min(width, i + wish.dilate + 1);
          across[row * width + i] = *std::max_element(line + begin, line + end);
        }
      }
      for (int64_t row = 0; row < height; ++row) {
        const int64_t begin = std::max<int64_t>(0, row - wish.dilate);
        const int64_t end = std::min(height, row + wish.dilate + 1);
        C* line = plane + row * width;
        std::copy_n(across.data() + begin * width, width, line);
        for (int64_t other = begin + 1; other < end; ++other) {
          const C* next = across.data() + other * width;
          for (int64_t i = 0; i < width; ++i) line[i] = next[i] > line[i] ? next[i] : line[i];
        }
      }
    }
  }

  C quantile(const C* map) const {
    constexpr int kBins = 4096;
    const auto bin = [](C value) { return std::min(kBins - 1, static_cast<int>(value * kBins)); };
    const std::span<const C> all(map, wish.size.size());
    std::vector<int64_t> counts(kBins, 0);
    for (const C value : all) ++counts[bin(value)];
    const double rank = wish.quantile * static_cast<double>(all.size() - 1);
    int64_t left = static_cast<int64_t>(rank);
    const double share = rank - static_cast<double>(left);
    int wanted = 0;
    while (left >= counts[wanted]) left -= counts[wanted++];
    std::vector<C> near;
    near.reserve(counts[wanted]);
    C next = std::numeric_limits<C>::infinity();  // the least beyond the bin
    for (const C value : all) {
      const int at = bin(value);
      if (at == wanted) near.push_back(value);
      if (at > wanted && value < next) next = value;
    }
    std::nth_element(near.begin(), near.begin() + left, near.end());
    const C below = near[left];
    const C above = left + 1 < counts[wanted] ? *std::min_element(near.begin() + left + 1, near.end()) : next;
    return std::isinf(above) ? below : below + static_cast<C>(share) * (above - below);
  }

  void compare(C* map, C limit) const {
    const C softness = static_cast<C>(wish.softness);
    for (C& value : std::span(map, wish.size.size())) {
      if (softness > 0) {
        const C u = std::clamp<C>((value - limit) / softness + C(0.5), 0, 1);
        value = u * u * (3 - 2 * u);
      } else {
        value = value > limit ? C(1) : C(0);
      }
    }
  }

  void make(const C* heat, C* out) const {
    std::vector<C> x;
    if (!normalise(heat, x)) {
      std::fill_n(out, wish.size.size(), std::numeric_limits<C>::quiet_NaN());
      return;
    }
    enlarge(smoothed(std::move(x)), out);
    if (wish.dilate > 0) dilate(out);
    if (!std::isnan(wish.quantile)) {
      compare(out, quantile(out));
    } else if (!std::isnan(wish.threshold)) {
      compare(out, static_cast<C>(wish.threshold));
    }
  }
};

}  // namespace

void heatmap_to_mask(const View& heat, std::span<const int64_t> grid, double threshold, double quantile,
                     double softness, int64_t dilate, double smooth_time, const View& out) {
  check_contiguous(heat, "heat");
  check_contiguous(out, "out");
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(grid.size() == 3 && grid[0] * grid[1] * grid[2] == heat.size(2),
                  "grid must be that of heat");
  const Wish wish{{grid[0], grid[1], grid[2]},
                  {out.size(2), out.size(3), out.size(4)},
                  threshold,
                  quantile,
                  softness,
                  dilate,
                  gaussian(smooth_time)};
  dispatch_wide(heat.scalar_type(), "heatmap_to_mask", [&]<typename C>() {
    const C* from = data<C>(heat);
    C* to = mutable_data<C>(out);
    parallel(out.size(0) * out.size(1), wish.size.size(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Maker<C>{wish}.make(from + i * wish.grid.size(), to + i * wish.size.size());
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CPU, m) { m.impl("heatmap_to_mask", LATENTFAST_BOX(heatmap_to_mask)); }

}  // namespace latentfast
