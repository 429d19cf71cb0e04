// temporal_loss: every column of frames is walked once; its gradient is written as soon as its last
// difference is known.
//
// With f1[t] = first/Σw1 · w1[t] ρ'(d1[t]) and f2[t] likewise, the gradient of frame t is
// f1[t−1] − f1[t] + f2[t−2] − 2 f2[t−1] + f2[t]. Only the three newest rows of anything are kept.
#include <cstring>

#include "common/operators.h"
#include "cpu/rows.h"

namespace latentfast {
namespace {

// z as (samples, outer, frames, inner).
struct Clip {
  int64_t samples, outer, frames, inner;

  int64_t row(int64_t sample, int64_t outer_index, int64_t frame) const {
    return ((sample * outer + outer_index) * frames + frame) * inner;
  }
  int64_t sample_size() const { return outer * frames * inner; }
};

Clip clip_of(Shape shape, int frame_dim) {
  Clip clip{shape.sizes[0], 1, shape.sizes[frame_dim], 1};
  for (int d = 1; d < shape.dims; ++d) {
    if (d < frame_dim) clip.outer *= shape.sizes[d];
    if (d > frame_dim) clip.inner *= shape.sizes[d];
  }
  return clip;
}

// Σ w1 and Σ w2 of a sample.
struct Totals {
  double order[2] = {0.0, 0.0};
};

// Without a mask every weight is 1.
Totals count_differences(const Clip& clip) {
  const double columns = static_cast<double>(clip.outer) * static_cast<double>(clip.inner);
  return {{columns * std::max<int64_t>(clip.frames - 1, 0), columns * std::max<int64_t>(clip.frames - 2, 0)}};
}

// The mask's own elements are summed, then multiplied by how often each is used. One entry a sample, or one
// for all.
template <typename C, typename M>
std::vector<Totals> weigh_differences(const M* mask, Shape shape, Shape target, int frame_dim) {
  std::vector<int64_t> sizes(target.dims, 1);
  std::copy_n(shape.sizes, shape.dims, sizes.end() - shape.dims);
  const Clip own = clip_of({sizes.data(), target.dims}, frame_dim), full = clip_of(target, frame_dim);
  const int64_t starts = own.frames == 1 ? 1 : own.frames - 1;
  const bool still = own.frames == 1;  // one mask for all frames
  std::vector<double> partial(own.samples * own.outer * starts * 2, 0.0);
  const auto& loop = loops_of<C>();
  parallel(own.samples * own.outer * starts, own.inner, [&](int64_t begin, int64_t end) {
    Row<C> wide[3];
    Row<C> product;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i % starts;
      double lanes[2][kLanes] = {};
      const int64_t step = still ? 0 : own.inner;
      const M* row = mask + i / starts * own.frames * own.inner + t * step;
      for (int64_t j = 0; j < own.inner; j += kTile) {
        const int n = static_cast<int>(std::min<int64_t>(kTile, own.inner - j));
        const C* m0 = widen_to<C>(row + j, n, wide[0]);
        const C* m1 = widen_to<C>(row + step + j, n, wide[1]);
        loop.dot(m0, m1, n, lanes[0]);
        if (!still && t + 2 >= own.frames) continue;
        loop.multiply(m0, m1, n, product.values);
        loop.dot(product.values, widen_to<C>(row + 2 * step + j, n, wide[2]), n, lanes[1]);
      }
      for (int order = 0; order < 2; ++order) partial[2 * i + order] = add_lanes(lanes[order]);
    }
  });
  std::vector<Totals> totals(own.samples);
  const double columns =
      static_cast<double>(full.outer / own.outer) * static_cast<double>(full.inner / own.inner);
  for (int64_t b = 0; b < own.samples; ++b) {
    for (int order = 0; order < 2; ++order) {
      double total = 0.0;
      for (int64_t i = 0; i < own.outer * starts; ++i)
        total += partial[2 * (b * own.outer * starts + i) + order];
      totals[b].order[order] = total * columns * (still ? std::max<int64_t>(full.frames - 1 - order, 0) : 1);
    }
  }
  return totals;
}

template <typename T>
struct TemporalLoss {
  using C = Working<T>;
  using Rows = Row<C>[3];
  Clip clip;
  const T* z;
  const T* ref;  // null: none
  std::optional<Broadcast<C>> mask;
  double weight[2];  // first, second
  int norm;
  double eps, grad_scale;
  Output<T> grad;  // absent: not wanted

  // The penalties of one block of columns, added to `sums`; its gradient, if wanted. The common case: first
  // differences alone.
  void walk_first(int64_t sample, int64_t outer, int64_t column, int n, double total, double* sums) const {
    const auto& loop = loops_of<C>();
    const auto step = loop.first_step[norm][mask.has_value()];
    Row<C> x, slope, penalty, weights[2], nothing;
    Row<T> wide_z, wide_ref, wide_grad;
    double lanes[kLanes] = {};
    const C scale = static_cast<C>(weight[0] * grad_scale / total);
    std::fill_n(slope.values, n, C(0));
    if (ref == nullptr) std::fill_n(nothing.values, n, C(0));
    const C* mask_before = nullptr;
    int64_t before = 0;
    for (int64_t t = 0; t < clip.frames; ++t) {
      const int64_t at = clip.row(sample, outer, t) + column;
      const C* frame = widen(z + at, n, wide_z);
      const C* reference = ref == nullptr ? nothing.values : widen(ref + at, n, wide_ref);
      const C* mask_now = mask.has_value() ? mask->read(at, n, weights[t % 2].values) : nullptr;
      if (t == 0) {
        loop.subtract(frame, reference, n, x.values);
      } else {
        C* row = grad.begin(before, wide_grad);
        const int64_t ahead = kIsWide<T> ? clip.inner : 0;
        const bool in_place = mask_now != nullptr && mask_now != weights[t % 2].values;
        const FirstStep<C> rows{frame,
                                reference,
                                mask_before,
                                mask_now,
                                x.values,
                                slope.values,
                                penalty.values,
                                row,
                                ahead,
                                ref == nullptr ? 0 : ahead,
                                in_place ? clip.inner : 0};
        step(rows, n, static_cast<C>(eps), scale);
        grad.finish(row, n, before);
        loop.sum(penalty.values, n, lanes);
      }
      mask_before = mask_now;
      before = at;
    }
    grad.finish(slope.values, n, before);
    sums[0] = add_lanes(lanes);
  }

  // The same with second differences.
  void walk(int64_t sample, int64_t outer, int64_t column, int n, const Totals& totals, double* sums) const {
    const auto& loop = loops_of<C>();
    Rows x, m, slopes[2];
    Row<T> wide_z, wide_ref, wide_grad;
    Row<C> penalty;
    const C* frame[3] = {};
    const C* where[3] = {};
    double lanes[2][kLanes] = {};
    const bool active[2] = {weight[0] != 0.0 && totals.order[0] != 0.0,
                            weight[1] != 0.0 && totals.order[1] != 0.0};
    const int64_t lag = active[1] ? 2 : 1;

    for (int64_t t = 0; t < clip.frames; ++t) {
      const int64_t at = clip.row(sample, outer, t) + column;
      const int slot = static_cast<int>(t % 3);
      frame[slot] = read_frame(at, n, wide_z, wide_ref, x[slot]);
      if (mask.has_value()) where[slot] = mask->read(at, n, m[slot].values);
      for (int order = 0; order < 2; ++order) {
        const int64_t oldest = t - order - 1;
        if (!active[order] || oldest < 0) continue;
        FrameRows<C> rows{};
        for (int64_t i = 0; i <= order + 1; ++i) {
          rows.x[i] = frame[(oldest + i) % 3];
          rows.mask[i] = where[(oldest + i) % 3];
        }
        const auto difference =
            (order == 0 ? loop.first_difference : loop.second_difference)[norm][mask.has_value()];
        const double scale = weight[order] * grad_scale / totals.order[order];
        difference(rows, n, static_cast<C>(eps), static_cast<C>(scale), penalty.values,
                   slopes[order][oldest % 3].values);
        loop.sum(penalty.values, n, lanes[order]);
      }
      if (grad && t >= lag) write_gradient(sample, outer, column, n, t - lag, active, slopes, wide_grad);
    }
    for (int64_t t = std::max<int64_t>(0, clip.frames - lag); grad && t < clip.frames; ++t) {
      write_gradient(sample, outer, column, n, t, active, slopes, wide_grad);
    }
    for (int order = 0; order < 2; ++order) sums[order] = add_lanes(lanes[order]);
  }

  const C* read_frame(int64_t at, int n, Row<T>& wide_z, Row<T>& wide_ref, Row<C>& buffer) const {
    if constexpr (kIsWide<T>) {
      if (ref == nullptr) return z + at;
      loops_of<C>().subtract(z + at, ref + at, n, buffer.values);
    } else {
      const C* row = widen(z + at, n, ref == nullptr ? buffer : wide_z);
      if (ref == nullptr) return row;
      loops_of<C>().subtract(row, widen(ref + at, n, wide_ref), n, buffer.values);
    }
    return buffer.values;
  }

  void write_gradient(int64_t sample, int64_t outer, int64_t column, int n, int64_t t,
                      const bool (&active)[2], const Rows (&slopes)[2], Row<T>& wide) const {
    const auto& loop = loops_of<C>();
    static constexpr C kShares[2][3] = {{-1, 1, 0}, {1, -2, 1}};  // of the slopes at t, t − 1, t − 2
    const int64_t to = clip.row(sample, outer, t) + column;
    C* row = grad.begin(to, wide);
    std::fill_n(row, n, C(0));
    for (int order = 0; order < 2; ++order) {
      for (int64_t back = 0; active[order] && back <= order + 1; ++back) {
        const int64_t i = t - back;
        if (i < 0 || i >= clip.frames - 1 - order) continue;
        loop.add_scaled(slopes[order][i % 3].values, n, kShares[order][back], row);
      }
    }
    grad.finish(row, n, to);
  }

  template <typename L>
  void run(const std::vector<Totals>& totals, L* loss) const {
    // blocks of columns of even width, a multiple of the lanes
    const int64_t count = std::max<int64_t>(1, ceil_div(clip.inner, 1024));
    const int64_t width = ceil_div(ceil_div(clip.inner, count), kLanes) * kLanes;
    const int64_t blocks = ceil_div(clip.inner, width), each = clip.outer * blocks;
    std::vector<double> sums(2 * clip.samples * each, 0.0);
    parallel(clip.samples * each, std::min(width, clip.inner) * clip.frames, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / each, column = i % blocks * width;
        const int n = static_cast<int>(std::min(width, clip.inner - column));
        const Totals& total = totals[totals.size() > 1 ? sample : 0];
        if (weight[0] != 0.0 && weight[1] == 0.0 && total.order[0] != 0.0) {
          walk_first(sample, i % each / blocks, column, n, total.order[0], sums.data() + 2 * i);
        } else {
          walk(sample, i % each / blocks, column, n, total, sums.data() + 2 * i);
        }
      }
    });
    for (int64_t b = 0; b < clip.samples; ++b) {
      const Totals& total = totals[totals.size() > 1 ? b : 0];
      double value = 0.0;
      for (int order = 0; order < 2; ++order) {
        if (weight[order] == 0.0 || total.order[order] == 0.0) continue;
        double sum = 0.0;
        for (int64_t i = 0; i < each; ++i) sum += sums[2 * (b * each + i) + order];
        value += weight[order] * sum / total.order[order];
      }
      loss[b] = static_cast<L>(value);
    }
  }
};

}  // namespace

void temporal_loss(const View& z, const OptionalView& ref, const OptionalView& mask, double first,
                   double second, int64_t norm, double eps, double grad_scale, int64_t frame_dim,
                   const View& loss, const OptionalView& grad) {
  check_contiguous(z, "z");
  if (ref.has_value()) check_contiguous(*ref, "ref");
  if (mask.has_value()) check_contiguous(*mask, "mask");
  const int dim = static_cast<int>(frame_dim);
  const Shape shape = shape_of(z);
  STD_TORCH_CHECK(dim > 0 && dim < shape.dims, "frame_dim must name a dimension of z after the first, got ",
                  frame_dim);
  if (loss.numel() == 0) return;
  if (z.numel() == 0) {
    zero(loss);
    return;
  }
  dispatch_floating(z.scalar_type(), "temporal_loss", [&]<typename T>() {
    using C = Working<T>;
    TemporalLoss<T> op{clip_of(shape, dim),
                       data<T>(z),
                       data_or_null<T>(ref),
                       std::nullopt,
                       {first, second},
                       static_cast<int>(norm),
                       eps,
                       grad_scale,
                       Output(mutable_data_or_null<T>(grad), z.numel())};
    std::vector<Totals> totals(1, count_differences(op.clip));
    if (mask.has_value()) {
      op.mask.emplace(mask->const_data_ptr(), mask->scalar_type(), shape_of(*mask), shape, "mask");
      dispatch_floating(mask->scalar_type(), "temporal_loss's mask", [&]<typename M>() {
        totals = weigh_differences<C>(data<M>(*mask), shape_of(*mask), shape, dim);
      });
    }
    dispatch_wide(loss.scalar_type(), "temporal_loss's loss",
                  [&]<typename L>() { op.run(totals, mutable_data<L>(loss)); });
  });
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CPU, m) { m.impl("temporal_loss", LATENTFAST_BOX(temporal_loss)); }

}  // namespace latentfast
