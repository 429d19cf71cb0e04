// heatmap_to_mask: each heat map by itself, from its range to its mask, while it is in a cache. Threads take
// a map each, or share the frames of one where there are fewer maps than threads. No sum is split.
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
    const int64_t plane = wish.grid.plane();
    struct Range {
      C low, high;
      C none;  // NaN once something is not finite
    };
    std::vector<Range> ranges(wish.grid.t);
    parallel(wish.grid.t, plane, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const C* frame = heat + t * plane;
        Range range{frame[0], frame[0], 0};
        for (const C value : std::span(frame, plane)) {
          range.low = value < range.low ? value : range.low;
          range.high = value > range.high ? value : range.high;
          range.none += value * 0;
        }
        ranges[t] = range;
      }
    });
    C low = ranges[0].low, high = ranges[0].high, none = 0;
    for (const Range& range : ranges) {
      low = range.low < low ? range.low : low;
      high = range.high > high ? range.high : high;
      none += range.none;
    }
    const C span = high - low;
    if (!(none == 0) || !std::isfinite(span)) return false;
    x.resize(wish.grid.size());
    parallel(wish.grid.t, plane, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * plane; i < end * plane; ++i) x[i] = span > 0 ? (heat[i] - low) / span : C(0);
    });
    return true;
  }

  std::vector<C> smoothed(std::vector<C> x) const {
    if (wish.weights.size() == 1) return x;
    const int64_t plane = wish.grid.plane(), radius = static_cast<int64_t>(wish.weights.size() / 2);
    std::vector<C> out(x.size(), C(0));
    parallel(wish.grid.t, plane * (2 * radius + 1), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t i = -radius; i <= radius; ++i) {
          const C* from = x.data() + std::clamp<int64_t>(t + i, 0, wish.grid.t - 1) * plane;
          const C weight = static_cast<C>(wish.weights[i + radius]);
          in_tiles(plane, [&](int64_t at, int count) {
            loops_of<C>().add_scaled(from + at, count, weight, out.data() + t * plane + at);
          });
        }
      }
    });
    return out;
  }

  // One given frame at the wanted height and width. `wide`: room for its rows, at the wanted width.
  void enlarge_frame(const C* frame, std::span<const Between> columns, C* wide, C* out) const {
    const Grid &from = wish.grid, &to = wish.size;
    for (int64_t row = 0; row < from.h; ++row) {
      const C* line = frame + row * from.w;
      for (int64_t i = 0; i < to.w; ++i) {
        const Between& at = columns[i];
        wide[row * to.w + i] =
            static_cast<C>(1 - at.share) * line[at.first] + static_cast<C>(at.share) * line[at.second];
      }
    }
    for (int64_t row = 0; row < to.h; ++row) {
      const Between at(row, from.h, to.h);
      mix(wide + at.first * to.w, wide + at.second * to.w, to.w, at.share, out + row * to.w);
    }
  }

  // Enlarged, and dilated.
  void enlarge(const std::vector<C>& x, C* out) const {
    const Grid &from = wish.grid, &to = wish.size;
    std::vector<C> planes(from.t * to.plane());
    std::vector<Between> columns;
    for (int64_t i = 0; i < to.w; ++i) columns.emplace_back(i, from.w, to.w);
    parallel(from.t, to.plane(), [&](int64_t begin, int64_t end) {
      std::vector<C> wide(from.h * to.w);
      for (int64_t t = begin; t < end; ++t) {
        enlarge_frame(x.data() + t * from.plane(), columns, wide.data(), planes.data() + t * to.plane());
      }
    });
    parallel(to.t, to.plane(), [&](int64_t begin, int64_t end) {
      std::vector<C> across(wish.dilate > 0 ? to.plane() : 0);
      for (int64_t t = begin; t < end; ++t) {
        const Between at(t, from.t, to.t);
        C* frame = out + t * to.plane();
        mix(planes.data() + at.first * to.plane(), planes.data() + at.second * to.plane(), to.plane(),
            at.share, frame);
        if (wish.dilate > 0) dilate(frame, across.data());
      }
    });
  }

  // The largest of each row's neighbours, then of each column's.
  void dilate(C* frame, C* across) const {
    const int64_t height = wish.size.h, width = wish.size.w, reach = wish.dilate;
    for (int64_t row = 0; row < height; ++row) {
      const C* line = frame + row * width;
      C* largest = across + row * width;
      std::copy_n(line, width, largest);
      for (int64_t away = 1; away <= std::min(reach, width - 1); ++away) {
        for (int64_t i = 0; i < width - away; ++i) {
          largest[i] = line[i + away] > largest[i] ? line[i + away] : largest[i];
        }
        for (int64_t i = away; i < width; ++i) {
          largest[i] = line[i - away] > largest[i] ? line[i - away] : largest[i];
        }
      }
    }
    for (int64_t row = 0; row < height; ++row) {
      const int64_t begin = std::max<int64_t>(0, row - reach), end = std::min(height, row + reach + 1);
      C* line = frame + row * width;
      std::copy_n(across + begin * width, width, line);
      for (int64_t other = begin + 1; other < end; ++other) {
        const C* next = across + other * width;
        for (int64_t i = 0; i < width; ++i) line[i] = next[i] > line[i] ? next[i] : line[i];
      }
    }
  }

  // Pieces of a map for threads to share, as many of any number of threads.
  template <typename F>
  void in_pieces(F&& f) const {
    const int64_t size = wish.size.size();
    parallel(pieces(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i, i * size / pieces(), (i + 1) * size / pieces());
    });
  }
  int64_t pieces() const { return std::clamp<int64_t>(wish.size.size() / kGrain, 1, 16); }

  static constexpr int kBins = 4096;
  struct Part {  // what one piece has
    std::vector<int64_t> counts;
    std::vector<C> near;  // what is in the wanted bin
    C next;               // the least beyond it
  };

  C quantile(const C* map) const {
    const auto bin = [](C value) { return std::min(kBins - 1, static_cast<int>(value * kBins)); };
    constexpr C kInfinity = std::numeric_limits<C>::infinity();
    std::vector<Part> parts(pieces(), Part{std::vector<int64_t>(kBins, 0), {}, kInfinity});
    in_pieces([&](int64_t i, int64_t begin, int64_t end) {
      int64_t* counts = parts[i].counts.data();
      for (int64_t at = begin; at < end; ++at) ++counts[bin(map[at])];
    });
    const double rank = wish.quantile * static_cast<double>(wish.size.size() - 1);
    int64_t left = static_cast<int64_t>(rank);
    const double share = rank - static_cast<double>(left);
    const auto count = [&](int of) {
      int64_t total = 0;
      for (const Part& part : parts) total += part.counts[of];
      return total;
    };
    int wanted = 0;
    for (int64_t here = count(0); left >= here; here = count(++wanted)) left -= here;
    in_pieces([&](int64_t i, int64_t begin, int64_t end) {
      Part& part = parts[i];
      part.near.reserve(part.counts[wanted]);
      for (int64_t at = begin; at < end; ++at) {
        const C value = map[at];
        const int own = bin(value);
        if (own == wanted) part.near.push_back(value);
        if (own > wanted && value < part.next) part.next = value;
      }
    });
    std::vector<C> near;
    near.reserve(count(wanted));
    C next = kInfinity;
    for (const Part& part : parts) {
      near.insert(near.end(), part.near.begin(), part.near.end());
      next = std::min(next, part.next);
    }
    std::nth_element(near.begin(), near.begin() + left, near.end());
    const C below = near[left];
    const bool last = left + 1 == static_cast<int64_t>(near.size());
    const C above = last ? next : *std::min_element(near.begin() + left + 1, near.end());
    return std::isinf(above) ? below : below + static_cast<C>(share) * (above - below);
  }

  void compare(C* map, C limit) const {
    const C softness = static_cast<C>(wish.softness);
    in_pieces([&](int64_t, int64_t begin, int64_t end) {
      if (softness > 0) {
        for (int64_t i = begin; i < end; ++i) {
          const C u = std::clamp<C>((map[i] - limit) / softness + C(0.5), 0, 1);
          map[i] = u * u * (3 - 2 * u);
        }
      } else {
        for (int64_t i = begin; i < end; ++i) map[i] = map[i] > limit ? C(1) : C(0);
      }
    });
  }

  void make(const C* heat, C* out) const {
    std::vector<C> x;
    if (!normalise(heat, x)) {
      std::fill_n(out, wish.size.size(), std::numeric_limits<C>::quiet_NaN());
      return;
    }
    enlarge(smoothed(std::move(x)), out);
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
    const int64_t maps = out.size(0) * out.size(1);
    const auto make = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Maker<C>{wish}.make(from + i * wish.grid.size(), to + i * wish.size.size());
      }
    };
    if (maps < static_cast<int64_t>(torch::stable::get_num_threads())) {
      make(0, maps);
    } else {  // what a thread would share with others it does alone in here
      parallel(maps, wish.size.size(), make);
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CPU, m) { m.impl("heatmap_to_mask", LATENTFAST_BOX(heatmap_to_mask)); }

}  // namespace latentfast
