// channel_stats, adain, standardize and tone_map.
//
// Sums are taken from each channel's first element on and in float64: a mean far from 0 costs no digits, and
// a constant channel has a variance of exactly 0. Channels that fit into a core's cache are read from memory
// once: summed up, then changed while they are there.
#include <utility>

#include "cpu/vectors.h"

namespace latentfast {
namespace {

struct Nothing {};

struct Moments {
  double mean = 0.0, std = 0.0;
};

Moments moments_of(double shift, double sum, double squares, int64_t count) {
  const double middle = sum / static_cast<double>(count);
  const double variance = (squares - sum * middle) / static_cast<double>(std::max<int64_t>(1, count - 1));
  return {shift + middle, std::sqrt(variance < 0.0 ? 0.0 : variance)};  // NaN stays
}

// (x − centre)·gain + offset.
template <typename C>
struct Affine {
  C centre, gain, offset;
};

// A channel each: vectors of a tensor whose channels are (p, n, q, m).
Vectors channels_of(int64_t p, int64_t n, int64_t q, int64_t m) {
  return n == 1 ? Vectors{p * q, 1, 1, m} : Vectors{p, n, q, m};
}

// The first element of the vector that a part belongs to.
template <typename T>
Working<T> first_of(const T* x, const Vectors& vectors, const Part& part) {
  return widened(x[part.start - part.first % vectors.m - part.first / vectors.m * vectors.q * vectors.m]);
}

template <typename T>
void sum_part(const T* x, const Part& part, Working<T> shift, double* sums) {
  double lanes[2][kLanes] = {};
  Row<T> row;
  for_rows(part, [&](int64_t at, int n) {
    loops_of<Working<T>>().shifted_sums(widen(x + at, n, row), n, shift, lanes[0], lanes[1]);
  });
  for (int s = 0; s < 2; ++s) sums[s] = add_lanes(lanes[s]);
}

// The moments of the channels that lie side by side in a block.
template <typename T>
std::vector<Moments> sum_block(const T* x, const Block& block) {
  using C = Working<T>;
  const int width = block.width;
  const int64_t m = block.x->m;
  std::vector<double> sums(2 * width, 0.0);
  Row<C> shift;
  Row<T> row;
  for (int v = 0; v < block.vectors; ++v)
    std::fill_n(shift.values + v * m, m, widened(x[block.row(0) + v * m]));
  for (int64_t i = 0; i < block.x->n; ++i) {
    loops_of<C>().shifted_sums_columns(widen(x + block.row(i), width, row), shift.values, width, sums.data(),
                                       sums.data() + width);
  }
  std::vector<Moments> out(block.vectors);
  for (int v = 0; v < block.vectors; ++v) {
    out[v] = moments_of(shift.values[v * m], add_columns(sums.data(), v, m),
                        add_columns(sums.data() + width, v, m), block.x->elements());
  }
  return out;
}

// f(v, moments) for every channel.
template <typename T, typename F>
void for_moments(const T* x, const Vectors& vectors, F&& f) {
  if (vectors.in_columns()) {
    for_blocks(vectors, [&](const Block& block) {
      const std::vector<Moments> moments = sum_block(x, block);
      for (int v = 0; v < block.vectors; ++v) f(block.first + v, moments[v]);
    });
    return;
  }
  const auto first = [&](int64_t v) { return widened(x[vectors.run(v, 0)]); };
  const int64_t parts = parts_of(vectors);
  std::vector<double> partial(2 * vectors.count() * parts);
  parallel(vectors.count() * parts, vectors.elements() / parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      sum_part(x, part_of(vectors, i / parts, i % parts), first(i / parts), partial.data() + 2 * i);
  });
  for (int64_t v = 0; v < vectors.count(); ++v) {
    double sum = 0.0, squares = 0.0;
    for (int64_t i = v * parts; i < (v + 1) * parts; ++i) {
      sum += partial[2 * i];
      squares += partial[2 * i + 1];
    }
    f(v, moments_of(first(v), sum, squares, vectors.elements()));
  }
}

// The affines of a block of channels, at each of its columns.
template <typename C>
struct Columns {
  Row<C> centre, gain, offset;

  template <typename F>
  Columns(const Block& block, F&& affine_of) {
    const int64_t m = block.x->m;
    for (int v = 0; v < block.vectors; ++v) {
      const Affine<C> own = affine_of(v);
      std::fill_n(centre.values + v * m, m, own.centre);
      std::fill_n(gain.values + v * m, m, own.gain);
      std::fill_n(offset.values + v * m, m, own.offset);
    }
  }

  template <typename T>
  void apply(const T* x, const Block& block, const Output<T>& out) const {
    Row<T> wide, results;
    for (int64_t i = 0; i < block.x->n; ++i) {
      const int64_t at = block.row(i);
      C* row = out.begin(at, results);
      loops_of<C>().affine_columns(widen(x + at, block.width, wide), block.width, centre.values, gain.values,
                                   offset.values, row);
      out.finish(row, block.width, at);
    }
  }
};

template <typename T>
void apply_to_part(const T* x, const Part& part, const Affine<Working<T>>& own, const Output<T>& out) {
  Row<T> wide, results;
  for_rows(part, [&](int64_t at, int n) {
    Working<T>* row = out.begin(at, results);
    loops_of<Working<T>>().affine(widen(x + at, n, wide), n, own.centre, own.gain, own.offset, row);
    out.finish(row, n, at);
  });
}

template <typename T>
void change_style(const T* z, const Vectors& vectors, const std::vector<Moments>& style, double factor,
                  const Output<T>& out) {
  using C = Working<T>;
  const int64_t styles = static_cast<int64_t>(style.size());
  // factor·((z − mean)·gain + style's mean) + (1 − factor)·z, counted from the mean as the working precision
  // has it
  const auto affine_of = [&](int64_t v, const Moments& own) -> Affine<C> {
    const Moments& wanted = style[v % styles];
    const double scaled = own.std == 0.0 ? 0.0 : factor * wanted.std / own.std, kept = 1.0 - factor;
    if (scaled == 0.0) return {C(0), static_cast<C>(kept), static_cast<C>(factor * wanted.mean)};
    const C centre = static_cast<C>(own.mean);
    return {centre, static_cast<C>(scaled + kept),
            static_cast<C>(factor * wanted.mean - scaled * (own.mean - centre) + kept * centre)};
  };
  if (vectors.in_columns()) {
    for_blocks(vectors, [&](const Block& block) {
      const std::vector<Moments> moments = sum_block(z, block);
      const Columns<C> columns(block, [&](int v) { return affine_of(block.first + v, moments[v]); });
      columns.apply(z, block, out);
    });
    return;
  }
  const auto first = [&](int64_t v) { return widened(z[vectors.run(v, 0)]); };
  struct State {
    Affine<C> affine;
  };
  reduce_and_apply<State>(
      vectors, 2,
      [&](const Part& part, double* sums) { sum_part(z, part, first_of(z, vectors, part), sums); },
      [&](int64_t v, const double* sums, State& state) {
        state.affine = affine_of(v, moments_of(first(v), sums[0], sums[1], vectors.elements()));
      },
      [&](int64_t, const Part& part, const State& state) { apply_to_part(z, part, state.affine, out); });
}

// The numbers of the VAE: a tensor (C,), numbers on the host, or none.
struct PerChannel {
  const OptionalView& device;
  std::span<const double> host;

  double at(int64_t c, double otherwise) const {
    if (!device.has_value()) return host.empty() ? otherwise : host[c];
    return device->scalar_type() == ScalarType::Double ? data<double>(*device)[c] : data<float>(*device)[c];
  }
};

enum Layout : int { kSame, kPack, kUnpack };

// Latents (b, c, t, h, w), and tokens (b, t/pt · h/ph · w/pw, c·pt·ph·pw).
struct Packing {
  int64_t b, c, t, h, w, pt, ph, pw;

  // Rows that follow one another in the latents as their tokens do are one.
  void join_rows() {
    if (ph != 1) return;
    w *= std::exchange(h, 1);
    if (pt == 1) w *= std::exchange(t, 1);
  }
  int64_t features() const { return c * pt * ph * pw; }
  int64_t elements() const { return b * c * t * h * w; }

  // A strip is a row of tokens: f(channel, where the row starts in the latents, where its first element lies
  // in the tokens) for each of the latents' rows that it is made of.
  template <typename F>
  void for_rows_of(int64_t strip, F&& f) const {
    const int64_t rows = h / ph, frames = t / pt;
    const int64_t sample = strip / (frames * rows), frame = strip / rows % frames, row = strip % rows;
    const int64_t first_token = strip * (w / pw);
    for (int64_t channel = 0; channel < c; ++channel) {
      for (int64_t i = 0; i < pt; ++i) {
        for (int64_t j = 0; j < ph; ++j) {
          const int64_t at = (((sample * c + channel) * t + frame * pt + i) * h + row * ph + j) * w;
          f(channel, at, first_token * features() + ((channel * pt + i) * ph + j) * pw);
        }
      }
    }
  }
};

// Positions of a row that are taken to or from their tokens at a time, for all channels: what they fill of
// the tokens stays in the first-level cache, or the second, meanwhile.
int64_t positions_at_once(int64_t features) { return std::clamp<int64_t>(8192 / features, 64, kTile); }

template <typename T, typename F>
void standardize_packed(const T* z, const Packing& packing, bool packs, F&& affine_of, T* out) {
  using C = Working<T>;
  const int64_t strips = packing.b * (packing.t / packing.pt) * (packing.h / packing.ph);
  const int64_t features = packing.features(), pw = packing.pw, across = positions_at_once(features),
                pieces = ceil_div(packing.w, across);
  parallel(strips * pieces, packing.elements() / (strips * pieces), [&](int64_t begin, int64_t end) {
    Row<T> wide, results;
    alignas(64) T narrow[kTile];
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t x = piece % pieces * across;
      const int n = static_cast<int>(std::min<int64_t>(across, packing.w - x));
      packing.for_rows_of(piece / pieces, [&](int64_t channel, int64_t at, int64_t in_tokens) {
        // f(element of the row, where it lies in the tokens)
        const auto for_elements = [&](auto&& f) {
          int64_t to = in_tokens + x / pw * features, place = x % pw;
          for (int k = 0; k < n; ++k) {
            f(k, to + place);
            if (++place == pw) {
              place = 0;
              to += features;
            }
          }
        };
        const T* row = z + at + x;
        if (!packs) {
          for_elements([&](int k, int64_t token) { narrow[k] = z[token]; });
          row = narrow;
        }
        const Affine<C> own = affine_of(channel);
        loops_of<C>().affine(widen(row, n, wide), n, own.centre, own.gain, own.offset, results.values);
        if (packs) {
          const T* rounded_row = narrow;
          if constexpr (kIsWide<T>) {
            rounded_row = results.values;
          } else {
            round_row(results.values, n, narrow);
          }
          for_elements([&](int k, int64_t token) { out[token] = rounded_row[k]; });
        } else {
          round_row(results.values, n, out + at + x);
        }
      });
    }
  });
}

// Rows of the latents that lie side by side in every token, pw (1 or 2) elements of each: `count` of them,
// whose part of the tokens is read or written at once.
template <typename T>
struct TokenRows {
  using C = Working<T>;
  // What is not computed in its own dtype passes through a row of the working precision.
  static constexpr int kPositions = kIsWide<T> ? 512 : kTile / kTokenRows;

  int64_t pw;
  int64_t at[kTokenRows] = {};  // the rows in the latents
  RowAffines<C> own = {};

  // `size` elements of each token, the next one's `stride` after them.
  static void copy_parts(const T* from, int64_t from_stride, int64_t tokens, int64_t size, T* to,
                         int64_t to_stride) {
    if (from_stride == size && to_stride == size) {
      std::copy_n(from, tokens * size, to);
    } else if (size == kTokenRows) {  // of a size that is known, a copy is no call
      for (int64_t k = 0; k < tokens; ++k)
        std::copy_n(from + k * from_stride, kTokenRows, to + k * to_stride);
    } else {
      for (int64_t k = 0; k < tokens; ++k) {
        for (int64_t i = 0; i < size; ++i) to[k * to_stride + i] = from[k * from_stride + i];
      }
    }
  }

  void pack(const T* z, int count, int n, T* tokens, int64_t features) const {
    const C* rows[kTokenRows];
    if constexpr (kIsWide<T>) {
      for (int r = 0; r < count; ++r) rows[r] = z + at[r];
      loops_of<C>().affine_to_tokens[pw - 1](rows, own, count, n, tokens, features);
    } else {
      Row<T> wide, results;
      T narrow[kTile];
      for (int r = 0; r < count; ++r) std::copy_n(z + at[r], n, narrow + r * n);
      const C* first = widen(narrow, count * n, wide);
      for (int r = 0; r < count; ++r) rows[r] = first + r * n;
      loops_of<C>().affine_to_tokens[pw - 1](rows, own, count, n, results.values, count * pw);
      round_row(results.values, count * n, narrow);
      copy_parts(narrow, count * pw, n / pw, count * pw, tokens, features);
    }
  }

  void unpack(const T* tokens, int64_t features, int count, int n, T* out) const {
    C* rows[kTokenRows];
    if constexpr (kIsWide<T>) {
      for (int r = 0; r < count; ++r) rows[r] = out + at[r];
      loops_of<C>().affine_from_tokens[pw - 1](tokens, features, own, count, n, rows);
    } else {
      Row<T> wide, results;
      T narrow[kTile];
      copy_parts(tokens, features, n / pw, count * pw, narrow, count * pw);
      for (int r = 0; r < count; ++r) rows[r] = results.values + r * n;
      loops_of<C>().affine_from_tokens[pw - 1](widen(narrow, count * n, wide), count * pw, own, count, n,
                                               rows);
      round_row(results.values, count * n, narrow);
      for (int r = 0; r < count; ++r) std::copy_n(narrow + r * n, n, out + at[r]);
    }
  }
};

template <typename T, typename F>
void standardize_grouped(const T* z, const Packing& packing, bool packs, F&& affine_of, T* out) {
  using Rows = TokenRows<T>;
  std::vector<Affine<Working<T>>> affines(packing.c);
  for (int64_t channel = 0; channel < packing.c; ++channel) affines[channel] = affine_of(channel);
  const int64_t strips = packing.b * (packing.t / packing.pt) * (packing.h / packing.ph);
  const int64_t features = packing.features(), pw = packing.pw, most = kTokenRows / pw,
                pieces = ceil_div(packing.w, Rows::kPositions);
  parallel(strips * pieces, packing.elements() / (strips * pieces), [&](int64_t begin, int64_t end) {
    Rows rows{pw};
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t x = piece % pieces * Rows::kPositions;
      const int n = static_cast<int>(std::min<int64_t>(Rows::kPositions, packing.w - x));
      int64_t row = 0;
      packing.for_rows_of(piece / pieces, [&](int64_t channel, int64_t at, int64_t in_tokens) {
        const int place = static_cast<int>(row % most);
        const int count = static_cast<int>(std::min(most, features / pw - (row - place)));
        const int64_t tokens = in_tokens - place * pw + x / pw * features;  // of the group's first row
        rows.at[place] = at + x;
        rows.own.centre[place] = affines[channel].centre;
        rows.own.gain[place] = affines[channel].gain;
        rows.own.offset[place] = affines[channel].offset;
        ++row;
        if (place + 1 < count) return;
        packs ? rows.pack(z, count, n, out + tokens, features)
              : rows.unpack(z + tokens, features, count, n, out);
      });
    }
  });
}

void channel_stats(const View& z, int64_t p, int64_t n, int64_t q, int64_t m, const View& mean,
                   const View& std) {
  check_contiguous(z, "z");
  check_contiguous(mean, "mean");
  check_contiguous(std, "std");
  if (mean.numel() == 0) return;
  if (z.numel() == 0) {
    zero(mean);
    zero(std);
    return;
  }
  dispatch_floating(z.scalar_type(), "channel_stats", [&]<typename T>() {
    const auto put = [](const View& to, int64_t v, double value) {
      if (to.scalar_type() == ScalarType::Double) {
        mutable_data<double>(to)[v] = value;
      } else {
        mutable_data<float>(to)[v] = static_cast<float>(value);
      }
    };
    for_moments(data<T>(z), channels_of(p, n, q, m), [&](int64_t v, const Moments& moments) {
      put(mean, v, moments.mean);
      put(std, v, moments.std);
    });
  });
}

void adain(const View& z, const View& ref, double factor, int64_t p, int64_t n, int64_t q, int64_t m,
           int64_t ref_p, int64_t ref_n, int64_t ref_m, const View& out) {
  check_contiguous(z, "z");
  check_contiguous(ref, "ref");
  check_contiguous(out, "out");
  if (out.numel() == 0) return;
  dispatch_floating(z.scalar_type(), "adain", [&]<typename T>() {
    std::vector<Moments> style(ref_p * q);
    for_moments(data<T>(ref), channels_of(ref_p, ref_n, q, ref_m),
                [&](int64_t v, const Moments& moments) { style[v] = moments; });
    change_style(data<T>(z), channels_of(p, n, q, m), style, factor,
                 Output(mutable_data<T>(out), out.numel()));
  });
}

void standardize(const View& z, const OptionalView& mean, const OptionalView& std,
                 std::span<const double> host_mean, std::span<const double> host_std, double scale,
                 bool inverse, int64_t layout, int64_t b, int64_t c, int64_t t, int64_t h, int64_t w,
                 int64_t pt, int64_t ph, int64_t pw, const View& out) {
  check_contiguous(z, "z");
  check_contiguous(out, "out");
  if (out.numel() == 0) return;
  dispatch_floating(z.scalar_type(), "standardize", [&]<typename T>() {
    using C = Working<T>;
    const PerChannel means{mean, host_mean}, deviations{std, host_std};
    const auto affine_of = [&](int64_t channel) -> Affine<C> {
      const C middle = static_cast<C>(means.at(channel, 0.0));
      const double deviation = deviations.at(channel, 1.0);
      if (inverse) return {C(0), static_cast<C>(deviation / scale), middle};
      return {middle, static_cast<C>(scale / deviation), C(0)};
    };
    const T* from = data<T>(z);
    if (layout != kSame) {
      Packing packing{b, c, t, h, w, pt, ph, pw};
      packing.join_rows();
      T* const to = mutable_data<T>(out);
      // of fewer than 4 rows, collecting a group takes longer than it saves
      const bool groups = pw <= 2 && packing.features() / pw >= 4;
      groups ? standardize_grouped(from, packing, layout == kPack, affine_of, to)
             : standardize_packed(from, packing, layout == kPack, affine_of, to);
      return;
    }
    const Output<T> to(mutable_data<T>(out), out.numel());
    const Vectors vectors{b, 1, c, t * h * w};
    if (vectors.in_columns()) {  // all samples' channels as so many rows
      const Vectors rows{1, b, c, vectors.m};
      for_blocks(rows, [&](const Block& block) {
        const Columns<C> columns(block, [&](int v) { return affine_of(block.first + v); });
        columns.apply(from, block, to);
      });
      return;
    }
    reduce_and_apply<Nothing>(
        vectors, 0, [](const Part&, double*) {}, [](int64_t, const double*, Nothing&) {},
        [&](int64_t v, const Part& part, const Nothing&) {
          apply_to_part(from, part, affine_of(v % c), to);
        });
  });
}

void tone_map(const View& z, const OptionalView& grad, double compression, const View& out) {
  check_contiguous(z, "z");
  check_contiguous(out, "out");
  if (grad.has_value()) check_contiguous(*grad, "grad");
  if (out.numel() == 0) return;
  dispatch_floating(z.scalar_type(), "tone_map", [&]<typename T>() {
    using C = Working<T>;
    const C s = static_cast<C>(0.75 * compression);
    const Output<T> to(mutable_data<T>(out), out.numel());
    const T *x = data<T>(z), *upstream = data_or_null<T>(grad);
    parallel(ceil_div(out.numel(), kTile), kTile, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] Row<T> wide, wide_upstream, results;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i * kTile;
        const int n = static_cast<int>(std::min<int64_t>(kTile, out.numel() - at));
        const C* own = widen(x + at, n, wide);
        const C* slope_of = upstream == nullptr ? nullptr : widen(upstream + at, n, wide_upstream);
        const auto loop = loops_of<C>().tone_map[upstream != nullptr];
        if constexpr (kIsWide<T>) {
          loop(own, slope_of, n, s, &to[at], to.streams());
        } else {
          loop(own, slope_of, n, s, results.values, false);
          to.finish(results.values, n, at);
        }
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(latentfast, CPU, m) {
  m.impl("channel_stats", LATENTFAST_BOX(channel_stats));
  m.impl("adain", LATENTFAST_BOX(adain));
  m.impl("standardize", LATENTFAST_BOX(standardize));
  m.impl("tone_map", LATENTFAST_BOX(tone_map));
}

}  // namespace latentfast
