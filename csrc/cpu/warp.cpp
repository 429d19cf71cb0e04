// warp_loss: neighbouring frames compared along an optical flow.
//
// Where a flow samples is worked out once a sample, for all channels. One thread owns a channel's frames and
// walks them in order, so the gradient's scatter needs no atomics.
#include <cmath>
#include <cstring>

#include "cpu/rows.h"

namespace latentfast {
namespace {

// Where one pixel samples the next frame: the four neighbours from `at` on, and the fractions towards the far
// ones.
template <typename C>
struct Tap {
  int64_t at;  // < 0: outside of the frame
  int32_t right, down;
  C fx, fy;
};

template <typename T>
struct WarpLoss {
  using C = Working<T>;
  int64_t samples, channels, frames, height, width;
  bool channels_first;  // z is (B, C, T, H, W), not (B, T, C, H, W)
  const T* z;
  Broadcast<C> flow;
  std::optional<Broadcast<C>> mask;
  double grad_scale;
  T* grad;  // null: not wanted

  int64_t plane() const { return height * width; }
  // The first element of a plane in a tensor like z with `count` frames.
  int64_t plane_at(int64_t sample, int64_t channel, int64_t t, int64_t count) const {
    const int64_t i = channels_first ? (sample * channels + channel) * count + t
                                     : (sample * count + t) * channels + channel;
    return i * plane();
  }

  void read_plane(const Broadcast<C>& from, int64_t start, std::vector<C>& out) const {
    for (int64_t i = 0; i < plane(); i += kTile) {
      const int n = static_cast<int>(std::min<int64_t>(kTile, plane() - i));
      const C* row = from.read(start + i, n, out.data() + i);
      if (row != out.data() + i) std::copy_n(row, n, out.data() + i);
    }
  }

  const C* read_frame(int64_t start, std::vector<C>& buffer) const {
    if constexpr (kIsWide<T>) {
      return z + start;
    } else {
      for (int64_t i = 0; i < plane(); ++i) buffer[i] = widened(z[start + i]);
      return buffer.data();
    }
  }

  // The taps of one pair of frames.
  void find_taps(int64_t sample, int64_t t, Tap<C>* taps) const {
    std::vector<C> shift[2] = {std::vector<C>(plane()), std::vector<C>(plane())};
    for (int axis = 0; axis < 2; ++axis) {
      read_plane(flow, ((sample * 2 + axis) * (frames - 1) + t) * plane(), shift[axis]);
    }
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t x = 0; x < width; ++x) {
        const int64_t i = y * width + x;
        const C xs = static_cast<C>(x) + shift[0][i], ys = static_cast<C>(y) + shift[1][i];
        const bool inside =
            xs >= 0 && xs <= static_cast<C>(width - 1) && ys >= 0 && ys <= static_cast<C>(height - 1);
        if (!inside) {
          taps[i] = {-1, 0, 0, 0, 0};
          continue;
        }
        const auto x0 = static_cast<int64_t>(xs), y0 = static_cast<int64_t>(ys);
        taps[i] = {y0 * width + x0, x0 + 1 < width ? 1 : 0, y0 + 1 < height ? static_cast<int32_t>(width) : 0,
                   xs - static_cast<C>(x0), ys - static_cast<C>(y0)};
      }
    }
  }

  // Σ w of one pair of frames.
  double weigh(int64_t sample, int64_t t, const Tap<C>* taps) const {
    double total = 0.0;
    if (!mask.has_value()) {
      int64_t inside = 0;
      for (int64_t i = 0; i < plane(); ++i) inside += taps[i].at >= 0;
      return static_cast<double>(inside) * static_cast<double>(channels);
    }
    std::vector<C> weight(plane());
    for (int64_t c = 0; c < channels; ++c) {
      read_plane(*mask, plane_at(sample, c, t, frames - 1), weight);
      for (int64_t i = 0; i < plane(); ++i) total += taps[i].at >= 0 ? static_cast<double>(weight[i]) : 0.0;
    }
    return total;
  }

  // Σ w d² of one channel; its gradient times 1/Σw, if wanted.
  double walk(int64_t sample, int64_t channel, const Tap<C>* taps, double total) const {
    const bool wanted = grad != nullptr;
    const C scale = static_cast<C>(2.0 * grad_scale / total);
    std::vector<C> weight(mask.has_value() ? plane() : 0), wide_here(kIsWide<T> ? 0 : plane()),
        wide_next(wide_here);
    std::vector<C> here(wanted ? plane() : 0, C(0)), next(here);
    double loss = 0.0;
    for (int64_t t = 0; t < frames; ++t) {
      if (t + 1 < frames) {
        const C* x0 = read_frame(plane_at(sample, channel, t, frames), wide_here);
        const C* x1 = read_frame(plane_at(sample, channel, t + 1, frames), wide_next);
        if (mask.has_value()) read_plane(*mask, plane_at(sample, channel, t, frames - 1), weight);
        const Tap<C>* own = taps + t * plane();
        for (int64_t i = 0; i < plane(); ++i) {
          const Tap<C>& tap = own[i];
          const C w = mask.has_value() ? weight[i] : C(1);
          if (tap.at < 0 || w == 0) continue;
          const C* from = x1 + tap.at;
          const C top = from[0] * (1 - tap.fx) + from[tap.right] * tap.fx;
          const C bottom = from[tap.down] * (1 - tap.fx) + from[tap.down + tap.right] * tap.fx;
          const C d = top * (1 - tap.fy) + bottom * tap.fy - x0[i];
          loss += static_cast<double>(w * (d * d));
          if (!wanted) continue;
          const C g = scale * (w * d), upper = g * (1 - tap.fy), lower = g * tap.fy;
          here[i] -= g;
          C* to = next.data() + tap.at;
          to[0] += upper * (1 - tap.fx);
          to[tap.right] += upper * tap.fx;
          to[tap.down] += lower * (1 - tap.fx);
          to[tap.down + tap.right] += lower * tap.fx;
        }
      }
      if (!wanted) continue;
      T* to = grad + plane_at(sample, channel, t, frames);
      for (int64_t i = 0; i < plane(); ++i) to[i] = rounded<T>(here[i]);
      here.swap(next);
      std::fill(next.begin(), next.end(), C(0));
    }
    return loss;
  }

  template <typename L>
  void run(L* loss) const {
    const int64_t pairs = frames - 1;
    std::vector<Tap<C>> taps(pairs * plane());
    std::vector<double> partial(std::max(pairs, channels));
    for (int64_t b = 0; b < samples; ++b) {
      parallel(pairs, plane(), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          find_taps(b, t, taps.data() + t * plane());
          partial[t] = weigh(b, t, taps.data() + t * plane());
        }
      });
      double total = 0.0;
      for (int64_t t = 0; t < pairs; ++t) total += partial[t];
      if (total == 0.0) {
        loss[b] = L(0);
        if (grad != nullptr)
          std::memset(grad + b * channels * frames * plane(), 0, channels * frames * plane() * sizeof(T));
        continue;
      }
      parallel(channels, frames * plane(), [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) partial[c] = walk(b, c, taps.data(), total);
      });
      double sum = 0.0;
      for (int64_t c = 0; c < channels; ++c) sum += partial[c];
      loss[b] = static_cast<L>(sum / total);
    }
  }
};

void warp_loss(const View& z, const View& flow, const OptionalView& mask, double grad_scale,
               int64_t frame_dim, const View& loss, const OptionalView& grad) {
  check_contiguous(z, "z");
  check_contiguous(flow, "flow");
  if (mask.has_value()) check_contiguous(*mask, "mask");
  STD_TORCH_CHECK(z.dim() == 5 && (frame_dim == 1 || frame_dim == 2),
                  "warp_loss takes z of 5 dimensions with frames in 1 or 2");
  if (loss.numel() == 0) return;
  const int64_t frames = z.size(frame_dim);
  if (z.numel() == 0 || frames < 2) {
    zero(loss);
    if (grad.has_value()) zero(*grad);
    return;
  }
  std::vector<int64_t> pairs(z.shape, z.shape + z.dims);
  pairs[frame_dim] = frames - 1;
  dispatch_floating(z.scalar_type(), "warp_loss", [&]<typename T>() {
    using C = Working<T>;
    WarpLoss<T> op{
        z.size(0),
        z.size(3 - frame_dim),
        frames,
        z.size(3),
        z.size(4),
        frame_dim == 2,
        data<T>(z),
        Broadcast<C>(flow.const_data_ptr(), flow.scalar_type(), shape_of(flow), shape_of(flow), "flow"),
        std::nullopt,
        grad_scale,
        mutable_data_or_null<T>(grad)};
    if (mask.has_value()) {
      op.mask.emplace(mask->const_data_ptr(), mask->scalar_type(), shape_of(*mask), Shape{pairs.data(), 5},
                      "mask");
    }
    dispatch_wide(loss.scalar_type(), "warp_loss's loss",
                  [&]<typename L>() { op.run(mutable_data<L>(loss)); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(latentfast, CPU, m) { m.impl("warp_loss", LATENTFAST_BOX(warp_loss)); }

}  // namespace latentfast
