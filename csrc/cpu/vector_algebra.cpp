// vector_dots and vector_mix: inner products of N vectors with K others, and K linear combinations of N
// vectors.
#include "common/operators.h"
#include "cpu/vectors.h"

namespace latentfast {
namespace {

struct Nothing {};

// `x` (N, …) and `y` (K, …) of `each` elements a row; out (K, vectors, N).
template <typename T>
void dots(const T* x, int64_t x_count, const T* y, int64_t y_count, int64_t each, const Vectors& vectors,
          double* out) {
  using C = Working<T>;
  const auto& loop = loops_of<C>();
  const int pairs = static_cast<int>(x_count * y_count);
  const auto put = [&](int64_t v, int pair, double value) {
    out[(pair / x_count * vectors.count() + v) * x_count + pair % x_count] = value;
  };
  // f(pair, row of x, row of y) at an offset
  const auto for_pairs = [&](int64_t at, int n, Row<T>& wide_x, Row<T>& wide_y, auto&& f) {
    for (int pair = 0; pair < pairs; ++pair) {
      f(pair, widen(x + pair % x_count * each + at, n, wide_x),
        widen(y + pair / x_count * each + at, n, wide_y));
    }
  };
  if (vectors.in_columns()) {
    for_blocks(vectors, [&](const Block& block) {
      Row<T> wide_x, wide_y;
      std::vector<double> columns(static_cast<size_t>(pairs) * block.width, 0.0);
      for (int64_t i = 0; i < vectors.n; ++i) {
        for_pairs(block.row(i), block.width, wide_x, wide_y, [&](int pair, const C* row_x, const C* row_y) {
          loop.dot_columns(row_x, row_y, block.width,
                           columns.data() + static_cast<size_t>(pair) * block.width);
        });
      }
      for (int v = 0; v < block.vectors; ++v) {
        for (int pair = 0; pair < pairs; ++pair) {
          const double* own = columns.data() + static_cast<size_t>(pair) * block.width;
          put(block.first + v, pair, add_columns(own, v, vectors.m));
        }
      }
    });
    return;
  }
  const auto reduce = [&](const Part& part, double* sums) {
    std::vector<double> lanes(static_cast<size_t>(pairs) * kLanes, 0.0);
    Row<T> wide_x, wide_y;
    for_rows(part, [&](int64_t i, int n) {
      for_pairs(i, n, wide_x, wide_y, [&](int pair, const C* row_x, const C* row_y) {
        loop.dot(row_x, row_y, n, lanes.data() + static_cast<size_t>(pair) * kLanes);
      });
    });
    for (int pair = 0; pair < pairs; ++pair)
      sums[pair] = add_lanes(lanes.data() + static_cast<size_t>(pair) * kLanes);
  };
  const auto finish = [&](int64_t v, const double* sums, Nothing&) {
    for (int pair = 0; pair < pairs; ++pair) put(v, pair, sums[pair]);
  };
  reduce_and_apply<Nothing>(vectors, pairs, reduce, finish, [](int64_t, const Part&, const Nothing&) {});
}

// `coefficients` (K, vectors or 1, N); out (K, …).
template <typename T, typename W>
void mix(const T* x, int64_t x_count, const W* coefficients, int64_t k_count, int64_t coefficient_rows,
         int64_t each, const Vectors& vectors, const Output<T>& out) {
  using C = Working<T>;
  const auto& loop = loops_of<C>();
  const auto coefficient = [&](int64_t k, int64_t v, int64_t i) {
    return static_cast<C>(
        coefficients[(k * coefficient_rows + (coefficient_rows > 1 ? v : 0)) * x_count + i]);
  };
  if (coefficient_rows > 1 && vectors.in_columns()) {
    for_blocks(vectors, [&](const Block& block) {
      Row<T> wide;
      Row<C> acc;
      std::vector<C> all(k_count * x_count * block.width);
      C* next = all.data();
      for (int64_t k = 0; k < k_count; ++k) {
        for (int64_t i = 0; i < x_count; ++i) {
          for (int v = 0; v < block.vectors; ++v) {
            next = std::fill_n(next, vectors.m, coefficient(k, block.first + v, i));
          }
        }
      }
      for (int64_t row = 0; row < vectors.n; ++row) {
        const int64_t at = block.row(row);
        for (int64_t k = 0; k < k_count; ++k) {
          std::fill_n(acc.values, block.width, C(0));
          for (int64_t i = 0; i < x_count; ++i) {
            const C* own = all.data() + (k * x_count + i) * block.width;
            loop.add_scaled_columns(widen(x + i * each + at, block.width, wide), block.width, own,
                                    acc.values);
          }
          out.finish(acc.values, block.width, k * each + at);
        }
      }
    });
    return;
  }
  const auto apply = [&](int64_t v, const Part& part, const Nothing&) {
    Row<T> wide;
    Row<C> acc;
    for_rows(part, [&](int64_t at, int n) {
      for (int64_t k = 0; k < k_count; ++k) {
        std::fill_n(acc.values, n, C(0));
        for (int64_t i = 0; i < x_count; ++i) {
          const C c = coefficient(k, v, i);
          if (c != 0) loop.add_scaled(widen(x + i * each + at, n, wide), n, c, acc.values);
        }
        out.finish(acc.values, n, k * each + at);
      }
    });
  };
  // with one row of coefficients nothing depends on where a vector ends
  const Vectors walked = coefficient_rows > 1 ? vectors : Vectors{1, 1, 1, each};
  reduce_and_apply<Nothing>(
      walked, 0, [](const Part&, double*) {}, [](int64_t, const double*, Nothing&) {}, apply);
}

void vector_dots(const View& x, const View& y, int64_t p, int64_t n, int64_t q, int64_t m, const View& out) {
  check_contiguous(x, "x");
  check_contiguous(y, "y");
  check_contiguous(out, "out");
  if (out.numel() == 0) return;
  const Vectors vectors{p, n, q, m};
  if (vectors.elements() == 0) {
    zero(out);
    return;
  }
  dispatch_floating(x.scalar_type(), "vector_dots", [&]<typename T>() {
    dots(data<T>(x), x.size(0), data<T>(y), y.size(0), x.numel() / x.size(0), vectors,
         mutable_data<double>(out));
  });
}

}  // namespace

void vector_mix(const View& x, const View& coefficients, int64_t p, int64_t n, int64_t q, int64_t m,
                const View& out) {
  check_contiguous(x, "x");
  check_contiguous(coefficients, "coefficients");
  check_contiguous(out, "out");
  if (out.numel() == 0) return;
  const int64_t k = coefficients.size(0);
  dispatch_floating(x.scalar_type(), "vector_mix", [&]<typename T>() {
    dispatch_wide(coefficients.scalar_type(), "vector_mix's coefficients", [&]<typename W>() {
      mix(data<T>(x), x.size(0), data<W>(coefficients), k, coefficients.size(1), out.numel() / k,
          Vectors{p, n, q, m}, Output(mutable_data<T>(out), out.numel()));
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CPU, m) {
  m.impl("vector_dots", LATENTFAST_BOX(vector_dots));
  m.impl("vector_mix", LATENTFAST_BOX(vector_mix));
}

}  // namespace latentfast
