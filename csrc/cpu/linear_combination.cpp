// combine: one pass, row by row. Every tensor's row is widened once and serves all outputs from a core's
// cache.
#include "common/combination.h"
#include "common/operators.h"
#include "cpu/rows.h"

namespace latentfast {
namespace {

static_assert(kMostCombined == kTerms && kMostCombinations == kSums, "the loops have a form for each count");

// n elements of a tensor of any floating dtype in the working precision C.
template <typename C>
const C* read_row(const View& x, int64_t at, int n, Row<C>& buffer) {
  const C* row = buffer.values;
  dispatch_floating(x.scalar_type(), "combine", [&]<typename T>() {
    if constexpr (std::is_same_v<Working<T>, C>) {
      row = widen(data<T>(x) + at, n, buffer);
    } else if constexpr (std::is_same_v<C, double>) {
      Row<T> single;
      loops().to_double(widen(data<T>(x) + at, n, single), n, buffer.values);
    }  // and a sum in float32 has no float64 terms
  });
  return row;
}

// A working row, rounded to the output's dtype.
template <typename C>
void write_row(const C* row, int n, const View& out, int64_t at) {
  dispatch_floating(out.scalar_type(), "combine", [&]<typename T>() {
    const Output<T> to(mutable_data<T>(out), out.numel());
    if constexpr (std::is_same_v<Working<T>, C>) {
      to.finish(row, n, at);
    } else {
      Row<T> single;
      if constexpr (std::is_same_v<C, double>) loops().to_single(row, n, single.values);
      to.finish(single.values, n, at);
    }
  });
}

template <typename C>
void run(const Combination& p) {
  constexpr ScalarType kWide = std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float;
  // One output of one dtype: pieces so long that their ends do not count.
  const bool direct = p.outs.size() == 1 && p.all_of(kWide);
  const int64_t piece = direct ? 8 * kTile : kTile;
  const int count = static_cast<int>(p.tensors.size());
  const int64_t numel = p.outs[0].numel();
  std::array<std::array<C, kMostCombined>, kMostCombinations> weights;
  for (size_t k = 0; k < p.outs.size(); ++k) {
    for (int i = 0; i < count; ++i) weights[k][i] = static_cast<C>(p.row(k)[i]);
  }
  const auto& loop = loops_of<C>().combine[count - 1];
  parallel(ceil_div(numel, piece), piece, [&](int64_t begin, int64_t end) {
    Row<C> wide[kMostCombined], sum;
    const C* x[kMostCombined];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * piece;
      const int n = static_cast<int>(std::min(piece, numel - at));
      for (int t = 0; t < count; ++t) x[t] = read_row<C>(p.tensors[t], at, n, wide[t]);
      for (size_t k = 0; k < p.outs.size(); ++k) {
        const View& out = p.outs[k];
        if (out.scalar_type() == kWide) {
          const Output<C> to(mutable_data<C>(out), numel);
          loop(x, weights[k].data(), n, &to[at], to.streams());
        } else {
          loop(x, weights[k].data(), n, sum.values, false);
          write_row(sum.values, n, out, at);
        }
      }
    }
  });
}

// Sums in float64 of what is not: the rows stay in float32, and all outputs are made of them at once, in
// pieces so short that a core's first cache has room for all of them.
void run_in_double(const Combination& p) {
  constexpr int kPiece = kTile / 4;
  const int count = static_cast<int>(p.tensors.size());
  const int64_t numel = p.outs[0].numel();
  const auto& loop = loops().combine_in_double[p.outs.size() - 1];
  parallel(ceil_div(numel, int64_t{kPiece}), kPiece, [&](int64_t begin, int64_t end) {
    Row<float> wide[kMostCombined], made[kMostCombinations];
    const float* x[kMostCombined];
    float* out[kMostCombinations];
    for (size_t k = 0; k < p.outs.size(); ++k) out[k] = made[k].values;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * kPiece;
      const int n = static_cast<int>(std::min<int64_t>(kPiece, numel - at));
      for (int t = 0; t < count; ++t) x[t] = read_row<float>(p.tensors[t], at, n, wide[t]);
      loop(x, count, p.row(0), n, out);
      for (size_t k = 0; k < p.outs.size(); ++k) write_row(out[k], n, p.outs[k], at);
    }
  });
}

}  // namespace

void combine(std::span<const View> tensors, std::span<const double> coefficients, int64_t precise,
             const View& out, const OptionalView& out1, const OptionalView& out2, const OptionalView& out3) {
  const Combination p(tensors, coefficients, out, out1, out2, out3);
  if (out.numel() == 0) return;
  if (p.has(ScalarType::Double)) return run<double>(p);
  precise != 0 ? run_in_double(p) : run<float>(p);
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CPU, m) { m.impl("combine", LATENTFAST_BOX(combine)); }

}  // namespace latentfast
