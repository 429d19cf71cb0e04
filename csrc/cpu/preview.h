// The map of latents to RGB, enlarged: for rows of latents that lie in memory, and for those that a plan
// makes.
//
// The rows of latents that a band of the output needs are mapped to RGB once, then spread to the output's
// columns, interleaved as they are stored: so far the work is that of the latents' rows, a small part of the
// output's. What is left for each output row is one contiguous loop over two spread rows, which are kept
// while they are needed. Bytes take the map's (x + 1)·127.5 in the factors, which is the same, because the
// weights of an interpolation add up to 1.
#pragma once

#include <type_traits>
#include <vector>

#include "cpu/rows.h"

namespace latentfast {

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

// A Source of latents (B, C, T, H, W):
//   using C                                    the precision that they come in
//   struct Room                                what a thread needs for `read`
//   static constexpr int kMost                 the most elements that `read` gives
//   int64_t batch, channels, frames, height, width
//   const C* read(b, c, at, n, room)           n elements from element `at` of a channel on
template <typename Source, typename R>
class Preview {
 public:
  using C = typename Source::C;
  static constexpr bool kBytes = std::is_same_v<R, uint8_t>;

  // `band`: how many rows of the output a task has. The rows of latents at its ends are mapped by its
  // neighbours too.
  Preview(const Source& source, const C* weight, const C* bias, const View& out, int64_t band)
      : source_(source),
        rows_(out.size(2)),
        columns_(out.size(3)),
        tasks_(source.batch * source.frames),
        band_(band),
        weight_(weight, weight + 3 * source.channels),
        bias_(bias, bias + 3),
        out_(mutable_data<R>(out), out.numel()),
        places_(columns_) {
    if (kBytes) {
      for (C& w : weight_) w *= C(127.5);
      for (C& b : bias_) b = (b + 1) * C(127.5);
    }
    for (int64_t i = 0; i < columns_; ++i) places_[i] = place_of<C>(i, columns_, source_.width);
  }

  void run() const {
    const int64_t bands = ceil_div(rows_, band_);
    parallel(tasks_ * bands, std::min(rows_, band_) * 3 * columns_, [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % bands * band_;
        fill_band(i / bands, first, std::min(first + band_, rows_), scratch);
      }
    });
  }

 private:
  struct Scratch {
    explicit Scratch(const Preview& p)
        : spread{std::vector<C>(3 * p.columns_), std::vector<C>(3 * p.columns_)} {}
    typename Source::Room room;
    std::vector<C> rgb;           // mapped rows of latents: all red, then all green, then all blue
    int64_t first = 0, last = 0;  // which rows these are
    std::vector<C> spread[2];     // rows of the output's width
    int64_t holds[2] = {-1, -1};
  };

  void fill_band(int64_t task, int64_t first, int64_t last, Scratch& scratch) const {
    scratch.holds[0] = scratch.holds[1] = -1;
    scratch.first = scratch.last = 0;
    if (rows_ >= source_.height) {  // else rows of latents are left out
      const int64_t low = place_of<C>(first, rows_, source_.height).low;
      const int64_t high = place_of<C>(last - 1, rows_, source_.height).low + 2;
      map_rows(task, low, std::min(high, source_.height), scratch);
    }
    const int64_t width = 3 * columns_;
    for (int64_t y = first; y < last; ++y) {
      const Place<C> at = place_of<C>(y, rows_, source_.height);
      const C* above = spread_row(task, at.low, scratch);
      const C* below = spread_row(task, std::min(at.low + 1, source_.height - 1), scratch);
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

  void map_rows(int64_t task, int64_t first, int64_t last, Scratch& scratch) const {
    scratch.first = first;
    scratch.last = last;
    const int64_t width = source_.width, count = (last - first) * width;
    scratch.rgb.resize(3 * count);
    C* rgb[3];
    for (int k = 0; k < 3; ++k) {
      rgb[k] = scratch.rgb.data() + k * count;
      std::fill_n(rgb[k], count, bias_[k]);
    }
    const int64_t sample = task / source_.frames;
    const int64_t start = (task % source_.frames * source_.height + first) * width;
    for (int64_t i = 0; i < count; i += Source::kMost) {
      const int n = static_cast<int>(std::min<int64_t>(Source::kMost, count - i));
      for (int64_t c = 0; c < source_.channels; ++c) {
        const C* x = source_.read(sample, c, start + i, n, scratch.room);
        loops_of<C>().add_to_rgb(x, n, weight_.data() + 3 * c, rgb[0] + i, rgb[1] + i, rgb[2] + i);
      }
    }
  }

  // Row y of a frame's latents as RGB, spread to the output's columns. Neighbouring rows have a place each.
  const C* spread_row(int64_t task, int64_t y, Scratch& scratch) const {
    C* out = scratch.spread[y % 2].data();
    if (scratch.holds[y % 2] == y) return out;
    scratch.holds[y % 2] = y;
    if (y < scratch.first || y >= scratch.last) map_rows(task, y, y + 1, scratch);
    const int64_t width = source_.width, count = (scratch.last - scratch.first) * width;
    const C* const row = scratch.rgb.data() + (y - scratch.first) * width;
    for (int64_t i = 0; i < columns_; ++i) {
      const int64_t low = places_[i].low, high = std::min(low + 1, width - 1);
      const C share = places_[i].share;
      for (int k = 0; k < 3; ++k) {
        const C* const x = row + k * count;
        out[3 * i + k] = x[low] + share * (x[high] - x[low]);
      }
    }
    return out;
  }

  const Source& source_;
  int64_t rows_, columns_, tasks_, band_;
  std::vector<C> weight_, bias_;
  Output<R> out_;
  std::vector<Place<C>> places_;
};

// Checks what the raw operators' callers could get wrong; false if there is nothing to write.
inline bool check_preview(const View& z, const View& weight, const View& bias, const View& out,
                          const char* name) {
  check_contiguous(weight, "weight");
  check_contiguous(bias, "bias");
  check_contiguous(out, "out");
  STD_TORCH_CHECK(z.dim() == 5 && out.dim() == 5 && weight.numel() == 3 * z.size(1) && bias.numel() == 3,
                  name, " takes z (B, C, T, H, W), weight (C, 3), bias (3) and out (B, T, H', W', 3)");
  if (out.numel() == 0) return false;
  STD_TORCH_CHECK(z.size(3) > 0 && z.size(4) > 0, name, " cannot enlarge frames without pixels");
  return true;
}

}  // namespace latentfast
