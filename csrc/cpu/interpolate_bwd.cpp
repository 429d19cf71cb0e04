// interpolate_bwd: the gradients of lerp, nlerp and slerp in their vectors and in t.
//
// With G_a = Σ g·a and G_b = Σ g·b of a vector's upstream gradient g at each t, and the weights w_a, w_b as
// functions of |a|², |b|², a·b and t: grad_a = Σ_t w_a g + 2 D_aa a + D_ab b, where D_aa = Σ_t G_a ∂w_a/∂|a|²
// + G_b ∂w_b/∂|a|², and so on.
#include "cpu/vectors.h"

namespace latentfast {
namespace {

// What one vector's gradients are put together from.
struct VectorGradient {
  std::vector<Weights> at;  // each t
  double aa, bb, ab;        // D_aa, D_bb, D_ab
  bool delicate;
  QuarterTurn quarter;
};

template <typename T>
struct InterpolationBackward {
  using C = Working<T>;
  const T* grad;
  const T* a;
  const T* b;
  Output<T> grad_a;  // absent: not wanted, as for the others
  Output<T> grad_b;
  void* grad_t;
  bool grad_t_is_double;
  int64_t numel;
  Mode mode;
  Times times;
  Vectors vectors;

  int sum_count() const { return static_cast<int>(3 + 2 * times.count()); }
  // lerp's weights do not depend on the vectors
  bool bends() const { return mode != Mode::lerp; }
  bool reduces() const { return bends() || grad_t != nullptr; }

  void put_grad_t(int64_t k, int64_t v, double value) const {
    const int64_t i = k * vectors.count() + v;
    if (grad_t_is_double) {
      static_cast<double*>(grad_t)[i] = value;
    } else {
      static_cast<float*>(grad_t)[i] = static_cast<float>(value);
    }
  }

  // `sums`: |a|², |b|², a·b, then G_a and G_b at each t.
  void weigh(int64_t v, const double* sums, VectorGradient& out) const {
    const Pair pair =
        make_pair_of(mode, bends() ? Sums{sums[0], sums[1], sums[2]} : Sums{}, vectors.elements());
    out.at.resize(times.count());
    out.aa = out.bb = out.ab = 0.0;
    out.delicate = false;
    out.quarter = {};
    for (int64_t k = 0; k < times.count(); ++k) {
      const double t = times.at(k, v);
      out.at[k] = interpolation_weights(pair, t);
      if (!reduces()) continue;
      const WeightSlopes slopes = interpolation_slopes(pair, t);
      out.delicate = out.delicate || is_delicate(out.at[k]);
      if ((out.at[k].turn != 0.0 || slopes.turn_t != 0.0) && out.quarter.size == 0)
        out.quarter = {vectors, a, v};
      const double ga = sums[3 + 2 * k], gb = sums[4 + 2 * k];
      out.aa += ga * slopes.a_aa + gb * slopes.b_aa;
      out.bb += ga * slopes.a_bb + gb * slopes.b_bb;
      out.ab += ga * slopes.a_ab + gb * slopes.b_ab;
      if (grad_t == nullptr) continue;
      double along_t = ga * slopes.a_t + gb * slopes.b_t;
      if (slopes.turn_t != 0.0) along_t += slopes.turn_t * turned_dot(v, k, out.quarter);
      put_grad_t(k, v, along_t);
    }
  }

  // Σ g·Q(a), for the vectors that cancel out.
  double turned_dot(int64_t v, int64_t k, const QuarterTurn& quarter) const {
    double total = 0.0;
    for (int64_t e = 0; e < vectors.elements(); ++e) {
      total += widened(grad[k * numel + vectors.element(v, e)]) * quarter.turned(vectors, a, v, e);
    }
    return total;
  }

  // Vectors that nearly or entirely cancel out, element by element in float64.
  void put_carefully(int64_t v, const Part& part, const VectorGradient& from) const {
    for (int64_t d = 0; d < part.size; ++d) {
      const int64_t i = part.start + d;
      double along_a = 0.0, along_b = 0.0;
      if (bends()) {
        const double x = widened(a[i]), y = widened(b[i]);
        along_a = 2.0 * from.aa * x + from.ab * y;
        along_b = 2.0 * from.bb * y + from.ab * x;
      }
      for (int64_t k = 0; k < times.count(); ++k) {
        const Weights& w = from.at[k];
        const T* g = grad + k * numel;
        along_a += w.a * widened(g[i]);
        along_b += w.b * widened(g[i]);
        if (w.turn != 0.0) along_a += w.turn * from.quarter.turned_back(vectors, g, v, part.first + d);
      }
      if (grad_a) grad_a[i] = rounded<T>(static_cast<C>(along_a));
      if (grad_b) grad_b[i] = rounded<T>(static_cast<C>(along_b));
    }
  }

  void by_runs() const {
    const auto& loop = loops_of<C>();
    const auto reduce = [&](const Part& part, double* sums) {
      double lanes[3][kLanes] = {};
      std::vector<double> dots(2 * times.count() * kLanes, 0.0);
      Row<T> x, y, z;
      for_rows(part, [&](int64_t i, int n) {
        const C* wide_a = widen(a + i, n, x);
        const C* wide_b = widen(b + i, n, y);
        if (bends()) loop.sums(wide_a, wide_b, n, lanes[0], lanes[1], lanes[2]);
        for (int64_t k = 0; k < times.count(); ++k) {
          const C* g = widen(grad + k * numel + i, n, z);
          loop.dot(g, wide_a, n, dots.data() + 2 * k * kLanes);
          loop.dot(g, wide_b, n, dots.data() + (2 * k + 1) * kLanes);
        }
      });
      for (int s = 0; s < 3; ++s) sums[s] = add_lanes(lanes[s]);
      for (int64_t s = 0; s < 2 * times.count(); ++s) sums[3 + s] = add_lanes(dots.data() + s * kLanes);
    };
    const auto apply = [&](int64_t v, const Part& part, const VectorGradient& from) {
      Row<T> x, y, z;
      Row<C> acc;
      for_rows(part, [&](int64_t i, int n) {
        const auto put = [&](const Output<T>& target, const T* own, const T* other, double d_own,
                             double Weights::* weight) {
          if (!target) return;
          if (bends()) {
            loop.mix(widen(own + i, n, x), widen(other + i, n, y), n, static_cast<C>(2.0 * d_own),
                     static_cast<C>(from.ab), acc.values);
          } else {
            std::fill_n(acc.values, n, C(0));
          }
          for (int64_t k = 0; k < times.count(); ++k) {
            loop.add_scaled(widen(grad + k * numel + i, n, z), n, static_cast<C>(from.at[k].*weight),
                            acc.values);
          }
          target.finish(acc.values, n, i);
        };
        put(grad_a, a, b, from.aa, &Weights::a);
        put(grad_b, b, a, from.bb, &Weights::b);
      });
      if (from.delicate) put_carefully(v, part, from);
    };
    reduce_and_apply<VectorGradient>(
        vectors, reduces() ? sum_count() : 0, reduce,
        [&](int64_t v, const double* sums, VectorGradient& out) { weigh(v, sums, out); }, apply);
  }

  void by_columns() const {
    const auto& loop = loops_of<C>();
    const int64_t count = times.count(), m = vectors.m;
    for_blocks(vectors, [&](const Block& block) {
      const int width = block.width;
      Row<T> x, y, z;
      Row<C> acc;
      std::vector<double> columns(sum_count() * width, 0.0);
      for (int64_t i = 0; i < vectors.n && reduces(); ++i) {
        const C* row_a = widen(a + block.row(i), width, x);
        const C* row_b = widen(b + block.row(i), width, y);
        double* own = columns.data();
        if (bends()) loop.sums_columns(row_a, row_b, width, own, own + width, own + 2 * width);
        for (int64_t k = 0; k < count; ++k) {
          const C* g = widen(grad + k * numel + block.row(i), width, z);
          loop.dot_columns(g, row_a, width, columns.data() + (3 + 2 * k) * width);
          loop.dot_columns(g, row_b, width, columns.data() + (4 + 2 * k) * width);
        }
      }
      std::vector<VectorGradient> from(block.vectors);
      std::vector<C> wa(count * width), wb(count * width), aa(width), bb(width), ab(width);
      std::vector<double> sums(sum_count());
      for (int v = 0; v < block.vectors; ++v) {
        for (int s = 0; s < sum_count(); ++s) sums[s] = add_columns(columns.data() + s * width, v, m);
        weigh(block.first + v, sums.data(), from[v]);
        std::fill_n(aa.data() + v * m, m, static_cast<C>(2.0 * from[v].aa));
        std::fill_n(bb.data() + v * m, m, static_cast<C>(2.0 * from[v].bb));
        std::fill_n(ab.data() + v * m, m, static_cast<C>(from[v].ab));
        for (int64_t k = 0; k < count; ++k) {
          std::fill_n(wa.data() + k * width + v * m, m, static_cast<C>(from[v].at[k].a));
          std::fill_n(wb.data() + k * width + v * m, m, static_cast<C>(from[v].at[k].b));
        }
      }
      for (int64_t i = 0; i < vectors.n; ++i) {
        const int64_t at = block.row(i);
        const auto put = [&](const Output<T>& target, const T* own, const T* other, const C* d_own,
                             const C* weights) {
          if (!target) return;
          if (bends()) {
            loop.mix_columns(widen(own + at, width, x), widen(other + at, width, y), width, d_own, ab.data(),
                             acc.values);
          } else {
            std::fill_n(acc.values, width, C(0));
          }
          for (int64_t k = 0; k < count; ++k) {
            loop.add_scaled_columns(widen(grad + k * numel + at, width, z), width, weights + k * width,
                                    acc.values);
          }
          target.finish(acc.values, width, at);
        };
        put(grad_a, a, b, aa.data(), wa.data());
        put(grad_b, b, a, bb.data(), wb.data());
        for (int v = 0; v < block.vectors; ++v) {
          if (from[v].delicate) put_carefully(block.first + v, block.part(v, i), from[v]);
        }
      }
    });
  }
};

void interpolate_bwd(const View& grad, const View& a, const View& b, const OptionalView& t,
                     std::span<const double> ts, int64_t mode, int64_t p, int64_t n, int64_t q, int64_t m,
                     const OptionalView& grad_a, const OptionalView& grad_b, const OptionalView& grad_t) {
  check_contiguous(grad, "grad");
  check_contiguous(a, "a");
  check_contiguous(b, "b");
  dispatch_floating(a.scalar_type(), "interpolate_bwd", [&]<typename T>() {
    const InterpolationBackward<T> op{data<T>(grad),
                                      data<T>(a),
                                      data<T>(b),
                                      Output(mutable_data_or_null<T>(grad_a), a.numel()),
                                      Output(mutable_data_or_null<T>(grad_b), a.numel()),
                                      mutable_data_or_null<void>(grad_t),
                                      grad_t.has_value() && grad_t->scalar_type() == ScalarType::Double,
                                      a.numel(),
                                      static_cast<Mode>(mode),
                                      Times(t, ts),
                                      {p, n, q, m}};
    if (op.numel == 0) {
      if (grad_t.has_value()) zero(*grad_t);
    } else if (op.vectors.in_columns()) {
      op.by_columns();
    } else {
      op.by_runs();
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(latentfast, CPU, m) { m.impl("interpolate_bwd", LATENTFAST_BOX(interpolate_bwd)); }

}  // namespace latentfast
