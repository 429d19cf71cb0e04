// latent_to_rgb: a linear map of the channels to RGB at every latent position, enlarged bilinearly. The
// specification is latentfast/reference/preview.py.
//
// A row of latents is mapped to RGB once, then spread to the output's columns, interleaved as they are
// stored: so far the work is that of the latents' rows, a small part of the output's. What is left for each
// output row is one contiguous loop over two spread rows, which are kept while they are needed. Bytes take
// the map's (x + 1)·127.5 in the factors, which is the same, because the weights of an interpolation add up
// to 1.
#include <cmath>
#include <vector>

#include "cpu/rows.h"

namespace latentfast {
namespace {

// Where an output lies between two inputs along one dimension: at low + share.
template <typename C>
struct Place {
  int64_t low;
  C share;
};

// In whole numbers up to the one division: output i of `full` is at (i + ½)·size/full − ½, not below 0.
template <typename C>
Place<C> place_of(int64_t i, int64_t full, int64_t size) {
  const int64_t twice = std::max<int64_t>((2 * i + 1) * size - full, 0), low = twice / (2 * full);
  return {low, static_cast<C>(twice - low * 2 * full) / static_cast<C>(2 * full)};
}

// How many rows of the output a task has: enough that the rows above it, which it shares, do not matter.
constexpr int64_t kBand = 64;

template <typename T, typename R>
class Preview {
 public:
  using C = Working<T>;
  static constexpr bool kBytes = std::is_same_v<R, uint8_t>;

  Preview(const View& z, const C* weight, const C* bias, const View& out)
      : channels_(z.size(1)),
        frames_(z.size(2)),
        height_(z.size(3)),
        width_(z.size(4)),
        rows_(out.size(2)),
        columns_(out.size(3)),
        tasks_(z.size(0) * frames_),
        z_(data<T>(z)),
        weight_(weight, weight + 3 * channels_),
        bias_(bias, bias + 3),
        out_(mutable_data<R>(out), out.numel()),
        places_(columns_) {
    if (kBytes) {
      for (C& w : weight_) w *= C(127.5);
      for (C& b : bias_) b = (b + 1) * C(127.5);
    }
    for (int64_t i = 0; i < columns_; ++i) places_[i] = place_of<C>(i, columns_, width_);
  }

  void run() const {
    const int64_t bands = ceil_div(rows_, kBand);
    parallel(tasks_ * bands, std::min(rows_, kBand) * 3 * columns_, [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % bands * kBand;
        band(i / bands, first, std::min(first + kBand, rows_), scratch);
      }
    });
  }

 private:
  struct Scratch {
    explicit Scratch(const Preview& p)
        : rgb(3 * p.width_), spread{std::vector<C>(3 * p.columns_), std::vector<C>(3 * p.columns_)} {}
    std::vector<C> rgb;        // a row of the latents, mapped: red, green, blue one after another
    std::vector<C> spread[2];  // rows of the output's width
    int64_t holds[2] = {-1, -1};
  };

  void band(int64_t task, int64_t first, int64_t last, Scratch& scratch) const {
    scratch.holds[0] = scratch.holds[1] = -1;
    const int64_t width = 3 * columns_;
    for (int64_t y = first; y < last; ++y) {
      const Place<C> at = place_of<C>(y, rows_, height_);
      const C* above = spread_row(task, at.low, scratch);
      const C* below = spread_row(task, std::min(at.low + 1, height_ - 1), scratch);
      for (int64_t i = 0; i < width; i += kTile) {
        const int n = static_cast<int>(std::min<int64_t>(kTile, width - i));
        const int64_t to = (task * rows_ + y) * width + i;
        if constexpr (kBytes) {
          if (out_.streams()) {
            alignas(64) uint8_t packed[kTile];
            loops_of<C>().between_as_bytes(above + i, below + i, n, at.share, packed);
            out_.copy(packed, n, to);
          } else {
            loops_of<C>().between_as_bytes(above + i, below + i, n, at.share, &out_[to]);
          }
        } else {
          Row<R> row;
          C* values = out_.begin(to, row);
          loops_of<C>().between(above + i, below + i, n, at.share, values);
          out_.finish(values, n, to);
        }
      }
    }
  }

  // Row y of a frame's latents as RGB, spread to the output's columns. Neighbouring rows have a place each.
  const C* spread_row(int64_t task, int64_t y, Scratch& scratch) const {
    C* out = scratch.spread[y % 2].data();
    if (scratch.holds[y % 2] == y) return out;
    scratch.holds[y % 2] = y;
    const int64_t plane = height_ * width_;
    C* rgb[3];
    for (int k = 0; k < 3; ++k) {
      rgb[k] = scratch.rgb.data() + k * width_;
      std::fill_n(rgb[k], width_, bias_[k]);
    }
    const int64_t start = (task / frames_ * channels_ * frames_ + task % frames_) * plane + y * width_;
    for (int64_t i = 0; i < width_; i += kTile) {
      const int n = static_cast<int>(std::min<int64_t>(kTile, width_ - i));
      for (int64_t c = 0; c < channels_; ++c) {
        [[maybe_unused]] Row<T> row;
        const C* x = widen(z_ + start + c * frames_ * plane + i, n, row);
        loops_of<C>().add_to_rgb(x, n, weight_.data() + 3 * c, rgb[0] + i, rgb[1] + i, rgb[2] + i);
      }
    }
    for (int64_t i = 0; i < columns_; ++i) {
      const int64_t low = places_[i].low, high = std::min(low + 1, width_ - 1);
      const C share = places_[i].share;
      for (int k = 0; k < 3; ++k) out[3 * i + k] = rgb[k][low] + share * (rgb[k][high] - rgb[k][low]);
    }
    return out;
  }

  int64_t channels_, frames_, height_, width_, rows_, columns_, tasks_;
  const T* z_;
  std::vector<C> weight_, bias_;
  Output<R> out_;
  std::vector<Place<C>> places_;
};

void latent_to_rgb(const View& z, const View& weight, const View& bias, const View& out) {
  check_contiguous(z, "z");
  check_contiguous(weight, "weight");
  check_contiguous(bias, "bias");
  check_contiguous(out, "out");
  STD_TORCH_CHECK(z.dim() == 5 && out.dim() == 5 && weight.numel() == 3 * z.size(1) && bias.numel() == 3,
                  "latent_to_rgb takes z (B, C, T, H, W), weight (C, 3), bias (3) and out (B, T, H', W', 3)");
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(z.size(3) > 0 && z.size(4) > 0, "latent_to_rgb cannot enlarge frames without pixels");
  dispatch_floating(z.scalar_type(), "latent_to_rgb", [&]<typename T>() {
    using C = Working<T>;
    const C *w = data<C>(weight), *b = data<C>(bias);
    if (out.scalar_type() == ScalarType::Byte) {
      Preview<T, uint8_t>(z, w, b, out).run();
    } else {
      Preview<T, C>(z, w, b, out).run();
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(latentfast, CPU, m) { m.impl("latent_to_rgb", LATENTFAST_BOX(latent_to_rgb)); }

}  // namespace latentfast
