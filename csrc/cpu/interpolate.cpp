// interpolate: lerp, nlerp and slerp at K values of t. Two passes over the vectors (one for lerp), inputs
// read once a pass.
#include "common/operators.h"
#include "cpu/vectors.h"

namespace latentfast {
namespace {

// The weights of one vector at each t.
struct VectorWeights {
  std::vector<Weights> at;
  std::vector<int> end;  // see `end_point`
  bool delicate = false;
  QuarterTurn quarter;
};

template <typename T>
struct Interpolation {
  using C = Working<T>;
  const T* a;
  const T* b;
  Output<T> out;
  int64_t numel;
  Mode mode;
  Times times;
  Vectors vectors;

  void weigh(int64_t v, const Sums& sums, VectorWeights& weights) const {
    const Pair pair = make_pair_of(mode, sums, vectors.elements());
    weights.at.resize(times.count());
    weights.end.resize(times.count());
    weights.delicate = false;
    weights.quarter = {};
    for (int64_t k = 0; k < times.count(); ++k) {
      const double t = times.at(k, v);
      weights.end[k] = end_point(t);
      weights.at[k] = interpolation_weights(pair, t);
      if (weights.end[k] >= 0) continue;
      weights.delicate = weights.delicate || is_delicate(weights.at[k]);
      if (weights.at[k].turn != 0.0 && weights.quarter.size == 0) weights.quarter = {vectors, a, v};
    }
  }

  // Vectors that nearly or entirely cancel out, element by element in float64.
  void put_carefully(int64_t v, const Part& part, const VectorWeights& weights) const {
    for (int64_t k = 0; k < times.count(); ++k) {
      const Weights& w = weights.at[k];
      if (weights.end[k] >= 0 || !is_delicate(w)) continue;
      for (int64_t d = 0; d < part.size; ++d) {
        const int64_t i = part.start + d;
        double value = w.a * widened(a[i]) + w.b * widened(b[i]);
        if (w.turn != 0.0) value += w.turn * weights.quarter.turned(vectors, a, v, part.first + d);
        out[k * numel + i] = rounded<T>(static_cast<C>(value));
      }
    }
  }

  void by_runs() const {
    const auto& loop = loops_of<C>();
    const auto reduce = [&](const Part& part, double* sums) {
      double lanes[3][kLanes] = {};
      Row<T> x, y;
      for_rows(part, [&](int64_t i, int n) {
        loop.sums(widen(a + i, n, x), widen(b + i, n, y), n, lanes[0], lanes[1], lanes[2]);
      });
      for (int s = 0; s < 3; ++s) sums[s] = add_lanes(lanes[s]);
    };
    const auto finish = [&](int64_t v, const double* sums, VectorWeights& weights) {
      weigh(v, mode == Mode::lerp ? Sums{} : Sums{sums[0], sums[1], sums[2]}, weights);
    };
    const auto apply = [&](int64_t v, const Part& part, const VectorWeights& weights) {
      Row<T> x, y, z;
      for_rows(part, [&](int64_t i, int n) {
        const C* wide_a = widen(a + i, n, x);
        const C* wide_b = widen(b + i, n, y);
        for (int64_t k = 0; k < times.count(); ++k) {
          const int64_t to = k * numel + i;
          if (weights.end[k] >= 0) {
            out.copy((weights.end[k] == 0 ? a : b) + i, n, to);
            continue;
          }
          C* row = out.begin(to, z);
          loop.mix(wide_a, wide_b, n, static_cast<C>(weights.at[k].a), static_cast<C>(weights.at[k].b), row);
          out.finish(row, n, to);
        }
      });
      if (weights.delicate) put_carefully(v, part, weights);
    };
    reduce_and_apply<VectorWeights>(vectors, mode == Mode::lerp ? 0 : 3, reduce, finish, apply);
  }

  // The weights of a block of vectors, at [k][column]; the vectors that need more than these are left in
  // `special`.
  struct BlockWeights {
    std::vector<C> a, b;
    std::vector<std::pair<int, VectorWeights>> special;
  };

  BlockWeights weigh_block(const Block& block, std::vector<double>& sums) const {
    const int64_t count = times.count(), width = block.width, m = vectors.m, each = block.vectors;
    BlockWeights out{std::vector<C>(count * width), std::vector<C>(count * width), {}};
    std::vector<double> theta(each), sine(each), ordinary(each, 0.0), t(each), wa(each), wb(each);
    if (m > 1) {  // one sum a vector, at the front
      for (int s = 0; s < 3; ++s) {
        for (int64_t v = 0; v < each; ++v) sums[s * width + v] = add_columns(sums.data() + s * width, v, m);
      }
    }
    const double *aa = sums.data(), *bb = aa + width, *ab = bb + width;
    const int size = static_cast<int>(each);
    if (mode == Mode::slerp) loops().angles(aa, bb, ab, size, theta.data(), sine.data(), ordinary.data());
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t v = 0; v < each; ++v) {
        t[v] = times.at(k, block.first + v);
        if (!(std::fabs(t[v]) <= kOrdinaryT) || (times.vary() && end_point(t[v]) >= 0)) ordinary[v] = 0.0;
      }
      if (mode != Mode::slerp) continue;
      loops().arc_weights(theta.data(), sine.data(), t.data(), size, wa.data(), wb.data());
      for (int64_t v = 0; v < each; ++v) {
        std::fill_n(out.a.data() + k * width + v * m, m, static_cast<C>(wa[v]));
        std::fill_n(out.b.data() + k * width + v * m, m, static_cast<C>(wb[v]));
      }
    }
    for (int v = 0; v < block.vectors; ++v) {
      if (ordinary[v] != 0.0) continue;
      VectorWeights own;
      weigh(block.first + v, {aa[v], bb[v], ab[v]}, own);
      for (int64_t k = 0; k < count; ++k) {
        std::fill_n(out.a.data() + k * width + v * m, m, static_cast<C>(own.at[k].a));
        std::fill_n(out.b.data() + k * width + v * m, m, static_cast<C>(own.at[k].b));
      }
      const bool ends =
          times.vary() && std::any_of(own.end.begin(), own.end.end(), [](int end) { return end >= 0; });
      if (own.delicate || ends) {
        out.special.emplace_back(v, std::move(own));
      }
    }
    return out;
  }

  void by_columns() const {
    const auto& loop = loops_of<C>();
    for_blocks(vectors, [&](const Block& block) {
      const int width = block.width;
      Row<T> x, y, z;
      std::vector<double> sums(3 * width, 0.0);
      double *aa = sums.data(), *bb = aa + width, *ab = bb + width;
      for (int64_t i = 0; i < vectors.n && mode != Mode::lerp; ++i) {
        loop.sums_columns(widen(a + block.row(i), width, x), widen(b + block.row(i), width, y), width, aa, bb,
                          ab);
      }
      const BlockWeights weights = weigh_block(block, sums);
      for (int64_t i = 0; i < vectors.n; ++i) {
        const int64_t at = block.row(i);
        const C* row_a = widen(a + at, width, x);
        const C* row_b = widen(b + at, width, y);
        for (int64_t k = 0; k < times.count(); ++k) {
          const int end = times.vary() ? -1 : end_point(times.at(k, 0));
          if (end >= 0) {
            out.copy((end == 0 ? a : b) + at, width, k * numel + at);
            continue;
          }
          C* row = out.begin(k * numel + at, z);
          loop.mix_columns(row_a, row_b, width, weights.a.data() + k * width, weights.b.data() + k * width,
                           row);
          out.finish(row, width, k * numel + at);
        }
        for (const auto& [v, own] : weights.special) {
          const Part part = block.part(v, i);
          for (int64_t k = 0; k < times.count(); ++k) {
            if (own.end[k] >= 0)
              std::copy_n((own.end[k] == 0 ? a : b) + part.start, part.size, &out[k * numel + part.start]);
          }
          if (own.delicate) put_carefully(block.first + v, part, own);
        }
      }
    });
  }
};

}  // namespace

void interpolate(const View& a, const View& b, const OptionalView& t, std::span<const double> ts,
                 int64_t mode, int64_t p, int64_t n, int64_t q, int64_t m, const View& out) {
  check_contiguous(a, "a");
  check_contiguous(b, "b");
  check_contiguous(out, "out");
  if (out.numel() == 0) return;
  dispatch_floating(a.scalar_type(), "interpolate", [&]<typename T>() {
    const Interpolation<T> op{data<T>(a),
                              data<T>(b),
                              Output(mutable_data<T>(out), out.numel()),
                              a.numel(),
                              static_cast<Mode>(mode),
                              Times(t, ts),
                              {p, n, q, m}};
    if (op.mode == Mode::lerp && !op.times.vary()) {
      // nothing depends on where a vector ends
      const Interpolation<T> flat{op.a, op.b, op.out, op.numel, op.mode, op.times, {1, 1, 1, op.numel}};
      flat.by_runs();
    } else if (op.vectors.in_columns()) {
      op.by_columns();
    } else {
      op.by_runs();
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CPU, m) { m.impl("interpolate", LATENTFAST_BOX(interpolate)); }

}  // namespace latentfast
