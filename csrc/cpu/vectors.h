// How the interpolation operators walk their vectors: the tensors are (p, n, q, m), see
// latentfast/_operators.py.
//
// A vector is n runs of m contiguous elements. Where the runs are long, they are cut into chunks that are
// reduced one by one and added in order; where they are short and lie side by side, a block of vectors is
// walked row by row, one sum a column. Which of the two depends on n, q and m alone, so a sample has the same
// bits in every batch.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "common/interpolation_weights.h"
#include "cpu/rows.h"

namespace latentfast {

constexpr int64_t kChunk = 16384;  // elements of a partial sum
constexpr int64_t kFused =
    65536;  // vectors up to this size are reduced and used while they are in a core's cache
constexpr int64_t kGroup = int64_t(1)
                           << 20;  // larger ones are reduced and used in groups of about this many elements
constexpr int64_t kShortRun = 64;

struct Vectors {
  int64_t p, n, q, m;

  int64_t count() const { return p * q; }
  int64_t elements() const { return n * m; }
  int64_t run(int64_t v, int64_t i) const { return ((v / q * n + i) * q + v % q) * m; }
  int64_t element(int64_t v, int64_t e) const { return run(v, e / m) + e % m; }
  bool in_columns() const { return q > 1 && m < kShortRun; }
};

// Contiguous elements of one vector: `size` of them from its element `first` on, at `start` in the tensor.
struct Part {
  int64_t start, size, first;
};

inline int64_t parts_of(const Vectors& x) { return x.n * ceil_div(x.m, kChunk); }

inline Part part_of(const Vectors& x, int64_t v, int64_t index) {
  const int64_t per_run = ceil_div(x.m, kChunk), run = index / per_run, skipped = index % per_run * kChunk;
  return {x.run(v, run) + skipped, std::min(kChunk, x.m - skipped), run * x.m + skipped};
}

// f(offset, n) for the rows of at most kTile elements of a part.
template <typename F>
void for_rows(const Part& part, F&& f) {
  for (int64_t i = 0; i < part.size; i += kTile) {
    f(part.start + i, static_cast<int>(std::min<int64_t>(kTile, part.size - i)));
  }
}

// For every vector v: add up `reduce(part, sums)` over its parts, in order; `finish(v, sums, state)`;
// `apply(v, part, state)` on its parts. `sums` doubles a part; 0 if there is nothing to reduce.
template <typename State, typename Reduce, typename Finish, typename Apply>
void reduce_and_apply(const Vectors& x, int sums, Reduce&& reduce, Finish&& finish, Apply&& apply) {
  const int64_t parts = parts_of(x), part_size = x.elements() / parts;
  const auto finish_vector = [&](int64_t v, const double* partial, State& state) {
    std::vector<double> total(sums, 0.0);
    for (int64_t i = 0; i < parts; ++i) {
      for (int s = 0; s < sums; ++s) total[s] += partial[i * sums + s];
    }
    finish(v, total.data(), state);
  };
  if (x.elements() <= kFused) {
    parallel(x.count(), x.elements(), [&](int64_t begin, int64_t end) {
      std::vector<double> partial(parts * sums);
      State state;
      for (int64_t v = begin; v < end; ++v) {
        if (sums > 0) {
          for (int64_t i = 0; i < parts; ++i) reduce(part_of(x, v, i), partial.data() + i * sums);
        }
        finish_vector(v, partial.data(), state);
        for (int64_t i = 0; i < parts; ++i) apply(v, part_of(x, v, i), state);
      }
    });
    return;
  }
  const int64_t group = std::max<int64_t>(1, kGroup / x.elements());
  std::vector<double> partial(group * parts * sums);
  std::vector<State> states(group);
  for (int64_t first = 0; first < x.count(); first += group) {
    const int64_t size = std::min(group, x.count() - first);
    if (sums > 0) {
      parallel(size * parts, part_size, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          reduce(part_of(x, first + i / parts, i % parts), partial.data() + i * sums);
      });
    }
    for (int64_t v = 0; v < size; ++v) finish_vector(first + v, partial.data() + v * parts * sums, states[v]);
    parallel(size * parts, part_size, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        apply(first + i / parts, part_of(x, first + i / parts, i % parts), states[i / parts]);
    });
  }
}

// A block of vectors side by side: `width` columns, m for each vector, in n rows.
struct Block {
  const Vectors* x;
  int64_t first;  // vector
  int vectors, width;

  int64_t row(int64_t i) const { return x->run(first, i); }
  Part part(int vector, int64_t i) const { return {row(i) + vector * x->m, x->m, i * x->m}; }
};

// f(block) for blocks of vectors that cover all of x, each at most kTile columns wide.
template <typename F>
void for_blocks(const Vectors& x, F&& f) {
  const int64_t per_block = std::max<int64_t>(1, kTile / x.m), blocks = ceil_div(x.q, per_block);
  parallel(x.p * blocks, per_block * x.elements(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t w = i % blocks * per_block;
      const int vectors = static_cast<int>(std::min(per_block, x.q - w));
      f(Block{&x, i / blocks * x.q + w, vectors, static_cast<int>(vectors * x.m)});
    }
  });
}

// The sum of one vector's columns.
inline double add_columns(const double* columns, int64_t vector, int64_t m) {
  double total = 0.0;
  for (int64_t j = 0; j < m; ++j) total += columns[vector * m + j];
  return total;
}

// The values of t: K of them, on the host or in a tensor (K, vectors or 1).
class Times {
 public:
  Times(const OptionalView& t, std::span<const double> ts)
      : host_(ts), count_(static_cast<int64_t>(ts.size())) {
    if (!t.has_value()) return;
    check_contiguous(*t, "t");
    dtype_ = t->scalar_type();
    data_ = t->const_data_ptr();
    count_ = t->size(0);
    columns_ = t->size(1);
  }

  int64_t count() const { return count_; }
  // Whether vectors have their own values.
  bool vary() const { return data_ != nullptr && columns_ > 1; }

  double at(int64_t k, int64_t v) const {
    if (data_ == nullptr) return host_[k];
    const int64_t i = k * columns_ + (columns_ > 1 ? v : 0);
    return dtype_ == ScalarType::Double ? static_cast<const double*>(data_)[i]
                                        : static_cast<const float*>(data_)[i];
  }

 private:
  std::span<const double> host_;
  int64_t count_;
  const void* data_ = nullptr;
  ScalarType dtype_ = ScalarType::Float;
  int64_t columns_ = 1;
};

// How a vector is turned by a quarter: see interpolation_weights.h.
struct QuarterTurn {
  int64_t size = 0;
  double scale = 1.0, length = 0.0;

  QuarterTurn() = default;
  template <typename T>
  QuarterTurn(const Vectors& x, const T* a, int64_t v) : size(x.elements()) {
    if (size % 2 == 0) return;
    double left = 0.0;
    for (int64_t e = 0; e < size - 1; ++e) {
      const double value = widened(a[x.element(v, e)]);
      left += value * value;
    }
    const double last = widened(a[x.element(v, size - 1)]), aa = left + last * last;
    scale = quarter_turn_scale(aa, left);
    length = std::sqrt(aa);
  }

  bool keeps(int64_t e) const { return scale != 0.0 && (size % 2 == 0 || e < size - 1); }

  // Element e of the turned vector v of x.
  template <typename T>
  double turned(const Vectors& x, const T* a, int64_t v, int64_t e) const {
    if (!keeps(e)) return scale == 0.0 && e == 0 ? length : 0.0;
    const double partner = widened(a[x.element(v, e ^ 1)]);
    return e % 2 == 0 ? -scale * partner : scale * partner;
  }

  // What the gradient g of the turned vector is for the vector's element e, with `scale` held.
  template <typename T>
  double turned_back(const Vectors& x, const T* g, int64_t v, int64_t e) const {
    if (!keeps(e)) return 0.0;
    const double partner = widened(g[x.element(v, e ^ 1)]);
    return e % 2 == 0 ? scale * partner : -scale * partner;
  }
};

}  // namespace latentfast
