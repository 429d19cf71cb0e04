// guide: two passes over a sample, its sums and then everything else in one go, with the sample still in a
// core's cache if it fits; one pass where no sums are needed.
#include "common/guidance_coefficients.h"
#include "common/operators.h"
#include "cpu/vectors.h"

namespace latentfast {
namespace {

// The momentum, of the latents' dtype or their working precision, read and replaced in place.
template <typename T>
class Momentum {
 public:
  using C = Working<T>;

  Momentum(const View& x, double beta)
      : old_(x.const_data_ptr(), x.scalar_type(), shape_of(x), shape_of(x), "momentum"),
        data_(x.mutable_data_ptr()),
        wide_(item_size(x.scalar_type()) == sizeof(C)),
        beta_(static_cast<C>(beta)) {}

  // m = d + beta·(the old momentum)
  const C* advance(const C* d, int64_t at, int n, Row<C>& buffer) const {
    loops_of<C>().mix(d, old_.read(at, n, buffer.values), n, C(1), beta_, buffer.values);
    return buffer.values;
  }

  void replace(const C* m, int64_t at, int n) const {
    if (wide_) {
      std::copy_n(m, n, static_cast<C*>(data_) + at);
    } else {
      round_row(m, n, static_cast<T*>(data_) + at);
    }
  }

 private:
  Broadcast<C> old_;
  void* data_;
  bool wide_;
  C beta_;
};

template <typename T>
struct Guiding {
  using C = Working<T>;
  // Of one sample.
  struct Weights {
    C c, d, m;
  };

  GuidanceOptions options;
  const T *cond, *uncond, *sample, *known;
  std::optional<Momentum<T>> momentum;
  std::optional<Broadcast<C>> mask;
  C sigma, dt;
  Output<T> out, x0;

  bool rescales() const { return options.rescale > 0.0; }

  void add_up(const Part& part, double* sums) const {
    const auto& loop = loops_of<C>();
    double c[kLanes] = {}, d[kLanes] = {}, m[kLanes] = {};
    double cc[kLanes] = {}, cd[kLanes] = {}, dd[kLanes] = {}, cm[kLanes] = {}, dm[kLanes] = {},
           mm[kLanes] = {};
    Row<T> wide_c, wide_u;
    Row<C> apart, onward;
    for_rows(part, [&](int64_t at, int n) {
      const C *row_c = widen(cond + at, n, wide_c), *row_u = widen(uncond + at, n, wide_u);
      loop.apart_sums[rescales()](row_c, row_u, n, {cc, cd, dd, c, d});
      if (!momentum.has_value()) return;
      loop.subtract(row_c, row_u, n, apart.values);
      const C* row_m = momentum->advance(apart.values, at, n, onward);
      loop.dot(row_c, row_m, n, cm);
      loop.dot(row_m, row_m, n, mm);
      if (rescales()) {
        loop.dot(apart.values, row_m, n, dm);
        loop.sum(row_m, n, m);
      }
    });
    const double* lanes[] = {c, d, m, cc, cd, dd, cm, dm, mm};
    for (int s = 0; s < kSums; ++s) sums[s] = add_lanes(lanes[s]);
  }

  Weights weigh(const double* s) const {
    const GuidanceCoefficients p =
        guidance_coefficients(options, {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8]});
    return {static_cast<C>(p.c), static_cast<C>(p.d), static_cast<C>(p.m)};
  }

  // The common case, with nothing to widen, to round or to keep for a second result.
  bool put_directly(int64_t at, int n, const Weights& weights) const {
    if constexpr (kIsWide<T>) {
      if (momentum.has_value() || mask.has_value() || x0) return false;
      const C* from = sample == nullptr ? nullptr : sample + at;
      loops_of<C>().guide[from != nullptr](cond + at, uncond + at, from, n, weights.c, weights.d, dt,
                                           &out[at], out.streams());
      return true;
    }
    return false;
  }

  // The guided prediction of a row.
  const C* predict(int64_t at, int n, const Weights& weights, Row<C>& result) const {
    if (static_cast<Guidance>(options.kind) == Guidance::zero) {
      std::fill_n(result.values, n, C(0));  // whatever the predictions hold
      return result.values;
    }
    const auto& loop = loops_of<C>();
    Row<T> wide_c, wide_u;
    const C *row_c = widen(cond + at, n, wide_c), *row_u = widen(uncond + at, n, wide_u);
    loop.guide[false](row_c, row_u, nullptr, n, weights.c, weights.d, C(0), result.values, false);
    if (momentum.has_value()) {
      Row<C> apart, onward;
      loop.subtract(row_c, row_u, n, apart.values);
      const C* m = momentum->advance(apart.values, at, n, onward);
      loop.add_scaled(m, n, weights.m, result.values);
      momentum->replace(m, at, n);
    }
    return result.values;
  }

  void put_by_row(int64_t at, int n, const Weights& weights) const {
    const auto& loop = loops_of<C>();
    Row<C> prediction, result, clean;
    Row<T> wide_sample;
    const C* p = predict(at, n, weights, prediction);
    if (sample == nullptr) {
      out.finish(p, n, at);
      return;
    }
    const C* row = widen(sample + at, n, wide_sample);
    if (x0) {
      loop.mix(row, p, n, C(1), -sigma, clean.values);
      x0.finish(clean.values, n, at);
    }
    loop.mix(row, p, n, C(1), dt, result.values);
    if (mask.has_value()) {
      keep_known(at, n, result);
    } else {
      out.finish(result.values, n, at);
    }
  }

  void keep_known(int64_t at, int n, Row<C>& step) const {
    Row<T> wide_known;
    Row<C> weight;
    const C* m = mask->read(at, n, weight.values);
    if constexpr (kIsWide<T>) {
      loops_of<C>().blend(known + at, step.values, m, n, &out[at], out.streams());
    } else {
      Row<C> mixed;
      alignas(64) T packed[kTile], whole[kTile];
      loops_of<C>().blend(widen(known + at, n, wide_known), step.values, m, n, mixed.values, false);
      round_row(mixed.values, n, packed);
      round_row(step.values, n, whole);
      const auto bits = [](const T* values) { return reinterpret_cast<const uint16_t*>(values); };
      loops().select(bits(known + at), bits(whole), m, n, reinterpret_cast<uint16_t*>(packed));
      out.copy(packed, n, at);
    }
  }

  void run(const Vectors& samples) const {
    const auto reduce = [&](const Part& part, double* sums) { add_up(part, sums); };
    const auto finish = [&](int64_t, const double* sums, Weights& weights) {
      const double none[kSums] = {};
      weights = weigh(guidance_needs_sums(options) ? sums : none);
    };
    const auto apply = [&](int64_t, const Part& part, const Weights& weights) {
      const bool zero = static_cast<Guidance>(options.kind) == Guidance::zero;
      if (!zero && put_directly(part.start, static_cast<int>(part.size), weights)) return;
      for_rows(part, [&](int64_t at, int n) { put_by_row(at, n, weights); });
    };
    reduce_and_apply<Weights>(samples, guidance_needs_sums(options) ? kSums : 0, reduce, finish, apply);
  }

 private:
  static constexpr int kSums = 9;
};

}  // namespace

void guide(const View& cond, const View& uncond, const OptionalView& sample, const OptionalView& momentum,
           const OptionalView& mask, const OptionalView& known, int64_t kind, int64_t original, double scale,
           double rescale, double eta, double norm_threshold, double beta, double alpha, double sigma,
           double dt, const View& out, const OptionalView& x0) {
  check_contiguous(cond, "cond");
  check_contiguous(uncond, "uncond");
  check_contiguous(out, "out");
  const std::pair<const OptionalView&, const char*> others[] = {
      {sample, "sample"}, {momentum, "momentum"}, {mask, "mask"}, {known, "known"}, {x0, "x0"}};
  for (const auto& [x, name] : others) {
    if (x.has_value()) check_contiguous(*x, name);
  }
  if (out.numel() == 0) return;
  const int64_t numel = cond.numel(), elements = numel / cond.size(0);
  const GuidanceOptions options{static_cast<int>(kind),
                                original != 0,
                                momentum.has_value(),
                                scale,
                                rescale,
                                eta,
                                norm_threshold,
                                alpha,
                                elements};
  dispatch_floating(cond.scalar_type(), "guide", [&]<typename T>() {
    using C = Working<T>;
    Guiding<T> op{options,
                  data<T>(cond),
                  data<T>(uncond),
                  data_or_null<T>(sample),
                  data_or_null<T>(known),
                  std::nullopt,
                  std::nullopt,
                  static_cast<C>(sigma),
                  static_cast<C>(dt),
                  Output(mutable_data<T>(out), numel),
                  Output(mutable_data_or_null<T>(x0), numel)};
    if (momentum.has_value()) op.momentum.emplace(*momentum, beta);
    if (mask.has_value())
      op.mask.emplace(mask->const_data_ptr(), mask->scalar_type(), shape_of(*mask), shape_of(out), "mask");
    // without sums nothing depends on where a sample ends
    op.run(guidance_needs_sums(options) ? Vectors{cond.size(0), 1, 1, elements} : Vectors{1, 1, 1, numel});
  });
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CPU, m) { m.impl("guide", LATENTFAST_BOX(guide)); }

}  // namespace latentfast
